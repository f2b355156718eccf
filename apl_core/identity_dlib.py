"""Faces through dlib: its frontal detector, five landmarks and the 128 numbers of its ResNet.

Step image -> score. Wheels (`dlib-bin`) and weights (`face_recognition_models`, public domain) come from the package
index, so this recogniser of photographs can be had without any download by hand. dlib compares by distance; features of
two strangers have a cosine around 0.87 already, so an ID-ACC of dlib is only to be read beside that of strangers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from .errors import ScoreError
from .faces import Face, largest_first, with_border
from .id_scores import normalise
from .onnx_models import checked_image, file_hash
from .recognisers import DEFAULT_ROOT, model_note

LANDMARKS = "shape_predictor_5_face_landmarks.dat"
RECOGNISER = "dlib_face_recognition_resnet_model_v1.dat"
CHIP, PADDING = 150, 0.25  # what the weights were trained with
UPSAMPLE_BELOW = 800
"""Pictures with a shorter longer edge are doubled for the detector, which sees no face below 80 pixels."""


class DlibEmbedder:
    """dlib with its weights from `root`/models/dlib, or from the package face_recognition_models.

    Args:
        root: folder that holds models/dlib; ~/.insightface when not given.
        det_threshold: least score of a face; dlib's scale starts at 0 and has no upper end.

    Raises:
        ScoreError: dlib or its weights are missing (with the command), or they are damaged.
    """

    name = "dlib"

    def __init__(self, root: str | Path | None = None, *, det_threshold: float = 0.0) -> None:
        self.note = model_note("dlib", root)
        try:
            import dlib
        except ImportError as error:
            raise ScoreError("dlib is not installed.", f"Install it: {self.note.command}. {self.note.licence}",
                             field="dlib") from error
        folder = self._weights(Path(root or DEFAULT_ROOT).expanduser() / "models" / "dlib")
        try:
            self._landmarks = dlib.shape_predictor(str(folder / LANDMARKS))
            self._recogniser = dlib.face_recognition_model_v1(str(folder / RECOGNISER))
        except RuntimeError as error:
            raise ScoreError(f"dlib's weights in {folder} cannot be loaded: {error}",
                             f"Install them again: {self.note.command}", field="recogniser") from error
        self._dlib, self._detector = dlib, dlib.get_frontal_face_detector()
        self._det_threshold, self._busy = det_threshold, Lock()
        self.sha256 = file_hash(folder / RECOGNISER)
        self.settings = {"detector": "dlib frontal", "landmarks": file_hash(folder / LANDMARKS), "det_size": "whole",
                         "det_threshold": det_threshold, "upsample_below": UPSAMPLE_BELOW, "chip": CHIP,
                         "padding": PADDING}

    def _weights(self, folder: Path) -> Path:
        package = importlib.util.find_spec("face_recognition_models")  # found, not imported: it needs setuptools
        places = package.submodule_search_locations or () if package else ()
        for home in (folder, *(Path(place) / "models" for place in places)):
            if (home / LANDMARKS).is_file() and (home / RECOGNISER).is_file():
                return home
        raise ScoreError(f"{LANDMARKS} and {RECOGNISER} are neither in {folder} nor installed.",
                         f"Install them: {self.note.command}. {self.note.licence}", field="recogniser")

    def faces(self, image: NDArray[np.uint8]) -> list[Face]:
        """uint8 [H, W, 3] RGB -> its faces, largest first; tried once more with a border when there is none."""
        rgb = np.ascontiguousarray(checked_image(image))
        with self._busy:  # a server may ask from several threads
            return self._faces(rgb)

    def _faces(self, rgb: NDArray[np.uint8]) -> list[Face]:
        found, looked_at, border = with_border(rgb, self._detect)
        if not found:
            return []
        shapes = self._dlib.full_object_detections()
        for box, _ in found:
            shapes.append(self._landmarks(looked_at, box))
        chips = self._dlib.get_face_chips(looked_at, shapes, size=CHIP, padding=PADDING)
        features = normalise(np.array([self._recogniser.compute_face_descriptor(chip) for chip in chips]))
        return largest_first([
            Face(tuple(float(v) - border for v in (box.left(), box.top(), box.right() + 1, box.bottom() + 1)),
                 float(score), feature)
            for (box, score), feature in zip(found, features.astype(np.float32), strict=True)
        ])

    def _detect(self, rgb: NDArray[np.uint8]) -> list[tuple[object, float]]:
        doubled = int(max(rgb.shape[:2]) < UPSAMPLE_BELOW)
        boxes, scores, _ = self._detector.run(rgb, doubled, self._det_threshold)
        return list(zip(boxes, scores, strict=True))

    def faces_of(self, images: Sequence[NDArray[np.uint8]]) -> list[list[Face]]:
        """`faces` of every picture, one after the other: dlib's detector keeps its pyramid between calls."""
        return [self.faces(image) for image in images]
