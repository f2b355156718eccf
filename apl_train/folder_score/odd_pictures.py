"""Any picture file a person may have, as 8-bit RGB, with a note of everything unusual about it. Nothing is raised.

Step picture file -> pixels, for folders of people's own pictures. A training set refuses such files (`pictures`); a
check must go on, say which files were unusual and why, and count none of them as what it is not.
"""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from apl_train.datasets.pictures import MAX_PIXELS

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
LONGEST = 2048
"""Longest edge in pixels at which a picture is looked at; larger ones are reduced."""
TINY = 32
"""Pictures with a shorter edge are noted."""
NOT_ASKED = "no face can be looked for"
LEAST, NARROW = 16, 20
"""Below this edge in pixels, or above this ratio of the edges, no detector can find a face: it isn't asked."""
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, TypeError, KeyError, IndexError, OverflowError,
            MemoryError, zlib.error)
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, eq=False)
class Opened:
    """`pixels`: uint8 [H, W, 3] RGB, upright, or None when the file holds no sound picture. `notes`: what is unusual.

    `askable` is False for a picture in which no detector can find a face.
    """

    pixels: NDArray[np.uint8] | None
    notes: tuple[str, ...] = ()

    @property
    def askable(self) -> bool:
        if self.pixels is None:
            return False
        short, long = sorted(self.pixels.shape[:2])
        return short >= LEAST and long <= NARROW * short


def open_any(data: bytes) -> Opened:
    """The picture in a file's bytes; of an animation the first frame, 16 bits scaled to 8, transparency on white."""
    if not data:
        return Opened(None, ("broken: the file is empty",))
    notes: list[str] = []
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            width, height = picture.size  # from the header, before any pixel is unpacked
            if width * height > MAX_PIXELS:
                return Opened(None, (f"too large: {width} x {height} pixels",))
            frames = getattr(picture, "n_frames", 1)
            if frames > 1:
                kind = "animated" if picture.format in ("GIF", "WEBP", "PNG") else "several pictures in one file"
                notes.append(f"{kind}: the first of {frames} counts")
                picture.seek(0)
            picture.load()
            pixels = _to_rgb(picture, data, notes)
    except Image.DecompressionBombError:
        return Opened(None, ("too large: more pixels than can be trusted",))
    except UnidentifiedImageError:
        return Opened(None, (f"broken, or none of {', '.join(FORMATS)}",))
    except _DAMAGED as error:
        return Opened(None, (f"broken: {str(error) or type(error).__name__}",))
    opened = Opened(pixels, tuple(notes))
    if min(width, height) < TINY or not opened.askable:
        shape = "tiny" if min(width, height) < TINY else "a narrow strip"
        asked = "" if opened.askable else f", {NOT_ASKED}"
        opened = Opened(pixels, (*notes, f"{shape}: {width} x {height} pixels{asked}"))
    return opened


def _to_rgb(picture: Image.Image, data: bytes, notes: list[str]) -> NDArray[np.uint8]:
    try:
        orientation = picture.getexif().get(0x0112, 1)
        upright = ImageOps.exif_transpose(picture)
        if orientation not in (None, 1):
            notes.append("turned upright as its EXIF says")
    except _DAMAGED:
        upright = picture
        notes.append("its EXIF cannot be read")
    mode = upright.mode
    if mode.startswith("I") or mode == "F":
        upright = _eight_bits(upright, notes)
    elif data.startswith(_PNG) and data[24:25] == b"\x10":  # Pillow has already dropped the lower bytes
        notes.append("16 bits a channel, read as 8")
    if mode in ("1", "L", "LA", "La") or upright.mode == "L":
        notes.append("grey")
    if mode == "CMYK":
        notes.append("CMYK colours, converted to RGB")
    if upright.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in upright.info:
        whole = upright.convert("RGBA")
        if whole.getchannel("A").getextrema()[0] < 255:
            notes.append("transparent, put on white")
        upright = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole)
    rgb = upright.convert("RGB")
    if max(rgb.size) > LONGEST:
        rgb.thumbnail((LONGEST, LONGEST), Image.Resampling.BOX)
    return np.array(rgb, np.uint8)


def _eight_bits(picture: Image.Image, notes: list[str]) -> Image.Image:
    """16-bit, 32-bit and floating-point grey as mode L; the range is the type's, or the picture's own where unknown."""
    values = np.nan_to_num(np.asarray(picture).astype(np.float64), posinf=0, neginf=0)
    if picture.mode == "F":
        notes.append("floating point, scaled to its own range")
        low, high = float(values.min()), float(values.max())
        values = (values - low) * (255 / (high - low)) if high > low else np.zeros_like(values)
    else:
        deep = values.max(initial=0) > 255 or picture.mode != "I"
        notes.append("16 bits a channel, read as 8" if deep else "32-bit numbers of 8-bit size")
        values = values / 257 if deep else values
    return Image.fromarray(np.clip(np.round(values), 0, 255).astype(np.uint8))
