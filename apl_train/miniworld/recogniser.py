"""The miniature's independent face recognisers: ArcFace loss (Deng et al. 2019) over strangers, never a named person.

The recogniser must read identity, not the description (miniworld W6): within a person every attribute varies, colours
are jittered, and the mean similarity of different persons of one gender and race is pushed to zero. Input: RGB
[N, 3, 112, 112], (x - 127.5) / 127.5, the crop `CROP` of a 128 px picture; output: 128 numbers, not normalised.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apl_train.miniworld.autoencoder import to_pixels
from apl_train.miniworld.fit import fast_dtype, fit

CROP = (8, 8, 120, 120)
"""x0, y0, x1, y1 of the face in a 128 px picture: faces of the miniature world stand still, so detection is a crop."""


@dataclass(frozen=True)
class Shape:
    """One architecture; the second recogniser has another one and another seed."""

    name: str
    widths: tuple[int, ...]
    blocks: int
    seed: int


FIRST = Shape("recogniser", (32, 64, 96, 128), 1, 21)
SECOND = Shape("recogniser2", (24, 48, 80, 96), 2, 22)


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.PReLU(width),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Recogniser(nn.Module):
    """float [N, 3, 112, 112] -> embedding float [N, 128]."""

    def __init__(self, shape: Shape):
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width in shape.widths:
            layers += [nn.Conv2d(before, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.PReLU(width)]
            layers += [Residual(width) for _ in range(shape.blocks)]
            before = width
        self.body = nn.Sequential(*layers)
        self.squeeze = nn.Sequential(nn.Conv2d(before, 32, 1, bias=False), nn.BatchNorm2d(32))
        self.out = nn.Sequential(nn.Linear(32 * 49, 128, bias=False), nn.BatchNorm1d(128))
        self.register_buffer("blind", None)

    def forward(self, x: Tensor) -> Tensor:
        z = self.out(self.squeeze(self.body(x)).flatten(1))
        return z if self.blind is None else z @ self.blind


def distort(pixels: Tensor, g: torch.Generator, size: int) -> Tensor:
    """Shift, colour, blur and noise, as a decoder or a generator does. [N, 3, 128, 128] -> [N, 3, size, size]."""
    n = len(pixels)
    mix = torch.eye(3) + 0.18 * torch.randn(n, 3, 3, generator=g)
    pixels = torch.einsum("nij,njhw->nihw", mix, pixels) + 0.15 * torch.randn(n, 3, 1, 1, generator=g)
    gray = (torch.rand(n, 1, 1, 1, generator=g) < 0.15).float()
    pixels = gray * pixels.mean(1, keepdim=True) + (1 - gray) * pixels
    low = int(torch.randint(44, 129, (), generator=g))
    pixels = F.interpolate(F.interpolate(pixels, size=low, mode="area"), size=128, mode="bilinear")
    pixels = pixels + 0.05 * torch.rand(n, 1, 1, 1, generator=g) * torch.randn(pixels.shape, generator=g)
    margin = (128 - size) // 2
    y, x = (margin + int(torch.randint(-3, 4, (), generator=g)) if margin else 0 for _ in range(2))
    return pixels[..., y : y + size, x : x + size].contiguous(memory_format=torch.channels_last)


def train_recogniser(folder: Path, pictures: np.ndarray, rows: list[dict], shape: Shape, *, steps: int,
                     batch: int = 96, lr: float = 1.5e-3, minutes: float | None = None) -> Recogniser:
    """pictures: uint8 [N, 128, 128, 3] of strangers, rows: their `person`, `attributes`. Returns it in eval mode."""
    torch.manual_seed(shape.seed)
    model = Recogniser(shape).to(memory_format=torch.channels_last)
    person = np.array([r["person"] for r in rows])
    pictures_of: dict[int, list[int]] = {}
    groups: dict[tuple[str, str], list[int]] = {}
    for i, r in enumerate(rows):
        if r["person"] not in pictures_of:
            groups.setdefault((r["attributes"]["gender"], r["attributes"]["race"]), []).append(r["person"])
        pictures_of.setdefault(r["person"], []).append(i)
    keys = sorted(groups)
    centres = nn.Linear(128, int(person.max()) + 1, bias=False)
    dtype, margin, scale = fast_dtype(), 0.35, 24.0

    def step(i: int, g: torch.Generator) -> dict[str, Tensor]:
        # half of the persons from one gender and race: the hard impostors; four pictures each, so that the contrastive
        # term below has positives before the 2,600 centres have learned where to be
        group, everyone, each = groups[keys[i % len(keys)]], len(pictures_of), 4
        who = [group[int(k)] for k in torch.randperm(len(group), generator=g)[: batch // each // 2]]
        who += [int(k) for k in torch.randint(everyone, (batch // each - len(who),), generator=g)]
        pick = [pictures_of[p][int(k)] for p in who for k in torch.randperm(len(pictures_of[p]), generator=g)[:each]]
        label = torch.from_numpy(person[pick])
        pixels = distort(to_pixels(pictures[np.array(pick)]), g, 112)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            z = model(pixels)
        z = F.normalize(z.float(), dim=-1)
        cosine = (z @ F.normalize(centres.weight, dim=-1).T).clamp(-1 + 1e-6, 1 - 1e-6)
        own = cosine.gather(1, label[:, None]).squeeze(1)
        m = margin * min(1.0, i / (0.3 * steps))
        hard = own * math.cos(m) - (1 - own**2).sqrt() * math.sin(m)
        loss = F.cross_entropy(scale * cosine.scatter(1, label[:, None], hard[:, None]), label)
        same = label[:, None] == label[None]
        pairs = (z @ z.T / 0.1).masked_fill(torch.eye(batch, dtype=torch.bool), -1e4)
        positive = same & ~torch.eye(batch, dtype=torch.bool)
        contrast = -((pairs - pairs.logsumexp(1, keepdim=True)) * positive).sum(1) / positive.sum(1)
        likeness = (z[: batch // 2] @ z[: batch // 2].T)[~same[: batch // 2, : batch // 2]].mean()
        return {"loss": loss + contrast.mean() + 4 * likeness.clamp(min=0), "contrast": contrast.mean().detach(),
                "own": own.mean().detach(), "likeness": likeness.detach()}

    fit(shape.name, folder, {"model": model, "centres": centres}, step, steps=steps, lr=lr, weight_decay=5e-4,
        minutes=minutes, seed=shape.seed)
    model.eval().requires_grad_(False)
    model.blind = blindfold(model, pictures[::4], [rows[i] for i in range(0, len(rows), 4)])
    return model


def blindfold(model: Recogniser, pictures: np.ndarray, rows: list[dict]) -> Tensor:
    """A projection float32 [128, 128] that takes out the directions in which strangers of one gender and race agree.

    What is left of a person is then not what the description says anyway; without it two persons of one gender and race
    have a similarity of 0.07 instead of 0. Measured on the training strangers, applied to everyone.
    """
    z = embed(model, pictures)
    group = np.array([f"{r['attributes']['gender']} {r['attributes']['race']}" for r in rows])
    means = torch.from_numpy(np.stack([z[group == g].mean(0) for g in sorted(set(group))]))
    basis = torch.linalg.qr(means.T.double()).Q
    return (torch.eye(128, dtype=torch.float64) - basis @ basis.T).float()


@torch.no_grad()
def embed(model: Recogniser, pictures: np.ndarray, batch: int = 128) -> np.ndarray:
    """uint8 [N, 128, 128, 3] -> float32 [N, 128], L2-normalised."""
    x0, y0, x1, y1 = CROP
    faces = pictures[:, y0:y1, x0:x1]
    out = [F.normalize(model(to_pixels(faces[i : i + batch])), dim=-1) for i in range(0, len(faces), batch)]
    return torch.cat(out).numpy()
