"""The picture of a comparison: one row a method, the same persons and prompts at the same seeds in every column."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from apl_core.atomic import write_bytes
from apl_train.baselines.comparison import Comparison
from apl_train.report.grids import fit, labelled, to_png

EDGE = 96
LISTED, UNSEEN = 3, 3


def columns(comparison: Comparison) -> tuple[list[str], list[str]]:
    """Prompts of the picture's columns, and what is written above them."""
    named = [(p, "listed") for p in comparison.listed[:LISTED]] + [(p, "unseen") for p in comparison.unseen[:UNSEEN]]
    prompts = [comparison.tools.template.replace("{}", p.name) for p, _ in named]
    labels = [f"{kind}: {p.name}" for p, kind in named]
    for kind, label in (("unnamed_face", "nobody in particular"), ("nonface", "a thing")):
        own = [n.prompt for n in comparison.neutral if n.kind == kind][:1]
        prompts, labels = prompts + own, labels + [label] * len(own)
    return prompts, labels


class Strips:
    """Rows of the picture, kept in a work folder until all of them are there."""

    def __init__(self, comparison: Comparison, folder: Path) -> None:
        self._comparison = comparison
        key = hashlib.sha256(json.dumps(comparison.setup, sort_keys=True).encode()).hexdigest()[:12]
        self._folder = folder / key

    def take(self, name: str, source: Any) -> None:
        """Draws a method's row with its model."""
        prompts, _ = columns(self._comparison)
        tools = self._comparison.tools
        images = source.sample(prompts, list(range(1, len(prompts) + 1)), steps=tools.steps,
                               guidance=tools.guidance).images
        write_bytes(self._folder / f"{name}.png", to_png(np.concatenate(list(images), axis=1)))

    def missing(self, names: Sequence[str]) -> list[str]:
        """Methods whose row was not drawn."""
        return [name for name in names if not (self._folder / f"{name}.png").exists()]

    def picture(self, methods: Mapping[str, Mapping[str, Any]], path: Path) -> Path:
        """Writes the picture of these methods, in their order."""
        _, labels = columns(self._comparison)
        rows = []
        for name in methods:
            with Image.open(self._folder / f"{name}.png") as strip:
                pictures = np.split(np.asarray(strip.convert("RGB")), len(labels), axis=1)
            rows.append(np.stack([fit(np.ascontiguousarray(p), EDGE) for p in pictures]))
        write_bytes(path, to_png(labelled(np.stack(rows), [m["title"] for m in methods.values()], labels)))
        return path
