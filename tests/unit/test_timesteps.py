"""Timesteps by separability, against numpy, and as a bank draws them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from apl_train.training.timesteps import apart, bins_of, chances, separability, tuple_weights


def test_separability_and_chances_by_hand() -> None:
    rng = np.random.default_rng(0)
    e1, e2 = rng.normal(size=(2, 40, 4, 3, 3))
    t = rng.integers(0, 1000, 40)
    t[:5] = [0, 49, 50, 998, 999]
    distance = ((e1 - e2) ** 2).reshape(40, -1).mean(1)
    bins = t // 50
    present = [b for b in range(20) if (bins == b).any()]
    means = {b: distance[bins == b].mean() for b in present}
    filled = np.array([means.get(b, np.mean(list(means.values()))) for b in range(20)])
    expected = 0.7 * np.sqrt(filled) / np.sqrt(filled).sum() + 0.3 / 20
    found_bins = bins_of(torch.from_numpy(t), 0, 999)
    assert found_bins.tolist() == bins.tolist()
    s = separability(found_bins, apart(torch.from_numpy(e1), torch.from_numpy(e2)))
    assert np.allclose(s.numpy(), filled, rtol=1e-5)
    assert np.allclose(chances(s, 0.3).numpy(), expected, rtol=1e-5)


def test_bins_cover_any_range() -> None:
    bins = bins_of(torch.arange(200, 401), 200, 400)
    assert bins[0] == 0 and bins[-1] == 19 and bool((bins.diff() >= 0).all())
    assert torch.bincount(bins, minlength=20).min() >= 10


def test_bins_are_drawn_by_their_chance_whatever_they_hold() -> None:
    bin_of = torch.tensor([0] * 30 + [1] * 3 + [2] * 7)
    chance = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    weights = tuple_weights(bin_of, chance)
    assert np.allclose([float(weights[bin_of == b].sum()) for b in range(3)], chance.numpy())


@pytest.mark.parametrize("floor", [0.0, 0.4, 1.0])
def test_chances_sum_to_one_and_keep_the_floor(floor: float) -> None:
    found = chances(torch.tensor([0.0, 1.0, 4.0, 9.0]), floor)
    assert float(found.sum()) == pytest.approx(1.0)
    assert float(found.min()) == pytest.approx(floor / 4)
    assert torch.allclose(chances(torch.zeros(4), floor), torch.full((4,), 0.25, dtype=torch.float64))
