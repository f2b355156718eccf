"""The accordion "Anonymize" below the prompt: Enable, prefix, level, a line of honest state, and before/after.

Only components and arguments that gradio 3.41 and 4.40 share; no javascript, and nothing that the host would save.
"""

from __future__ import annotations

from typing import Any

from ..apl_core.errors import APLError
from . import counter
from .args import KEY, WHOLE, ScriptArgs, choice_label, from_infotext, level_label, name_of
from .compare import before_and_after
from .jobs import JOBS
from .library import entries, first_fitting, unfit_reason
from .state import state_line

TITLE = "Anonymize"


def defaults() -> ScriptArgs:
    """What holds where nothing is said: off, or on by the operator's `default_on` or the settings page."""
    from modules import shared

    option = getattr(shared.opts, "apl_default_enabled", False) is True
    on = JOBS.policy.mode == "default_on" if JOBS.policy is not None else option
    preferred = str(getattr(shared.opts, "apl_default_prefix", "") or "")
    return ScriptArgs(enabled=on, prefix=preferred or first_fitting(entries()))


def script_of(runner: Any) -> Any:
    """This extension's script in a host's runner, or None."""
    return next((each for each in getattr(runner, "alwayson_scripts", None) or () if isinstance(each, ScriptBase)),
                None)


def arguments_of(p: Any, args: Any = None) -> ScriptArgs | None:
    """What a job's own arguments say; None where it carries none of ours (another extension's inner job).

    Raises:
        ConfigError: they are wrong.
    """
    changes = getattr(p, "apl_xyz", None)
    script = script_of(getattr(p, "scripts", None))
    values = args if args else getattr(p, "script_args", None)
    if script is None or not values or script.args_to is None or len(values) < script.args_to:
        return ScriptArgs.of([changes], defaults()) if changes else None
    asked = ScriptArgs.of(values[script.args_from : script.args_to], defaults())
    return ScriptArgs.of([changes], asked) if changes else asked


def _choices() -> list[str]:
    return [choice_label(entry.name, not unfit_reason(entry)) for entry in entries()]


def _levels(prefix: str) -> list[str]:
    levels = next((entry.levels for entry in entries() if entry.name == name_of(prefix or "")), ())
    return [WHOLE, *(level_label(level) for level in levels)]


def _choice_for(name: str) -> str:
    return next((each for each in _choices() if name_of(each) == name), name)


class ScriptBase:
    """What `scripts/apl.py` joins with the host's `Script`."""

    def title(self) -> str:
        """The name in the UI and, in lower case, in the API."""
        return TITLE

    def show(self, is_img2img: bool) -> Any:
        """Always there, for text and for pictures as a start."""
        from modules import scripts

        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        """Build the accordion. Called several times by the host's API; has no effect but the components."""
        import gradio as gr

        tab = "img2img" if is_img2img else "txt2img"
        start, locked = defaults(), JOBS.enforced
        with gr.Accordion(TITLE, open=False, elem_id=f"apl_{tab}"):
            with gr.Row():
                enabled = gr.Checkbox(label="Enable", value=start.enabled or locked, interactive=not locked,
                                      elem_id=f"apl_{tab}_enabled")
                prefix = gr.Dropdown(label="Prefix", choices=_choices(), value=_choice_for(start.prefix),
                                     interactive=not locked, elem_id=f"apl_{tab}_prefix")
                level = gr.Dropdown(label="Level", choices=_levels(start.prefix), value=WHOLE,
                                    interactive=not locked, elem_id=f"apl_{tab}_level")
                refresh = gr.Button("Refresh", elem_id=f"apl_{tab}_refresh")
            line = gr.HTML(value=state_line(start.enabled, start.prefix, WHOLE), elem_id=f"apl_{tab}_state")
            with gr.Row(visible=not locked):
                both = gr.Button("Last picture again, without and with the prefix", elem_id=f"apl_{tab}_both")
            shown = gr.HTML(value="", elem_id=f"apl_{tab}_pair")
        controls = [enabled, prefix, level]
        for control in controls:
            control.do_not_save_to_config = True
            control.change(fn=lambda *values: counter.update(tab, *values), inputs=controls, outputs=[line],
                           show_progress=False)
        counter.join(tab, controls)
        prefix.change(fn=lambda name: gr.update(choices=_levels(name), value=WHOLE), inputs=[prefix], outputs=[level],
                      show_progress=False)
        refresh.click(fn=lambda *values: self._refreshed(tab, *values), inputs=controls, outputs=[prefix, level, line],
                      show_progress=False)
        both.click(fn=before_and_after, inputs=[prefix, level], outputs=[shown])
        self.infotext_fields = [(enabled, lambda values: _pasted(values, "enabled")),
                                (prefix, lambda values: _pasted(values, "prefix")),
                                (level, lambda values: _pasted(values, "level"))]
        self.paste_field_names = [KEY]
        return controls

    def process(self, p: Any, *args: Any) -> None:
        """Nothing, where the hooks hold. Where they could not be placed, the host would go on after any error raised
        here, so the job is interrupted before its first picture."""
        from modules import shared

        if JOBS.stack:
            return
        try:
            asked = ScriptArgs.of(args, defaults())
        except APLError:
            asked = ScriptArgs(enabled=True)
        if asked.enabled:
            shared.state.interrupted = True
            p.comment("Anonymize is enabled but cannot work in this host; nothing was generated.")

    def _refreshed(self, tab: str, enabled: bool, prefix: str, level: str) -> tuple[Any, Any, str]:
        import gradio as gr

        name = name_of(prefix or "") or first_fitting(entries())
        levels = _levels(name)
        kept = level if level in levels else WHOLE
        return (gr.update(choices=_choices(), value=_choice_for(name)), gr.update(choices=levels, value=kept),
                counter.update(tab, enabled, name, kept))


def _pasted(values: Any, field: str) -> Any:
    """A component's value from pasted parameters; None, the hosts' word for "as it is", for those without a prefix.

    An empty `gr.update` would say the same on a page, but hosts with gradio 4 take it for a value in their API.
    """
    import gradio as gr

    found = from_infotext(values.get(KEY))
    if found is None or JOBS.enforced:
        return None
    name, _, level = found
    known = next((entry for entry in entries() if entry.name == name), None)
    if field == "enabled":
        return True
    if known is None:  # another machine's file; what is chosen here stays on instead
        return None
    if field == "prefix":
        return gr.update(choices=_choices(), value=_choice_for(name))
    return gr.update(choices=_levels(name), value=level_label(level if level in known.levels else None))
