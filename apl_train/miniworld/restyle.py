"""Another way to render the same world: lit from a side, soft outlines, an out-of-focus background, grain.

What Realistic Vision is to Stable Diffusion 1.5: the same persons, captions and things, drawn in another style, so that
a fine-tune on them shows whether a prefix made on the first model still works.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

from apl_train.miniworld.render import SIZE
from apl_train.miniworld.text_tower import Pairs

NEAR = 10
"""How far a pixel may be from the colour of a corner, of 255, and still be background."""
LINES = (0.30, 0.19, 0.15)
"""Outlines are brown instead of black."""


def _smooth(rng: np.random.Generator, cells: int) -> np.ndarray:
    """A soft random field in 0..1, float32 [128, 128]."""
    small = (rng.random((cells, cells)) * 255).astype(np.uint8)
    return np.asarray(Image.fromarray(small).resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float32) / 255


def _background(picture: np.ndarray) -> np.ndarray:
    """Share of background of every pixel, float32 [128, 128]: of a corner's colour, and joined to the frame."""
    from scipy.ndimage import gaussian_filter, label

    corners = picture[[0, 0, -1, -1], [0, -1, 0, -1]].astype(int)
    plain = np.abs(picture.astype(int) - np.median(corners, axis=0)).max(-1) <= NEAR
    regions, _ = label(plain)
    edge = np.unique(np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]]))
    return gaussian_filter(np.isin(regions, edge[edge > 0]).astype(np.float32), 0.8)


def restyle(picture: np.ndarray, seed: int) -> np.ndarray:
    """uint8 [128, 128, 3] -> uint8 [128, 128, 3] in the other style; seeded, the same for the same picture and seed."""
    rng = np.random.default_rng(seed)
    soft = Image.fromarray(np.asarray(picture)).filter(ImageFilter.GaussianBlur(0.8))
    face = np.asarray(soft, np.float32) / 255
    x, y = np.meshgrid(np.linspace(-1, 1, SIZE), np.linspace(-1, 1, SIZE))
    light = 0.78 + 0.26 * (-0.6 * x - 0.8 * y) * (0.7 + 0.3 * rng.random()) + 0.12 * (_smooth(rng, 5) - 0.5)
    round_off = 1 - 0.22 * np.clip(x**2 + 0.5 * y**2, 0, 1)
    face = np.array(LINES, np.float32) + face * (1 - np.array(LINES, np.float32))
    face = face**1.25 * (light * round_off + 0.18)[..., None] * np.array([1.04, 1.0, 0.93], np.float32)
    colours = rng.random((2, 3)) * np.array([0.35, 0.4, 0.45]) + np.array([0.18, 0.2, 0.22])
    blend = _smooth(rng, 4)[..., None]
    behind = colours[0] * blend + colours[1] * (1 - blend)
    share = _background(np.asarray(picture))[..., None]
    out = face * (1 - share) + behind * share + rng.normal(0, 0.012, (SIZE, SIZE, 1))
    return (np.clip(out, 0, 1) * 255).round().astype(np.uint8)


def restyled_pairs(pairs: Pairs, about: Sequence[Mapping[str, Any]], *, own: int = 12, doubles: int = 12,
                   strangers: int = 1200, things: int = 3) -> Pairs:
    """The world's pictures in the other style: so many of each person, double, thing, and of strangers in all.

    about: what each of `pairs.things` is.
    """
    rng = random.Random(23)
    loners = [i for i, row in enumerate(pairs.rows) if row["kind"] == "stranger"]
    rows = sorted(i for of in pairs.own.values() for i in of[:own])
    rows += sorted(i for of in pairs.doubles.values() for i in of[:doubles]) + sorted(rng.sample(loners, strangers))
    seen: dict[str, int] = {}
    some = []
    for i, row in enumerate(about):
        seen[row["name"]] = seen.get(row["name"], 0) + 1
        if seen[row["name"]] <= things:
            some.append(i)
    drawn = [np.stack([restyle(np.asarray(every[i]), i) for i in tqdm(chosen, desc="restyle")])
             for every, chosen in ((pairs.faces, rows), (pairs.things, some))]
    return Pairs(pairs.captioner, drawn[0], [pairs.rows[i] for i in rows], drawn[1], [about[i] for i in some])
