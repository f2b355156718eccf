"""Screen "Runs": the queue and every run; for the chosen one curves, faces, figures, its log, and what can be done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from . import commands, compat, pages
from .desk import NOTE, Desk, Said
from .jobs import QUEUED, RUNNING
from .place import PRIVATE
from .runs import PAUSED

FAST, SLOW = 2.0, 4.0
"""Seconds between two looks at the run folder."""


@dataclass
class Screen:
    """Components that other screens write to: the list of runs to choose from, and everything that shows the choice."""

    picker: gr.Dropdown
    shown: list[Any]


def build(desk: Desk) -> tuple[Screen, Callable[[], tuple[Any, ...]]]:
    """Draws the screen. The function returned gives new values for `shown`, in its order."""
    allowed = desk.place.may_start

    def run() -> Any:
        return desk.run(desk.selected)

    def show_list() -> str:
        return pages.run_list(desk.runs(), desk.queue.waiting(), desk.selected)

    def show_status() -> str:
        return pages.status(run(), tell=allowed)

    def show_faces() -> str:
        return pages.previews(run()) if allowed else pages.said(Said(PRIVATE, NOTE))

    def show_log() -> str:
        return pages.log(run() if allowed else None)

    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            picker = gr.Dropdown(choices=desk.names(), value=lambda: desk.selected or None, label="Run to look at",
                                 allow_custom_value=True, elem_id="apl-picker")
            runs = compat.html(show_list, every=SLOW, elem_id="apl-runs")
            refresh = gr.Button("Refresh", size="sm", elem_id="apl-refresh")
        with gr.Column(scale=5, min_width=420):
            status = compat.html(show_status, every=FAST, elem_id="apl-status")
            with gr.Row():
                pause, stop, resume, hasten = (
                    gr.Button(size="sm", elem_id=f"apl-{name}", **options)
                    for name, options in zip(("pause", "stop", "resume", "next"), _buttons(desk, run()), strict=True))
            answer = compat.html(elem_id="apl-run-answer")
            faces = compat.html(show_faces, every=SLOW, elem_id="apl-previews")
            with gr.Accordion("Log", open=False):
                log = compat.html(show_log, every=FAST, elem_id="apl-log")
            command = compat.copy_box("Copy as command", _command(desk))
    shown = [runs, status, faces, log, command, pause, stop, resume, hasten]

    def everything() -> tuple[Any, ...]:
        found = run()
        return show_list(), show_status(), show_faces(), show_log(), _command(desk), *_updates(desk, found)

    def choose(name: str) -> tuple[Any, ...]:
        desk.select(name)
        return everything()

    def act(action: Callable[[str], Said]) -> Callable[[], tuple[Any, ...]]:
        def acted() -> tuple[Any, ...]:
            said = action(desk.selected)
            return pages.said(said), *everything()
        return acted

    def news() -> tuple[Any, ...]:
        return compat.update(choices=desk.names()), _command(desk), *_updates(desk, run())

    compat.on(picker.change, choose, [picker], shown)
    compat.on(refresh.click, lambda: (compat.update(choices=desk.names(), value=desk.selected or None), *everything()),
              [], [picker, *shown])
    # the list changes with every new run and every new state: then the choices and the buttons have to follow
    compat.on(runs.change, news, [], [picker, command, pause, stop, resume, hasten])
    for button, action in ((pause, desk.pause), (stop, desk.stop), (resume, desk.resume), (hasten, desk.hasten)):
        compat.on(button.click, act(action), [], [answer, *shown])
    return Screen(picker, shown), everything


def _command(desk: Desk) -> str:
    """The command of the chosen run's newest job."""
    run = desk.run(desk.selected)
    if run is None or not desk.place.may_start:
        return ""
    return commands.shown(run.job.argv[3:]) if run.job else commands.shown(commands.resume(run.folder))


def _updates(desk: Desk, run: Any) -> tuple[Any, ...]:
    return tuple(compat.update(**options) for options in _buttons(desk, run))


def _buttons(desk: Desk, run: Any) -> tuple[dict[str, Any], ...]:
    """What can be pressed, and what it would do: pause, stop, resume, run next."""
    allowed = desk.place.may_start
    state = run.state if run is not None else ""
    stopping = run is not None and run.job is not None and run.job.control == "stop" and state == RUNNING
    word = "Take out of the queue" if state == QUEUED else "End now, without saving" if stopping else "Stop and save"
    return (
        {"value": "Go on" if state == PAUSED else "Pause",
         "interactive": allowed and state in (RUNNING, PAUSED) and not stopping},
        {"value": word, "interactive": allowed and state in (RUNNING, PAUSED, QUEUED)},
        {"value": "Resume", "interactive": allowed and run is not None and desk.again(run)},
        {"value": "Run next", "interactive": allowed and state == QUEUED},
    )
