"""Screen "New prefix": checkpoint, pictures, how long, and one button; no file is touched, no setting must be known."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import gradio as gr

from . import commands, compat, pages, thumbs
from .commands import MINIATURE, Wish
from .core import core
from .desk import BAD, NOT_DRAWN, NOTE, Desk, Said
from .place import NOT_ALLOWED

DRAWN, SHIPPED, OWN = "Let the checkpoint draw them", "Shipped with the miniature checkpoint", "Folders that I have"
SHEET = 18


class Form:
    """The inputs of the screen, and the wish that they spell."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.presets = desk, commands.presets()
        allowed, fitting = desk.place.may_start, commands.presets_for(self.presets, MINIATURE)
        with gr.Column(elem_id="apl-card-1"):
            compat.html(pages.step(1, "Checkpoint", "The text-to-image model that the prefix is learned for. The "
                                                    "miniature ships here: a small world of drawn persons to try in."))
            self.checkpoint = gr.Dropdown(
                choices=desk.place.models(), value=MINIATURE, allow_custom_value=True, label="Checkpoint",
                info="Choose one, or paste the path of a .safetensors file or a diffusers folder (SD 1.x).",
                interactive=allowed, elem_id="apl-checkpoint")
        with gr.Column(elem_id="apl-card-2"):
            compat.html(pages.step(2, "Pictures", "Named persons to learn on, and everything else that has to stay as "
                                                  "it is. Both sets are checked before anything is trained."))
            self.source = gr.Radio(choices=[SHIPPED, DRAWN, OWN], value=SHIPPED, label="Pictures to learn from",
                                   interactive=allowed, elem_id="apl-source")
            with gr.Row():
                self.s_id = gr.Textbox(label="Folder of named persons (S_ID)", visible=False, elem_id="apl-s-id",
                                       placeholder="holds metadata.csv and pictures")
                self.s_reg = gr.Textbox(label="Folder of everything else (S_Reg)", visible=False, elem_id="apl-s-reg",
                                        placeholder="holds metadata.csv and pictures")
            with gr.Row():
                self.people = gr.Textbox(label="Table of persons (CSV)", visible=False, elem_id="apl-people",
                                         placeholder="empty: the list that ships", interactive=allowed)
                self.limit = gr.Number(value=0, precision=0, label="Persons (0 = all)", visible=False,
                                       elem_id="apl-limit")
                self.each = gr.Number(value=4, precision=0, label="Pictures of each", visible=False, elem_id="apl-each")
                self.neutral = gr.Number(value=400, precision=0, label="Pictures of everything else", visible=False,
                                         elem_id="apl-neutral")
            with gr.Row():
                self.draw = gr.Button("Only draw them, to look first", size="sm", visible=False, interactive=allowed,
                                      elem_id="apl-draw")
                self.check = gr.Button("Check both sets", size="sm", interactive=allowed, elem_id="apl-check")
                self.look = gr.Button("Look at the pictures", size="sm", elem_id="apl-look")
            self.checked, self.sheet = compat.html(elem_id="apl-checked"), compat.html(elem_id="apl-sheet")
        with gr.Column(elem_id="apl-card-3"):
            compat.html(pages.step(3, "Training", "A preset holds all settings; its number of steps can be changed."))
            self.preset = gr.Radio(choices=fitting, value=fitting[0], label="Preset", elem_id="apl-preset")
            self.about = compat.html(pages.heading("", self.of(fitting[0]).about))
            with gr.Row():
                self.name = gr.Textbox(value="anonymize", label="Name of the prefix", elem_id="apl-name")
                self.steps = gr.Number(value=self.of(fitting[0]).steps, precision=0, label="Steps", elem_id="apl-steps")
                self.faces = gr.Slider(0, 8, value=4, step=1, label="Persons to draw at every level",
                                       elem_id="apl-faces")
                self.score = gr.Number(value=16, precision=0, label="Persons to score at the end",
                                       elem_id="apl-score")
        self.inputs = [self.checkpoint, self.source, self.s_id, self.s_reg, self.people, self.limit, self.each,
                       self.neutral, self.preset, self.steps, self.name, self.faces,
                       self.score]
        self.defaults = (MINIATURE, SHIPPED, "", "", "", 0, 4, 400, fitting[0], self.of(fitting[0]).steps, "anonymize",
                         4, 16)

    def of(self, name: str) -> commands.Preset:
        return next((p for p in self.presets if p.name == name), self.presets[0])

    def wish(self, model: str, source: str, s_id: str, s_reg: str, people: str, limit: float | None,
             each: float | None, neutral: float | None, preset: str, steps: float | None, name: str,
             faces: float, score: float | None) -> Wish:
        sets = {SHIPPED: (MINIATURE, MINIATURE), DRAWN: ("", "")}.get(source, ((s_id or "").strip(),
                                                                              (s_reg or "").strip()))
        count = int(steps or 0)
        return Wish((name or "").strip(), (model or MINIATURE).strip(), *sets, preset,
                    0 if count == self.of(preset).steps else count, int(faces), (people or "").strip(),
                    int(limit or 0), int(each or 0), int(neutral or 0), int(score or 0))

    def problem(self, *values: Any) -> Said | None:
        """What can be told without asking the trainer."""
        wish = self.wish(*values)
        if min(wish.steps, wish.limit) < 0:
            return Said("Numbers have to be above 0.", BAD)
        if values[1] == OWN and not (wish.s_id and wish.s_reg):
            return Said("Name both folders under 2, or let the checkpoint draw the pictures.", BAD)
        if wish.s_id == MINIATURE and wish.checkpoint != MINIATURE:
            return Said("The shipped pictures belong to the miniature checkpoint: another one does not know those "
                        "persons. Let it draw its own under 2.", BAD)
        return None


