"""The host's way in: hooks and callbacks, at every load of `scripts/apl.py`; "Reload UI" loads it again.

What must outlive a reload (hooks, jobs, policy) lives in this package, which the shim loads once.
"""

from __future__ import annotations

import logging
from typing import Any

from . import carry, counter
from .api import add_routes
from .conds import patch_processing
from .encoder import patch_encoders
from .enforce import on_model_loaded, refuse_to_start, switch_on
from .hooks import Hooks
from .identity import KNOWN, THRESHOLD, tab
from .jobs import JOBS
from .script import ScriptBase
from .xyz import add_axes

HOOKS = Hooks()
SECTION = ("apl", "Anonymization")
_polls = False
_log = logging.getLogger("apl")


def register() -> type:
    """Place the hooks, register the callbacks. Returns the base of the script's class.

    Raises:
        SystemExit: 78, when a policy is enforced and this host cannot keep it.
    """
    switch_on(HOOKS)
    try:
        patch_encoders(HOOKS)
        patch_processing(HOOKS)
        JOBS.problem = ""
    except Exception as error:
        if JOBS.enforced:
            refuse_to_start(error)
        HOOKS.remove()
        JOBS.problem = str(error)
        _log.error("APL cannot work in this host: %s", error)
    _callbacks()
    return ScriptBase


def _callbacks() -> None:
    from modules import script_callbacks as callbacks

    callbacks.on_ui_settings(add_settings)
    callbacks.on_before_ui(_before_ui)
    callbacks.on_after_component(counter.note)
    callbacks.on_app_started(_started)
    callbacks.on_ui_tabs(_tabs)
    callbacks.on_model_loaded(on_model_loaded)
    callbacks.on_script_unloaded(unload)


def unload() -> None:
    """Put the host back as it was, unless a policy is enforced: then the hooks stay, whatever is reloaded."""
    if not JOBS.enforced:
        HOOKS.remove()


def _before_ui() -> None:
    counter.forget()
    for what, place in (("axes", add_axes), ("token counter", lambda: counter.patch_counter(HOOKS))):
        try:
            place()
        except Exception as error:  # conveniences: a host that has them otherwise must still start
            _log.warning("APL: no %s in this host: %s", what, error)


def _started(demo: Any, app: Any) -> None:
    from modules import shared

    if _polls:
        let_go(demo)
    options = shared.cmd_opts
    add_routes(app, HOOKS, api=bool(getattr(options, "api", False) or getattr(options, "nowebui", False)),
               api_auth=getattr(options, "api_auth", None))


def let_go(demo: Any) -> None:
    """Make "Reload UI" work while a browser shows a page that polls, as the trainer's does.

    The host closes its server first, which in gradio 3 waits for every open connection; a poll's never ends.
    """
    close = getattr(demo, "close", None)
    if close is None:
        return

    def closing(*args: Any, **kwargs: Any) -> Any:
        server = getattr(demo, "server", None)
        if server is not None:
            server.force_exit = True  # uvicorn's word for not waiting
        return close(*args, **kwargs)

    demo.close = closing


def _tabs() -> list[tuple[Any, str, str]]:
    global _polls
    tabs = [(tab(), "Identity check", "apl_identity")]
    trainer = trainer_tab()
    _polls = trainer is not None
    if not (JOBS.enforced and JOBS.policy.lock_training):
        tabs.append((carry.tab(), "Prefix transfer", "apl_transfer_tab"))
    return [*tabs, (trainer, "APL Trainer", "apl_trainer")] if trainer is not None else tabs


def trainer_tab() -> Any:
    """The shared trainer interface, where it is there and the operator did not lock training; else None."""
    if JOBS.policy is not None and JOBS.policy.enforced and JOBS.policy.lock_training:
        return None
    from .trainer import blocks

    try:
        return blocks()
    except Exception as error:  # the page is a convenience; the host's own page must come up without it
        _log.warning("APL: no trainer tab: %s", error)
        return None


def add_settings() -> None:
    """The settings page: what is preselected. None of it can weaken a policy."""
    import gradio as gr
    from modules import shared

    info = shared.OptionInfo
    for key, option in (
        ("apl_default_enabled", info(False, "Enable at start", gr.Checkbox, {"interactive": True}, section=SECTION)),
        ("apl_default_prefix", info("", "Prefix preselected at start (empty: the first that fits)", gr.Textbox,
                                    {"interactive": True}, section=SECTION)),
        ("apl_recogniser", info(KNOWN[0], f"Face recogniser for the identity check ({', '.join(KNOWN)}, or a folder "
                                "of models/insightface/models)", gr.Textbox, {"interactive": True}, section=SECTION)),
        ("apl_threshold", info(THRESHOLD, "From this similarity on, a face counts as recognised", gr.Slider,
                               {"minimum": -1, "maximum": 1, "step": 0.01}, section=SECTION)),
    ):
        option.restrict_api = JOBS.enforced
        shared.opts.add_option(key, option)

