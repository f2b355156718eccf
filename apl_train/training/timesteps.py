"""Which timesteps a step draws: uniform as in the paper, or more often where a name and its description differ.

Step noise level -> what there is to learn. s(t) = mean || eps(c1) - eps(c2) ||^2 over a target bank says how far apart
the two are at a noise level; the chance of t is proportional to s(t)^(1/2), plus a uniform floor. SDErasure (ICLR 2026)
finds that choosing steps by separability beats uniform choice; with a bank it costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 20
"""Noise levels told apart: a bank of 800 tuples has 20 of S_ID in each."""


def bins_of(t: Tensor, low: int, high: int, bins: int = BINS) -> Tensor:
    """Bin of each timestep in [low, high], equally wide: int64 [N] from int64 [N]."""
    return ((t - low) * bins).div(high - low + 1, rounding_mode="floor").clamp(0, bins - 1)


def apart(eps_c1: Tensor, eps_c2: Tensor) -> Tensor:
    """|| eps(c1) - eps(c2) ||^2 of each tuple, mean over elements: float32 [N] from float [N, 4, h, w] twice."""
    return (eps_c1.float() - eps_c2.float()).square().flatten(1).mean(1)


def separability(bin_of: Tensor, distances: Tensor, bins: int = BINS) -> Tensor:
    """s of each bin, float64 [bins]: the mean of its tuples' distances; an empty bin takes the mean of the others.

    bin_of: int64 [N]; distances: float [N], see `apart`.
    """
    sums = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of, distances.double())
    counts = torch.bincount(bin_of, minlength=bins)
    means = sums / counts.clamp(min=1)
    return torch.where(counts > 0, means, means.sum() / (counts > 0).sum().clamp(min=1))


def chances(s: Tensor, floor: float) -> Tensor:
    """Chance of each bin, float64 [bins], summing to 1: (1 - floor) s^(1/2) / sum + floor / bins."""
    root = s.double().clamp(min=0).sqrt()
    total = root.sum()
    shaped = root / total if float(total) > 0 else torch.full_like(root, 1 / len(root))
    return (1 - floor) * shaped + floor / len(s)


def tuple_weights(bin_of: Tensor, chance: Tensor) -> Tensor:
    """Weight of each stored tuple, float64 [N], so that bins are drawn by `chance` however many tuples they hold."""
    counts = torch.bincount(bin_of, minlength=len(chance)).clamp(min=1)
    return (chance / counts)[bin_of]
