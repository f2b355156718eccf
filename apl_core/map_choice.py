"""Which map between two token tables to use, decided on tokens that were held out while it was fitted.

Every method, damping and centring is fitted on four fifths of the anchors and predicts the target's rows of the rest,
five times over. The best mean cosine wins. A prefix is no token, so where several maps are within a standard error of
the best, sums and differences of two held-out tokens decide between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .relative_maps import (
    METHODS,
    POWERS,
    RHOS,
    SMALLEST,
    Moments,
    Spectra,
    Together,
    masked,
    powered,
    sides_inverted,
    unit,
)
from .side_by_side import side_by_side
from .token_tables import TokenTable

ANCHORS = 16384
"""Anchors that folds are made of at most: a random part of them tells maps apart as well as all of them."""
SAMPLE = 256
"""Held-out tokens of a fold that a map is judged on; all candidates see the same ones."""
MASKED_SAMPLE = 8
_ROWS = 1024
PAPER_TOPK = 8192
"""Entries of a relative code that PTfer's README keeps."""


@dataclass(frozen=True)
class Candidate:
    """One map: its method, rho, whether the tables' means are taken off, and PTfer's mask (0: none)."""

    method: str
    rho: float
    centred: bool
    topk: int = 0

    def text(self) -> str:
        """In words, for people and for a file's metadata."""
        damped = self.method in ("ridge", "ptfer", "half")
        return (f"{self.method}, {'centred' if self.centred else 'raw'}" + (f", rho {self.rho:g}" if damped else "")
                + (f", top {self.topk}" if self.topk else ""))


@dataclass(frozen=True, eq=False)
class Judged:
    """A candidate's hold-out score.

    Attributes:
        cosines: [n], of every held-out token's prediction with its row of the target.
        cosine: their weighted mean; error: its standard error.
        pairs: mean cosine for sums and differences of two held-out tokens.
    """

    candidate: Candidate
    cosines: Tensor
    cosine: float
    error: float
    pairs: float


@dataclass(frozen=True, eq=False)
class Side:
    """What a table needs beside a map.

    Attributes:
        mean: [width], taken off its rows; zeros where raw.
        lengths: [vocabulary], the rows' norms after that. median: the anchors'.
    """

    mean: Tensor
    lengths: Tensor
    median: float

    @classmethod
    def of(cls, table: TokenTable, ids: Tensor, weights: Tensor, centred: bool) -> Side:
        """Of a table, its anchors [k] and their weights [k]."""
        if not centred:
            return cls(torch.zeros(table.width), table.lengths, float(table.lengths[ids].median()))
        # all of a table goes through faster in its order than most of it gathered
        share = torch.zeros(table.vocabulary).index_add_(0, ids, weights)
        mean = (share @ table.vectors) / weights.sum()
        lengths = torch.cat([(rows - mean).norm(dim=1) for rows in table.vectors.split(_ROWS)])
        return cls(mean, lengths, float(lengths[ids].median()))


class HoldOut:
    """Folds of the anchors, or of a random part of many, for one centring.

    Args:
        source, target: the tables. ids: int64 [k], the anchors; weights: float32 [k].
        folds: how many parts; seed: of their drawing.

    Attributes:
        ids, weights: [k'] of those in the folds. parts: each fold's places in them.
        sides: source's and target's mean and median norm, of all anchors.
    """

    def __init__(self, source: TokenTable, target: TokenTable, ids: Tensor, weights: Tensor, centred: bool, *,
                 folds: int = 5, seed: int = 0) -> None:
        self.source, self.target, self.centred = source.vectors, target.vectors, centred
        self.sides = (Side.of(source, ids, weights, centred), Side.of(target, ids, weights, centred))
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
        self._others = [each[order[ANCHORS:].sort().values] for each in (ids, weights)]
        order = order[:ANCHORS]
        self.ids, self.weights = ids[order], weights[order]
        self.parts = list(torch.arange(len(order)).chunk(folds))
        self._moments = [Moments(self.source, self.target, self.ids[part], self.weights[part], self.means,
                                 torch.float32) for part in self.parts]
        self._spectra: dict[int, Spectra] = {}

    @property
    def means(self) -> tuple[Tensor, Tensor] | None:
        """What is taken off rows before they are compared; None where nothing is."""
        return (self.sides[0].mean, self.sides[1].mean) if self.centred else None

    def add_up(self, *names: str) -> None:
        """Find these moments of all folds, each in one pass (`Moments.add_up`)."""
        for each in self._moments:
            each.add_up(*names)

    def without(self, fold: int) -> Spectra:
        """Those of all folds but one, in float32: enough to tell maps apart. Found once."""
        if fold not in self._spectra:
            rest = [each for i, each in enumerate(self._moments) if i != fold]
            self._spectra[fold] = Spectra(Together(rest, torch.float32), torch.float32)
        return self._spectra[fold]

    def whole(self, *names: str) -> Spectra:
        """Those of all anchors, in float64: of the folds, and of the others that are in none.

        names: the moments to find in one pass; any other is found when it is asked for.
        """
        others = Moments(self.source, self.target, *self._others, self.means, torch.float64)
        others.add_up(*names)
        return Spectra(Together([others, *self._moments], torch.float64), torch.float64)

    def sample(self, fold: int, size: int = SAMPLE) -> Tensor:
        """Places [n] in `ids` of a fold's tokens to judge by."""
        return self.parts[fold][:size]


