"""Linear maps from one token table to another, in closed form, from the second moments of their common tokens.

With A^ [k, ds] and B^ [k, dt] the anchors' unit rows and W their weights, all maps are of one family:

    u = (B^'WB^ + lam)^-p  B^'WA^  (A^'WA^ + lam)^-q  v^

(p, q) = (1, 0) is the optimum of PTfer's search for relative codes (arXiv 2310.01691), (0, 1) ridge regression from
source to target, (1/2, 1/2) a CCA-like whitening, (0, 0) the baseline without either. Orthogonal Procrustes takes the
singular vectors of B^'WA^. lam = rho * trace(G) / d, with G the matrix that is inverted. No k x k matrix is formed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .errors import ConfigError

POWERS = {"ptfer": (1.0, 0.0), "ridge": (0.0, 1.0), "half": (0.5, 0.5), "none": (0.0, 0.0)}
METHODS = ("ridge", "half", "ptfer", "procrustes", "none")
RHOS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_ROWS = 8192
_COLUMNS = 320
_SMALLEST = 1e-30


@dataclass(frozen=True, eq=False)
class Grams:
    """Weighted second moments of anchors' unit rows.

    Attributes:
        source: [ds, ds], A^'WA^.
        target: [dt, dt], B^'WB^.
        cross: [dt, ds], B^'WA^.
    """

    source: Tensor
    target: Tensor
    cross: Tensor

    def plus(self, other: Grams) -> Grams:
        """Those of both sets of anchors."""
        return Grams(self.source + other.source, self.target + other.target, self.cross + other.cross)

    def minus(self, other: Grams) -> Grams:
        """Those of the anchors without `other`'s, which are among them."""
        return Grams(self.source - other.source, self.target - other.target, self.cross - other.cross)


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1; rows of zeros stay."""
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=_SMALLEST)


def _squared(rows: Tensor, out: Tensor) -> None:
    """Adds the upper triangle of rows' Gram matrix, in blocks of columns: half of the multiplications."""
    width = rows.shape[1]
    for start in range(0, width, _COLUMNS):
        stop = min(start + _COLUMNS, width)
        out[start:stop, start:] += rows[:, start:stop].T @ rows[:, start:]


def grams(
    source: Tensor, target: Tensor, ids: Tensor, weights: Tensor, means: tuple[Tensor, Tensor] | None = None
) -> Grams:
    """Second moments of the anchors `ids`.

    Args:
        source, target: float32 [vocabulary, ds] and [vocabulary, dt].
        ids: int64 [k]; weights: float32 [k], not negative.
        means: what is taken off every row before it is made a unit one, [ds] and [dt]; None for nothing.

    Returns:
        float64: sums of float32 products over some thousand rows each.
    """
    ds, dt = source.shape[1], target.shape[1]
    found = [torch.zeros(ds, ds, dtype=torch.float64), torch.zeros(dt, dt, dtype=torch.float64),
             torch.zeros(dt, ds, dtype=torch.float64)]
    for start in range(0, len(ids), _ROWS):
        some, root = ids[start : start + _ROWS], weights[start : start + _ROWS].sqrt()[:, None]
        a, b = source[some], target[some]
        if means is not None:
            a, b = a - means[0], b - means[1]
        a, b = unit(a) * root, unit(b) * root
        part = [torch.zeros(ds, ds), torch.zeros(dt, dt), b.T @ a]
        _squared(a, part[0])
        _squared(b, part[1])
        for total, each in zip(found, part, strict=True):
            total += each
    for square in found[:2]:
        square.copy_(square.triu() + square.triu(1).T)
    return Grams(*found)


class Spectra:
    """Eigenvalues of both Gram matrices, found once and shared by every method and rho.

    Args:
        moments: of the anchors.
        dtype: to compute in; float32 is enough to compare maps by.
    """

    def __init__(self, moments: Grams, dtype: torch.dtype = torch.float64) -> None:
        self.moments = Grams(moments.source.to(dtype), moments.target.to(dtype), moments.cross.to(dtype))

    @cached_property
    def source(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [ds] ascending, and eigenvectors [ds, ds] in columns, of the source's Gram matrix."""
        values, basis = torch.linalg.eigh(self.moments.source)
        return values.clamp(min=0), basis

    @cached_property
    def target(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [dt] ascending, and eigenvectors [dt, dt] in columns, of the target's Gram matrix."""
        values, basis = torch.linalg.eigh(self.moments.target)
        return values.clamp(min=0), basis

    @cached_property
    def rotated(self) -> Tensor:
        """The cross moments [dt, ds] between both bases of eigenvectors."""
        return self.target[1].T @ self.moments.cross @ self.source[1]

    def factors(self, method: str, rho: float) -> tuple[Tensor, Tensor]:
        """(G_target + lam)^-p [dt] and (G_source + lam)^-q [ds] on the eigenvectors."""
        p, q = POWERS[method]
        return _power(self.target[0], rho, p), _power(self.source[0], rho, q)

    def map(self, method: str, rho: float) -> Tensor:
        """W [dt, ds] with u = W v^, up to a positive factor.

        Raises:
            ConfigError: the method is unknown.
        """
        if method == "procrustes":
            left, _, right = torch.linalg.svd(self.moments.cross, full_matrices=False)
            return left @ right
        if method not in POWERS:
            raise ConfigError(f"method is {method!r}.", f"Use one of: auto, {', '.join(METHODS)}.", field="method")
        p, q = POWERS[method]
        found = self.moments.cross
        if q:
            values, basis = self.source
            found = (found @ basis * _power(values, rho, q)) @ basis.T
        if p:
            values, basis = self.target
            found = basis @ (_power(values, rho, p)[:, None] * (basis.T @ found))
        return found

    def damping(self, method: str, rho: float) -> dict[str, float]:
        """lam by the side that it is added to: "source", "target", both or none."""
        p, q = POWERS.get(method, (0.0, 0.0))
        sides = (("target", p, self.moments.target), ("source", q, self.moments.source))
        return {name: rho * float(gram.trace()) / len(gram) for name, power, gram in sides if power}


def _power(values: Tensor, rho: float, power: float) -> Tensor:
    if not power:
        return torch.ones_like(values)
    return (values + rho * values.mean()).clamp(min=_SMALLEST) ** -power


def masked(source: Tensor, target: Tensor, weights: Tensor, vectors: Tensor, topk: int, rho: float) -> Tensor:
    """PTfer's optimum where only the `topk` largest entries of a relative code count: one solve a vector.

    Args:
        source, target: the anchors' unit rows, [k, ds] and [k, dt]; weights: [k].
        vectors: [n, ds].

    Returns:
        [n, dt] directions, up to a positive factor each.
    """
    codes = unit(vectors) @ source.T
    found = []
    for code in codes:
        rows = code.topk(min(topk, len(code))).indices
        b, w = target[rows], weights[rows][:, None]
        gram = b.T @ (b * w)
        gram.diagonal().add_(max(rho * float(gram.trace()) / len(gram), _SMALLEST))
        found.append(torch.linalg.solve(gram, b.T @ (w[:, 0] * code[rows])))
    return torch.stack(found)
