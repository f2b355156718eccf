"""A face in a picture, and what finds and embeds faces: the features that ID-ACC compares (APL sec. 4.1).

Step image -> score. The back-ends are `identity_insightface` (model packs such as auraface), `identity_sface` (OpenCV
alone), `identity_dlib`, and `identity_still` for worlds in which the face stands at a fixed place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Face:
    """One face: box (x0, y0, x1, y1) in the picture's pixels, detector's score, float32 [d] embedding of length 1."""

    box: tuple[float, float, float, float]
    score: float
    embedding: NDArray[np.float32]

    @property
    def area(self) -> float:
        """Square pixels of the box."""
        return max(0.0, self.box[2] - self.box[0]) * max(0.0, self.box[3] - self.box[1])


@runtime_checkable
class FaceEmbedder(Protocol):
    """Finds faces and embeds them. `sha256` is that of the recogniser's model file: thresholds hold for one only.

    A class may also have `settings`, a dict of JSON values that change its answers (detector size, threshold, ...).
    """

    name: str
    sha256: str

    def faces(self, image: NDArray[np.uint8]) -> list[Face]:
        """uint8 [H, W, 3] RGB -> its faces, largest first; empty when there is none."""
        ...

    def faces_of(self, images: Sequence[NDArray[np.uint8]]) -> list[list[Face]]:
        """`faces` of many pictures, in batches where possible."""
        ...


def largest_first(faces: list[Face]) -> list[Face]:
    """By area, equal ones by the detector's score."""
    return sorted(faces, key=lambda face: (-face.area, -face.score))


def with_border(
    image: NDArray[np.uint8], detect: Callable[[NDArray[np.uint8]], list[Any]]
) -> tuple[list[Any], NDArray[np.uint8], int]:
    """What `detect` finds; when it finds nothing, once more with a border of half the longer edge around the picture.

    Detectors miss faces that fill the frame, and close-up portraits are what ID-ACC is measured on (APL sec. 4.2).
    Returns what was found, the picture it was found in, and that picture's border in pixels.
    """
    found = detect(image)
    if found:
        return found, image, 0
    border = max(image.shape[:2]) // 2
    bordered = np.pad(image, ((border, border), (border, border), (0, 0)))
    return detect(bordered), bordered, border
