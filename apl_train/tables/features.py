"""Features of pictures for the Fréchet distance: clean-fid's Inception, or the layer ahead of a small model's heads.

Every extractor has `name`, `sha256`, `convention` (a line for whoever reads a figure) and
`features(images)`: uint8 [N, H, W, 3] RGB -> float32 [N, d].
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from apl_core.errors import ScoreError
from apl_core.onnx_models import (
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

Images = NDArray[np.uint8] | Sequence[NDArray[np.uint8]]
INCEPTION = "inception-2015-12-05.pt"
"""TorchScript file that clean-fid's modes "clean" and "legacy_tensorflow" use; its authors name where to get it."""
PART = 32
"""Pictures at once: enlarged to 299 px in float32 they take a megabyte each."""


class Extractor(Protocol):
    name: str
    sha256: str
    convention: str

    def features(self, images: Images) -> NDArray[np.float32]: ...


def last_layer(graph: Any) -> str:
    """Name of the tensor from which every output of an ONNX graph is one linear layer away.

    Raises:
        ScoreError: the outputs do not share such a tensor.
    """
    makers = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name for tensor in graph.initializer}
    found = set()
    for output in graph.output:
        node = makers.get(output.name)
        if node is None or node.op_type not in ("Gemm", "MatMul"):
            raise ScoreError(f"The output {output.name} is not made by a linear layer.",
                             "Use a model whose heads are linear.", field="model")
        found |= {name for name in node.input[:1] if name not in constants}
    if len(found) != 1:
        raise ScoreError(f"The model's outputs come from {len(found)} layers.", "Use a model with one trunk.",
                         field="model")
    return found.pop()


class Penultimate:
    """What an attribute model knows ahead of its heads, from its attributes.json: float32 [N, d].

    Raises:
        ScoreError: the files are missing or damaged, or the model has no such layer.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        values = read_json(path)
        self.frame = whole(values.get("frame"), 16, 4096, "frame")
        model = sibling(path.parent, values.get("model"), "model")
        open_session(model)  # refuses what is damaged or keeps weights elsewhere
        onnx = need("onnx")
        opened = onnx.load(str(model), load_external_data=False)
        self._layer = last_layer(opened.graph)
        del opened.graph.output[:]
        opened.graph.output.append(onnx.helper.make_tensor_value_info(self._layer, onnx.TensorProto.FLOAT, None))
        self._session = need("onnxruntime").InferenceSession(
            opened.SerializeToString(), sess_options=session_options(), providers=["CPUExecutionProvider"])
        self.name, self.sha256 = f"{model.stem} ahead of its heads", file_hash(model)
        self.convention = (f"{self.name}, {self.frame} px, middle square, area averaging; "
                           f"sha256 {self.sha256[:12]}")

    def features(self, images: Images) -> NDArray[np.float32]:
        frames = np.stack([to_frame(image, self.frame) for image in images])
        found = run_session(self._session, unit_range(frames))[self._layer]
        return found.reshape(len(frames), -1).astype(np.float32)


class Inception:
    """clean-fid's Inception features (paper reference [30]): float32 [N, 2048].

    Args:
        file: `INCEPTION` on this machine; nothing is downloaded.
        mode: clean-fid's "clean" (PIL bicubic in float, the headline) or "legacy_tensorflow" (resized by the network).

    Raises:
        ScoreError: clean-fid is not installed, the file is missing, or the mode is another.
    """

    def __init__(self, file: str | Path, mode: str = "clean", device: str = "cpu") -> None:
        file = Path(file).expanduser()
        if mode not in ("clean", "legacy_tensorflow"):
            raise ScoreError(f"mode is {mode!r}.", "Use clean, or legacy_tensorflow.", field="mode")
        if file.name != INCEPTION or not file.is_file():
            raise ScoreError(f"{file} is not a file named {INCEPTION}.",
                             "clean-fid's documentation says where to get it; it is not downloaded.", field="inception")
        try:
            resize = importlib.import_module("cleanfid.resize")
            network = importlib.import_module("cleanfid.inception_torchscript")
        except ImportError as error:
            raise ScoreError(f"{error.name or 'clean-fid'} is not installed.", "pip install clean-fid",
                             field="fid") from error
        self._resize, self._device, self._inside = resize.build_resizer(mode), device, mode == "legacy_tensorflow"
        self._network = network.InceptionV3W(str(file.parent), download=False, resize_inside=self._inside).to(device)
        self.name, self.sha256 = f"Inception v3 of clean-fid, mode {mode}", file_hash(file)
        self.convention = f"{self.name}, 2048 features; sha256 {self.sha256[:12]}"

    @torch.no_grad()
    def features(self, images: Images) -> NDArray[np.float32]:
        parts = []
        for start in range(0, len(images), PART):
            resized = np.stack([np.asarray(self._resize(image)) for image in images[start : start + PART]])
            pixels = torch.from_numpy(np.ascontiguousarray(resized)).permute(0, 3, 1, 2).float().to(self._device)
            parts.append(self._network(pixels).float().cpu().numpy())
        return np.concatenate(parts).astype(np.float32)


def average_cosine(features: NDArray, reference: NDArray) -> NDArray[np.float64]:
    """Cosine of every row with the reference: float [N, d], [d] -> float64 [N]; NaN for a row of zeros.

    The paper's Attr-ACC (sec. 4.3) is this between facial attribute features of generated faces and ground truths.
    """
    a, b = np.asarray(features, np.float64), np.asarray(reference, np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b)
    return np.divide(a @ b, norms, out=np.full(len(a), np.nan), where=norms > 0)