def directions_to_vectors(moved: Tensor, lengths: Tensor, mean: Tensor, scale: float) -> Tensor:
    """Target vectors [n, dt] of directions [n, dt]: a row's length relative to the median is kept (field: per token).

    lengths: [n], norms in the source after its mean was taken off; scale: target's median norm / source's.
    """
    factors = lengths * scale / moved.norm(dim=-1).clamp(min=SMALLEST)
    return torch.addcmul(mean, moved, factors[:, None])


class _Sample:
    """A fold's held-out tokens and pairs of them, ready to be judged in any basis of the target.

    Rows are the tokens' and their mean's, and those of sums and differences of two; what no candidate changes of them
    is found once.
    """

    def __init__(self, hold: HoldOut, fold: int, basis: Tensor | None) -> None:
        places = hold.sample(fold)
        self.weights = hold.weights[places]
        a, b = hold.sides
        tokens = hold.source[hold.ids[places]] - a.mean
        self.x = torch.cat([tokens, a.mean[None]])
        self.count, self.half = len(places), len(places) // 2
        self.lengths = self._with_pairs(self.x).norm(dim=1) * (b.median / max(a.median, SMALLEST))
        rows = torch.cat([hold.target[hold.ids[places]], torch.zeros(1, hold.target.shape[1])])
        truth = unit(self._with_pairs(rows))
        self.truth, self.mean = (truth, b.mean) if basis is None else (truth @ basis, b.mean @ basis)

    def _with_pairs(self, rows: Tensor) -> Tensor:
        """[n + 1, width], the mean's last -> [n + 2 (n // 2), width]: tokens, sums, differences."""
        tokens, offset = rows[:-1], rows[-1]
        first, second = tokens[: self.half], tokens[self.half : 2 * self.half] + offset
        # v1 + v2 less the mean is x1 + x2 + mean; v1 - v2 less the mean is x1 - x2 - mean
        return torch.cat([tokens, first + second, first - second])

    def judge(self, moved: Tensor) -> tuple[Tensor, Tensor]:
        """(cosines [n] of tokens, cosines [n'] of pairs) of W x, [n + 1, dt]."""
        found = directions_to_vectors(self._with_pairs(moved), self.lengths, self.mean, 1.0)
        cosines = (found * self.truth).sum(1) / found.norm(dim=1).clamp(min=SMALLEST)
        return cosines[: self.count], cosines[self.count :]


def _moves(spectra: Spectra, methods: Sequence[str], x: Tensor) -> Callable[[Candidate], Tensor]:
    """W x [n, dt] of x [n, ds] by candidate; what several share is found once.

    In the target's basis of eigenvectors where the methods invert its side: cosines are the same in every basis.
    """
    sides = sides_inverted(methods)
    inside, cross = x, spectra.cross
    if "source" in sides:
        inside, cross = x @ spectra.source[1], cross @ spectra.source[1]
    if "target" in sides:
        cross = spectra.target[1].T @ cross
    plain = None if all(m in ("ridge", "half") for m in methods) else inside @ cross.T

    def moved(each: Candidate) -> Tensor:
        if each.method == "procrustes":
            return x @ spectra.polar.T
        p, q = POWERS[each.method]
        found = (inside * powered(spectra.source[0], each.rho, q)) @ cross.T if q else plain
        return found * powered(spectra.target[0], each.rho, p) if p else found

    return moved


