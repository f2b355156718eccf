"""Which map between two token tables to use, decided on tokens that were held out while it was fitted.

Every method, damping and centring is fitted on four fifths of the anchors and predicts the target's rows of the rest,
five times over. The best mean cosine wins. A prefix is no token, so where several maps are within a standard error of
the best, sums and differences of two held-out tokens decide between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .relative_maps import METHODS, POWERS, RHOS, Moments, Spectra, Together, masked, powered, unit

ANCHORS = 16384
"""Anchors that folds are made of at most: a random part of them tells maps apart as well as all of them."""
SAMPLE = 256
"""Held-out tokens of a fold that a map is judged on; all candidates see the same ones."""
MASKED_SAMPLE = 8
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
    """What a table needs beside a map: the mean taken off its rows ([width]; zeros where raw) and their median norm."""

    mean: Tensor
    median: float

    @classmethod
    def of(cls, rows: Tensor, weights: Tensor, centred: bool) -> Side:
        """Of the anchors' rows [k, width]."""
        mean = (weights @ rows) / weights.sum() if centred else torch.zeros(rows.shape[1])
        return cls(mean, float((rows - mean if centred else rows).norm(dim=1).median()))


class HoldOut:
    """Folds of the anchors, or of a random part of many, for one centring.

    Args:
        source, target: float32 tables. ids: int64 [k], the anchors; weights: float32 [k].
        folds: how many parts; seed: of their drawing.

    Attributes:
        ids, weights: [k'] of those in the folds. parts: each fold's places in them.
        sides: source's and target's mean and median norm, of all anchors.
    """

    def __init__(self, source: Tensor, target: Tensor, ids: Tensor, weights: Tensor, centred: bool, *,
                 folds: int = 5, seed: int = 0) -> None:
        self.source, self.target, self.centred = source, target, centred
        self.sides = (Side.of(source[ids], weights, centred), Side.of(target[ids], weights, centred))
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[:ANCHORS]
        self.ids, self.weights = ids[order], weights[order]
        self.parts = list(torch.arange(len(order)).chunk(folds))
        self._moments = [Moments(source, target, self.ids[part], self.weights[part], self.means, torch.float32)
                         for part in self.parts]

    @property
    def means(self) -> tuple[Tensor, Tensor] | None:
        """What is taken off rows before they are compared; None where nothing is."""
        return (self.sides[0].mean, self.sides[1].mean) if self.centred else None

    def without(self, fold: int) -> Spectra:
        """Those of all folds but one, in float32: enough to tell maps apart."""
        rest = [each for i, each in enumerate(self._moments) if i != fold]
        return Spectra(Together(rest), torch.float32)

    def sample(self, fold: int, size: int = SAMPLE) -> Tensor:
        """Places [n] in `ids` of a fold's tokens to judge by."""
        return self.parts[fold][:size]


def directions_to_vectors(moved: Tensor, lengths: Tensor, mean: Tensor, scale: float) -> Tensor:
    """Target vectors [n, dt] of directions [n, dt]: a row's length relative to the median is kept (field: per token).

    lengths: [n], norms in the source after its mean was taken off; scale: target's median norm / source's.
    """
    return mean + unit(moved) * (lengths * scale)[:, None]


class _Sample:
    """A fold's held-out tokens and pairs of them, ready to be judged in any basis of the target."""

    def __init__(self, hold: HoldOut, fold: int, basis: Tensor) -> None:
        places = hold.sample(fold)
        self.weights = hold.weights[places]
        a, b = hold.sides
        self.x = hold.source[hold.ids[places]] - a.mean
        self.truth = hold.target[hold.ids[places]] @ basis
        self.scale = b.median / max(a.median, 1e-30)
        self.mean, self.offset = b.mean @ basis, a.mean
        half = len(places) // 2
        self.first, self.second = slice(0, half), slice(half, 2 * half)

    def judge(self, moved: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """(cosines [n] of tokens, cosines [n'] of pairs); moved: W x [n, dt], offset: W mean [dt]."""
        found = directions_to_vectors(moved, self.x.norm(dim=1), self.mean, self.scale)
        tokens = (unit(found) * unit(self.truth)).sum(1)
        pairs = []
        for sign in (1.0, -1.0):
            # v1 + v2 less the mean is x1 + x2 + mean; v1 - v2 less the mean is x1 - x2 - mean
            x = self.x[self.first] + sign * (self.x[self.second] + self.offset)
            y = moved[self.first] + sign * (moved[self.second] + offset)
            truth = self.truth[self.first] + sign * self.truth[self.second]
            pairs.append((unit(directions_to_vectors(y, x.norm(dim=1), self.mean, self.scale)) * unit(truth)).sum(1))
        return tokens, torch.cat(pairs)


def judge(hold: HoldOut, methods: Sequence[str], rhos: Sequence[float]) -> list[Judged]:
    """Hold-out scores of all methods, and rhos where a method has one, for one centring."""
    wanted = [Candidate(m, r, hold.centred) for m in methods for r in (rhos if POWERS.get(m, (0, 0)) != (0, 0) else
                                                                      rhos[:1])]
    tokens: dict[Candidate, list[Tensor]] = {each: [] for each in wanted}
    pairs: dict[Candidate, list[Tensor]] = {each: [] for each in wanted}
    weights = []
    for fold in range(len(hold.parts)):
        spectra = hold.without(fold)
        turned = any(m in ("ptfer", "half") for m in methods)
        basis = spectra.target[1] if turned else torch.eye(hold.target.shape[1])
        sample = _Sample(hold, fold, basis)
        weights.append(sample.weights)
        x = torch.cat([sample.x, sample.offset[None]])
        cross = (spectra.rotated if turned else spectra.cross @ spectra.source[1]).T
        in_source = x @ spectra.source[1]
        plain = in_source @ cross
        for each in wanted:
            if each.method == "procrustes":
                moved = x @ (basis.T @ spectra.map("procrustes", 0)).T
            elif each.method in ("ridge", "half"):
                moved = (in_source * powered(spectra.source[0], each.rho, POWERS[each.method][1])) @ cross
            else:
                moved = plain
            if p := POWERS.get(each.method, (0, 0))[0]:
                moved = moved * powered(spectra.target[0], each.rho, p)
            one, two = sample.judge(moved[:-1], moved[-1])
            tokens[each].append(one)
            pairs[each].append(two)
    share = torch.cat(weights)
    share = share / share.sum()
    return [_judged(each, torch.cat(tokens[each]), torch.cat(pairs[each]), share) for each in wanted]


def _judged(candidate: Candidate, cosines: Tensor, pairs: Tensor, share: Tensor) -> Judged:
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
            found = directions_to_vectors(y, x.norm(dim=1), b.mean, b.median / max(a.median, 1e-30))
            into.append((unit(found) * unit(truth)).sum(1))
    return float(torch.cat(without).mean()), float(torch.cat(with_mask).mean())


def considered(method: str, rho: float | None) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """(methods, rhos) to judge for a setting: "auto" means all; the baseline is judged beside them, never chosen."""
    return (METHODS if method == "auto" else (method,)), (RHOS if rho is None else (rho,))
