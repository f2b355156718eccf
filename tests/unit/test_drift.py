"""Drift against loops in numpy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from apl_core.errors import ScoreError
from apl_train.scoring import drift

PROMPTS = ("a", "b", "c", "d")
SEEDS = 3


def latents(seed: int, scale: float = 1.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(len(PROMPTS) * SEEDS, 4, 3, 2, generator=g)


def rms(a: np.ndarray, b: np.ndarray) -> float:
    return math.sqrt(((a.astype(float) - b.astype(float)) ** 2).mean())


def test_latent_distances_of_equal_seeds() -> None:
    off, on = latents(0), latents(1)
    found = drift.paired_latents(PROMPTS, off, on)
    expected = np.array([rms(a, b) for a, b in zip(off.numpy(), on.numpy(), strict=True)])
    assert found.values.ravel() == pytest.approx(expected)
    assert found.mean == pytest.approx(expected.mean())
    assert drift.paired_latents(PROMPTS, off, off).mean == 0


def test_two_seeds_are_all_pairs_within_a_prompt() -> None:
    off = latents(0)
    found = drift.two_seed_latents(PROMPTS, off)
    for p in range(len(PROMPTS)):
        own = off[p * SEEDS : (p + 1) * SEEDS].numpy()
        assert found.values[p] == pytest.approx([rms(a, b) for a, b in itertools.combinations(own, 2)])
    with pytest.raises(ScoreError):
        drift.two_seed_latents(PROMPTS, latents(0)[: len(PROMPTS)])


def test_pixels_are_in_0_to_1() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (5, 4, 4, 3), dtype=np.uint8) for _ in range(2))
    assert drift.pixel_rms(a, b) == pytest.approx([rms(x / 255, y / 255) for x, y in zip(a, b, strict=True)])
    black, white = np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 255, np.uint8)
    assert drift.pixel_rms(black, white) == pytest.approx([1.0])
    assert drift.pixel_rms(black[:0], white[:0]).shape == (0,)


def test_ratio_and_interval_resample_prompts() -> None:
    on = drift.Distances(PROMPTS, np.array([[0.1, 0.3], [0.2, 0.2], [0.4, 0.6], [0.1, 0.1]]))
    base = drift.Distances(PROMPTS, 4 * on.values)
    ratio = on.ratio(base)
    assert (ratio.value, ratio.lo, ratio.hi) == pytest.approx((0.25, 0.25, 0.25))  # paired: no spread at all
    picks = np.random.default_rng(0).integers(0, 4, size=(4000, 4))
    lo, hi = np.percentile(on.values.mean(1)[picks].mean(1), (2.5, 97.5))
    assert (on.interval().lo, on.interval().hi) == pytest.approx((lo, hi))
    assert math.isnan(on.ratio(drift.Distances(PROMPTS, 0 * on.values)).value)
    with pytest.raises(ScoreError):
        on.ratio(drift.Distances(("a", "b"), base.values[:2]))


def test_a_distance_that_is_not_finite_is_missing() -> None:
    found = drift.Distances(("a", "b"), np.array([[0.2, math.nan], [0.4, 0.4]]))
    assert found.mean == pytest.approx(0.3)
    assert math.isnan(drift.Distances(("a",), np.array([[math.inf]])).mean)


def test_shapes_must_agree() -> None:
    with pytest.raises(ScoreError):
        drift.paired_latents(PROMPTS, latents(0), latents(0)[:4])
    with pytest.raises(ScoreError):
        drift.pixel_rms(np.zeros((1, 2, 2, 3), np.uint8), np.zeros((1, 4, 4, 3), np.uint8))
    with pytest.raises(ScoreError):
        drift.Distances(("a",), np.zeros((2, 2)))


def test_random_vectors_keep_norms_and_nothing_else() -> None:
    learned = {"clip_l": torch.arange(1, 31).reshape(3, 10).float(), "clip_g": torch.ones(3, 12, dtype=torch.float16)}
    made = drift.random_vectors(learned, 7)
    again = drift.random_vectors(dict(reversed(learned.items())), 7)
    for key, value in learned.items():
        assert made[key].dtype == torch.float32
        assert made[key].norm(dim=1).numpy() == pytest.approx(value.float().norm(dim=1).numpy(), rel=1e-5)
        assert torch.equal(made[key], again[key])
        cosine = torch.nn.functional.cosine_similarity(made[key], value.float(), dim=1)
        assert cosine.abs().max() < 0.95
    assert not torch.equal(made["clip_l"], drift.random_vectors(learned, 8)["clip_l"])


def test_vectors_stand_where_the_loaded_prefix_stands() -> None:
    from apl_core.metadata import PrefixMetadata
    from apl_core.prefix import AnonymizationPrompt

    rows = {"emb_params": torch.randn(3, 768)}
    suffix = AnonymizationPrompt("sd1", rows, PrefixMetadata(family="sd1", placement="suffix"))
    control = {"emb_params": torch.zeros(3, 768)}
    placed = drift.standing_as(control, suffix)
    assert placed.meta.placement == "suffix" and torch.equal(placed.vectors(), control["emb_params"])
    for prompt in (rows, None, AnonymizationPrompt("sd1", rows, PrefixMetadata(family="sd1"))):
        assert drift.standing_as(control, prompt) is control
