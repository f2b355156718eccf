"""Faces in a picture and their embeddings: the ArcFace features that ID-ACC compares (APL sec. 4.1).

Step image -> score. Two backends behind one protocol: insightface's face analysis for photographs, and "still" for
worlds in which the face stands at a fixed place, so that detection is a yes/no model and a crop. Recognition runs
through insightface's `ArcFaceONNX` class in both. Nothing is downloaded unless the caller says so.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .errors import ScoreError
from .id_scores import normalise
from .onnx_models import (
    BATCH,
    checked_image,
    file_hash,
    need,
    open_session,
    read_json,
    run_session,
    session_options,
    sibling,
    to_frame,
    unit_range,
    whole,
)

DEFAULT_ROOT = Path("~/.insightface")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_log = logging.getLogger("apl")


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
    """Finds faces and embeds them. `sha256` is that of the recogniser's ONNX file: thresholds hold for one only.

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


@dataclass(frozen=True)
class ModelNote:
    """What must be known before a named model pack is used: its licence and the command that fetches it."""

    licence: str
    command: str


_NON_COMMERCIAL = "Its weights are for non-commercial research only (insightface model zoo)."


def model_note(name: str, root: str | Path | None = None) -> ModelNote:
    """Licence and download command of a model pack, such as "buffalo_l" or "auraface"."""
    where = Path(root or DEFAULT_ROOT)
    if name.lower() == "auraface":
        target = (where / "models" / name).as_posix()
        return ModelNote("Its weights are under Apache-2.0.", f"hf download fal/AuraFace-v1 --local-dir {target}")
    known = name.startswith(("buffalo_", "antelope", "raccoon_"))
    licence = _NON_COMMERCIAL if known else "Check the licence of its weights before use."
    return ModelNote(licence, f"insightface-cli model.download {name} --root {where.as_posix()}")


def _largest_first(faces: list[Face]) -> list[Face]:
    return sorted(faces, key=lambda face: (-face.area, -face.score))


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
                             "Use auraface, buffalo_l or the path of a recogniser.json.", field="recogniser")
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
        try:
            # the absolute path: a folder of this name in the working directory must not be taken for the pack
            self._app = app.FaceAnalysis(name=str(folder.resolve()), root=str(base),
                                         allowed_modules=["detection", "recognition"],
                                         providers=["CPUExecutionProvider"], sess_options=session_options())
            self._app.prepare(ctx_id=-1, det_thresh=det_threshold, det_size=(det_size, det_size))
            model = Path(self._app.models["recognition"].model_file)
        except Exception as error:  # assertions, KeyError, onnxruntime's own types
            raise ScoreError(f"The model pack in {folder} cannot be loaded: {error or type(error).__name__}.",
                             f"Delete the folder and fetch it again: {self.note.command}",
                             field="recogniser") from error
        self.sha256 = file_hash(model)
        self.settings = {"det_size": det_size, "det_threshold": det_threshold}

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
        """uint8 [H, W, 3] RGB -> its faces, largest first.

        When nothing is found the picture is tried once more with a border of half its longer edge: the detector misses
        faces that fill the frame, and close-up portraits are what ID-ACC is measured on (APL sec. 4.2).
        """
        bgr = np.ascontiguousarray(checked_image(image)[:, :, ::-1])  # insightface takes OpenCV's order
        found, border = self._app.get(bgr), 0
        if not found:
            border = max(bgr.shape[:2]) // 2
            found = self._app.get(np.pad(bgr, ((border, border), (border, border), (0, 0))))
        faces = [
            Face(tuple(float(v) - border for v in face.bbox[:4]), float(face.det_score),
                 normalise(face.embedding).astype(np.float32))
            for face in found if face.embedding is not None
        ]
        return _largest_first(faces)

    def faces_of(self, images: Sequence[NDArray[np.uint8]]) -> list[list[Face]]:
        """`faces` of every picture, one after the other: insightface's detector takes one at a time."""
        return [self.faces(image) for image in images]


def load_embedder(source: str | Path, root: str | Path | None = None, *, allow_download: bool = False,
                  det_size: int = 640, det_threshold: float = 0.5) -> FaceEmbedder:
    """The recogniser that `source` names.

    Args:
        source: a recogniser.json (or a folder with one), or the name of an insightface model pack such as "auraface".
        root: insightface's folder, for a pack.
        allow_download, det_size, det_threshold: see `InsightFaceEmbedder`; without effect on a recogniser.json.

    Raises:
        ScoreError: it is missing, damaged, or a library is missing; the hint holds the command to run.
    """
    path = Path(source)
    if path.suffix == ".json":
        return StillEmbedder(path)
    if (path / "recogniser.json").is_file():
        return StillEmbedder(path / "recogniser.json")
    return InsightFaceEmbedder(str(source), root, allow_download=allow_download, det_size=det_size,
                               det_threshold=det_threshold)
