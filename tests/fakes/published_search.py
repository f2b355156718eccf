"""PTfer's search for relative codes, written from its description (arXiv 2310.01691) as the reference for the closed
form. No product code uses it.

Candidates begin Xavier-normal; Adam, lr 5e-3, 2000 steps; the loss is torch's cosine embedding loss between relative
codes; every step the whole candidate tensor is shifted and scaled to the target table's mean and standard deviation.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS, RATE = 2000, 5e-3


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1."""
    return torch.nn.functional.normalize(rows, dim=-1)


def search(a: Tensor, b: Tensor, vectors: Tensor, steps: int = STEPS) -> tuple[Tensor, float]:
    """(candidates [n, dt], loss of the last step) for vectors [n, ds]; a [k, ds] and b [k, dt] are the anchors."""
    codes, rows = unit(vectors) @ unit(a).T, unit(b)
    torch.manual_seed(0)
    raw = torch.empty(len(vectors), b.shape[1])
    torch.nn.init.xavier_normal_(raw)
    raw.requires_grad_(True)
    optimizer, ones = torch.optim.Adam([raw], lr=RATE), torch.ones(len(vectors))
    mean, std = b.mean(), b.std()
    for _ in range(steps):
        candidate = (raw - raw.mean()) / raw.std() * std + mean
        loss = torch.nn.functional.cosine_embedding_loss(unit(candidate) @ rows.T, codes, ones)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return candidate.detach(), float(loss.detach())
