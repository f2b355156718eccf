"""What pictures are taken with: a model as it is, with a prefix, or as a baseline left it; prepared when first needed.

A method's `key` says everything that its pictures depend on beside prompts and seeds, so that a cell of a method that
is done needs neither the model's file nor hours of a baseline's preparation again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from apl_core.prefix import AnonymizationPrompt, load_prefix
from apl_train import shipped
from apl_train.model.backend import Backend, Samples
from apl_train.tables.instruments import digest

Sampler = Callable[..., Samples]


@dataclass(eq=False)
class Method:
    """One way to take pictures.

    Attributes:
        name: in results.
        key: JSON values; see above.
        make: gives the object with `sample`, once it is needed.
        list_method: whether it knows only the persons that it was given.
    """

    name: str
    key: Mapping[str, Any]
    make: Callable[[], Any]
    list_method: bool = False
    notes: dict[str, Any] = field(default_factory=dict)
    _made: Any = None

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], **options: Any) -> Samples:
        if self._made is None:
            self._made = self.make()
            self.notes |= dict(getattr(self._made, "notes", {}))
            if (seconds := getattr(self._made, "seconds", None)) is not None:
                self.notes["seconds"] = seconds
        return self._made.sample(prompts, seeds, **options)

    def close(self) -> None:
        """Lets go of what was prepared."""
        if hasattr(self._made, "close"):
            self._made.close()
        self._made = None


class Prefixed:
    """A model with a prefix in every prompt."""

    def __init__(self, backend: Backend, vectors: Mapping[str, Tensor] | AnonymizationPrompt) -> None:
        self._backend, self._vectors = backend, vectors

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], **options: Any) -> Samples:
        return self._backend.sample(prompts, seeds, vectors=self._vectors, **options)


def base_method(backend: Backend, name: str = "base") -> Method:
    """The model alone."""
    return Method(name, _model(backend), lambda: backend)


def prefix_method(backend: Backend, prefix: str | AnonymizationPrompt, name: str = "APL") -> Method:
    """The model with a prefix, by path, shipped name or as it is. Raises what `load_prefix` raises."""
    prompt = load_prefix(shipped.prefix_file(prefix)) if isinstance(prefix, str) else prefix
    key = {**_model(backend), "prefix": prompt.content_hash, "placement": prompt.meta.placement}
    return Method(name, key, lambda: Prefixed(backend, prompt))


def tuned_settings(name: str, file: Path) -> dict[str, Any] | None:
    """What `apl baselines` chose of a method's grid, from its results; None unless the whole grid was tried."""
    from apl_train.baselines import BASELINES
    from apl_train.baselines.tuning import chosen

    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["tuning"][name]
        whole = len(rows) == len(BASELINES[name].grid)
        return dict(chosen(rows)["settings"]) if whole else None
    except (OSError, ValueError, KeyError, TypeError):  # not tuned yet, or for another plan
        return None


def baselines(backend: Backend, persons: Sequence[Any], names: Sequence[str] = (), *, keep: Sequence[str] = (),
              seed: int = 0, tuned: Path | None = None) -> list[Method]:
    """The baselines of `apl_train.baselines`; those in `names`, all when there is none.

    persons: the list that they are given (S_ID); keep: captions that should stay as they are (S_Reg's); tuned: results
    of `apl baselines`, whose settings are taken where it tried a method's whole grid; else the method's own defaults.

    Raises:
        ConfigError: an unknown name.
    """
    from apl_train.baselines import BASELINES

    found = []
    for name in names or tuple(BASELINES):
        method, settings = BASELINES[name], tuned_settings(name, tuned) if tuned is not None else None
        key = {**_model(backend), "baseline": name, "settings": digest({**method.defaults, **(settings or {})}),
               "list": digest([[p.name, p.description] for p in persons]), "keep": digest(list(keep)), "seed": seed}
        found.append(Method(method.title, key,
                            lambda method=method, settings=settings: method.prepare(
                                backend, persons, settings, keep=keep, seed=seed),
                            list_method=True, notes={"paper": method.paper, "changes": method.changes,
                                                     "tuned": settings is not None}))
    return found


def _model(backend: Backend) -> dict[str, str]:
    return {"model": backend.sha256, "dtype": str(backend.dtype)}
