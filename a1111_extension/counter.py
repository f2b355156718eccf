"""The host's token counter while a prefix is on: n/65, for the prefix takes 10 of every chunk's 75."""

from __future__ import annotations

from typing import Any

from ..apl_core.errors import APLError
from .args import ScriptArgs, level_of, name_of
from .encoder import Scope, injection_for, opened
from .hooks import Hooks
from .jobs import JOBS, Choice
from .library import choice_of
from .models import encoders_of, loaded_model

_shown: dict[str, Choice | None] = {}


def update(tab: str, enabled: Any, prefix: Any, level: Any) -> str:
    """Remember what a tab's accordion shows, for the counter. Returns the accordion's line."""
    from .script import state_line

    try:
        _shown[tab] = choice_of(ScriptArgs(bool(enabled), name_of(str(prefix or "")), level_of(level)))
    except APLError:
        _shown[tab] = None
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
