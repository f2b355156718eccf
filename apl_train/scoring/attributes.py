"""Reading attributes (gender, hair, glasses, ...) off generated faces, and Attr-ACC (APL sec. 4.3).

Step image -> score. A prefix should remove who somebody is and keep what the description says of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apl_core.errors import ScoreError
from apl_core.onnx_models import (
    BATCH,
    file_hash,
    open_session,
    read_json,
    run_session,
    sibling,
    to_frame,
    unit_range,
    whole,
)

Classes = Mapping[str, str]
"""Head ("gender") to class ("female")."""


class AttributeReader:
    """An attribute model described by an attributes.json with its ONNX file beside it.

    `{"model": "attributes.onnx", "frame": 128, "heads": {"gender": ["female", "male"], ...}}`; the model takes RGB
    (x - 127.5) / 127.5 as float32 [N, 3, frame, frame] and gives logits [N, k] for every head under the head's name.

    Raises:
        ScoreError: a field is missing or wrong, the file is missing, damaged or elsewhere, outputs do not fit heads.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        values = read_json(path)
        self.frame = whole(values.get("frame"), 16, 4096, "frame")
        self.heads = _heads(values.get("heads"))
        model = sibling(path.parent, values.get("model"), "model")
        self._session = open_session(model)
        found = {output.name: output.shape for output in self._session.get_outputs()}
        for head, classes in self.heads.items():
            count = found[head][-1] if found.get(head) else None
            if head not in found or (isinstance(count, int) and count != len(classes)):
                raise ScoreError(f"heads.{head} has {len(classes)} classes; the model has {count or 'no such output'}.",
                                 "Copy attributes.json and its model together.", field="heads")
        self.sha256 = file_hash(model)

    def read(self, images: NDArray[np.uint8] | Sequence[NDArray[np.uint8]]) -> list[dict[str, str]]:
        """uint8 [N, H, W, 3] RGB (or a list of [H, W, 3]) -> the likeliest class of every head, for every picture.

        Pictures of another size are brought to the model's frame. What is read off a picture without a face means
        nothing; `attr_acc` takes None for it.
        """
        read: list[dict[str, str]] = []
        for start in range(0, len(images), BATCH):
            frames = np.stack([to_frame(image, self.frame) for image in images[start : start + BATCH]])
            logits = run_session(self._session, unit_range(frames))
            best = {head: logits[head].reshape(len(frames), -1).argmax(axis=1) for head in self.heads}
            read += [{head: self.heads[head][int(best[head][i])] for head in self.heads} for i in range(len(frames))]
        return read


def _heads(value: object) -> dict[str, tuple[str, ...]]:
    if not isinstance(value, dict) or not value:
        raise ScoreError(f"heads is {value!r}, not an object of classes.", "Copy attributes.json again.", field="heads")
    heads: dict[str, tuple[str, ...]] = {}
    for head, classes in value.items():
        good = isinstance(classes, list) and len(classes) > 1 and all(isinstance(c, str) and c for c in classes)
        if not good or len(set(classes)) != len(classes):
            raise ScoreError(f"heads.{head} is {classes!r}, not a list of two or more different classes.",
                             "Copy attributes.json again.", field=f"heads.{head}")
        heads[head] = tuple(classes)
    return heads


def attr_acc(predicted: Sequence[Classes | None], truth: Sequence[Classes]) -> float:
    """Attr-ACC: the share of heads that are right in a picture, averaged over the pictures with a face.

    The paper takes the cosine of FaRL features (sec. 4.3); named classes are what c2 speaks of, so that is what is
    compared here. Heads without a true class are skipped; a picture without any head to compare is left out.

    Args:
        predicted: one entry a picture, in order; None where there is no face (`face_rate` counts those).
        truth: what each picture should show.

    Returns:
        0 to 1; NaN when no picture can be compared.

    Raises:
        ScoreError: the lengths differ.
    """
    if len(predicted) != len(truth):
        raise ScoreError(f"{len(predicted)} pictures were read, {len(truth)} should have been.", field="truth")
    shares = []
    for said, true in zip(predicted, truth, strict=True):
        shared = [head for head in true if head in said] if said is not None else []
        if shared:
            shares.append(sum(said[head] == true[head] for head in shared) / len(shared))
    return float(np.mean(shares)) if shares else math.nan
