"""What a prefix keeps on other models: ratios of drops, against numpy by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from apl_train.miniworld.carried import kept, nearest_tokens


def test_kept_is_the_ratio_of_mean_drops_and_its_interval_holds_it() -> None:
    rng = np.random.default_rng(0)
    off = 0.6 + 0.1 * rng.standard_normal(40)
    native, ours = off * 0.3, off * 0.4 + 0.02 * rng.standard_normal(40)
    value, interval = kept(off, ours, off, native)
    assert value == pytest.approx((off - ours).mean() / (off - native).mean())
    assert interval[0] < value < interval[1]
    picks = np.random.default_rng(0).integers(0, 40, size=(4000, 40))
    draws = [(off - ours)[p].mean() / (off - native)[p].mean() for p in picks]
    assert interval == pytest.approx(np.percentile(draws, (2.5, 97.5)).tolist())


def test_between_models_drops_are_shares_of_what_each_knew() -> None:
    value, _ = kept([0.8, 0.8, 0.8], [0.4, 0.4, 0.4], [0.4, 0.4, 0.4], [0.2, 0.2, 0.2], relative=True)
    assert value == pytest.approx(1.0)


def test_a_person_without_a_face_is_left_out_of_both_sides() -> None:
    value, _ = kept([0.8, 0.6, 0.9], [0.4, 0.3, math.nan], [0.8, 0.6, 0.9], [0.2, 0.1, 0.1])
    assert value == pytest.approx((0.4 + 0.3) / (0.6 + 0.5))
    assert math.isnan(kept([0.5], [0.1], [0.5], [0.1])[0])


def test_nearest_tokens_are_nearest_by_cosine_not_by_length() -> None:
    table = torch.tensor([[1.0, 0.0], [0.0, 10.0], [0.7, 0.7]])
    found = nearest_tokens({"clip_l": torch.tensor([[0.1, 0.9], [5.0, 4.0]])}, {"clip_l": table})
    assert torch.equal(found["clip_l"], torch.tensor([[0.0, 10.0], [0.7, 0.7]]))
