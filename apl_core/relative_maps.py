"""Linear maps from one token table to another, in closed form, from the second moments of their common tokens.

With A^ [k, ds] and B^ [k, dt] the anchors' unit rows and W their weights, all maps are of one family:

    u = (B^'WB^ + lam)^-p  B^'WA^  (A^'WA^ + lam)^-q  v^

(p, q) = (1, 0) is the optimum of PTfer's search for relative codes (arXiv 2310.01691), (0, 1) ridge regression from
source to target, (1/2, 1/2) a CCA-like whitening, (0, 0) the baseline without either. Orthogonal Procrustes takes the
singular vectors of B^'WA^. lam = rho * trace(G) / d, with G the matrix that is inverted. No k x k matrix is formed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError

POWERS = {"ptfer": (1.0, 0.0), "ridge": (0.0, 1.0), "half": (0.5, 0.5), "none": (0.0, 0.0)}
METHODS = ("ridge", "half", "ptfer", "procrustes", "none")
RHOS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_ROWS = 4096
"""Rows in a product: of these few, memory that was freed is used again, and only that much of it is needed."""
_COLUMNS = 256
SMALLEST = 1e-30
_SIDES = {"source": (0, 0), "target": (1, 1), "cross": (1, 0)}
"""Tables that a product of moments is of: source 0, target 1."""
_SPREAD = 1e-12
"""Least over largest eigenvalue of C'C, in float64, above which its eigenvectors are good to 1e-3 or better; there the
products of float32 that C is made of leave no direction of C that small known to more than a tenth."""


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1; rows of zeros stay."""
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=SMALLEST)


class Moments:
    """Weighted second moments of anchors' unit rows; each is found when it is asked for, since few maps need all three.

    To gather the rows and make them unit ones takes about as long as a product does: `add_up` finds several in a pass.

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
        self._found: dict[str, Tensor] = {}

    def add_up(self, *names: str) -> None:
        """Find those of "source", "target" and "cross" that are still unknown, in one pass over the rows."""
        new = {name: torch.zeros([self._tables[side].shape[1] for side in _SIDES[name]], dtype=self._dtype)
               for name in names if name not in self._found}
        needed = {side for name in new for side in _SIDES[name]}
        for ids, weights in self._parts if new else ():
            rows = {side: self._scaled(side, ids, weights) for side in needed}
            for name, total in new.items():
                one, two = (rows[side] for side in _SIDES[name])
                if name == "cross":
                    total += one.T @ two
                    continue
                for start in range(0, len(total), _COLUMNS):  # the upper triangle alone: half of the multiplications
                    stop = min(start + _COLUMNS, len(total))
                    total[start:stop, start:] += one[:, start:stop].T @ two[:, start:]
        for name, total in new.items():
            self._found[name] = total if name == "cross" else total.triu() + total.triu(1).T

    def _scaled(self, side: int, ids: Tensor, weights: Tensor) -> Tensor:
        """Unit rows times the root of their weights, [n, width]: a product of two has the weight once."""
        rows, mean = self._tables[side][ids], self._means[side]
        if mean is not None:
            rows -= mean
        rows *= (weights.sqrt() / rows.norm(dim=1).clamp(min=SMALLEST))[:, None]
        return rows

    def _one(self, name: str) -> Tensor:
        self.add_up(name)
        return self._found[name]

    @property
    def source(self) -> Tensor:
        """A^'WA^, [ds, ds]."""
        return self._one("source")

    @property
    def target(self) -> Tensor:
        """B^'WB^, [dt, dt]."""
        return self._one("target")

    @property
    def cross(self) -> Tensor:
        """B^'WA^, [dt, ds]."""
        return self._one("cross")


class Together:
    """Moments of several sets of anchors as of one, added up in `dtype`."""

    def __init__(self, parts: Sequence[Moments], dtype: torch.dtype) -> None:
        self._parts, self._dtype = list(parts), dtype

    def _sum(self, name: str) -> Tensor:
        first, *others = (getattr(each, name) for each in self._parts)
        total = first.to(self._dtype, copy=True)
        for each in others:
            total += each
        return total

    @property
    def source(self) -> Tensor:
        """As `Moments.source`."""
        return self._sum("source")

    @property
    def target(self) -> Tensor:
        """As `Moments.target`."""
        return self._sum("target")

    @property
    def cross(self) -> Tensor:
        """As `Moments.cross`."""
        return self._sum("cross")


class Spectra:
    """Eigenvalues of both Gram matrices, found once and shared by every method and rho.

    Args:
        moments: of the anchors.
        dtype: to compute in; float32 is enough to compare maps by.
    """

    def __init__(self, moments: Moments | Together, dtype: torch.dtype = torch.float64) -> None:
        self._moments, self._dtype = moments, dtype
        self._found: dict[str, Any] = {}

    def _once(self, name: str, find: Callable[[], Any]) -> Any:
        # not by functools.cached_property: up to Python 3.11 all objects share its lock, and these are found at once
        if name not in self._found:
            self._found[name] = find()
        return self._found[name]

    @property
    def cross(self) -> Tensor:
        """B^'WA^ [dt, ds]."""
        return self._once("cross", lambda: self._moments.cross.to(self._dtype))

    @property
    def source(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [ds] ascending, and eigenvectors [ds, ds] in columns, of the source's Gram matrix."""
        return self._once("source", lambda: self._eigen(self._moments.source))

    @property
    def target(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [dt] ascending, and eigenvectors [dt, dt] in columns, of the target's Gram matrix."""
        return self._once("target", lambda: self._eigen(self._moments.target))

    def _eigen(self, gram: Tensor) -> tuple[Tensor, Tensor]:
        values, basis = torch.linalg.eigh(gram.to(self._dtype))
        return values.clamp(min=0), basis

    @property
    def polar(self) -> Tensor:
        """The nearest map to the cross moments that turns only: the product of their singular vectors, [dt, ds].

        By eigenvectors of the smaller of C'C and CC', which take half of the time that singular vectors do.
        """
        return self._once("polar", self._nearest_turn)

    def _nearest_turn(self) -> Tensor:
        wide = self.cross.shape[0] < self.cross.shape[1]
        tall = (self.cross.T if wide else self.cross).double()
        values, basis = torch.linalg.eigh(tall.T @ tall)
        if float(values[0]) > _SPREAD * float(values[-1]):
            found = tall.to(self._dtype) @ ((basis * values.rsqrt()).to(self._dtype) @ basis.T.to(self._dtype))
        else:
            left, _, right = torch.linalg.svd(tall.to(self._dtype), full_matrices=False)
            found = left @ right
        return found.T if wide else found

    def map(self, method: str, rho: float) -> Tensor:
        """W [dt, ds] with u = W v^, up to a positive factor.

        Raises:
            ConfigError: the method is unknown.
        """
        if method == "procrustes":
            return self.polar
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


def sides_inverted(methods: Sequence[str]) -> tuple[str, ...]:
    """Whose Gram matrices some of the methods take a power of: "source", "target", both or none."""
    powers = [POWERS.get(method, (0.0, 0.0)) for method in methods]
    return tuple(name for side, name in ((1, "source"), (0, "target")) if any(each[side] for each in powers))


def powered(values: Tensor, rho: float, power: float) -> Tensor:
    """(values + lam)^-power of a Gram matrix's eigenvalues, lam = rho * their mean."""
    if not power:
        return torch.ones_like(values)
    return (values + rho * values.mean()).clamp(min=SMALLEST) ** -power
