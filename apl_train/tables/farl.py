"""Facial attribute features of FaRL through facer, as the paper's Attr-ACC takes them (sec. 4.3, reference [33]).

The paper names neither layer nor crop. Here: facer's detector, its alignment, the logits of its 40 CelebA attributes
("farl/celeba/224"), whose cosine is compared; the largest face of a picture. facer fetches its weights by itself when
it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from apl_core.errors import ScoreError
from apl_train.tables.features import Images

DETECTOR, ATTRIBUTES = "retinaface/mobilenet", "farl/celeba/224"
COUNT = 40


class FarlAttributes:
    """float32 [N, 40] logits; a picture without a face is a row of zeros, which has no cosine. Raises ScoreError."""

    def __init__(self, device: str = "auto") -> None:
        try:
            facer: Any = importlib.import_module("facer")
        except (ImportError, RuntimeError) as error:
            raise ScoreError(f"facer cannot be imported: {error}", "pip install pyfacer", field="attributes") from error
        self._device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self._detector = facer.face_detector(DETECTOR, device=self._device)
        self._attributes = facer.face_attr(ATTRIBUTES, device=self._device)
        self.name = f"FaRL ({ATTRIBUTES}) of facer"
        self.sha256 = f"{ATTRIBUTES} {getattr(facer, '__version__', '')}"
        self.convention = (f"{self.name}: logits of 40 CelebA attributes, largest face of {DETECTOR}, facer's own "
                           "alignment")

    @torch.no_grad()
    def features(self, images: Images) -> NDArray[np.float32]:
        rows = np.zeros((len(images), COUNT), np.float32)
        for i, image in enumerate(images):
            pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].to(self._device)
            faces = self._detector(pixels)
            if not len(faces.get("rects", ())):
                continue
            box = faces["rects"].float()
            largest = int(((box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])).argmax())
            found = self._attributes(pixels, faces)["attrs"][largest].float()
            if not torch.isfinite(found).all():
                raise ScoreError("FaRL gave attributes that are not finite.", "Check the weights.", field="attributes")
            # facer gives probabilities; their logits tell pictures apart where probabilities are all near 0 or 1
            rows[i] = torch.logit(found.clamp(1e-6, 1 - 1e-6)).cpu().numpy()
        return rows
