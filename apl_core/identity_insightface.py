"""Faces through insightface's `FaceAnalysis` and a model pack: buffalo_l, antelopev2, auraface or one of the user's.

Step image -> score, on the CPU. Pictures are looked at side by side, one thread each: insightface's detector takes one
picture at a time, so on several cores this is faster than several threads within one picture.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import ScoreError
from .faces import Face, largest_first, with_border
from .id_scores import normalise
from .onnx_models import checked_image, file_hash, need, session_options, threads, whole
from .recognisers import DEFAULT_ROOT, model_note

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_log = logging.getLogger("apl")


class InsightFaceEmbedder:
    """Detection and recognition of an insightface model pack, on the CPU.

    Args:
        name: "buffalo_l", "auraface", ...; its .onnx files lie in `root`/models/`name`.
        root: insightface's folder; ~/.insightface when not given.
        allow_download: fetch a missing pack. Off by default: packs are large and most have a licence to agree to.
        det_size: edge of the detector's input in pixels; fixed, since insightface's own default changed with 1.0.
        det_threshold: least score of a face.

    Raises:
        ScoreError: the library or the pack is missing (with the exact command), or the pack is damaged.
    """

    def __init__(self, name: str, root: str | Path | None = None, *, allow_download: bool = False, det_size: int = 640,
                 det_threshold: float = 0.5) -> None:
        if not _NAME.fullmatch(name):
            raise ScoreError(f"The recogniser is {name!r}, neither the name of a model pack nor a recogniser.json.",
                             "Use auraface, buffalo_l, sface, dlib or the path of a recogniser.json.",
                             field="recogniser")
        self.name, self.note = name, model_note(name, root)
        whole(det_size, 64, 4096, "det_size")
        app = need("insightface.app")
        base = Path(root or DEFAULT_ROOT).expanduser()
        folder = base / "models" / name
        if not any(folder.rglob("*.onnx")):
            if not allow_download:
                raise ScoreError(f"The model pack {name} is not in {folder}.",
                                 f"Fetch it: {self.note.command}. {self.note.licence}", field="recogniser")
            self._download(base, folder)
        _log.info("Face recogniser %s. %s", name, self.note.licence)
        self._workers = threads()
        options = session_options()
        options.intra_op_num_threads = 1  # the threads are spent on pictures, not within one
        try:
            # the absolute path: a folder of this name in the working directory must not be taken for the pack
            found = app.FaceAnalysis(name=str(folder.resolve()), root=str(base),
                                     allowed_modules=["detection", "recognition"],
                                     providers=["CPUExecutionProvider"], sess_options=options)
            found.prepare(ctx_id=-1, det_thresh=det_threshold, det_size=(det_size, det_size))
            self._detector, self._arcface = found.models["detection"], found.models["recognition"]
            model = Path(self._arcface.model_file)
        except Exception as error:  # assertions, KeyError, onnxruntime's own types
            raise ScoreError(f"The model pack in {folder} cannot be loaded: {error or type(error).__name__}.",
                             f"Delete the folder and fetch it again: {self.note.command}",
                             field="recogniser") from error
        self._align = need("insightface.utils.face_align").norm_crop
        self.sha256 = file_hash(model)
        self.settings = {"detector": file_hash(Path(self._detector.model_file)), "det_size": det_size,
                         "det_threshold": det_threshold}

    def _download(self, base: Path, folder: Path) -> None:
        _log.info("Fetching %s. %s", self.name, self.note.licence)
        try:
            if self.name.lower() == "auraface":
                need("huggingface_hub").snapshot_download("fal/AuraFace-v1", local_dir=str(folder))
            else:
                need("insightface.utils").ensure_available("models", self.name, root=str(base))
        except ScoreError:
            raise
        except Exception as error:  # network, disk, archive: each library has its own types
            raise ScoreError(f"{self.name} could not be fetched: {error}.", f"Try by hand: {self.note.command}",
                             field="recogniser") from error

    def faces(self, image: NDArray[np.uint8]) -> list[Face]:
        """uint8 [H, W, 3] RGB -> its faces, largest first; tried once more with a border when there is none."""
        bgr = np.ascontiguousarray(checked_image(image)[:, :, ::-1])  # insightface takes OpenCV's order
        found, looked_at, border = with_border(bgr, self._detect)
        if not found:
            return []
        edge = self._arcface.input_size[0]
        crops = [self._align(looked_at, landmark=points, image_size=edge) for _, points in found]
        single = isinstance(self._arcface.input_shape[0], int)  # exported for a fixed number of faces
        features = [self._arcface.get_feat(crop) for crop in crops] if single else [self._arcface.get_feat(crops)]
        embeddings = normalise(np.concatenate(features)).astype(np.float32)
        return largest_first([
            Face(tuple(float(v) - border for v in box[:4]), float(box[4]), embedding)
            for (box, _), embedding in zip(found, embeddings, strict=True)
        ])

    def _detect(self, bgr: NDArray[np.uint8]) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        boxes, points = self._detector.detect(bgr)
        return [] if points is None else list(zip(boxes, points, strict=True))

    def faces_of(self, images: Sequence[NDArray[np.uint8]]) -> list[list[Face]]:
        """`faces` of every picture, as many at once as there are threads for it."""
        if len(images) < 2 or self._workers < 2:
            return [self.faces(image) for image in images]
        with ThreadPoolExecutor(min(self._workers, len(images))) as pool:
            return list(pool.map(self.faces, images))
