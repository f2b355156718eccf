"""Compare: pictures made without and with the prefix at the same seeds, side by side."""

from __future__ import annotations

import numpy as np
import torch
from comfy_api.latest import io

from ..apl_core.errors import ScoreError
from .pictures import captioned, to_bytes, to_images
from .schema import schema

GAP = 4


def paired(off: torch.Tensor, on: torch.Tensor, columns: int, off_caption: str, on_caption: str) -> torch.Tensor:
    """float [N, H, W, 3] twice -> float32 [1, h, w, 3]: pairs side by side, `columns` pairs a row.

    Raises:
        ScoreError: the numbers or sizes of the pictures differ.
    """
    if off.shape[:3] != on.shape[:3]:
        def shown(images: torch.Tensor) -> str:
            return f"{images.shape[0]} pictures of {images.shape[2]} x {images.shape[1]}"

        raise ScoreError(f"off has {shown(off)}, on has {shown(on)}.",
                         "Make both with the same size, batch and seed; only the CLIP should differ.", field="on")
    pairs = [
        np.concatenate([captioned(a, off_caption), captioned(b, on_caption)], axis=1)
        for a, b in zip(to_bytes(off), to_bytes(on), strict=True)
    ]
    height, width = pairs[0].shape[:2]
    columns = min(columns, len(pairs))
    rows = -(-len(pairs) // columns)
    grid = np.zeros((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), np.uint8)
    for index, pair in enumerate(pairs):
        y, x = index // columns * (height + GAP), index % columns * (width + GAP)
        grid[y : y + height, x : x + width] = pair
    return to_images([grid])


class CompareGrid(io.ComfyNode):
    """Puts pairs into one picture, to be looked at or saved."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="APL_CompareGrid",
            display_name="Compare Off / On",
            description="Puts pictures made without and with an anonymization prompt side by side. Use the same seed "
            "for both, so that nothing else differs.",
            search_aliases=["A/B", "grid", "before after", "APL"],
            inputs=[
                io.Image.Input("off", tooltip="Pictures made with the checkpoint's own CLIP."),
                io.Image.Input("on", tooltip="Pictures made with the anonymized CLIP, the same seeds and size."),
                io.Int.Input("columns", default=2, min=1, max=16, tooltip="Pairs in a row."),
                io.String.Input("off_caption", default="off", display_name="off caption",
                                tooltip="Written above the left picture of each pair."),
                io.String.Input("on_caption", default="on", display_name="on caption",
                                tooltip="Written above the right picture of each pair."),
            ],
            outputs=[io.Image.Output("grid", tooltip="One picture with all pairs.")],
        )

    @classmethod
    def execute(
        cls, off: torch.Tensor, on: torch.Tensor, columns: int, off_caption: str, on_caption: str
    ) -> io.NodeOutput:
        return io.NodeOutput(paired(off, on, columns, off_caption, on_caption))


NODES = [CompareGrid]
