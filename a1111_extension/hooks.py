"""Wrapping the host's functions on their classes and modules: once, whatever is reloaded, and reversibly.

The host runs its script files again on "Reload UI" while its classes live on, so a wrap made at each run would grow
one layer a time. This package stays in `sys.modules`; so do the hooks.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_log = logging.getLogger("apl")
_MISSING = object()


@dataclass
class Hook:
    """One wrapped attribute. `original` is what stood in the owner itself, or a marker where it was inherited."""

    owner: Any
    name: str
    original: Any
    installed: Any

    @property
    def label(self) -> str:
        """"Class.method" or "module.function", for people."""
        return f"{getattr(self.owner, '__name__', type(self.owner).__name__)}.{self.name}"

    @property
    def untouched(self) -> bool:
        """Whether the hook is still what the owner has; another extension may have put its own wrap around it."""
        return vars(self.owner).get(self.name) is self.installed


class Hooks:
    """Every hook of this process."""

    def __init__(self) -> None:
        self.placed: dict[tuple[int, str], Hook] = {}

    def wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> bool:
        """Make `owner.name(*args)` run `around(original, *args)`. Placed already: nothing happens, and False.

        An attribute that the host replaced by a new one (it reloads some of its modules) is wrapped anew.
        """
        original = getattr(owner, name)
        if getattr(original, "apl_hook", None) is around or self._under(original, around):
            return False

        @functools.wraps(original)
        def hooked(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs)

        hooked.apl_hook = around  # type: ignore[attr-defined]
        self.set(owner, name, hooked)
        return True

    @staticmethod
    def _under(function: Any, around: Callable[..., Any]) -> bool:
        """Whether another extension's wrap, made with functools.wraps, has ours inside."""
        for _ in range(32):
            function = getattr(function, "__wrapped__", None)
            if function is None:
                return False
            if getattr(function, "apl_hook", None) is around:
                return True
        return False

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Put `value` in place of an attribute and remember what was there."""
        key = (id(owner), name)
        known = self.placed.get(key)
        original = vars(owner).get(name, _MISSING) if known is None or known.untouched is False else known.original
        setattr(owner, name, value)
        self.placed[key] = Hook(owner, name, original, value)

    def remove(self) -> None:
        """Put every original back. A hook that somebody wrapped stays: taking it out would take theirs along."""
        for hook in reversed(list(self.placed.values())):
            if not hook.untouched:
                _log.warning("%s was wrapped by another extension and stays hooked.", hook.label)
            elif hook.original is _MISSING:
                delattr(hook.owner, hook.name)
            else:
                setattr(hook.owner, hook.name, hook.original)
        self.placed.clear()
