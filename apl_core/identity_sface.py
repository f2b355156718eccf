"""Faces through OpenCV alone: YuNet finds them, SFace embeds them (128 numbers). Nothing that a host could clash with.

Step image -> score. The two ONNX files are the user's, from the OpenCV model zoo; only `opencv-python` is needed, which
image hosts bring along.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from .errors import ScoreError
from .faces import Face, largest_first, with_border
from .id_scores import normalise
from .onnx_models import checked_image, file_hash, whole
from .recognisers import DEFAULT_ROOT, model_note

NMS, TOP_K = 0.3, 5000  # OpenCV's own defaults


class SFaceEmbedder:
    """YuNet and SFace from `root`/models/sface, which holds one *yunet*.onnx and one *sface*.onnx.

    Args:
        root: folder that holds models/sface; ~/.insightface when not given.
        det_size: longer edge in pixels to which every picture is brought for the detector.
        det_threshold: least score of a face.

    Raises:
        ScoreError: OpenCV or a file is missing (with the command), or a file is damaged.
    """

    name = "sface"

    def __init__(self, root: str | Path | None = None, *, det_size: int = 640, det_threshold: float = 0.6) -> None:
        self.note = model_note("sface", root)
        whole(det_size, 64, 4096, "det_size")
        try:
            import cv2
        except ImportError as error:
            raise ScoreError("opencv-python is not installed; SFace runs in it.",
                             "Install it: pip install opencv-python", field="opencv-python") from error
        if not hasattr(cv2, "FaceRecognizerSF"):
            raise ScoreError(f"OpenCV {cv2.__version__} has no FaceRecognizerSF.",
                             "Install a newer one: pip install 'opencv-python>=4.8'", field="opencv-python")
        folder = Path(root or DEFAULT_ROOT).expanduser() / "models" / "sface"
        detector, recogniser = self._file(folder, "yunet"), self._file(folder, "sface")
        try:
            self._detector = cv2.FaceDetectorYN.create(str(detector), "", (det_size, det_size), det_threshold, NMS,
                                                       TOP_K)
            self._recogniser = cv2.FaceRecognizerSF.create(str(recogniser), "")
        except cv2.error as error:
            raise ScoreError(f"{detector.name} or {recogniser.name} in {folder} cannot be loaded: {error}",
                             f"Fetch them again: {self.note.command}", field="recogniser") from error
        self._resize, self._area = cv2.resize, cv2.INTER_AREA
        self._det_size, self._busy = det_size, Lock()
        self.sha256 = file_hash(recogniser)
        self.settings = {"detector": file_hash(detector), "det_size": det_size, "det_threshold": det_threshold}

    def _file(self, folder: Path, word: str) -> Path:
        found = sorted(path for path in folder.glob("*.onnx") if word in path.name.lower())
        if not found:
            raise ScoreError(f"There is no *{word}*.onnx in {folder}.",
                             f"Fetch it: {self.note.command}. {self.note.licence}", field="recogniser")
        return found[0]

    def faces(self, image: NDArray[np.uint8]) -> list[Face]:
        """uint8 [H, W, 3] RGB -> its faces, largest first; tried once more with a border when there is none."""
        bgr = np.ascontiguousarray(checked_image(image)[:, :, ::-1])
        with self._busy:  # a server may ask from several threads
            return self._faces(bgr)

    def _faces(self, bgr: NDArray[np.uint8]) -> list[Face]:
        found, looked_at, border = with_border(bgr, self._detect)
        faces = []
        for row in found:
            crop = self._recogniser.alignCrop(looked_at, row)
            # `feature` returns a view of the network's own memory
            embedding = normalise(np.array(self._recogniser.feature(crop)).reshape(-1)).astype(np.float32)
            x, y, width, height = (float(v) for v in row[:4])
            box = (x - border, y - border, x + width - border, y + height - border)
            faces.append(Face(box, float(row[14]), embedding))
        return largest_first(faces)

    def _detect(self, bgr: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """YuNet's rows (box, five points, score) in the pixels of `bgr`."""
        height, width = bgr.shape[:2]
        scale = self._det_size / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        small = bgr if scale == 1 else self._resize(bgr, size, interpolation=self._area)
        self._detector.setInputSize(size)
        rows = self._detector.detect(small)[1]
        if rows is None:
            return []
        factor = np.ones(15, np.float32)
        factor[0:14:2], factor[1:14:2] = width / size[0], height / size[1]
        return list(rows.astype(np.float32) * factor)

    def faces_of(self, images: Sequence[NDArray[np.uint8]]) -> list[list[Face]]:
        """`faces` of every picture, one after the other: OpenCV's networks are not to be shared between threads."""
        return [self.faces(image) for image in images]
