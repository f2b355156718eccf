"""Odd files: every one gives pixels or a reason, never an exception, and the pixels are what they should be."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from apl_train.folder_score.odd_pictures import LEAST, LONGEST, open_any

COLOURS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def saved(picture: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def png16(values: np.ndarray, colour: int) -> bytes:
    """A 16-bit PNG by hand; values uint16 [H, W, channels]; colour 0 grey, 2 RGB."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_an_ordinary_picture_has_no_notes() -> None:
    found = open_any(saved(COLOURS))
    assert found.notes == () and (found.pixels == COLOURS).all() and found.askable


@pytest.mark.parametrize(("data", "reason"), [
    (b"", "empty"), (b"hello", "broken, or none of"), (saved(COLOURS)[:200], "broken"),
    (saved(COLOURS, "JPEG")[:300], "broken"), (b"\x89PNG\r\n\x1a\n" + b"x" * 40, "broken"),
    (b"P6\n5000 5000\n255\n" + b"\0" * 100, "broken, or none of"),
])
def test_broken_files_give_the_reason(data: bytes, reason: str) -> None:
    found = open_any(data)
    assert found.pixels is None and not found.askable and reason in found.notes[-1]


def test_too_many_pixels_are_refused_from_the_header() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    for edge in (9000, 60000):
        data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", edge, edge, 8, 2, 0, 0, 0))
        found = open_any(data + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b""))
        assert found.pixels is None and "too large" in found.notes[-1]


def test_sixteen_bits_are_scaled_not_cut() -> None:
    grey = np.linspace(0, 65535, 40 * 40).astype(np.uint16).reshape(40, 40, 1)
    found = open_any(png16(grey, 0))
    assert found.pixels[..., 0] == pytest.approx(grey[..., 0] / 257, abs=0.51)
    assert "16 bits a channel, read as 8" in found.notes and "grey" in found.notes
    colour = np.random.default_rng(1).integers(0, 65536, (40, 50, 3)).astype(np.uint16)
    found = open_any(png16(colour, 2))
    assert found.pixels.shape == (40, 50, 3) and "16 bits a channel, read as 8" in found.notes
    assert found.pixels == pytest.approx(colour / 257, abs=1.01)


def test_floating_point_is_scaled_to_its_range() -> None:
    values = np.linspace(-3, 5, 40 * 40, dtype=np.float32).reshape(40, 40)
    found = open_any(saved(Image.fromarray(values), "TIFF"))
    assert found.pixels[0, 0, 0] == 0 and found.pixels[-1, -1, 0] == 255
    assert any("floating point" in note for note in found.notes)
    flat = open_any(saved(Image.fromarray(np.full((40, 40), np.nan, np.float32)), "TIFF"))
    assert (flat.pixels == 0).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_counts(kind: str) -> None:
    frames = [Image.new("RGB", (48, 48), colour) for colour in ("red", "lime", "blue")]
    found = open_any(saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=50,
                           **({"lossless": True} if kind == "WEBP" else {})))
    assert found.pixels[20, 20] == pytest.approx([255, 0, 0], abs=3)
    assert "animated: the first of 3 counts" in found.notes


def test_grey_cmyk_transparent_and_turned() -> None:
    assert "grey" in open_any(saved(COLOURS[..., 0])).notes
    cmyk = open_any(saved(Image.fromarray(COLOURS).convert("CMYK"), "TIFF"))
    assert "CMYK colours, converted to RGB" in cmyk.notes and cmyk.pixels == pytest.approx(COLOURS, abs=2)
    rgba = np.dstack([COLOURS, np.full((40, 60), 255, np.uint8)])
    rgba[:20, :, 3] = 0
    found = open_any(saved(rgba))
    assert "transparent, put on white" in found.notes and (found.pixels[:20] == 255).all()
    assert (found.pixels[20:] == COLOURS[20:]).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees
    turned = open_any(saved(COLOURS, exif=exif))
    assert "turned upright as its EXIF says" in turned.notes
    assert (turned.pixels == np.rot90(COLOURS, 3)).all()


def test_tiny_narrow_and_large() -> None:
    tiny = open_any(saved(COLOURS[:8, :8]))
    assert not tiny.askable and tiny.pixels is not None and tiny.notes == (
        "tiny: 8 x 8 pixels, no face can be looked for",)
    small = open_any(saved(COLOURS[: LEAST + 4, : LEAST + 4]))
    assert small.askable and small.notes == ("tiny: 20 x 20 pixels",)
    strip = open_any(saved(np.zeros((40, 1600, 3), np.uint8)))
    assert not strip.askable and "narrow strip" in strip.notes[-1]
    large = open_any(saved(np.zeros((1000, LONGEST * 2, 3), np.uint8)))
    assert large.pixels.shape == (500, LONGEST, 3)


@settings(max_examples=60)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]), st.data())
def test_damage_anywhere_never_raises(kind: str, data: st.DataObject) -> None:
    sound = bytearray(saved(COLOURS, kind))
    for _ in range(data.draw(st.integers(1, 8))):
        sound[data.draw(st.integers(0, len(sound) - 1))] = data.draw(st.integers(0, 255))
    found = open_any(bytes(sound[: data.draw(st.integers(0, len(sound)))]))
    assert found.pixels is None or (found.pixels.dtype == np.uint8 and found.pixels.shape[2] == 3)
    assert found.pixels is not None or found.notes
