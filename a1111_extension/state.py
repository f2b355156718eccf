"""The accordion's line of honest state: what will happen to the next picture, and why not if not."""

from __future__ import annotations

import html
import sys
from typing import Any

from ..apl_core.errors import APLError
from .args import ScriptArgs, level_label, level_of, name_of
from .jobs import JOBS
from .library import choice_of
from .models import check_model, loaded_model


def state_line(enabled: Any, prefix: Any, level: Any) -> str:
    """HTML: what will happen to the next picture, and why not if not."""
    if JOBS.problem:
        return _line("bad", f"NOT ACTIVE, this host is not supported: {JOBS.problem}")
    model = loaded_model()
    try:
        if JOBS.enforced and model is None:
            return _line("on", f"active, set by the operator of this server, for {' and '.join(sorted(JOBS.forced))}; "
                         "no checkpoint is loaded yet")
        if JOBS.enforced:
            choice = JOBS.forced_choice(model)
            where = "set by the operator of this server"
            if choice is None:
                return _line("warn", "not active: the operator lets this model run without a prefix")
        else:
            choice = choice_of(ScriptArgs(bool(enabled), name_of(str(prefix or "")), level_of(level)))
            where = level_label(choice.level) if choice is not None else ""
            if choice is None:
                return _line("off", "off: prompts are used as they are")
        if model is not None:
            check_model(model, choice.prefix)
    except APLError as error:
        return _line("bad", f"NOT ACTIVE, nothing will be generated: {error}" if enabled or JOBS.enforced
                     else str(error))
    taken = choice.prefix.num_tokens
    if model is None:
        return _line("warn", f"on: {choice.name} ({where}); whether it fits is known once a checkpoint is loaded")
    return _line("on", f"active: {choice.name} ({where}) · {taken} of 75 tokens per chunk, {75 - taken} for your text. "
                 f"Reduces recognisable likeness in tested prompts.{_cost(taken)}")


def _cost(taken: int) -> str:
    """What a host without padding does with prompts of nearly a chunk; "" where the option is on, or not used."""
    from modules import shared

    # Forge has the option, and batches prompts of different lengths without it.
    if "modules_forge" in sys.modules or getattr(shared.opts, "pad_cond_uncond", True):
        return ""
    return (f" Prompts of {76 - taken} to 75 tokens become two chunks: two passes a step, unless the setting "
            "\"Pad prompt/negative prompt\" is on.")


def _line(kind: str, text: str) -> str:
    return f"<p class='apl-state apl-{kind}'>{html.escape(text)}</p>"
