"""CLIP scores: how well pictures show their prompts, and a picture tower's features (paper sec. 4.3, Table 2).

The score is the cosine of picture and text embedding, averaged over pictures. Different CLIP models give different
figures (0.3078 of one is 31.34 of another), so every score names its model and its preprocessing. The miniature's own
picture tower learned beside its text encoder and ships as two small ONNX files; open_clip and torchmetrics serve
photographs where they are installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from apl_core.errors import ScoreError
from apl_core.onnx_models import (
    file_hash,
    open_session,
    read_json,
    run_session,
    sibling,
    to_frame,
    unit_range,
    whole,
)
from apl_train.tables.features import PART, Images

Pooled = Callable[[Sequence[str]], NDArray[np.float32]]
"""Prompts -> pooled text states, float32 [N, width]."""


class Clip(Protocol):
    name: str
    sha256: str
    convention: str

    def scores(self, images: Images, prompts: Sequence[str]) -> NDArray[np.float64]: ...


def cosines(pictures: NDArray, texts: NDArray) -> NDArray[np.float64]:
    """Cosine of row i with row i: float [N, d] twice -> float64 [N]."""
    a, b = np.asarray(pictures, np.float64), np.asarray(texts, np.float64)
    if a.shape != b.shape:
        raise ScoreError(f"{list(a.shape)} picture and {list(b.shape)} text embeddings do not pair up.",
                         "Give one prompt a picture, and both towers of one model.", field="prompts")
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


class OnnxClip:
    """A picture tower and the projection of a text encoder's pooled states, described by a clip.json.

    `{"pictures": "clip.onnx", "texts": "clip_text.onnx", "frame": 128}`: the tower takes RGB (x - 127.5) / 127.5 as
    float32 [N, 3, frame, frame], the projection pooled states [N, width, 1, 1]; both give "embedding" [N, d].

    Args:
        path: the clip.json.
        pooled: the text encoder that belongs to them; it stays the same whatever model is measured.
    """

    def __init__(self, path: str | Path, pooled: Pooled) -> None:
        path = Path(path)
        values = read_json(path)
        self.frame = whole(values.get("frame"), 16, 4096, "frame")
        files = [sibling(path.parent, values.get(key), key) for key in ("pictures", "texts")]
        self._pictures, self._texts = (open_session(file) for file in files)
        self._pooled = pooled
        self.name, self.sha256 = "miniature CLIP", file_hash(files[0])
        self.convention = (f"{self.name}: cosine, {self.frame} px, middle square; picture tower sha256 "
                           f"{self.sha256[:12]}, text encoder of the shipped checkpoint")

    def features(self, images: Images) -> NDArray[np.float32]:
        """Picture embeddings, not normalised: float32 [N, d]."""
        frames = np.stack([to_frame(image, self.frame) for image in images])
        return run_session(self._pictures, unit_range(frames))["embedding"]

    def texts(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        """Text embeddings, not normalised: float32 [N, d]."""
        states = np.asarray(self._pooled(prompts), np.float32)
        return run_session(self._texts, states[:, :, None, None])["embedding"]

    def scores(self, images: Images, prompts: Sequence[str]) -> NDArray[np.float64]:
        return cosines(self.features(images), self.texts(prompts))


class OpenClip:
    """open_clip on this machine (paper's code: ViT-g-14, laion2b_s34b_b88k), with the model's own preprocessing.

    Args:
        model: open_clip's name. pretrained: a weights file; a tag of open_clip is a download and needs `download`.
    """

    def __init__(self, model: str, pretrained: str, *, download: bool = False, device: str = "cpu") -> None:
        if not download and not Path(pretrained).expanduser().is_file():
            raise ScoreError(f"clip weights {pretrained!r} are not a file.",
                             "Give a file, or set clip_download: true to let open_clip fetch the tag.", field="clip")
        open_clip = _module("open_clip", "pip install open_clip_torch")
        self._model, _, self._prepare = open_clip.create_model_and_transforms(
            model, pretrained=str(Path(pretrained).expanduser()) if not download else pretrained, device=device)
        self._tokenizer, self._device = open_clip.get_tokenizer(model), device
        self._model.eval()
        self.name = f"open_clip {model}, {Path(pretrained).name}"
        self.sha256 = file_hash(Path(pretrained).expanduser()) if not download else f"tag {pretrained}"
        self.convention = f"{self.name}: cosine, open_clip's own preprocessing of the model"

    @torch.no_grad()
    def features(self, images: Images) -> NDArray[np.float32]:
        from PIL import Image

        parts = []
        for start in range(0, len(images), PART):
            batch = torch.stack([self._prepare(Image.fromarray(i)) for i in images[start : start + PART]])
            parts.append(self._model.encode_image(batch.to(self._device)).float().cpu().numpy())
        return np.concatenate(parts)

    @torch.no_grad()
    def scores(self, images: Images, prompts: Sequence[str]) -> NDArray[np.float64]:
        tokens = self._tokenizer(list(prompts)).to(self._device)
        texts = [self._model.encode_text(part).float().cpu().numpy() for part in tokens.split(PART)]
        return cosines(self.features(images), np.concatenate(texts))


class _Features:
    """A CLIPModel as torchmetrics takes it: transformers 5 wraps features in an output, where 4 gave the tensors."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def to(self, device: Any) -> _Features:
        self._model.to(device)
        return self

    def get_image_features(self, *args: Any, **options: Any) -> torch.Tensor:
        found = self._model.get_image_features(*args, **options)
        return getattr(found, "pooler_output", found)

    def get_text_features(self, *args: Any, **options: Any) -> torch.Tensor:
        found = self._model.get_text_features(*args, **options)
        return getattr(found, "pooler_output", found)


class TorchmetricsClip:
    """torchmetrics' CLIPScore functional (100 x cosine, clipped at 0, over 100) with a folder of transformers' CLIP.

    The model is loaded here and handed over: by name torchmetrics knows few, and runs code that comes with some.
    """

    def __init__(self, folder: str) -> None:
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise ScoreError(f"clip weights {folder!r} are not a folder.",
                             "Give a folder of a CLIP model of transformers.", field="clip")
        self._score = _module("torchmetrics.functional.multimodal", "pip install torchmetrics transformers").clip_score
        transformers = _module("transformers", "pip install transformers")
        try:
            self._loaded = (_Features(transformers.CLIPModel.from_pretrained(path, local_files_only=True).eval()),
                            transformers.CLIPProcessor.from_pretrained(path, local_files_only=True))
        except (OSError, ValueError) as error:
            raise ScoreError(f"{path.name} holds no CLIP model: {error}", "Copy the whole folder again.",
                             field="clip") from error
        self.name, self.sha256 = f"torchmetrics CLIPScore, {path.name}", f"folder {path.name}"
        self.convention = f"{self.name}: over 100; transformers' own preprocessing of the model"

    @torch.no_grad()
    def scores(self, images: Images, prompts: Sequence[str]) -> NDArray[np.float64]:
        found = []
        for image, prompt in zip(images, prompts, strict=True):
            pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
            found.append(float(self._score(pixels, prompt, model_name_or_path=lambda: self._loaded)) / 100)
        return np.array(found)


def _module(name: str, install: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not belong to this torch
        raise ScoreError(f"{name} cannot be imported: {error}", install, field="clip") from error
