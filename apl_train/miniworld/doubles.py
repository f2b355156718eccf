"""Which doubles a named person is shown with: of the strangers of one description, those who look least like them.

A description tells no face, so pictures under it should show anybody but the person it was taken from. A small UNet
leans towards the face that it knows best; strangers who look otherwise pull it away. The second recogniser chooses, the
first one measures.
"""

from __future__ import annotations

import numpy as np

from apl_train.miniworld.recogniser import Recogniser, embed

KEPT = 0.34
"""Share of a person's doubles that is shown."""
SHOWN_PICTURES = 6
"""Pictures of a person that doubles are compared with."""


def look_alikes(model: Recogniser, pictures: np.ndarray, rows: list[dict], kept: float = KEPT) -> list[int]:
    """Rows of the doubles that look most like their person, to be left out.

    Args:
        pictures: uint8 [N, 128, 128, 3]; rows: their `kind` and `person`.
        kept: share of each person's doubles that stays, one at least.
    """
    found: list[int] = []
    for person in sorted({row["person"] for row in rows if row["kind"] == "double"}):
        own = [i for i, r in enumerate(rows) if r["kind"] == "person" and r["person"] == person][:SHOWN_PICTURES]
        doubles = [i for i, r in enumerate(rows) if r["kind"] == "double" and r["person"] == person]
        seen = embed(model, np.stack([pictures[i] for i in own])).mean(0)
        alike = embed(model, np.stack([pictures[i] for i in doubles])) @ seen
        found += [doubles[k] for k in np.argsort(alike, kind="stable")[max(1, round(kept * len(doubles))):]]
    return sorted(found)
