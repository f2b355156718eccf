"""Faces at a fixed place, for worlds in which detection is a yes/no model and a crop: the miniature recogniser.

Step image -> score. Recognition runs through insightface's `ArcFaceONNX` class, as for photographs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ScoreError
from .faces import Face
from .id_scores import normalise
from .onnx_models import (
    BATCH,
    file_hash,
    need,
    open_session,
    read_json,
    run_session,
    sibling,
    to_frame,
    unit_range,
    whole,
)


class StillEmbedder:
    """Faces at a fixed place, described by a recogniser.json with the ONNX files beside it.

    `{"name", "recogniser", "detector": {"kind": "still", "presence", "crop": [x0, y0, x1, y1], "frame", "threshold"}}`.
    A picture is brought to frame x frame pixels; `presence` (one logit) says whether there is a face, `crop` where.

    Raises:
        ScoreError: a field is missing or wrong (named in `field`), a file is missing, damaged or elsewhere.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        values = read_json(path)
        self.name = values.get("name") or path.stem
        if not isinstance(self.name, str):
            raise ScoreError(f"name is {self.name!r}, not text.", "Correct name.", field="name")
        detector = values.get("detector")
        if not isinstance(detector, dict) or detector.get("kind") != "still":
            raise ScoreError(f"detector is {detector!r}; its kind must be 'still'.", "Copy the file again.",
                             field="detector")
        self.frame = whole(detector.get("frame"), 16, 4096, "frame")
        self.crop = self._crop(detector.get("crop"))
        threshold = detector.get("threshold", 0.5)
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 < threshold < 1:
            raise ScoreError(f"threshold is {threshold!r}, not between 0 and 1.", "Use 0.5.", field="threshold")
        self.threshold = float(threshold)
        recogniser = sibling(path.parent, values.get("recogniser"), "recogniser")
        presence = sibling(path.parent, detector.get("presence"), "presence")
        arcface = need("insightface.model_zoo.arcface_onnx").ArcFaceONNX
        self._presence, session = open_session(presence), open_session(recogniser)
        try:
            self._arcface = arcface(str(recogniser), session=session)
        except Exception as error:  # its assertions
            raise ScoreError(f"{recogniser.name} is not a recogniser: it must have one input and one output.",
                             "Export the recogniser again.", field="recogniser") from error
        if self._arcface.input_mean != 127.5:  # insightface guesses this from node names
            raise ScoreError(f"{recogniser.name} normalises its input itself.",
                             "Export it without that: it must take (x - 127.5) / 127.5.", field="recogniser")
        self.sha256 = file_hash(recogniser)
        self.settings = {"presence": file_hash(presence), "crop": list(self.crop), "frame": self.frame,
                         "threshold": self.threshold}

    def _crop(self, value: Any) -> tuple[int, int, int, int]:
        if not isinstance(value, list | tuple) or len(value) != 4:
            raise ScoreError(f"crop is {value!r}, not four numbers.", "Write [x0, y0, x1, y1].", field="crop")
        x0, y0, x1, y1 = (whole(v, 0, self.frame, "crop") for v in value)
        if x1 - x0 < 8 or x1 - x0 != y1 - y0:
            raise ScoreError(f"crop is {value!r}, not a square of 8 or more pixels in {self.frame} x {self.frame}.",
                             "Write [x0, y0, x1, y1] with x0 < x1 and equal edges.", field="crop")
        return x0, y0, x1, y1

    def faces(self, image: NDArray[np.uint8]) -> list[Face]:
        """uint8 [H, W, 3] RGB -> one face or none."""
        return self.faces_of([image])[0]

    def faces_of(self, images: Sequence[NDArray[np.uint8]]) -> list[list[Face]]:
        """The face, if any, of every picture. Raises `ScoreError` for a picture that is not uint8 [H, W, 3]."""
        found: list[list[Face]] = []
        for start in range(0, len(images), BATCH):
            found += self._faces_of(images[start : start + BATCH])
        return found

    def _faces_of(self, images: Sequence[NDArray[np.uint8]]) -> list[list[Face]]:
        frames = np.stack([to_frame(image, self.frame) for image in images])
        logits = next(iter(run_session(self._presence, unit_range(frames)).values())).reshape(len(images), -1)[:, 0]
        scores = 0.5 * (1 + np.tanh(0.5 * logits.astype(np.float64)))  # the logistic function without overflow
        present = np.flatnonzero(scores >= self.threshold)
        found: list[list[Face]] = [[] for _ in images]
        if not present.size:
            return found
        x0, y0, x1, y1 = self.crop
        bgr = [np.ascontiguousarray(frames[i, y0:y1, x0:x1, ::-1]) for i in present]
        single = isinstance(self._arcface.input_shape[0], int)  # exported for a fixed number of pictures
        features = np.concatenate([self._arcface.get_feat(b) for b in bgr]) if single else self._arcface.get_feat(bgr)
        for i, embedding in zip(present, normalise(features).astype(np.float32), strict=True):
            height, width = images[i].shape[:2]
            edge = min(height, width)
            scale, dx, dy = edge / self.frame, (width - edge) // 2, (height - edge) // 2
            box = (x0 * scale + dx, y0 * scale + dy, x1 * scale + dx, y1 * scale + dy)
            found[i] = [Face(box, float(scores[i]), embedding)]
        return found
