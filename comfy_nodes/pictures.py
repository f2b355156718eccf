"""Between the host's pictures (float32 [N, H, W, 3] RGB in 0..1) and bytes, and what is drawn on them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

BAND = 24
_INK, _PAPER = (235, 235, 235), (24, 24, 24)
GREEN, RED, GREY = (60, 200, 90), (235, 80, 70), (150, 150, 150)


def to_bytes(images: torch.Tensor) -> list[NDArray[np.uint8]]:
    """float [N, H, W, 3 or 4] in 0..1 -> N times uint8 [H, W, 3]; an alpha channel is left out."""
    values = images[..., :3].detach().to("cpu", torch.float32).clamp(0, 1).mul(255).round().to(torch.uint8).numpy()
    return [np.ascontiguousarray(value) for value in values]


def to_images(pictures: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
    """uint8 [H, W, 3] of one size -> float32 [N, H, W, 3] in 0..1."""
    return torch.from_numpy(np.stack(pictures).astype(np.float32) / 255)


def captioned(picture: NDArray[np.uint8], caption: str) -> NDArray[np.uint8]:
    """The picture below a band of `BAND` pixels with a line of text."""
    height, width = picture.shape[:2]
    canvas = Image.new("RGB", (width, height + BAND), _PAPER)
    canvas.paste(Image.fromarray(picture), (0, BAND))
    ImageDraw.Draw(canvas).text((5, BAND // 2 - 6), caption, fill=_INK)
    return np.asarray(canvas)


def boxed(
    picture: NDArray[np.uint8], boxes: Sequence[tuple[tuple[float, float, float, float], tuple[int, int, int]]]
) -> NDArray[np.uint8]:
    """The picture with rectangles (x0, y0, x1, y1) drawn on it, each in its colour."""
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    line = max(1, min(picture.shape[:2]) // 160)
    for (x0, y0, x1, y1), colour in boxes:
        draw.rectangle((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)), outline=colour, width=line)
    return np.asarray(canvas)
