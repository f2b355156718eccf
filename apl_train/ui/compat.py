"""The only file that knows which gradio this is: 3.41, 4.40, 5 and 6 differ in a handful of names.

Everything else in this package is written to what all of them have: `gr.update`, `every=` on a component whose value is
a function, events without javascript, styles in the page itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

Listener = tuple[Callable[..., Any], Sequence[Any], Sequence[Any]]
"""A function, the components whose values it gets, and those that take what it returns."""
MAJOR = int(gr.__version__.split(".")[0])


def blocks(title: str) -> gr.Blocks:
    return gr.Blocks(title=title, analytics_enabled=False)


def html(value: str | Callable[[], str] = "", *, every: float | None = None, **options: Any) -> gr.HTML:
    """HTML without the frame and padding that newer versions add. With `every` (seconds) a function is asked again."""
    if MAJOR >= 5:
        options.setdefault("padding", False)
    if MAJOR >= 6:
        options.setdefault("apply_default_css", False)
    return gr.HTML(value, every=every, **options) if every else gr.HTML(value, **options)


def copy_box(label: str, value: str = "") -> gr.Textbox:
    """A line to copy from, with a button for it."""
    button: dict[str, Any] = {"buttons": ["copy"]} if MAJOR >= 6 else {"show_copy_button": True}
    # the beginning of a long line says what it is: nothing scrolls to its end
    return gr.Textbox(value=value, label=label, lines=3, max_lines=6, interactive=False, autoscroll=False,
                      elem_classes="apl-command", **button)


def on(event: Any, fn: Callable[..., Any], inputs: Sequence[Any] = (), outputs: Sequence[Any] = (), *,
       busy: bool = False) -> Any:
    """Attaches a listener. `busy`: show that it works, for what takes longer than a blink.

    Private to the page: no named endpoint, no place in the API's documentation.
    """
    hidden: dict[str, Any] = {"api_visibility": "private"} if MAJOR >= 6 else {"api_name": False}
    return event(fn, list(inputs), list(outputs), show_progress="minimal" if busy else "hidden", **hidden)


def update(**changes: Any) -> Any:
    return gr.update(**changes)


def launch(page: gr.Blocks, *, address: str, port: int | None, open_browser: bool, auth: Any, quiet: bool) -> Any:
    """Serves a page that stands alone, from this machine's own files only. Returns when it is up."""
    options: dict[str, Any] = {"server_name": address, "server_port": port, "inbrowser": open_browser, "auth": auth,
                               "quiet": quiet, "share": False, "prevent_thread_lock": True}
    if MAJOR >= 6:
        options |= {"footer_links": [], "ssr_mode": False}
    elif MAJOR == 5:
        options |= {"show_api": False, "ssr_mode": False}
    else:
        options |= {"show_api": False}
        page.queue()  # 3.41 asks for it before components can be polled
    return page.launch(**options)
