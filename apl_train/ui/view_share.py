"""Screen "Use and share": a finished prefix into the folders that hosts read, or into a file for other people."""

from __future__ import annotations

from typing import Any

import gradio as gr

from . import commands, compat, pages
from .core import core
from .desk import Desk

LICENCES = ["", "CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0", "MIT", "Apache-2.0"]


def build(desk: Desk) -> compat.Listener:
    """Draws the screen; returns what brings it up to date, for when its tab is opened."""
    found = desk.prefixes()
    chosen = desk.newest_prefix()
    known, allowed = desk.metadata(chosen), desk.place.may_start
    folders = "\n".join(map(str, desk.folders())) if allowed else "the prefix folders of this server"
    with gr.Row():
        prefix = gr.Dropdown(choices=found, value=chosen, label="Prefix (run @ step)", allow_custom_value=True,
                             scale=4, elem_id="apl-prefix")
        refresh = gr.Button("Refresh", size="sm", scale=1, min_width=90, elem_id="apl-share-refresh")
    with gr.Row():
        with gr.Column(min_width=320, elem_id="apl-card-use"):
            compat.html(pages.heading("Use this prefix", f"Copies it, checked, to:\n{folders}"))
            name = gr.Textbox(value=known.get("title", ""), label="Name to choose it by", elem_id="apl-use-name")
            replace = gr.Checkbox(value=False, label="Replace another prefix of that name")
            use = gr.Button("Use this prefix", variant="primary", interactive=allowed, elem_id="apl-use")
            used = compat.html(elem_id="apl-used")
            use_command = compat.copy_box("Copy as command")
        with gr.Column(min_width=320, elem_id="apl-card-publish"):
            compat.html(pages.heading("Publish", "Writes a copy with what others need to know in its metadata. Names "
                                                 "of persons are never part of a prefix file."))
            title = gr.Textbox(value=known.get("title", ""), label="Title", elem_id="apl-title")
            author = gr.Textbox(value=known.get("author", ""), label="Author", elem_id="apl-author")
            licence = gr.Dropdown(choices=LICENCES, value=known.get("license", ""), allow_custom_value=True,
                                  label="Licence", elem_id="apl-licence")
            text = gr.Textbox(value=known.get("description", ""), label="Description", lines=3,
                              elem_id="apl-description")
            publish = gr.Button("Write the file", interactive=allowed, elem_id="apl-publish")
            published = compat.html(elem_id="apl-published")
            publish_command = compat.copy_box("Copy as command")
    use_inputs, publish_inputs = [prefix, name, replace], [prefix, title, author, licence, text]

    def use_line(choice: str, called: str, _replace: bool) -> str:
        if not allowed:
            return ""
        try:
            return commands.shown(commands.use(desk.prefix_file(choice), desk.folders(), (called or "").strip()))
        except core("errors").APLError:
            return ""

    def publish_line(choice: str, *texts: str) -> str:
        if not allowed:
            return ""
        try:
            out = desk.published(choice, texts[0] or "")
            return commands.shown(commands.publish(desk.prefix_file(choice), out, *(t or "" for t in texts)))
        except core("errors").APLError:
            return ""

    def fill(choice: str) -> tuple[str, ...]:
        now = desk.metadata(choice)
        return tuple(now.get(key, "") for key in ("title", "title", "author", "license", "description"))

    def again(choice: str | None) -> Any:
        now = desk.prefixes()
        kept = choice if choice in now else desk.newest_prefix()
        return compat.update(choices=now, value=kept)  # a new value fills the fields, as a choice by hand does

    fields = [name, title, author, licence, text]
    compat.on(prefix.change, fill, [prefix], fields)
    listener = (again, [prefix], [prefix])
    compat.on(refresh.click, *listener)
    for component in use_inputs:
        compat.on(component.change, use_line, use_inputs, [use_command])
    for component in publish_inputs:
        compat.on(component.change, publish_line, publish_inputs, [publish_command])
    use_command.value = use_line(chosen or "", known.get("title", ""), False)
    publish_command.value = publish_line(chosen or "", known.get("title", ""), known.get("author", ""),
                                         known.get("license", ""), known.get("description", ""))
    compat.on(use.click, lambda *values: pages.said(desk.use(*(v if v is not None else "" for v in values))),
              use_inputs, [used])
    compat.on(publish.click, lambda *values: pages.said(desk.publish(*(v or "" for v in values))),
              publish_inputs, [published])
    return listener
