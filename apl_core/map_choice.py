"""Which map between two token tables to use, decided on tokens that were held out while it was fitted.

Every method, damping and centring is fitted on four fifths of the anchors and predicts the target's rows of the rest,
five times over. The best mean cosine wins. A prefix is no token, so where several maps are within a standard error of
the best, sums and differences of two held-out tokens decide between them; where those cannot either, PTfer's is taken.
Between tables with little in common all maps predict alike, and ridge regression then sends a prefix where no picture
comes from: of the miniature SDXL's second text encoder alone, none with a face (docs/transfer.md).
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
    powered,
    sides_inverted,
    unit,
)
from .relative_mask import masked
from .side_by_side import side_by_side
from .token_tables import TokenTable

ANCHORS = 16384
"""Anchors that folds are made of at most: a random part of them tells maps apart as well as all of them."""
SAMPLE = 256
"""Held-out tokens of a fold that a map is judged on; all candidates see the same ones."""
MASKED_SAMPLE = 8
FIRST_FOLDS = 2
CLEAR = 3.0
"""Standard errors that make a difference on the first folds clear."""
_ROWS = 1024
PAPER_TOPK = 8192
"""Entries of a relative code that PTfer's README keeps."""


Row = tuple[Tensor, Tensor, Tensor]
"""Of a fold: weights [n] of its tokens, cosines [n] of them and [n'] of pairs."""


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
        weights: [n], of the held-out tokens that it was judged on.
        cosines: [n], of every one's prediction with its row of the target.
        cosine: their weighted mean; error: its standard error.
        pairs: mean cosine for sums and differences of two held-out tokens; pairs_error: its standard error.
    """

    candidate: Candidate
    weights: Tensor
    cosines: Tensor
    cosine: float
    error: float
    pairs: float
    pairs_error: float

    @property
    def predicts(self) -> bool:
        """Whether it is clearly better than chance."""
        return self.cosine > CLEAR * self.error


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

    def units(self, table: Tensor, ids: Tensor) -> Tensor:
        """Unit rows [k, width] of a table's tokens [k]."""
        rows = table[ids]
        rows -= self.mean
        rows /= self.lengths[ids].clamp(min=SMALLEST)[:, None]
        return rows


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


def judge(holds: Sequence[HoldOut], methods: Sequence[str], rhos: Sequence[float],
          rivals: Sequence[Judged] = ()) -> list[Judged]:
    """Hold-out scores of all methods, and rhos where a method has one, for every centring, in this order.

    All are judged on the first folds; what is clearly behind there is not judged on the others, and where nothing
    predicts anything, nothing is: the differences are chance, and eigenvectors cost most of a transfer's time.

    rivals: of the same folds, for those that are judged to be held against.
    """
    every = [each for hold in holds for each in _candidates(hold, methods, rhos)]
    for hold in holds:
        hold.add_up("cross", *sides_inverted(methods))
    scores: dict[Candidate, list[Row]] = {each: [] for each in every}
    folds = len(holds[0].parts)
    _score(holds, every, range(min(FIRST_FOLDS, folds)), scores)
    found = {each: _judged(each, scores[each]) for each in every}
    _score(holds, _in_sight(list(found.values()), rivals), range(FIRST_FOLDS, folds), scores)
    return [_judged(each, scores[each]) for each in every]


def _score(holds: Sequence[HoldOut], some: Sequence[Candidate], folds: range,
           scores: dict[Candidate, list[Row]]) -> None:
    """Adds a row a fold for each of `some`."""
    # those of one basis together, and the longest first, so that no core is left with one of those alone at the end
    groups = [[each for each in some
               if each.centred == hold.centred and ("target" in sides_inverted([each.method])) == inverted]
              for inverted in (True, False) for hold in holds]
    turns = [(hold, group, fold, hold.without(fold))
             for group, hold in zip(groups, [*holds, *holds], strict=True) if group for fold in folds]
    for found in side_by_side(lambda turn: _of_fold(*turn), turns):
        for candidate, row in found.items():
            scores[candidate].append(row)


def _in_sight(judged: Sequence[Judged], rivals: Sequence[Judged]) -> list[Candidate]:
    """Those within `CLEAR` standard errors of the best of both, compared token by token, in the centring of the best of
    them: where the means are not in the way, both are alike. None where the best is not that far from predicting
    nothing."""
    count = len(judged[0].cosines)
    best = max((*judged, *rivals), key=lambda each: _mean(each.weights[:count], each.cosines[:count]))
    if not best.predicts:
        return []
    left, centred = [], max(judged, key=lambda each: each.cosine).candidate.centred
    for each in judged:
        behind, error = _mean(each.weights, best.cosines[:count] - each.cosines)
        if each.candidate.centred == centred and behind <= CLEAR * error:
            left.append(each.candidate)
    return left


