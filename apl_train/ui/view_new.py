"""Screen "New prefix": checkpoint, pictures, how long, Start; no file is touched and no setting must be known."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import gradio as gr

from . import commands, compat, pages, thumbs
from .commands import MINIATURE, Wish
from .core import core
from .desk import BAD, NOTE, Desk, Said
from .place import NOT_ALLOWED

SHIPPED, OWN = "Shipped with the miniature checkpoint", "Folders that I have"
SHEET = 18


def build(desk: Desk, started: Callable[[Said], tuple[Any, ...]], outputs: list[Any]) -> None:
    """Draws the screen; what `started` makes of an action's answer goes to `outputs`, components of other screens."""
    allowed, presets = desk.place.may_start, commands.presets()
    fitting = commands.presets_for(presets, MINIATURE)
    with gr.Column(elem_id="apl-card-1"):
        compat.html(pages.step(1, "Checkpoint", "The text-to-image model that the prefix is learned for. The miniature "
                                                "ships here: a small world of drawn persons to try everything in."))
        checkpoint = gr.Dropdown(choices=desk.place.models(), value=MINIATURE, allow_custom_value=True,
                                 label="Checkpoint", info="Choose one, or paste the path of a .safetensors file or a "
                                                          "diffusers folder (SD 1.x).", interactive=allowed,
                                 elem_id="apl-checkpoint")
    with gr.Column(elem_id="apl-card-2"):
        compat.html(pages.step(2, "Pictures", "Named persons to learn on, and everything else that has to stay as it "
                                              "is. Both sets are checked before anything runs."))
        source = gr.Radio(choices=[SHIPPED, OWN], value=SHIPPED, label="Pictures to learn from", interactive=allowed,
                          elem_id="apl-source")
        with gr.Row():
            s_id = gr.Textbox(label="Folder of named persons (S_ID)", visible=False, elem_id="apl-s-id",
                              placeholder="holds metadata.csv and pictures")
            s_reg = gr.Textbox(label="Folder of everything else (S_Reg)", visible=False, elem_id="apl-s-reg",
                               placeholder="holds metadata.csv and pictures")
        with gr.Row():
            check = gr.Button("Check both sets", size="sm", interactive=allowed, elem_id="apl-check")
            look = gr.Button("Look at the pictures", size="sm", elem_id="apl-look")
        checked, sheet = compat.html(elem_id="apl-checked"), compat.html(elem_id="apl-sheet")
    with gr.Column(elem_id="apl-card-3"):
        compat.html(pages.step(3, "Training", "A preset holds all settings; its number of steps can be changed."))
        preset = gr.Radio(choices=fitting, value=fitting[0], label="Preset",
                          elem_id="apl-preset")
        about = compat.html(pages.heading("", presets[0].about))
        with gr.Row():
            name = gr.Textbox(value="anonymize", label="Name of the prefix", elem_id="apl-name")
            steps = gr.Number(value=presets[0].steps, precision=0, label="Steps", elem_id="apl-steps")
            faces = gr.Slider(0, 8, value=4, step=1, label="Persons to draw at every level", elem_id="apl-faces")
    start = gr.Button("Start", variant="primary", interactive=allowed, elem_id="apl-start")
    answer = compat.html(pages.said(None if allowed else Said(NOT_ALLOWED, NOTE)), elem_id="apl-answer")
    command = compat.copy_box("Copy as command")
    inputs = [checkpoint, source, s_id, s_reg, preset, steps, name, faces]

    def read(model: str, where: str, named: str, other: str, chosen: str, count: float | None, title: str,
             drawn: float) -> Wish:
        own = where == OWN
        usual = next((p.steps for p in presets if p.name == chosen), 0)
        number = int(count or 0)
        return Wish((title or "").strip(), (model or MINIATURE).strip(), (named or "").strip() if own else MINIATURE,
                    (other or "").strip() if own else MINIATURE, chosen, 0 if number == usual else number, int(drawn))

    def line(*values: Any) -> str:
        wish = read(*values)
        try:
            run = desk.folder_for(wish.name)
        except core("errors").APLError:
            run = desk.place.runs / "NAME"
        return commands.shown(commands.train(wish, run))

    def begin(*values: Any) -> tuple[Any, ...]:
        wish = read(*values)
        if wish.steps < 0:
            said = Said("Steps have to be above 0.", BAD)
        elif wish.s_id == MINIATURE and wish.checkpoint != MINIATURE:
            said = Said("The shipped pictures belong to the miniature checkpoint: another one does not know those "
                        "persons. Choose your own folders under 2.", BAD)
        else:
            said = desk.start(wish)
        return (pages.said(said), *started(said))

    def check_sets(*values: Any) -> str:
        return pages.said(desk.check(read(*values)))

    def show_sheet(*values: Any) -> str:
        wish, parts = read(*values), []
        try:
            for kind, value, title in (("s_id", wish.s_id, "Named persons"), ("s_reg", wish.s_reg, "Everything else")):
                found, total = thumbs.cards(desk.data_folder(kind, value), random.randrange(10_000), SHEET)
                parts.append(pages.sheet(found, total, title))
        except Exception as error:  # a stranger's table may be anything; the page tells and goes on
            parts.append(pages.said(Said(f"These pictures cannot be shown: {error}", NOTE)))
        return "".join(parts)

    def chosen_checkpoint(model: str, chosen: str) -> Any:
        now = commands.presets_for(presets, (model or MINIATURE).strip())
        return compat.update(choices=now, value=chosen if chosen in now else now[0])

    def chosen_source(where: str) -> tuple[Any, Any]:
        return compat.update(visible=where == OWN), compat.update(visible=where == OWN)

    def chosen_preset(chosen: str) -> tuple[Any, str]:
        found = next((p for p in presets if p.name == chosen), presets[0])
        return found.steps, pages.heading("", found.about)

    compat.on(checkpoint.change, chosen_checkpoint, [checkpoint, preset], [preset])
    compat.on(source.change, chosen_source, [source], [s_id, s_reg])
    compat.on(preset.change, chosen_preset, [preset], [steps, about])
    for component in inputs:
        compat.on(component.change, line, inputs, [command])
    command.value = line(MINIATURE, SHIPPED, "", "", presets[0].name, presets[0].steps, "anonymize", 4)
    compat.on(check.click, check_sets, inputs, [checked], busy=True)
    compat.on(look.click, show_sheet, inputs, [sheet], busy=True)
    compat.on(start.click, begin, inputs, [answer, *outputs])
