"""PTfer's optimum where only the largest entries of a relative code count (arXiv 2310.01691, `--topk`).

A mask is another for every vector, so each has a system of its own: (B^'MB^ + lam) u = B^'M r with M the weights of the
anchors that count. Its matrix is never formed, which would take longer than everything else of a transfer together:
conjugate gradients solve all vectors at once, preconditioned by the Gram matrix of all anchors, which under every mask
is nearly the system's own. On a token table that takes some ten passes over its rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .relative_maps import SMALLEST, unit

TOLERANCE = 1e-4
"""Length of the preconditioned residual, as a share of its first one."""
PASSES = 60
"""A system that is not solved by then is formed and solved directly."""


def masked(source: Tensor, target: Tensor, weights: Tensor, vectors: Tensor, topk: int, rho: float,
           spectrum: tuple[Tensor, Tensor] | None = None, allowed: Tensor | None = None) -> Tensor:
    """PTfer's optimum under a mask, of every vector.

    Args:
        source, target: the anchors' unit rows, float32 [k, ds] and [k, dt]; weights: [k], not negative.
        vectors: [n, ds].
        topk: entries of a code that count, the largest; rho: damping, as a share of the mean eigenvalue.
        spectrum: eigenvalues [dt] and eigenvectors [dt, dt] of about B^'WB^, such as those of a part of the anchors:
            what the solution is approached with, not what it is. None forms every system, which takes longer.
        allowed: bool [n, k], anchors that may count for each vector; None for all.

    Returns:
        [n, dt] directions, up to a positive factor each.
    """
    codes = unit(vectors) @ source.T
    if allowed is not None:
        codes = codes.masked_fill(~allowed, -2.0)
    rows = codes.topk(min(topk, codes.shape[1]), dim=1).indices
    counted = torch.zeros_like(codes).scatter_(1, rows, weights[rows])
    if allowed is not None:
        counted *= allowed
    wanted = (counted * codes) @ target
    lam = (rho * (counted @ target.square().sum(1)) / target.shape[1]).clamp(min=SMALLEST)
    if spectrum is None:
        return torch.stack([_solved(target, *each) for each in zip(counted, wanted, lam, strict=True)])
    found, unsolved = _gradients(target, counted, wanted, lam, spectrum)
    for i in unsolved.nonzero().flatten().tolist():
        found[i] = _solved(target, counted[i], wanted[i], lam[i])
    return found


def _solved(target: Tensor, counted: Tensor, wanted: Tensor, lam: Tensor) -> Tensor:
    """One system, formed: weights [k], right side [dt] -> [dt]."""
    rows = counted.nonzero().flatten()
    some = target[rows]
    gram = some.T @ (some * counted[rows][:, None])
    gram.diagonal().add_(lam)
    return torch.linalg.solve(gram, wanted)


def _gradients(target: Tensor, counted: Tensor, wanted: Tensor, lam: Tensor,
               spectrum: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """([n, dt], bool [n] of those that did not arrive) by preconditioned conjugate gradients, all n at once."""
    values, basis = spectrum
    share = counted.sum(1, keepdim=True) / values.sum().clamp(min=SMALLEST)
    inverse = 1 / (share * values + lam[:, None]).clamp(min=SMALLEST)

    def smoothed(residual: Tensor) -> Tensor:
        return ((residual @ basis) * inverse) @ basis.T

    found, residual = torch.zeros_like(wanted), wanted.clone()
    z = smoothed(residual)
    way, left = z.clone(), (residual * z).sum(1)
    enough = TOLERANCE**2 * left
    for _ in range(PASSES):
        if not bool((left > enough).any()):
            break
        pushed = ((way @ target.T) * counted) @ target + lam[:, None] * way
        # a system that has arrived stands still: its direction is as good as nothing, and 0 / 0 is not wanted
        size = torch.where(left > enough, left / (way * pushed).sum(1).clamp(min=SMALLEST), 0.0)[:, None]
        found, residual = found + size * way, residual - size * pushed
        z = smoothed(residual)
        now = (residual * z).sum(1)
        way = z + torch.where(left > enough, now / left.clamp(min=SMALLEST), 0.0)[:, None] * way
        left = torch.where(left > enough, now, left)
    return found, ~(left <= enough)
