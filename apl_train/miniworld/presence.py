"""The attribute model and the face/no-face model of the miniature world: one small network each, on 128 px pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apl_train.miniworld.autoencoder import to_pixels
from apl_train.miniworld.captions import codes
from apl_train.miniworld.fit import fast_dtype, fit
from apl_train.miniworld.people import HEADS, Attributes
from apl_train.miniworld.recogniser import distort


class Looker(nn.Module):
    """float [N, 3, 128, 128] in [-1, 1] -> one tensor of logits per head."""

    def __init__(self, heads: dict[str, int], widths: tuple[int, ...] = (24, 32, 48, 64, 96)):
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width in widths:
            layers += [nn.Conv2d(before, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        self.body = nn.Sequential(*layers)
        self.squeeze = nn.Conv2d(before, 24, 1)
        self.heads = nn.ModuleDict({k: nn.Linear(24 * 16, n) for k, n in heads.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = F.relu(self.squeeze(self.body(x))).flatten(1)
        return {k: head(z) for k, head in self.heads.items()}


def train_attributes(folder: Path, sets: list[tuple[np.ndarray, list[dict]]], *, steps: int, batch: int = 64,
                     minutes: float | None = None) -> Looker:
    """sets: (pictures, rows with `attributes`) of faces. Returns it in eval mode."""
    torch.manual_seed(31)
    model = Looker({k: len(v) for k, v in HEADS.items()}).to(memory_format=torch.channels_last)
    labels = [torch.tensor([codes(Attributes(**r["attributes"])) for r in rows]) for _, rows in sets]
    dtype = fast_dtype()

    def step(i: int, g: torch.Generator) -> dict[str, Tensor]:
        k = i % len(sets)
        pick = torch.randint(len(labels[k]), (batch,), generator=g)
        pixels = soften(to_pixels(sets[k][0][pick.numpy()]), g)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            said = model(pixels)
        loss = sum(F.cross_entropy(said[h].float(), labels[k][pick, j]) for j, h in enumerate(HEADS))
        right = torch.stack([said[h].argmax(1) == labels[k][pick, j] for j, h in enumerate(HEADS)]).float().mean()
        return {"loss": loss, "right": right}

    fit("attributes", folder, {"model": model}, step, steps=steps, lr=2e-3, minutes=minutes, weight_decay=1e-3)
    return model.eval().requires_grad_(False)


def soften(pixels: Tensor, g: torch.Generator) -> Tensor:
    """Blur, small shift and slight colour change; colours stay readable, since attributes name them."""
    low = int(torch.randint(40, 129, (), generator=g))
    pixels = F.interpolate(F.interpolate(pixels, size=low, mode="area"), size=128, mode="bilinear")
    dy, dx = (int(torch.randint(-3, 4, (), generator=g)) for _ in range(2))
    pixels = torch.roll(pixels, (dy, dx), (2, 3)) * (1 + 0.06 * torch.randn(len(pixels), 3, 1, 1, generator=g))
    return (pixels + 0.04 * torch.randn(pixels.shape, generator=g)).contiguous(memory_format=torch.channels_last)


def train_presence(folder: Path, faces: np.ndarray, things: np.ndarray, *, steps: int, batch: int = 64,
                   minutes: float | None = None) -> Looker:
    """Is there a face? Negatives: things, and faces cut into shuffled tiles (a smear of face colours is no face)."""
    torch.manual_seed(32)
    model = Looker({"face": 1}, (16, 24, 32, 48, 64)).to(memory_format=torch.channels_last)
    dtype = fast_dtype()

    def step(i: int, g: torch.Generator) -> dict[str, Tensor]:
        half, quarter = batch // 2, batch // 4
        yes = torch.randint(len(faces), (half,), generator=g).numpy()
        no = torch.randint(len(things), (quarter,), generator=g).numpy()
        cut = to_pixels(faces[torch.randint(len(faces), (batch - half - quarter,), generator=g).numpy()])
        tiles = F.unfold(cut, 32, stride=32)
        cut = F.fold(tiles[:, :, torch.randperm(16, generator=g)], 128, 32, stride=32)
        pixels = torch.cat([to_pixels(faces[yes]), to_pixels(things[no]), cut])
        pixels = distort(pixels, g, 128)
        label = torch.cat([torch.ones(half), torch.zeros(batch - half)])
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            said = model(pixels)["face"].squeeze(1).float()
        return {"loss": F.binary_cross_entropy_with_logits(said, label),
                "right": ((said > 0) == (label > 0.5)).float().mean()}

    fit("presence", folder, {"model": model}, step, steps=steps, lr=2e-3, minutes=minutes, weight_decay=1e-3)
    return model.eval().requires_grad_(False)
