"""Screen "Compare": two runs side by side, what was set differently and what came out of it."""

from __future__ import annotations

from typing import Any

import gradio as gr

from . import commands, comparison, compat, pages
from .desk import Desk


def build(desk: Desk) -> compat.Listener:
    """Draws the screen; returns what brings it up to date, for when its tab is opened."""
    names = desk.names()
    a, b = [*names, "", ""][:2]
    compat.html(pages.heading("Compare two runs", "What was set differently, both losses in one chart, the last "
                                                  "pictures at equal seeds."))
    with gr.Row():
        first = gr.Dropdown(choices=names, value=names[0] if names else None, label="First run",
                            allow_custom_value=True, elem_id="apl-first")
        second = gr.Dropdown(choices=names, value=names[1] if len(names) > 1 else None, label="Second run",
                             allow_custom_value=True, elem_id="apl-second")
        refresh = gr.Button("Refresh", size="sm", scale=0, min_width=110, elem_id="apl-compare-refresh")
    table = compat.html(_table(desk, a, b), elem_id="apl-compared")
    command = compat.copy_box("Copy as command", _command(desk, a, b))

    def show(a: str | None, b: str | None) -> tuple[str, str]:
        return _table(desk, a or "", b or ""), _command(desk, a or "", b or "")

    def again(a: str | None, b: str | None) -> tuple[Any, ...]:
        now = desk.names()
        kept = [name if name in now else None for name in (a, b)]
        rest = [name for name in now if name not in kept]
        chosen = [name or (rest.pop(0) if rest else None) for name in kept]
        return (*(compat.update(choices=now, value=name) for name in chosen), *show(*chosen))

    compat.on(first.change, show, [first, second], [table, command])
    compat.on(second.change, show, [first, second], [table, command])
    listener = (again, [first, second], [first, second, table, command])
    compat.on(refresh.click, *listener)
    return listener


def _table(desk: Desk, a: str, b: str) -> str:
    return comparison.compared(desk.run(a), desk.run(b), tell=desk.place.may_start)


def _command(desk: Desk, a: str, b: str) -> str:
    """Both finished prefixes measured on equal seeds: what a comparison in figures takes."""
    if not desk.place.may_start:
        return ""
    done = [run for run in (desk.run(a), desk.run(b)) if run is not None and run.final is not None]
    return " && ".join(commands.shown(commands.score(run.final, str(run.config.get("base_model", "miniature")),
                                                     run.folder / "scores.json")) for run in done)