def judge(holds: Sequence[HoldOut], methods: Sequence[str], rhos: Sequence[float]) -> list[Judged]:
    """Hold-out scores of all methods, and rhos where a method has one, for every centring, in this order."""
    turned = [m for m in methods if "target" in sides_inverted([m])]
    groups = [group for group in (turned, [m for m in methods if m not in turned]) if group]
    for hold in holds:
        hold.add_up("cross", *sides_inverted(methods))
    # the longest first, so that no core is left with one of those alone at the end
    turns = [(hold, group, fold, hold.without(fold)) for group in groups for hold in holds
             for fold in range(len(hold.parts))]
    scores: dict[Candidate, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for found in side_by_side(lambda turn: _of_fold(*turn, rhos), turns):
        for candidate, row in found.items():
            scores.setdefault(candidate, []).append(row)
    return [_judged(each, scores[each]) for hold in holds for each in _candidates(hold, methods, rhos)]


def _candidates(hold: HoldOut, methods: Sequence[str], rhos: Sequence[float]) -> list[Candidate]:
    return [Candidate(m, r, hold.centred) for m in methods for r in (rhos if sides_inverted([m]) else rhos[:1])]


def _of_fold(hold: HoldOut, methods: Sequence[str], fold: int, spectra: Spectra,
             rhos: Sequence[float]) -> dict[Candidate, tuple[Tensor, Tensor, Tensor]]:
    """By candidate: weights [n] of a fold's tokens, cosines [n] of them and [n'] of pairs."""
    sample = _Sample(hold, fold, spectra.target[1] if "target" in sides_inverted(methods) else None)
    moved = _moves(spectra, methods, sample.x)
    return {each: (sample.weights, *sample.judge(moved(each))) for each in _candidates(hold, methods, rhos)}


def _judged(candidate: Candidate, folds: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Judged:
    weights, cosines, pairs = (torch.cat(each) for each in zip(*folds, strict=True))
    share = weights / weights.sum()
    mean = float(share @ cosines)
    error = float((share.square() @ (cosines - mean).square()).sqrt())
    return Judged(candidate, cosines, mean, error, float(pairs.mean()) if len(pairs) else mean)


def best_of(judged: Sequence[Judged]) -> Judged:
    """The best by held-out cosine; between those within a standard error of it, the best on sums and differences."""
    top = max(judged, key=lambda each: each.cosine)
    close = [each for each in judged if each.cosine >= top.cosine - top.error]
    return max(close, key=lambda each: (each.pairs, each.cosine))


def mask_helps(hold: HoldOut, rho: float, topk: int) -> tuple[float, float]:
    """Mean held-out cosine of PTfer (without a mask, with one), on a few tokens of every fold: a mask costs a solve."""
    without, with_mask = [], []
    a, b = hold.sides
    for fold in range(len(hold.parts)):
        held = hold.sample(fold, MASKED_SAMPLE)
        keep = torch.cat([part for i, part in enumerate(hold.parts) if i != fold])
        rows = unit(hold.source[hold.ids[keep]] - a.mean), unit(hold.target[hold.ids[keep]] - b.mean)
        x = hold.source[hold.ids[held]] - a.mean
        truth = hold.target[hold.ids[held]]
        moved = x @ hold.without(fold).map("ptfer", rho).T
        for y, into in ((moved, without), (masked(*rows, hold.weights[keep], x, topk, rho), with_mask)):
            found = directions_to_vectors(y, x.norm(dim=1), b.mean, b.median / max(a.median, SMALLEST))
            into.append((unit(found) * unit(truth)).sum(1))
    return float(torch.cat(without).mean()), float(torch.cat(with_mask).mean())


def considered(method: str, rho: float | None) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """(methods, rhos) to judge for a setting: "auto" means all; the baseline is judged beside them, never chosen."""
    return (METHODS if method == "auto" else (method,)), (RHOS if rho is None else (rho,))
