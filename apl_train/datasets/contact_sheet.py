"""Contact sheets: all pictures of a set, small and captioned, a hundred a page, to look at before hours of training."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from apl_core.atomic import write_bytes
from apl_train.datasets.pictures import decode

EDGE, COLUMNS, ROWS, GAP, LINE = 144, 10, 10, 8, 16
_PAPER, _INK = (250, 250, 248), (40, 40, 40)


@dataclass(frozen=True)
class Frame:
    """One picture of a sheet: its file and the words under it."""

    path: Path
    caption: str


def _fitted(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.ImageFont, width: int) -> str:
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text.rstrip() + "..."


def _drawable(text: str, font: ImageFont.ImageFont) -> str:
    """The text in letters that the font has: Pillow's oldest built-in one knows Latin-1 only."""
    return text if isinstance(font, ImageFont.FreeTypeFont) else text.encode("latin-1", "replace").decode("latin-1")


def sheet(frames: Sequence[Frame]) -> Image.Image:
    """One page. Raises DatasetError for a picture that cannot be read."""
    rows = -(-len(frames) // COLUMNS)
    step_x, step_y = EDGE + GAP, EDGE + LINE + GAP
    page = Image.new("RGB", (min(len(frames), COLUMNS) * step_x + GAP, rows * step_y + GAP), _PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default()
    for i, frame in enumerate(frames):
        x, y = GAP + i % COLUMNS * step_x, GAP + i // COLUMNS * step_y
        picture = Image.fromarray(np.asarray(decode(frame.path.read_bytes(), frame.path.name)))
        picture.thumbnail((EDGE, EDGE), Image.Resampling.LANCZOS)
        page.paste(picture, (x + (EDGE - picture.width) // 2, y + (EDGE - picture.height) // 2))
        words = _fitted(draw, _drawable(frame.caption, font), font, EDGE)
        draw.text((x, y + EDGE + 2), words, fill=_INK, font=font)
    return page


def write_sheets(folder: Path, frames: Sequence[Frame]) -> list[Path]:
    """`contact-sheet-1.jpg` and so on; sheets of an earlier, longer set are removed. Raises StorageError."""
    written, size = [], COLUMNS * ROWS
    for start in range(0, len(frames), size):
        data = io.BytesIO()
        sheet(frames[start : start + size]).save(data, "JPEG", quality=88)
        path = folder / f"contact-sheet-{start // size + 1}.jpg"
        write_bytes(path, data.getvalue())
        written.append(path)
    for old in folder.glob("contact-sheet-*.jpg"):
        if old not in written:
            old.unlink(missing_ok=True)
    return written
