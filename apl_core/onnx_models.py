"""Small ONNX models described by a JSON file beside them: read the description, open the model, run it in batches.

Used for the face recogniser and the attribute model of step image -> score. The description may come from strangers:
it can name files of its own folder only, and a model must hold all of its weights, so that its hash covers them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from .errors import ScoreError

INSTALL = "pip install insightface onnxruntime"
BATCH = 64
"""Pictures a model is given at once, where its first axis is free."""
MAX_JSON_BYTES = 2**20


def need(module: str) -> Any:
    """Import an optional module. Raises `ScoreError` with the install command when it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ScoreError(f"{error.name or module} is not installed; it is needed to recognise faces.",
                         f"Install it: {INSTALL}", field=error.name or module) from error


def file_hash(path: Path) -> str:
    """SHA-256 of a file, lowercase hex. Raises `ScoreError` when it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as handle:
            while block := handle.read(2**20):
                digest.update(block)
    except OSError as error:
        raise ScoreError(f"{path} cannot be read: {error.strerror or error}.", "Check the file.",
                         field="path") from error
    return digest.hexdigest()


def checked_image(image: Any) -> NDArray[np.uint8]:
    """The picture itself, when it is uint8 [H, W, 3] and not empty. Raises `ScoreError`."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ScoreError(f"A picture has shape {list(image.shape)} and type {image.dtype}.",
                         "Give RGB pictures as uint8 [height, width, 3].", field="image")
    return image


def to_frame(image: NDArray[np.uint8], frame: int) -> NDArray[np.uint8]:
    """The picture's middle square at frame x frame pixels: area averaging down, bicubic up; unchanged if it fits."""
    image = checked_image(image)
    height, width = image.shape[:2]
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    image = image[top : top + edge, left : left + edge]
    if edge == frame:
        return image
    how = Image.Resampling.BOX if edge > frame else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((frame, frame), how))


def unit_range(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 [N, H, W, 3] RGB -> float32 [N, 3, H, W], (x - 127.5) / 127.5."""
    return np.ascontiguousarray(((frames.astype(np.float32) - 127.5) / 127.5).transpose(0, 3, 1, 2))


def threads() -> int:
    """Threads for one ONNX session: OMP_NUM_THREADS where it is set, else what torch uses."""
    with contextlib.suppress(ValueError):
        if (count := int(os.environ.get("OMP_NUM_THREADS", ""))) > 0:
            return count
    return torch.get_num_threads()


def session_options() -> Any:
    """onnxruntime options with `threads()`; more threads than the rest of the program uses only slow both down."""
    options = need("onnxruntime").SessionOptions()
    options.intra_op_num_threads = threads()
    options.inter_op_num_threads = 1
    return options


def open_session(path: Path) -> Any:
    """An onnxruntime CPU session of a self-contained ONNX file.

    Raises:
        ScoreError: onnxruntime is missing, the file is damaged, or its weights lie in another file (they would escape
            the hash, and a path in the file could name anything).
    """
    ort, onnx = need("onnxruntime"), need("onnx")
    again = "Copy or export the file again, with all weights inside it."
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
        outside = any(t.data_location == onnx.TensorProto.EXTERNAL for t in graph.initializer)
        session = None if outside else ort.InferenceSession(
            str(path), sess_options=session_options(), providers=["CPUExecutionProvider"])
    except Exception as error:  # protobuf and onnxruntime have no common base
        raise ScoreError(f"{path.name} is not a sound ONNX model: {error}", again, field=path.name) from error
    if session is None:
        raise ScoreError(f"{path.name} keeps weights in another file.", again, field=path.name)
    return session


def run_session(session: Any, batch: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """Outputs by name for float32 [N, 3, H, W], in batches that the model's first axis allows. Raises `ScoreError`."""
    taken = session.get_inputs()[0]
    size = taken.shape[0] if isinstance(taken.shape[0], int) else BATCH
    names = [output.name for output in session.get_outputs()]
    parts: list[list[NDArray[np.float32]]] = []
    for start in range(0, len(batch), size):
        part = batch[start : start + size]
        padded = np.concatenate([part, np.repeat(part[-1:], size - len(part), 0)]) if size != BATCH else part
        try:
            found = session.run(names, {taken.name: padded})
        except Exception as error:  # onnxruntime's own types
            raise ScoreError(f"The model does not take pictures of {batch.shape[2]} x {batch.shape[3]}: {error}",
                             "Check `frame` and `crop` beside the model.", field="frame") from error
        parts.append([value[: len(part)] for value in found])
    return {name: np.concatenate([part[i] for part in parts]) for i, name in enumerate(names)}


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object of at most 1 MiB. Raises `ScoreError`."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ScoreError(f"{path.name} is larger than 1 MiB.", "Choose the right file.", field="path")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ScoreError(f"{path} cannot be read: {error.strerror or error}.", "Check the path.",
                         field="path") from error
    except (ValueError, RecursionError) as error:
        raise ScoreError(f"{path.name} is not JSON: {error}", "Copy the file again.", field="path") from error
    if not isinstance(value, dict):
        raise ScoreError(f"{path.name} holds no JSON object.", "Copy the file again.", field="path")
    return value


def sibling(folder: Path, value: Any, field: str) -> Path:
    """The file `value` in `folder` itself. Raises `ScoreError` for a missing file or any name that leads elsewhere."""
    if not isinstance(value, str) or not value or value in (".", "..") or re.search(r"[/\\:\x00-\x1f]", value):
        raise ScoreError(f"{field} is {value!r}, not the name of a file in the same folder.",
                         "Name an .onnx file beside it, without a path.", field=field)
    path = folder / value
    if not path.is_file():
        raise ScoreError(f"{field} names {value}, which is not in {folder}.", "Put the file there.", field=field)
    if path.resolve().parent != folder.resolve():
        raise ScoreError(f"{field} names {value}, which links out of {folder}.", "Put a real file there.", field=field)
    return path


def whole(value: Any, low: int, high: int, field: str) -> int:
    """A whole number in a range from a JSON file. Raises `ScoreError`."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ScoreError(f"{field} is {value!r}, not a whole number from {low} to {high}.", f"Correct {field}.",
                         field=field)
    return value
