"""What holds for the picture being made: process-wide, for one job at a time, inherited by every job inside it.

Another extension repaints faces in a job of its own, in which this one's script does not run: that job must not lose
the prefix. So nothing here depends on a script's callbacks: the host's own `process_images_inner` opens and ends jobs.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..apl_core.errors import ModelError, PolicyError
from ..apl_core.policy import Policy
from ..apl_core.prefix import AnonymizationPrompt
from .models import family_of, loaded_model


@dataclass(frozen=True, eq=False)
class Choice:
    """A prefix that is on: its library name and level, for people, and the prefix."""

    name: str
    level: int | None
    prefix: AnonymizationPrompt

    @property
    def digest(self) -> str:
        """What conditioning made with it depends on."""
        return f"{self.prefix.content_hash}:{self.prefix.meta.placement}"


@dataclass(frozen=True, eq=False)
class Job:
    """One run of the host's `process_images_inner`; `choice` None where nothing is to be anonymized."""

    choice: Choice | None
    owner: Any = None


@dataclass
class Conditioning:
    """What is known of the conditioning being computed in this thread: `negative` must carry the prefix as well, and
    whether the persons named `consented` to go without."""

    negative: bool = True
    consented: bool = False


@dataclass(eq=False)
class Jobs:
    """The open jobs, the policy, and what was counted.

    Attributes:
        policy, forced: the operator's policy and, in enforced mode, family to its pinned choice.
        counters: prefixed rows, refusals and so on since the start.
        problem: why this host cannot be used, for the accordion; "" where it can.
    """

    policy: Policy | None = None
    forced: dict[str, Choice] = field(default_factory=dict)
    counters: Counter[str] = field(default_factory=Counter)
    stack: list[Job] = field(default_factory=list)
    requests: list[Job] = field(default_factory=list)
    trusted: str = ""
    problem: str = ""
    _local: threading.local = field(default_factory=threading.local)

    @property
    def enforced(self) -> bool:
        """Whether every prompt has to carry the policy's prefix."""
        return self.policy is not None and self.policy.enforced

    @contextlib.contextmanager
    def job(self, choice: Choice | None, owner: Any = None) -> Iterator[Job]:
        """A job; closed whatever happens inside."""
        opened = Job(choice, owner)
        self.stack.append(opened)
        try:
            yield opened
        finally:
            self.stack.remove(opened)

    @contextlib.contextmanager
    def request(self, choice: Choice | None) -> Iterator[None]:
        """A selected script's run, which may start jobs of its own making that have no arguments for us."""
        opened = Job(choice)
        self.requests.append(opened)
        try:
            yield
        finally:
            self.requests.remove(opened)

    def current(self) -> Choice | None:
        """The prefix that holds now, for whatever is encoded.

        Raises:
            ModelError, PolicyError: enforced, and the loaded model has no prefix in the policy.
        """
        if self.enforced:
            return self.forced_choice(loaded_model())
        return self.stack[-1].choice if self.stack else None

    def forced_choice(self, model: Any) -> Choice | None:
        """The policy's choice for a model; None where the policy lets such models run without.

        Raises:
            ModelError: no model. PolicyError: the policy names no prefix for its family and says "refuse".
        """
        if model is None:
            raise ModelError("No checkpoint is loaded.", "Choose a checkpoint first.", field="model")
        family = family_of(model)
        choice = self.forced.get(family)
        others = " or ".join(sorted(self.forced)) or "another family"
        if choice is None and self.policy and self.policy.unsupported != "allow":
            self.counters["refused"] += 1
            raise PolicyError(f"Pictures are made with an anonymization prompt only; there is none for {family}.",
                              f"Choose a checkpoint of {others}.", field="model")
        if choice is None:
            self.counters["unprotected"] += 1
        return choice

    @property
    def conditioning(self) -> Conditioning:
        """This thread's; outside a known job a negative prompt counts as a positive one where a policy enforces."""
        return getattr(self._local, "conditioning", None) or Conditioning(negative=self.enforced)

    @contextlib.contextmanager
    def conditions(self, known: Conditioning) -> Iterator[None]:
        """Hold `known` for the conditioning computed inside."""
        before = getattr(self._local, "conditioning", None)
        self._local.conditioning = known
        try:
            yield
        finally:
            self._local.conditioning = before

    @property
    def hires(self) -> bool:
        """Whether this thread prepares a hires pass, which has prompts and, in Forge, guidance of its own."""
        return getattr(self._local, "hires", False)

    @contextlib.contextmanager
    def hires_pass(self) -> Iterator[None]:
        """While the host computes the hires pass's conditioning."""
        before = self.hires
        self._local.hires = True
        try:
            yield
        finally:
            self._local.hires = before

    @property
    def suspended(self) -> bool:
        """Whether this thread computes the host's own padding, which belongs to no prompt."""
        return getattr(self._local, "suspended", False)

    @contextlib.contextmanager
    def suspend(self) -> Iterator[None]:
        """While the host encodes its empty prompt: later jobs without a prefix reuse the result."""
        before = self.suspended
        self._local.suspended = True
        try:
            yield
        finally:
            self._local.suspended = before


JOBS = Jobs()
"""The one of this process: the package is loaded once, whatever the host reloads."""
