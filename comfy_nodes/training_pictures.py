"""What a training drew, as one picture: a row without the prefix, then a row for every level, a column a person."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .pictures import captioned

FOLDER = "previews"


def levels(run: Path) -> list[dict[str, Any]]:
    """What the trainer wrote of its levels, by step: {"step", "persons": [{"off", "on", "off_score", "on_score"}]}."""
    found = []
    for path in sorted((run / FOLDER).glob("step-*.json")):
        try:
            found.append(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError):  # being written; the next look finds it
            continue
    return [each for each in found if each.get("persons")]


def mean_score(level: dict[str, Any], state: str) -> float | None:
    """Mean identity score of a level's pictures, `state` "off" or "on"; None where there is no recogniser."""
    scores = [person[f"{state}_score"] for person in level["persons"] if person.get(f"{state}_score") is not None]
    return sum(scores) / len(scores) if scores else None


def grid(run: Path, found: Sequence[dict[str, Any]]) -> NDArray[np.uint8] | None:
    """uint8 [H, W, 3] of the levels `found`; None before the first picture."""
    rows = []
    for state, level in [("off", level) for level in found[:1]] + [("on", level) for level in found]:
        try:
            pictures = [np.asarray(Image.open(run / FOLDER / person[state]).convert("RGB"))
                        for person in level["persons"]]
        except OSError:
            continue
        score = mean_score(level, state)
        title = "off" if state == "off" else f"step {level['step']}"
        rows.append(captioned(np.concatenate(pictures, axis=1),
                              title if score is None else f"{title}: mean identity score {score:.2f}"))
    return np.concatenate(rows) if rows else None
