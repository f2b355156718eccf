"""Identity scores from similarities: ID-ACC mean and max, face rate, joint success, floors, intervals (APL sec. 4.2).

Pure numpy. The one rule behind everything here: a picture without a face has no similarity. It is never counted as 0,
or a prefix that merely destroys faces would look like perfect anonymization; it lowers `face_rate` instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import ScoreError

RESAMPLES = 4000
"""Bootstrap resamples by default; fewer than `MIN_RESAMPLES` are refused."""
MIN_RESAMPLES = 2000


@dataclass(frozen=True)
class PersonScores:
    """The similarities of one person's pictures to that person's reference embedding.

    Args:
        name: the person.
        similarities: float [n_faces], one per picture WITH a face; empty when no picture has one.
        n_images: all pictures generated for the person, with and without a face.

    Raises:
        ScoreError: a similarity is not finite, or there are more similarities than pictures.
    """

    name: str
    similarities: NDArray[np.float64]
    n_images: int

    def __post_init__(self) -> None:
        values = np.asarray(self.similarities, dtype=np.float64).reshape(-1)
        if values.size > self.n_images:
            raise ScoreError(f"{self.name} has {values.size} similarities for {self.n_images} images.",
                             "Give at most one similarity per image.", field="similarities")
        if not np.isfinite(values).all():
            raise ScoreError(f"A similarity of {self.name} is not a number.",
                             "Leave images without a face out.", field="similarities")
        object.__setattr__(self, "similarities", values)

    @property
    def mean(self) -> float:
        """Mean over the pictures with a face; NaN when there is none."""
        return float(self.similarities.mean()) if self.similarities.size else math.nan

    @property
    def max(self) -> float:
        """The picture that looks most like the person; NaN when no picture has a face."""
        return float(self.similarities.max()) if self.similarities.size else math.nan


@dataclass(frozen=True)
class Interval:
    """A figure with its 95% interval; NaN where it cannot be had."""

    value: float
    lo: float
    hi: float


@dataclass(frozen=True)
class PairedIntervals:
    """off, on and on / off from the same resamples of persons."""

    off: Interval
    on: Interval
    ratio: Interval


def normalise(embeddings: NDArray) -> NDArray[np.float64]:
    """Rows of unit length: float [..., d] -> float64 [..., d]. Raises `ScoreError` for a zero or non-finite row."""
    values = np.asarray(embeddings, dtype=np.float64)
    norms = np.linalg.norm(values, axis=-1, keepdims=True)
    if not np.isfinite(norms).all() or (norms == 0).any():
        raise ScoreError("An embedding is zero or not finite.", "Check the recogniser model.", field="embedding")
    return values / norms


def reference_embedding(embeddings: NDArray) -> NDArray[np.float64]:
    """The person's reference: the mean of the L2-normalised embeddings, normalised again (APL sec. 4.2).

    Args:
        embeddings: float [n, d], n >= 2, so that the leave-one-out ceiling exists for the same pictures.

    Returns:
        float64 [d], unit length.

    Raises:
        ScoreError: fewer than two embeddings, or they cancel out.
    """
    values = np.asarray(embeddings, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] < 2:
        raise ScoreError(f"A reference needs at least 2 embeddings, got an array of shape {values.shape}.",
                         "Give two or more reference images with a face for every person.", field="references")
    return normalise(normalise(values).mean(axis=0))


def cosine(embeddings: NDArray, reference: NDArray) -> NDArray[np.float64]:
    """Cosine similarity: float [..., d] and [d] -> float64 [...]."""
    return normalise(embeddings) @ normalise(reference)


def leave_one_out(embeddings: NDArray) -> NDArray[np.float64]:
    """Similarity of each picture to the mean of the others, real pictures' ceiling. float [n, d] -> float64 [n].

    With two pictures the "mean" is the other picture. Raises `ScoreError` below two.
    """
    values = np.asarray(embeddings, dtype=np.float64)
    reference_embedding(values)  # refuses fewer than two
    unit = normalise(values)
    others = normalise(unit.sum(axis=0) - unit)
    return np.einsum("nd,nd->n", unit, others)


def _some(persons: Sequence[PersonScores]) -> None:
    if not persons:
        raise ScoreError("There is nobody to score.", "Name at least one person.", field="persons")


def _nanmean(values: NDArray[np.float64]) -> float:
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if kept.size else math.nan


def person_means(persons: Sequence[PersonScores]) -> NDArray[np.float64]:
    """float64 [n_persons], NaN for a person without any face."""
    return np.array([p.mean for p in persons], dtype=np.float64)


def person_maxima(persons: Sequence[PersonScores]) -> NDArray[np.float64]:
    """float64 [n_persons], NaN for a person without any face."""
    return np.array([p.max for p in persons], dtype=np.float64)


def id_acc_mean(persons: Sequence[PersonScores]) -> float:
    """ID-ACC, mean (APL sec. 4.2, Table 1): mean over persons of the person's mean; NaN if no picture has a face."""
    _some(persons)
    return _nanmean(person_means(persons))


def id_acc_max(persons: Sequence[PersonScores]) -> float:
    """ID-ACC, max (APL sec. 4.2, Table 1): mean over persons of the person's highest similarity."""
    _some(persons)
    return _nanmean(person_maxima(persons))


def face_rate(persons: Sequence[PersonScores]) -> float:
    """Pictures with a face / all pictures."""
    _some(persons)
    total = sum(p.n_images for p in persons)
    if total == 0:
        raise ScoreError("There are no images to score.", "Generate at least one image per person.", field="n_images")
    return sum(p.similarities.size for p in persons) / total