def build(desk: Desk, started: Callable[[Said], tuple[Any, ...]], outputs: list[Any]) -> None:
    """Draws the screen; what `started` makes of an action's answer goes to `outputs`, components of other screens."""
    form, allowed = Form(desk), desk.place.may_start
    with gr.Row():
        make = gr.Button("Make everything: pictures, training, scores, installed", variant="primary", scale=3,
                         interactive=allowed, elem_id="apl-make")
        start = gr.Button("Only train", scale=1, interactive=allowed, elem_id="apl-start")
    answer = compat.html(pages.said(None if allowed else Said(NOT_ALLOWED, NOTE)), elem_id="apl-answer")
    command = compat.copy_box("Copy as command", line(desk, form, *form.defaults))
    train_command = compat.copy_box("Copy as command, step by step", train_line(desk, form, *form.defaults))
    drawn_fields = [form.people, form.limit, form.each, form.neutral, form.draw]

    def begin(action: Callable[[Wish], Said], *values: Any) -> tuple[Any, ...]:
        said = form.problem(*values) or action(form.wish(*values))
        return (pages.said(said), *started(said))

    def only_train(*values: Any) -> tuple[Any, ...]:
        if values[1] == DRAWN:
            said = Said(NOT_DRAWN, BAD)
            return (pages.said(said), *started(said))
        return begin(desk.start, *values)

    def draw_only(*values: Any) -> tuple[Any, ...]:
        shown = begin(desk.draw, *values)
        run = desk.run(desk.selected)
        made = run is not None and run.job is not None and run.job.kind == "generate"
        if not made:
            return (*shown, *(compat.update() for _ in range(3)))
        return (*shown, OWN, str(run.folder / "s_id"), str(run.folder / "s_reg"))  # what is looked at and used next

    def lines(*values: Any) -> tuple[str, str]:
        return line(desk, form, *values), train_line(desk, form, *values)

    def chosen_checkpoint(model: str, chosen: str, source: str) -> tuple[Any, Any]:
        now, small = commands.presets_for(form.presets, (model or MINIATURE).strip()), model == MINIATURE
        sources = [SHIPPED, DRAWN, OWN] if small else [DRAWN, OWN]
        return (compat.update(choices=now, value=chosen if chosen in now else now[0]),
                compat.update(choices=sources, value=source if source in sources else sources[0]))

    def chosen_source(source: str) -> list[Any]:
        return [compat.update(visible=source == OWN)] * 2 + [compat.update(visible=source == DRAWN)] * 5

    def chosen_preset(chosen: str) -> tuple[Any, str]:
        return form.of(chosen).steps, pages.heading("", form.of(chosen).about)

    compat.on(form.checkpoint.change, chosen_checkpoint, [form.checkpoint, form.preset, form.source],
              [form.preset, form.source])
    compat.on(form.source.change, chosen_source, [form.source], [form.s_id, form.s_reg, *drawn_fields])
    compat.on(form.preset.change, chosen_preset, [form.preset], [form.steps, form.about])
    for component in form.inputs:
        compat.on(component.change, lines, form.inputs, [command, train_command])
    compat.on(form.check.click, lambda *values: pages.said(desk.check(form.wish(*values))), form.inputs, [form.checked],
              busy=True)
    compat.on(form.look.click, lambda *values: _sheet(desk, form.wish(*values)), form.inputs, [form.sheet], busy=True)
    compat.on(form.draw.click, draw_only, form.inputs, [answer, *outputs, form.source, form.s_id, form.s_reg])
    compat.on(make.click, lambda *values: begin(desk.make, *values), form.inputs, [answer, *outputs])
    compat.on(start.click, only_train, form.inputs, [answer, *outputs])


def _run_for(desk: Desk, wish: Wish) -> Any:
    try:
        return desk.folder_for(wish.name)
    except core("errors").APLError:
        return desk.place.runs / "NAME"


def line(desk: Desk, form: Form, *values: Any) -> str:
    """The command of "Make everything"."""
    if not desk.place.may_start:
        return ""
    wish = form.wish(*values)
    return commands.shown(commands.make(wish, _run_for(desk, wish), desk.place.embeddings, desk.place.host_embeddings))


def train_line(desk: Desk, form: Form, *values: Any) -> str:
    """The command of "Only train", or those that draw the pictures."""
    if not desk.place.may_start:
        return ""
    wish = form.wish(*values)
    run = _run_for(desk, wish)
    if wish.s_id:
        return commands.shown(commands.train(wish, run))
    return " && ".join(map(commands.shown, commands.generate(wish, run)))


def _sheet(desk: Desk, wish: Wish) -> str:
    if not wish.s_id and not wish.s_reg:
        return pages.said(Said(NOT_DRAWN, NOTE))
    parts = []
    try:
        for kind, value, title in (("s_id", wish.s_id, "Named persons"), ("s_reg", wish.s_reg, "Everything else")):
            found, total = thumbs.cards(desk.data_folder(kind, value), random.randrange(10_000), SHEET)
            parts.append(pages.sheet(found, total, title))
    except Exception as error:  # a stranger's table may be anything; the page tells and goes on
        parts.append(pages.said(Said(f"These pictures cannot be shown: {error}", NOTE)))
    return "".join(parts)
