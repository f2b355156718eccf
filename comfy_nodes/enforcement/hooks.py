"""Replacing functions of the host, and knowing at any time that the replacements are still in place."""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from ...apl_core.errors import PolicyError
from ...apl_core.policy import EXIT_CODE

_log = logging.getLogger("apl")


@dataclass(frozen=True)
class Hook:
    """One function of the host that was replaced. `holder`.`owner` is where a class is looked up by its name."""

    label: str
    holder: Any
    owner: Any
    name: str
    replacement: Callable[..., Any]

    @property
    def in_place(self) -> bool:
        """Whether calling the function by its usual name still calls the replacement."""
        if inspect.isclass(self.owner) and getattr(self.holder, self.owner.__name__, None) is not self.owner:
            return False
        return vars(self.owner).get(self.name) is self.replacement


class Hooks:
    """The hooks of this process, in the order they were placed."""

    def __init__(self) -> None:
        self.placed: list[Hook] = []

    def place(self, module: Any, path: str, parameters: Sequence[str],
              make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Replace `module`.`path` ("Class.method" or "function") by what `make` makes of the original.

        Raises:
            PolicyError: it is not there, takes other parameters first, or another pack has already replaced it.
        """
        *classes, name = path.split(".")
        owner = functools.reduce(lambda at, part: getattr(at, part, None), classes, module)
        original = inspect.getattr_static(owner, name, None) if owner is not None else None
        label = f"{module.__name__}.{path}"
        if not inspect.isfunction(original):
            raise PolicyError(f"This ComfyUI has no {label}.", "Enforced mode does not know this version of ComfyUI; "
                              "use one of those that docs/hosting.md names.", field=label)
        if original.__globals__ is not vars(module):  # `__module__` is what functools.wraps copies
            raise PolicyError(f"{label} was replaced by {original.__globals__.get('__name__')}.",
                              "Remove the custom node that does this, or do not run an enforced server with it.",
                              field=label)
        found = list(inspect.signature(original).parameters)
        if found[: len(parameters)] != list(parameters):
            raise PolicyError(f"{label} takes {', '.join(found)}; expected {', '.join(parameters)}.",
                              "Enforced mode does not know this version of ComfyUI; use one of those that "
                              "docs/hosting.md names.", field=label)
        replacement = functools.wraps(original)(make(original))
        setattr(owner, name, replacement)
        self.placed.append(Hook(label, module, owner, name, replacement))

    def missing(self) -> list[str]:
        """Labels of the hooks that are no longer in place."""
        return [hook.label for hook in self.placed if not hook.in_place]


def refuse_to_start(reason: object) -> NoReturn:
    """End the process while it starts. `SystemExit`, since ComfyUI swallows every `Exception` of a custom node."""
    _log.critical("APL enforced mode: %s ComfyUI is not started.", reason)
    raise SystemExit(EXIT_CODE)


def stop_serving(reason: object) -> NoReturn:
    """End a running server from any of its threads, at once: a clean way out could be left open by whoever did this."""
    _log.critical("APL enforced mode: %s ComfyUI is stopped.", reason)
    for handler in logging.getLogger().handlers:
        handler.flush()
    os._exit(EXIT_CODE)
