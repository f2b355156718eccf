"""Shares of pictures and persons with intervals: faces found, joint success, recognised in any of k, agreement.

Pure numpy. Pictures of one person are not independent: every interval resamples persons, and off and on share their
resamples, so that easy persons move both sides together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import ScoreError
from .id_check import PersonPictures
from .id_scores import MIN_RESAMPLES, RESAMPLES, Interval, impostor_threshold

FARS = (1e-4, 1e-3, 1e-2)
"""False accept rates reported; a recogniser's threshold is set at the second unless another is asked for."""
Count = Callable[[PersonPictures], int]


@dataclass(frozen=True)
class Threshold:
    """Similarity from which a face counts as recognised, and where it comes from.

    `source`: "impostors" (at `far`, of `impostors` values), "given", "customary" (the recogniser's, from others' data),
    or "none": then `value` is NaN and nothing can be called recognised.
    """

    value: float
    source: str
    far: float = math.nan
    impostors: int = 0


@dataclass(frozen=True)
class Agreement:
    """Two recognisers on the same pictures: share of equal verdicts, Cohen's kappa, correlation of similarities, n."""

    share: float
    kappa: float
    correlation: float
    pictures: int


def choose_threshold(values: NDArray, *, far: float = 1e-3, given: float | None = None,
                     customary: float | None = None) -> Threshold:
    """The threshold: the one given; else from impostors at `far`, or at 1e-2 where they are too few; else customary.

    Raises:
        ScoreError: `far` is out of range.
    """
    if not 0 < far < 1:
        raise ScoreError(f"far is {far}, it must lie between 0 and 1.", "Use 0.001 for one in a thousand.", field="far")
    count = len(values)
    if given is not None:
        return Threshold(given, "given", impostors=count)
    for rate in (far, *(r for r in (1e-2,) if r > far)):
        if count * rate * (1 + 1e-12) >= 1:
            return Threshold(impostor_threshold(values, rate), "impostors", rate, count)
    if customary is not None:
        return Threshold(customary, "customary", impostors=count)
    return Threshold(math.nan, "none", impostors=count)


def _draws(counts: NDArray[np.float64], totals: NDArray[np.float64], picks: NDArray[np.int64]) -> NDArray[np.float64]:
    sums = totals[picks].sum(axis=1)
    return np.divide(counts[picks].sum(axis=1), sums, out=np.full(len(picks), np.nan), where=sums > 0)


def _picks(persons: int, resamples: int, seed: int) -> NDArray[np.int64]:
    if persons == 0:
        raise ScoreError("There is nobody to score.", "Name at least one person.", field="persons")
    if resamples < MIN_RESAMPLES:
        raise ScoreError(f"{resamples} resamples are too few for a 95% interval.", f"Use {MIN_RESAMPLES} or more.",
                         field="resamples")
    return np.random.default_rng(seed).integers(0, persons, size=(resamples, persons))


def _interval(value: float, draws: NDArray[np.float64], persons: int) -> Interval:
    known = draws[np.isfinite(draws)]
    if persons < 2 or not math.isfinite(value) or known.size < 0.95 * draws.size:
        return Interval(value, math.nan, math.nan)
    lo, hi = np.percentile(known, (2.5, 97.5))
    return Interval(value, float(lo), float(hi))


def picture_share(persons: Sequence[PersonPictures], count: Count, *, resamples: int = RESAMPLES,
                  seed: int = 0) -> Interval:
    """Share of all pictures that `count` counts, with the 95% interval of resampled persons.

    Persons may have different numbers of pictures: every resample is a ratio of sums.
    """
    picks = _picks(len(persons), resamples, seed)
    counts = np.array([count(p) for p in persons], dtype=np.float64)
    totals = np.array([p.n_images for p in persons], dtype=np.float64)
    value = float(counts.sum() / totals.sum()) if totals.sum() else math.nan
    return _interval(value, _draws(counts, totals, picks), len(persons))


def share_change(off: Sequence[PersonPictures], on: Sequence[PersonPictures], count: Count, *,
                 resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """on - off of `picture_share`, from shared resamples of persons.

    Raises:
        ScoreError: the two sides are not the same persons in the same order.
    """
    if [p.name for p in off] != [p.name for p in on]:
        raise ScoreError("The two sides are not the same persons in the same order.",
                         "Score both conditions on one list of persons.", field="persons")
    picks = _picks(len(off), resamples, seed)
    values, draws = [], []
    for side in (off, on):
        counts = np.array([count(p) for p in side], dtype=np.float64)
        totals = np.array([p.n_images for p in side], dtype=np.float64)
        values.append(float(counts.sum() / totals.sum()) if totals.sum() else math.nan)
        draws.append(_draws(counts, totals, picks))
    return _interval(values[1] - values[0], draws[1] - draws[0], len(off))


def any_of_k(n: int, recognised: int, k: int) -> float:
    """Chance that at least one of k pictures drawn from n is among the recognised ones: 1 - C(n - m, k) / C(n, k)."""
    if not 1 <= k <= n or not 0 <= recognised <= n:
        raise ScoreError(f"k is {k} of {n} pictures, {recognised} of them recognised.", "Use 1 <= k <= pictures.",
                         field="k")
    return 1 - math.comb(n - recognised, k) / math.comb(n, k)


def worst_of_k(persons: Sequence[PersonPictures], threshold: float, k: int | None = None, *,
               resamples: int = RESAMPLES, seed: int = 0) -> tuple[Interval, int]:
    """Share of persons recognised in at least one of k of their pictures, and k: one picture is enough to be known.

    k is the least number of pictures anybody has when not given; a person with more counts by every choice of k.
    """
    picks = _picks(len(persons), resamples, seed)
    k = min(p.n_images for p in persons) if k is None else k
    values = np.array([any_of_k(p.n_images, p.recognised(threshold), k) for p in persons])
    return _interval(float(values.mean()), values[picks].mean(axis=1), len(persons)), k


def agreement(first: NDArray, second: NDArray, first_threshold: float, second_threshold: float) -> Agreement:
    """How two recognisers agree; first, second: float [n], a picture's highest similarity, NaN without a face.

    Only pictures in which both see a face count. Kappa is NaN where both give everything the same verdict, the
    correlation where one of them does not vary.
    """
    both = np.isfinite(first) & np.isfinite(second)
    a, b = np.asarray(first, np.float64)[both], np.asarray(second, np.float64)[both]
    if not a.size or not math.isfinite(first_threshold) or not math.isfinite(second_threshold):
        return Agreement(math.nan, math.nan, math.nan, int(a.size))
    x, y = a >= first_threshold, b >= second_threshold
    share = float((x == y).mean())
    chance = float(x.mean() * y.mean() + (1 - x.mean()) * (1 - y.mean()))
    kappa = (share - chance) / (1 - chance) if chance < 1 else math.nan
    varies = a.size > 1 and a.std() > 0 and b.std() > 0
    return Agreement(share, kappa, float(np.corrcoef(a, b)[0, 1]) if varies else math.nan, int(a.size))


def between(value: float, strangers: float, same: float) -> float:
    """Where a mean similarity lies between strangers (0) and the person's own pictures (1); NaN unless 1 is above 0.

    Unlike the similarities themselves, this can be compared over recognisers.
    """
    return (value - strangers) / (same - strangers) if same - strangers > 1e-6 else math.nan
