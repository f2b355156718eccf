"""Pictures side by side: grids with labels as arrays, and pictures as PNG or WebP bytes and data URIs (Pillow).

Everything is lossless and deterministic: the same arrays give the same bytes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from apl_core.errors import ScoreError

Colour = tuple[int, int, int]
PAPER: Colour = (255, 255, 255)
INK: Colour = (40, 43, 48)
MARGIN = 12
"""Pixels around a labelled grid and between labels and pictures."""


def tile(images: np.ndarray, gap: int = 4, background: Colour = PAPER) -> np.ndarray:
    """Put pictures in rows and columns, `gap` pixels apart, nothing around them.

    Args:
        images: uint8 [rows, columns, H, W, 3].
        gap: pixels between neighbours.
        background: RGB of the gaps.

    Returns:
        uint8 [rows * H + (rows - 1) * gap, columns * W + (columns - 1) * gap, 3]; picture (r, c) starts at
        (r * (H + gap), c * (W + gap)).

    Raises:
        ScoreError: not such an array, or no pictures, or a negative gap.
    """
    images = np.asarray(images)
    if images.ndim != 5 or images.shape[-1] != 3 or images.dtype != np.uint8 or 0 in images.shape:
        found = f"{images.dtype} {list(images.shape)}"
        raise ScoreError(
            f"images are {found}, not uint8 [rows, columns, H, W, 3] with pictures.",
            "Stack equally large RGB pictures.",
            field="images",
        )
    if gap < 0:
        raise ScoreError(f"gap is {gap}, below 0.", "Use 0 or more pixels.", field="gap")
    rows, columns, height, width, _ = images.shape
    sheet = np.empty((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), np.uint8)
    sheet[:] = background
    for r in range(rows):
        for c in range(columns):
            top, left = r * (height + gap), c * (width + gap)
            sheet[top : top + height, left : left + width] = images[r, c]
    return sheet


def _lines(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.ImageFont, room: int) -> list[str]:
    """`text` in lines no wider than `room` pixels; a word that is wider alone is cut with an ellipsis."""
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and draw.textlength(joined, font=font) <= room:
            lines[-1] = joined
            continue
        while len(word) > 1 and draw.textlength(word, font=font) > room:
            word = word.rstrip("…")[:-1] + "…"
        lines.append(word)
    return lines


def labelled(
    images: np.ndarray,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    *,
    gap: int = 4,
    size: int = 13,
    label_width: int = 110,
    background: Colour = PAPER,
    ink: Colour = INK,
) -> np.ndarray:
    """A grid with a label left of each row and above each column, for files that are looked at outside a page.

    Args:
        images: uint8 [rows, columns, H, W, 3].
        rows, columns: one label each, or None for none.
        size: height of the letters in pixels.
        label_width: pixels kept for row labels; longer ones are wrapped.

    Returns:
        uint8 [h, w, 3]; the pictures of `tile` end `MARGIN` pixels before the right and the lower edge.

    Raises:
        ScoreError: as `tile`, or the number of labels does not fit.
    """
    sheet = tile(images, gap, background)
    for field, labels, count in (("rows", rows, images.shape[0]), ("columns", columns, images.shape[1])):
        if labels is not None and len(labels) != count:
            raise ScoreError(f"{field} has {len(labels)} labels for {count}.", "Give one label each.", field=field)
    height, width = images.shape[2:4]
    font = ImageFont.load_default(size=size)
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    step = round(size * 1.3)
    heads = [_lines(pen, text, font, width) for text in columns] if columns is not None else []
    top = MARGIN + (max(1, *map(len, heads), 1) * step + MARGIN // 2 if heads else 0)
    left = MARGIN + (label_width + MARGIN if rows is not None else 0)
    canvas = Image.new("RGB", (left + sheet.shape[1] + MARGIN, top + sheet.shape[0] + MARGIN), background)
    canvas.paste(Image.fromarray(sheet), (left, top))
    draw = ImageDraw.Draw(canvas)
    for c, lines in enumerate(heads):
        centre = left + c * (width + gap) + width / 2
        for i, line in enumerate(lines):
            y = top - MARGIN // 2 - (len(lines) - i) * step
            draw.text((centre - draw.textlength(line, font=font) / 2, y), line, fill=ink, font=font)
    for r, text in enumerate(rows or ()):
        lines = _lines(draw, text, font, label_width)
        y = top + r * (height + gap) + height / 2 - len(lines) * step / 2
        for i, line in enumerate(lines):
            draw.text((left - MARGIN - draw.textlength(line, font=font), y + i * step), line, fill=ink, font=font)
    return np.asarray(canvas)


def fit(image: np.ndarray, edge: int) -> np.ndarray:
    """`image` made smaller so that no side exceeds `edge` pixels; smaller pictures come back untouched.

    Args:
        image: uint8 [H, W, 3].
    """
    height, width = image.shape[:2]
    if max(height, width) <= edge:
        return image
    scale = edge / max(height, width)
    small = Image.fromarray(image).resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.LANCZOS)
    return np.asarray(small)


def to_png(image: np.ndarray) -> bytes:
    """PNG of a picture, uint8 [H, W, 3], without any metadata."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def to_webp(image: np.ndarray) -> bytes:
    """Lossless WebP of a picture, uint8 [H, W, 3], without any metadata; a third smaller than PNG."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "WEBP", lossless=True, quality=60, method=4, exact=True)
    return buffer.getvalue()


def data_uri(image: np.ndarray) -> str:
    """A picture, uint8 [H, W, 3], as a `data:` URI, lossless: WebP, or PNG where Pillow was built without it."""
    mime, data = ("webp", to_webp(image)) if features.check("webp") else ("png", to_png(image))
    return f"data:image/{mime};base64,{base64.b64encode(data).decode('ascii')}"
