"""Preview Encoded Text: how a CLIP cuts a prompt into chunks, and what stands in each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy_api.latest import io, ui

from .clip_patch import Layout, layouts_of
from .schema import schema

PLAIN_ROOM = 75


def _words(entries: Sequence[tuple], names: dict[int, str]) -> str:
    """Tokens as text again; what is not a word of the vocabulary in brackets, emphasis as it is written."""
    parts: list[tuple[str, float]] = []
    for token, weight in entries:
        shown = "[embedding]" if not isinstance(token, int) else names.get(token, "?")
        shown = shown.replace("</w>", " ")
        if parts and parts[-1][1] == weight:
            parts[-1] = (parts[-1][0] + shown, weight)
        else:
            parts.append((shown, weight))
    return " ".join(text.strip() if weight == 1 else f"({text.strip()}:{weight:g})" for text, weight in parts).strip()


def _user_entries(chunk: Sequence[tuple], tokenizer: Any, layout: Layout | None) -> list[tuple]:
    """(token, weight) between the start and the first end token, without the prefix."""
    rows = {id(row) for row in layout.rows} if layout else set()
    entries = [(entry[0], entry[1]) for entry in chunk[1:]]
    end = next((at for at, (token, _) in enumerate(entries)
                if not torch.is_tensor(token) and token == tokenizer.end_token), len(entries))
    return [entry for entry in entries[:end] if id(entry[0]) not in rows]


def chunk_report(clip: Any, text: str) -> str:
    """One paragraph a text encoder, one line a chunk: tokens used of those there is room for, and the words.

    Raises:
        PlacementError: the CLIP's overflow is "error" and the text is too long.
    """
    tokens, layouts, paragraphs = clip.tokenize(text), layouts_of(clip), []
    for name, tokenizer in vars(clip.tokenizer).items():
        key = name.removeprefix("clip_")
        if key not in tokens or not hasattr(tokenizer, "inv_vocab"):
            continue
        layout = layouts.get(name)
        chunks = [_user_entries(chunk, tokenizer, layout) for chunk in tokens[key]]
        room = layout.room if layout else PLAIN_ROOM
        prefix = f"{len(layout.rows)} prefix vectors in each" if layout else "no prefix"
        count = f"{len(chunks)} chunk{'s' if len(chunks) != 1 else ''}"
        lines = [f"{name}: {count}, {prefix}"]
        lines += [f"  {i}: {len(used)}/{room} tokens: {_words(used, tokenizer.inv_vocab)}"
                  for i, used in enumerate(chunks, start=1)]
        paragraphs.append("\n".join(lines))
    return "\n".join(paragraphs) or "This CLIP has no tokenizer whose chunks can be shown."


class PreviewEncodedText(io.ComfyNode):
    """Shows what a text encoder will read: people see their chunk boundaries move when a prefix comes in."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="APL_PreviewEncodedText",
            display_name="Preview Encoded Text",
            description="Shows how a prompt is cut into chunks, how many of the tokens of each are used, and whether "
            "an anonymization prompt stands in them. Works with a plain CLIP too.",
            search_aliases=["tokens", "token count", "chunks", "APL"],
            is_output_node=True,
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP that encodes the text: the one from Anonymize, or a plain one "
                              "for comparison."),
                io.String.Input("text", multiline=True, default="", tooltip="The prompt, as in CLIP Text Encode."),
            ],
            outputs=[io.String.Output("report", tooltip="The same as text.")],
        )

    @classmethod
    def execute(cls, clip: Any, text: str) -> io.NodeOutput:
        report = chunk_report(clip, text)
        return io.NodeOutput(report, ui=ui.PreviewText(report))


NODES = [PreviewEncodedText]
