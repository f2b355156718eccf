"""Identity scores against figures worked out by hand and against naive loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from apl_core import id_scores as s
from apl_core.errors import ScoreError


def person(name: str, values: list[float], n: int | None = None) -> s.PersonScores:
    return s.PersonScores(name, np.array(values), len(values) if n is None else n)


TWO = [person("a", [0.2, 0.4], 4), person("b", [0.9], 1)]


def test_mean_is_over_persons_not_over_pictures() -> None:
    assert s.id_acc_mean(TWO) == pytest.approx((0.3 + 0.9) / 2)
    assert s.id_acc_max(TWO) == pytest.approx((0.4 + 0.9) / 2)


def test_pictures_without_a_face_lower_the_face_rate_only() -> None:
    assert s.face_rate(TWO) == pytest.approx(3 / 5)
    without = [person("a", [0.2, 0.4], 2), person("b", [0.9], 1)]
    assert s.id_acc_mean(without) == s.id_acc_mean(TWO)


def test_a_person_without_any_face_is_left_out_of_the_mean() -> None:
    assert s.id_acc_mean([*TWO, person("c", [], 5)]) == s.id_acc_mean(TWO)
    assert math.isnan(s.id_acc_mean([person("c", [], 5)]))
    assert s.face_rate([person("c", [], 5)]) == 0


def test_joint_success_needs_a_face_and_a_low_similarity() -> None:
    assert s.joint_success(TWO, 0.4) == pytest.approx(1 / 5)  # 0.2 only: at the threshold is recognised
    assert s.joint_success(TWO, 2.0) == pytest.approx(3 / 5)  # pictures without a face never succeed


def test_reference_weighs_pictures_equally() -> None:
    ref = s.reference_embedding(np.array([[10.0, 0.0], [0.0, 0.1]]))
    assert ref == pytest.approx([math.sqrt(0.5)] * 2)
    with pytest.raises(ScoreError):
        s.reference_embedding(np.ones((1, 4)))
    with pytest.raises(ScoreError):
        s.reference_embedding(np.zeros((3, 4)))


def test_leave_one_out_against_a_loop() -> None:
    e = np.random.default_rng(0).normal(size=(5, 8)) + 1
    expected = []
    for i in range(5):
        others = [e[j] / np.linalg.norm(e[j]) for j in range(5) if j != i]
        m = sum(others) / 4
        expected.append(float(e[i] @ m / np.linalg.norm(e[i]) / np.linalg.norm(m)))
    assert s.leave_one_out(e) == pytest.approx(expected)


def test_scores_against_a_naive_loop() -> None:
    rng = np.random.default_rng(1)
    people = [person(str(i), list(rng.uniform(-1, 1, rng.integers(0, 6))), 6) for i in range(20)]
    total, highest, count, faces, good = 0.0, 0.0, 0, 0, 0
    for p in people:
        if len(p.similarities):
            total += sum(p.similarities) / len(p.similarities)
            highest += max(p.similarities)
            count += 1
        faces += len(p.similarities)
        good += sum(1 for v in p.similarities if v < 0.1)
    assert s.id_acc_mean(people) == pytest.approx(total / count)
    assert s.id_acc_max(people) == pytest.approx(highest / count)
    assert s.face_rate(people) == pytest.approx(faces / 120)
    assert s.joint_success(people, 0.1) == pytest.approx(good / 120)


def test_impostor_threshold_accepts_no_more_than_far() -> None:
    values = np.arange(1000) / 1000
    t = s.impostor_threshold(values, 0.001)
    assert 0.998 < t < 0.999 and (values >= t).sum() == 1
    assert (values >= s.impostor_threshold(values, 0.1)).sum() == 100
    tied = np.full(100, 0.5)
    assert (tied >= s.impostor_threshold(tied, 0.1)).sum() == 0
    for bad in (0.0, 1.0, 1e-4):
        with pytest.raises(ScoreError):
            s.impostor_threshold(values, bad)


def test_floor_and_cross_similarities() -> None:
    refs = np.array([[1.0, 0.0], [0.0, 1.0]])
    faces = [np.array([[1.0, 0.0], [0.6, 0.8]]), np.array([[0.0, 2.0]])]
    assert s.impostor_floor(refs, [np.array([[0.0, 1.0]]), np.array([[0.0, 3.0]])]) == pytest.approx(0.5)
    assert s.impostor_floor(refs, [np.zeros((0, 2)), np.array([[0.0, 3.0]])]) == pytest.approx(1.0)
    assert sorted(s.cross_similarities(refs, faces)) == pytest.approx([0.0, 0.0, 0.8])


def test_bootstrap_against_a_loop_and_seeded() -> None:
    people = [person(str(i), [v], 1) for i, v in enumerate(np.random.default_rng(2).normal(0.3, 0.1, 30))]
    got = s.cluster_bootstrap(people, resamples=2000, seed=5)
    values = [p.mean for p in people]
    picks = np.random.default_rng(5).integers(0, 30, size=(2000, 30))
    draws = sorted(sum(values[j] for j in row) / 30 for row in picks)
    assert (got.lo, got.hi) == pytest.approx(tuple(np.percentile(draws, (2.5, 97.5))))
    assert got == s.cluster_bootstrap(people, resamples=2000, seed=5)
    assert got.lo < got.value < got.hi
    assert 0.5 < (got.hi - got.lo) / (2 * 1.96 * np.std(values) / math.sqrt(30)) < 1.5


def test_paired_ratio_shares_resamples() -> None:
    off = [person(str(i), [v], 1) for i, v in enumerate(np.linspace(0.2, 0.6, 12))]
    on = [person(p.name, [0.25 * p.mean], 1) for p in off]
    got = s.paired_bootstrap(off, on)
    assert (got.ratio.value, got.ratio.lo, got.ratio.hi) == pytest.approx((0.25, 0.25, 0.25))
    assert got.off.lo < got.off.hi
    with pytest.raises(ScoreError):
        s.paired_bootstrap(off, on[::-1])


def test_intervals_that_cannot_be_had() -> None:
    assert math.isnan(s.cluster_bootstrap([person("a", [0.1, 0.2])]).lo)
    negative = [person(str(i), [-0.1]) for i in range(4)]
    assert math.isnan(s.paired_bootstrap(negative, negative).ratio.value)
    with pytest.raises(ScoreError):
        s.cluster_bootstrap(TWO, resamples=100)


def test_refusals() -> None:
    for values, n in (([0.1, 0.2], 1), ([math.nan], 1)):
        with pytest.raises(ScoreError):
            person("a", values, n)
    with pytest.raises(ScoreError):
        s.id_acc_mean([])
    with pytest.raises(ScoreError):
        s.face_rate([person("a", [], 0)])