def _candidates(hold: HoldOut, methods: Sequence[str], rhos: Sequence[float]) -> list[Candidate]:
    return [Candidate(m, r, hold.centred) for m in methods for r in (rhos if sides_inverted([m]) else rhos[:1])]


def _of_fold(hold: HoldOut, some: Sequence[Candidate], fold: int, spectra: Spectra) -> dict[Candidate, Row]:
    """The row of a fold by candidate, all of one basis."""
    methods = list(dict.fromkeys(each.method for each in some))
    sample = _Sample(hold, fold, spectra.target[1] if "target" in sides_inverted(methods) else None)
    moved = _moves(spectra, methods, sample.x)
    return {each: (sample.weights, *sample.judge(moved(each))) for each in some}


def _judged(candidate: Candidate, folds: Sequence[Row]) -> Judged:
    weights, cosines, pairs = (torch.cat(each) for each in zip(*folds, strict=True))
    mean, error = _mean(weights, cosines)
    of_pairs = _mean(torch.ones_like(pairs), pairs) if len(pairs) else (mean, error)
    return Judged(candidate, weights, cosines, mean, error, *of_pairs)


def _mean(weights: Tensor, values: Tensor) -> tuple[float, float]:
    """(weighted mean, its standard error)."""
    share = weights / weights.sum()
    mean = float(share @ values)
    return mean, float((share.square() @ (values - mean).square()).sqrt())


def best_of(judged: Sequence[Judged]) -> Judged:
    """The best by held-out cosine; between those within a standard error of it, the best on sums and differences; of
    PTfer's within a standard error of that too, the best, where there is one.

    Only among those that were judged on the most tokens: others fell behind on the first folds.
    """
    most = max(len(each.cosines) for each in judged)
    full = [each for each in judged if len(each.cosines) == most]
    top = max(full, key=lambda each: each.cosine)
    close = [each for each in full if each.cosine >= top.cosine - top.error]
    best = max(close, key=lambda each: (each.pairs, each.cosine))
    as_good = [each for each in close
               if each.candidate.method == "ptfer" and each.pairs >= best.pairs - best.pairs_error]
    return max(as_good or [best], key=lambda each: (each.pairs, each.cosine))


def mask_helps(hold: HoldOut, rho: float, share: float) -> tuple[float, float]:
    """Mean held-out cosine of PTfer (without a mask, with one), on some tokens of every fold.

    share: of the anchors that count; a number made for all of them would mask less of a fold's.
    """
    a, b = hold.sides
    folds = range(len(hold.parts))
    held = torch.cat([hold.sample(fold, MASKED_SAMPLE) for fold in folds])
    fold_of = torch.cat([torch.full_like(hold.sample(fold, MASKED_SAMPLE), fold) for fold in folds])
    own = torch.cat([torch.full_like(part, fold) for fold, part in zip(folds, hold.parts, strict=True)])
    rows = [side.units(table, hold.ids) for side, table in ((a, hold.source), (b, hold.target))]
    x, truth = hold.source[hold.ids[held]] - a.mean, hold.target[hold.ids[held]]
    way = Candidate("ptfer", rho, hold.centred)
    plain = torch.cat([_moves(spectra, ("ptfer",), x[fold_of == fold])(way) @ spectra.target[1].T
                       for fold, spectra in enumerate(map(hold.without, folds))])
    topk = max(2, round(share * len(hold.ids) * (1 - 1 / len(folds))))
    under = masked(*rows, hold.weights, x, topk, rho, hold.without(0).target, own[None] != fold_of[:, None])
    without, with_mask = ((unit(directions_to_vectors(y, x.norm(dim=1), b.mean, b.median / max(a.median, SMALLEST)))
                           * unit(truth)).sum(1) for y in (plain, under))
    return float(without.mean()), float(with_mask.mean())


def considered(method: str, rho: float | None) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """(methods, rhos) to judge for a setting: "auto" means all; the baseline is judged beside them, never chosen."""
    return (METHODS if method == "auto" else (method,)), (RHOS if rho is None else (rho,))
