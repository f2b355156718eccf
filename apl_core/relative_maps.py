"""Linear maps from one token table to another, in closed form, from the second moments of their common tokens.

With A^ [k, ds] and B^ [k, dt] the anchors' unit rows and W their weights, all maps are of one family:

    u = (B^'WB^ + lam)^-p  B^'WA^  (A^'WA^ + lam)^-q  v^

(p, q) = (1, 0) is the optimum of PTfer's search for relative codes (arXiv 2310.01691), (0, 1) ridge regression from
source to target, (1/2, 1/2) a CCA-like whitening, (0, 0) the baseline without either. Orthogonal Procrustes takes the
singular vectors of B^'WA^. lam = rho * trace(G) / d, with G the matrix that is inverted. No k x k matrix is formed.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1; rows of zeros stay."""
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=_SMALLEST)


def _centred_unit(table: Tensor, ids: Tensor, mean: Tensor | None) -> Tensor:
    return unit(table[ids] if mean is None else table[ids] - mean)


class Moments:
    """Weighted second moments of anchors' unit rows; each is found when it is asked for, since few maps need all three.

    Args:
        source, target: float32 [vocabulary, ds] and [vocabulary, dt].
        ids: int64 [k]; weights: float32 [k], not negative.
        means: what is taken off every row before it is made a unit one, [ds] and [dt]; None for nothing.
        dtype: to add up in; products are of float32, over some thousand rows each.
    """

    def __init__(self, source: Tensor, target: Tensor, ids: Tensor, weights: Tensor,
                 means: tuple[Tensor, Tensor] | None = None, dtype: torch.dtype = torch.float64) -> None:
        self._tables, self._means, self._dtype = (source, target), means or (None, None), dtype
        self._parts = list(zip(ids.split(_ROWS), weights.split(_ROWS), strict=True))

    def _gram(self, side: int) -> Tensor:
        table, width = self._tables[side], self._tables[side].shape[1]
        found = torch.zeros(width, width, dtype=self._dtype)
        for ids, weights in self._parts:
            rows = _centred_unit(table, ids, self._means[side]) * weights.sqrt()[:, None]
            for start in range(0, width, _COLUMNS):  # the upper triangle alone: half of the multiplications
                stop = min(start + _COLUMNS, width)
                found[start:stop, start:] += rows[:, start:stop].T @ rows[:, start:]
        return found.triu() + found.triu(1).T

    @cached_property
    def source(self) -> Tensor:
        """A^'WA^, [ds, ds]."""
        return self._gram(0)

    @cached_property
    def target(self) -> Tensor:
        """B^'WB^, [dt, dt]."""
        return self._gram(1)

    @cached_property
    def cross(self) -> Tensor:
        """B^'WA^, [dt, ds]."""
        found = torch.zeros(self._tables[1].shape[1], self._tables[0].shape[1], dtype=self._dtype)
        for ids, weights in self._parts:
            a, b = (_centred_unit(t, ids, m) for t, m in zip(self._tables, self._means, strict=True))
            found += (b * weights[:, None]).T @ a
        return found


class Together:
    """Moments of several sets of anchors as of one."""

    def __init__(self, parts: Sequence[Moments]) -> None:
        self._parts = list(parts)

    @property
    def source(self) -> Tensor:
        """As `Moments.source`."""
        return sum(each.source for each in self._parts)

    @property
    def target(self) -> Tensor:
        """As `Moments.target`."""
        return sum(each.target for each in self._parts)

    @property
    def cross(self) -> Tensor:
        """As `Moments.cross`."""
        return sum(each.cross for each in self._parts)


class Spectra:
    """Eigenvalues of both Gram matrices, found once and shared by every method and rho.

    Args:
        moments: of the anchors.
        dtype: to compute in; float32 is enough to compare maps by.
    """

    def __init__(self, moments: Moments | Together, dtype: torch.dtype = torch.float64) -> None:
        self._moments, self._dtype = moments, dtype

    @cached_property
    def cross(self) -> Tensor:
        """B^'WA^ [dt, ds]."""
        return self._moments.cross.to(self._dtype)

    @cached_property
    def source(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [ds] ascending, and eigenvectors [ds, ds] in columns, of the source's Gram matrix."""
        values, basis = torch.linalg.eigh(self._moments.source.to(self._dtype))
        return values.clamp(min=0), basis

    @cached_property
    def target(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [dt] ascending, and eigenvectors [dt, dt] in columns, of the target's Gram matrix."""
        values, basis = torch.linalg.eigh(self._moments.target.to(self._dtype))
        return values.clamp(min=0), basis

    @cached_property
    def rotated(self) -> Tensor:
        """The cross moments [dt, ds] between both bases of eigenvectors."""
        return self.target[1].T @ self.cross @ self.source[1]

    def map(self, method: str, rho: float) -> Tensor:
        """W [dt, ds] with u = W v^, up to a positive factor.

        Raises:
            ConfigError: the method is unknown.
        """
        if method == "procrustes":
            left, _, right = torch.linalg.svd(self.cross, full_matrices=False)
            return left @ right
        if method not in POWERS:
            raise ConfigError(f"method is {method!r}.", f"Use one of: auto, {', '.join(METHODS)}.", field="method")
        p, q = POWERS[method]
        found = self.cross
        if q:
            values, basis = self.source
            found = (found @ basis * powered(values, rho, q)) @ basis.T
        if p:
            values, basis = self.target
            found = basis @ (powered(values, rho, p)[:, None] * (basis.T @ found))
        return found

    def damping(self, method: str, rho: float) -> dict[str, float]:
        """lam by the side that it is added to: "source", "target", both or none."""
        p, q = POWERS.get(method, (0.0, 0.0))
        found = {}
        for name, power in (("target", p), ("source", q)):
            if power:
                found[name] = rho * float(getattr(self, name)[0].mean())
        return found


def powered(values: Tensor, rho: float, power: float) -> Tensor:
    """(values + lam)^-power of a Gram matrix's eigenvalues, lam = rho * their mean."""
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
