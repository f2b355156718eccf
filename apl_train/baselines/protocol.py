"""What every baseline offers: settings with a declared grid, and `prepare`, which gives something to sample with."""

from __future__ import annotations

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
from torch import Tensor

from apl_core.errors import ConfigError, ModelError
from apl_train.model.backend import Backend, Samples


class Person(Protocol):
    """One name on the list; `description` is c2, the same person without the name."""

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str: ...


@dataclass
class Prepared:
    """A model as a method left it, to be sampled like a `Backend`.

    Attributes:
        name: of the method.
        seconds: what preparing took by the clock; pictures that an earlier preparation drew are not drawn again.
        notes: plain values: the settings, how many persons were on the list, what the method reports of itself.
        sha256: stands for model, method, settings and list, so that pictures can be told apart; lowercase hex.
    """

    name: str
    seconds: float
    notes: Mapping[str, Any]
    sha256: str
    _backend: Backend | None = field(repr=False)

    @property
    def backend(self) -> Backend:
        """The model to sample with. Raises ConfigError after `close`."""
        if self._backend is None:
            raise ConfigError(f"{self.name} was closed.", "Prepare it again.", field="method")
        return self._backend

    @property
    def dtype(self) -> Any:
        return self.backend.dtype

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], **options: Any) -> Samples:
        """As `Backend.sample`, with the same keywords."""
        return self.backend.sample(prompts, seeds, **options)

    def decode(self, latents: Tensor) -> np.ndarray:
        """As `Backend.decode`."""
        return self.backend.decode(latents)

    def close(self) -> None:
        """Lets go of the copy of the model; the model that it was made of is as it was."""
        self._backend = None


class Baseline(ABC):
    """One method. Knobs are in `defaults`; `grid` holds the combinations that tuning may choose from.

    Attributes:
        name: in the registry and the results; title: for people; paper: authors, venue, arXiv number.
        changes: what the method touches: "weights", "prompt" or "sampler".
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    changes: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]]
    grid: ClassVar[tuple[Mapping[str, Any], ...]]

    def prepare(self, backend: Backend, persons: Sequence[Person], settings: Mapping[str, Any] | None = None, *,
                keep: Sequence[str] = (), seed: int = 0) -> Prepared:
        """Makes a model that should not depict `persons`. `backend` itself is left as it is.

        Args:
            persons: the list.
            settings: knobs other than the defaults.
            keep: captions whose pictures should stay as they are, for methods that take some.
            seed: of everything that is drawn.

        Raises:
            ConfigError: nobody on the list, an unknown setting, or one that is out of range.
            ModelError: a model of another family than Stable Diffusion 1.
        """
        if not persons:
            raise ConfigError(f"{self.name} was given nobody.", "Name at least one person.", field="persons")
        if backend.family != "sd1":
            raise ModelError(f"{backend.name} is of the family {backend.family}; baselines are written for sd1.",
                             "Use a Stable Diffusion 1.x model.", field="family")
        for key in settings or {}:
            if key not in self.defaults:
                raise ConfigError(f"{self.name} has no setting {key!r}.", f"Known: {', '.join(self.defaults)}.",
                                  field=str(key))
        chosen = {**self.defaults, **(settings or {})}
        began, worked = time.monotonic(), time.process_time()
        edited, found = self.edit(backend, persons, chosen, keep=keep, seed=seed)
        notes = {"settings": chosen, "persons_on_list": len(persons), "kept_captions": len(keep), "seed": seed,
                 "cpu_seconds": round(time.process_time() - worked, 3), **found}
        names = [[p.name, p.description] for p in persons]
        digest = hashlib.sha256(json.dumps([backend.sha256, self.name, chosen, names, list(keep), seed],
                                           sort_keys=True).encode()).hexdigest()
        return Prepared(self.name, round(time.monotonic() - began, 3), notes, digest, edited)

    @abstractmethod
    def edit(self, backend: Backend, persons: Sequence[Person], settings: Mapping[str, Any], *, keep: Sequence[str],
             seed: int) -> tuple[Backend, dict[str, Any]]:
        """The model with the method at work, and plain values worth reporting."""


def one_of(settings: Mapping[str, Any], key: str, allowed: Sequence[Any]) -> Any:
    """A setting that must be one of `allowed`. Raises ConfigError."""
    if settings[key] not in allowed:
        raise ConfigError(f"{key} is {settings[key]!r}.", f"Use one of: {', '.join(map(str, allowed))}.", field=key)
    return settings[key]


def between(settings: Mapping[str, Any], key: str, low: float, high: float) -> float:
    """A setting that must be a number from `low` to `high`. Raises ConfigError."""
    value = settings[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"{key} is {value!r}, not a number from {low} to {high}.", f"Set {key} in that range.",
                          field=key)
    return value
