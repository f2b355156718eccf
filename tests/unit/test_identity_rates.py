"""Shares, intervals, any of k, thresholds and agreement against loops, enumeration and scikit-free formulas by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from apl_core import id_rates as r
from apl_core.errors import ScoreError
from apl_core.id_check import PersonPictures
from apl_core.id_scores import cluster_bootstrap, paired_bootstrap, person_maxima


def person(name: str, *values: list[float]) -> PersonPictures:
    return PersonPictures(name, tuple(np.array(v, float) for v in values))


PEOPLE = [person("a", [0.5], [], [0.1]), person("b", [0.05], [0.2], [0.0]), person("c", [], [], [0.9])]


def test_picture_share_is_a_ratio_of_sums_and_resamples_persons() -> None:
    people = [*PEOPLE, person("d", [0.4], [0.3])]
    found = r.picture_share(people, lambda p: p.n_faces, seed=4)
    assert found.value == pytest.approx(8 / 11)
    picks = np.random.default_rng(4).integers(0, 4, size=(4000, 4))
    counts, totals = np.array([2, 3, 1, 2]), np.array([3, 3, 3, 2])
    draws = [sum(counts[i] for i in row) / sum(totals[i] for i in row) for row in picks]
    assert (found.lo, found.hi) == pytest.approx(tuple(np.percentile(draws, (2.5, 97.5))))
    assert r.picture_share(people, lambda p: p.anonymised(0.35)).value == pytest.approx(5 / 11)
    assert math.isnan(r.picture_share(people[:1], lambda p: p.n_faces).lo)  # one person has no interval


def test_a_change_shares_its_resamples() -> None:
    on = [person(p.name, *p.values) for p in PEOPLE]
    same = r.share_change(PEOPLE, on, lambda p: p.n_faces)
    assert (same.value, same.lo, same.hi) == (0, 0, 0)  # independent resamples would give a wide interval
    lost = [person("a", [], [], []), person("b", [0.1], [0.1], [0.1]), person("c", [], [], [])]
    assert r.share_change(PEOPLE, lost, lambda p: p.n_faces).value == pytest.approx(3 / 9 - 6 / 9)
    with pytest.raises(ScoreError, match="same persons"):
        r.share_change(PEOPLE, lost[::-1], lambda p: p.n_faces)
    with pytest.raises(ScoreError, match="resamples"):
        r.picture_share(PEOPLE, lambda p: p.n_faces, resamples=100)
    with pytest.raises(ScoreError, match="nobody"):
        r.picture_share([], lambda p: p.n_faces)


def test_means_and_maxima_go_through_the_paired_bootstrap() -> None:
    """Aggregation as in the paper: within the person, then over persons; a person without a face is left out."""
    found = cluster_bootstrap(PEOPLE)
    assert found.value == pytest.approx(np.mean([(0.5 + 0.1) / 2, 0.25 / 3, 0.9]))
    assert cluster_bootstrap(PEOPLE, person_maxima).value == pytest.approx(np.mean([0.5, 0.2, 0.9]))
    halved = [person(p.name, *(v / 2 for v in p.values)) for p in PEOPLE]
    ratio = paired_bootstrap(PEOPLE, halved).ratio
    assert (ratio.value, ratio.lo, ratio.hi) == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.parametrize(("n", "m"), [(5, 0), (5, 2), (6, 3), (4, 4)])
def test_any_of_k_against_enumeration(n: int, m: int) -> None:
    flags = [True] * m + [False] * (n - m)
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(flags, k))
        assert r.any_of_k(n, m, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))
    with pytest.raises(ScoreError):
        r.any_of_k(n, m, n + 1)


def test_worst_of_k_states_k() -> None:
    people = [person("a", [0.9], [0.1]), person("b", [0.1], [0.1], [0.1], [0.9]), person("c", [], [0.1])]
    found, k = r.worst_of_k(people, 0.5)
    assert k == 2 and found.value == pytest.approx(np.mean([1.0, 1 - 3 / 6, 0.0]))
    one, k = r.worst_of_k(people, 0.5, 1)
    assert k == 1 and one.value == pytest.approx(np.mean([1 / 2, 1 / 4, 0]))


def test_the_threshold_says_where_it_comes_from() -> None:
    values = np.linspace(-1, 1, 2000)
    found = r.choose_threshold(values, far=1e-3)
    assert (found.source, found.far, found.impostors) == ("impostors", 1e-3, 2000)
    assert (values >= found.value).mean() <= 1e-3 and (values >= found.value - 0.01).mean() > 1e-3
    less = r.choose_threshold(values[:200], far=1e-3, customary=0.32)
    assert (less.source, less.far) == ("impostors", 1e-2)
    few = r.choose_threshold(values[:50], customary=0.32)
    assert (few.source, few.value) == ("customary", 0.32) and math.isnan(few.far)
    assert r.choose_threshold(values, given=0.5).source == "given"
    none = r.choose_threshold(values[:0])
    assert none.source == "none" and math.isnan(none.value)
    with pytest.raises(ScoreError, match="far"):
        r.choose_threshold(values, far=0)


def test_agreement_by_hand() -> None:
    a = np.array([0.9, 0.8, 0.1, 0.2, np.nan, 0.7])
    b = np.array([0.6, 0.1, 0.2, 0.1, 0.9, np.nan])
    found = r.agreement(a, b, 0.5, 0.5)
    # verdicts on the first four: a = 1100, b = 1000; chance = 0.5 * 0.25 + 0.5 * 0.75
    assert found.pictures == 4 and found.share == pytest.approx(0.75)
    assert found.kappa == pytest.approx((0.75 - 0.5) / 0.5)
    x, y = a[:4] - a[:4].mean(), b[:4] - b[:4].mean()
    assert found.correlation == pytest.approx(float((x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())))
    assert math.isnan(r.agreement(a, b, math.nan, 0.5).share)
    constant = r.agreement(np.array([0.9, 0.9]), np.array([0.9, 0.8]), 0.5, 0.5)
    assert constant.share == 1 and math.isnan(constant.kappa) and math.isnan(constant.correlation)


def test_between_strangers_and_the_person() -> None:
    assert r.between(0.9, 0.86, 0.98) == pytest.approx(1 / 3)
    assert math.isnan(r.between(0.5, 0.9, 0.9)) and math.isnan(r.between(0.5, math.nan, 0.9))