def joint_success(persons: Sequence[PersonScores], threshold: float) -> float:
    """Share of all pictures that have a face AND whose similarity is below `threshold`.

    Neither half counts alone: no face is a spoilt picture, a similarity at or above the threshold is a recognised
    person.
    """
    face_rate(persons)  # the same refusals
    good = sum(int((p.similarities < threshold).sum()) for p in persons)
    return good / sum(p.n_images for p in persons)


def impostor_threshold(similarities: NDArray, far: float) -> float:
    """The smallest threshold at which at most a share `far` of impostors is accepted (similarity >= threshold).

    Args:
        similarities: float [n] between different persons; n x far must reach 1, else the quantile would be a guess.
        far: false accept rate, 0 < far < 1.

    Raises:
        ScoreError: far out of range, or too few similarities for it.
    """
    values = np.sort(np.asarray(similarities, dtype=np.float64).reshape(-1))[::-1]
    if not 0 < far < 1:
        raise ScoreError(f"far is {far}, it must lie between 0 and 1.", "Use 0.001 for one in a thousand.", field="far")
    accepted = math.floor(values.size * far * (1 + 1e-12))  # 1000 * 0.001 must count as 1
    if accepted < 1:
        raise ScoreError(f"{values.size} impostor similarities cannot support a false accept rate of {far}.",
                         f"Use at least {math.ceil(1 / far)} of them or a higher rate.", field="far")
    return float(np.nextafter(values[accepted], np.inf))


def impostor_floor(references: NDArray, others: Sequence[NDArray]) -> float:
    """How similar strangers are anyway: mean over persons of the mean similarity of others' faces to the reference.

    With pictures of people of the same description as person i in `others[i]`, this is what perfect anonymization
    that keeps the description reaches; a score far below it would mean that more than the identity was lost.

    Args:
        references: float [n_persons, d].
        others: one float [k_i, d] per person (faces of other people); an empty one is left out.

    Raises:
        ScoreError: the lengths differ.
    """
    if len(references) != len(others):
        raise ScoreError(f"{len(references)} references for {len(others)} sets of others.", field="others")
    means = [float(cosine(o, r).mean()) for r, o in zip(references, others, strict=True) if len(o)]
    return float(np.mean(means)) if means else math.nan


def cross_similarities(references: NDArray, faces: Sequence[NDArray]) -> NDArray[np.float64]:
    """Similarities of all faces to everyone ELSE's reference. float [n, d], n x float [k_i, d] -> float64 [.]."""
    parts = [cosine(f, r) for i, r in enumerate(references) for j, f in enumerate(faces) if i != j and len(f)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float64)


def _resamples(count: int, resamples: int, seed: int) -> NDArray[np.int64]:
    if resamples < MIN_RESAMPLES:
        raise ScoreError(f"{resamples} resamples are too few for a 95% interval.",
                         f"Use {MIN_RESAMPLES} or more.", field="resamples")
    return np.random.default_rng(seed).integers(0, count, size=(resamples, count))


def _resampled_means(values: NDArray[np.float64], picks: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean of every resample without its NaN entries; NaN where nothing is left."""
    known = ~np.isnan(values)
    sums, counts = np.where(known, values, 0.0)[picks].sum(axis=1), known[picks].sum(axis=1)
    return np.divide(sums, counts, out=np.full(len(picks), np.nan), where=counts > 0)


def _interval(value: float, draws: NDArray[np.float64], persons: int) -> Interval:
    kept = draws[np.isfinite(draws)]
    if persons < 2 or kept.size < 0.95 * draws.size or not math.isfinite(value):
        return Interval(value, math.nan, math.nan)  # one person, or a figure undefined in many resamples: no interval
    lo, hi = np.percentile(kept, (2.5, 97.5))
    return Interval(value, float(lo), float(hi))


def cluster_bootstrap(
    persons: Sequence[PersonScores],
    statistic: Callable[[Sequence[PersonScores]], NDArray[np.float64]] = person_means,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """95% percentile interval of the mean over persons, resampling persons: pictures of one person are not independent.

    Args:
        statistic: `person_means` or `person_maxima`.
        seed: of the resampling; the same seed gives the same interval.

    Raises:
        ScoreError: nobody, or fewer than 2000 resamples.
    """
    _some(persons)
    values = statistic(persons)
    return _interval(_nanmean(values), _resampled_means(values, _resamples(len(values), resamples, seed)), len(values))


def paired_bootstrap(
    off: Sequence[PersonScores],
    on: Sequence[PersonScores],
    statistic: Callable[[Sequence[PersonScores]], NDArray[np.float64]] = person_means,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> PairedIntervals:
    """Intervals of off, on and their ratio from shared resamples, so that easy persons move both sides together.

    The ratio is mean(on) / mean(off); it is NaN unless mean(off) is above 0.

    Raises:
        ScoreError: the two sides are not the same persons in the same order.
    """
    _some(off)
    if [p.name for p in off] != [p.name for p in on]:
        raise ScoreError("The two sides are not the same persons in the same order.",
                         "Score both conditions on one list of persons.", field="persons")
    a, b = statistic(off), statistic(on)
    picks = _resamples(len(a), resamples, seed)
    draws_a, draws_b = _resampled_means(a, picks), _resampled_means(b, picks)
    ratios = np.divide(draws_b, draws_a, out=np.full(len(picks), np.nan), where=draws_a > 0)
    mean_a, mean_b = _nanmean(a), _nanmean(b)
    ratio = mean_b / mean_a if mean_a > 0 else math.nan
    n = len(a)
    return PairedIntervals(_interval(mean_a, draws_a, n), _interval(mean_b, draws_b, n), _interval(ratio, ratios, n))
