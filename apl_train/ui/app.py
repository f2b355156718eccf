"""The page as a whole. `build(place)` is what a host mounts as a tab; `serve` is `apl ui`.

    from <package>.apl_train.ui.app import build
    from <package>.apl_train.ui.place import Place
    tab = build(Place(runs=..., host="AUTOMATIC1111", host_embeddings=..., checkpoints=(...,), may_start=is_local))

The page holds no state: what it shows is read from run folders, so a reload or a restart of the server loses nothing.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from . import compat, pages, view_compare, view_new, view_runs, view_share
from .desk import Desk, Said
from .jobs import RUNNING
from .place import Place
from .view_runs import FAST

TITLE = "Anonymization prompts"


def build(place: Place, *, desk: Desk | None = None) -> gr.Blocks:
    """The page for one place, and the queue behind it set to work.

    Imports nothing of the trainer. In a host, render it inside the tab that the host asks for (A1111: return it from
    `on_ui_tabs`); polling needs the host's queue, and a Refresh button does the same without.

    Args:
        place: folders, interpreter and rights; `may_start=False` where others than this machine reach the host.
        desk: the actions behind the page; made for `place` by default.
    """
    desk = desk or Desk(place)
    if place.may_start:
        desk.queue.serve()
    with compat.blocks(TITLE) as page, gr.Column(elem_id="apl-root"):
        compat.html(pages.style() + pages.top(place))
        compat.html(lambda: _strip(desk), every=FAST, elem_id="apl-strip")
        with gr.Tabs() as tabs:
            with gr.Tab("New prefix", id="new"):
                new = gr.Column()
            with gr.Tab("Runs", id="runs"):
                screen, everything = view_runs.build(desk)
            with gr.Tab("Compare", id="compare") as compare:
                again = view_compare.build(desk)
                compat.on(compare.select, *again)
            with gr.Tab("Use and share", id="share") as share:
                again = view_share.build(desk)
                compat.on(share.select, *again)

        def started(said: Said) -> tuple[Any, ...]:
            """After a start the page goes on to the run; after a refusal it stays where the answer is."""
            if not said.run:
                return tuple(compat.update() for _ in range(2 + len(screen.shown)))
            choice = compat.update(choices=desk.names(), value=desk.selected or None)
            return compat.update(selected="runs"), choice, *everything()

        with new:
            view_new.build(desk, started, [tabs, screen.picker, *screen.shown])
    return page


def _strip(desk: Desk) -> str:
    waiting = desk.queue.waiting()
    busy = [job for job in waiting if job.state == RUNNING]
    active = desk.run(busy[0].run.name) if busy else None
    return pages.strip(active, len(waiting) - len(busy), tell=desk.place.may_start)


def serve(place: Place, *, address: str = "127.0.0.1", port: int | None = None, open_browser: bool = True,
          auth: tuple[str, str] | None = None, quiet: bool = False) -> Any:
    """Serves the page by itself and returns gradio's (app, local address, shared address)."""
    return compat.launch(build(place), address=address, port=port, open_browser=open_browser, auth=auth, quiet=quiet)
