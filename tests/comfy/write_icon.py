"""Writes web/icon.svg and web/icon.png, the node pack's icon: `python tests/comfy/write_icon.py`.

A frame of tokens, the learned ones filled, before a face without features. Plain shapes, drawn twice from one list.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

WEB = Path(__file__).resolve().parents[2] / "web"
SIZE = 400
"""The largest that the registry takes."""
INK, LEARNED, SKIN, PAPER = "#22303c", "#2a9d8f", "#cfd8dc", "#ffffff"
TOKENS = [(48 + 64 * at, 300, 48, 48, LEARNED if at < 2 else PAPER) for at in range(5)]
HEAD, SHOULDERS = (200, 120, 68), (80, 190, 320, 350)


def svg() -> str:
    """The icon as text."""
    x, y, r = HEAD
    left, top, right, bottom = SHOULDERS
    parts = [f'<rect width="{SIZE}" height="{SIZE}" rx="48" fill="{INK}"/>',
             f'<ellipse cx="{(left + right) // 2}" cy="{(top + bottom) // 2}" rx="{(right - left) // 2}" '
             f'ry="{(bottom - top) // 2}" fill="{SKIN}"/>',
             f'<circle cx="{x}" cy="{y}" r="{r}" fill="{SKIN}" stroke="{INK}" stroke-width="10"/>',
             f'<rect y="272" width="{SIZE}" height="{SIZE - 272 - 48}" fill="{INK}"/>',
             *(f'<rect x="{a}" y="{b}" width="{w}" height="{h}" rx="10" fill="{color}"/>'
               for a, b, w, h, color in TOKENS)]
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIZE} {SIZE}" width="{SIZE}" height="{SIZE}">'
            + "".join(parts) + "</svg>\n")


def png() -> Image.Image:
    """The same in pixels, drawn four times as large and made smaller."""
    scale = 4
    image = Image.new("RGBA", (SIZE * scale, SIZE * scale))
    draw = ImageDraw.Draw(image)

    def box(*corners: int) -> tuple[int, ...]:
        return tuple(corner * scale for corner in corners)

    draw.rounded_rectangle(box(0, 0, SIZE - 1, SIZE - 1), 48 * scale, INK)
    draw.ellipse(box(*SHOULDERS), SKIN)
    x, y, r = HEAD
    draw.ellipse(box(x - r - 5, y - r - 5, x + r + 5, y + r + 5), INK)
    draw.ellipse(box(x - r + 5, y - r + 5, x + r - 5, y + r - 5), SKIN)
    draw.rectangle(box(0, 272, SIZE - 1, SIZE - 49), INK)
    for a, b, w, h, color in TOKENS:
        draw.rounded_rectangle(box(a, b, a + w, b + h), 10 * scale, color)
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    (WEB / "icon.svg").write_text(svg(), encoding="utf-8")
    png().save(WEB / "icon.png", optimize=True)
