"""The host's token counter while a prefix is on: n/65, for the prefix takes 10 of every chunk's 75.

The host counts when the prompt changes; the accordion's controls are joined to its counter, so that it also counts when
the toggle or the prefix does. Its components are known by the ids that every host of this family gives them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from ..apl_core.errors import APLError
from .args import ScriptArgs, level_of, name_of
from .encoder import Scope, injection_for, opened
from .hooks import Hooks
from .jobs import JOBS, Choice
from .library import choice_of
from .models import encoders_of, loaded_model
from .state import state_line

_TABS = ("txt2img", "img2img")
_PARTS = ("prompt", "steps", "styles", "token_counter")
_shown: dict[str, Choice | None] = {}
_seen: dict[str, dict[str, Any]] = {}
_controls: dict[str, Sequence[Any]] = {}


def forget() -> None:
    """At the start of a page: components of an earlier one are no longer there."""
    _seen.clear()
    _controls.clear()


def note(component: Any, **_: Any) -> None:
    """The host's callback after each component of its page."""
    tab, _, part = str(getattr(component, "elem_id", None) or "").partition("_")
    if tab in _TABS and part in _PARTS:
        _seen.setdefault(tab, {})[part] = component
        _join(tab)


def join(tab: str, controls: Sequence[Any]) -> None:
    """Let a tab's counter follow these controls (enabled, prefix, level), as soon as it is there."""
    _controls[tab] = controls
    _join(tab)


def _join(tab: str) -> None:
    if tab not in _controls or len(_seen.get(tab, ())) < len(_PARTS):
        return
    # Once: the host's API builds the accordion again, outside of the page.
    parts, controls = _seen.pop(tab), _controls.pop(tab)
    for control in controls:
        control.change(fn=lambda *values: recount(tab, *values), outputs=[parts["token_counter"]], show_progress=False,
                       inputs=[*controls, parts["prompt"], parts["steps"], parts["styles"]])


def recount(tab: str, enabled: Any, prefix: Any, level: Any, prompt: Any, steps: Any, styles: Any) -> str:
    """What the host's counter shows for a prompt under these controls: HTML."""
    from modules import ui

    _remember(tab, enabled, prefix, level)
    known = inspect.signature(ui.update_token_counter).parameters
    return ui.update_token_counter(prompt, steps, *([styles] if "styles" in known else []))


def _remember(tab: str, enabled: Any, prefix: Any, level: Any) -> None:
    try:
        _shown[tab] = choice_of(ScriptArgs(bool(enabled), name_of(str(prefix or "")), level_of(level)))
    except APLError:
        _shown[tab] = None


def update(tab: str, enabled: Any, prefix: Any, level: Any) -> str:
    """Remember what a tab's accordion shows, for the counter. Returns the accordion's line."""
    _remember(tab, enabled, prefix, level)
    return state_line(enabled, prefix, level)


def _choice() -> Choice | None:
    if JOBS.enforced:
        return JOBS.forced_choice(loaded_model())
    # The host does not say whose counter it is; with both tabs the smaller room is the safer figure.
    return next((choice for choice in _shown.values() if choice is not None), None)


def _counted(original: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        choice = _choice() if kwargs.get("is_positive", True) else None
        held = Scope(injection_for(choice, encoders_of(loaded_model())[0]), counting=True) if choice else None
    except APLError:  # a counter must not fail where nothing is generated; the job will say why
        held = None
    with opened(held):
        return original(*args, **kwargs)


def patch_counter(hooks: Hooks) -> None:
    """Place the hook on the host's counter; at every start of the UI, since the host reloads that module."""
    from modules import ui

    if hasattr(ui, "update_token_counter"):
        hooks.wrap(ui, "update_token_counter", _counted)
