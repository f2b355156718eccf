"""Equations 5-7 against numpy by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from apl_train.training.losses import anonymized_target, apl_loss, guided_alpha, id_loss, reg_loss, released_loss


@pytest.fixture
def eps() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {k: torch.randn(3, 4, 2, 2, generator=g) for k in ("ap", "c1", "c2")}


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 5.0])
def test_target_and_id_loss_by_hand(eps: dict[str, torch.Tensor], alpha: float) -> None:
    ap, c1, c2 = (eps[k].numpy().astype(np.float64) for k in ("ap", "c1", "c2"))
    target = (1 + alpha) * c2 - alpha * c1
    assert np.allclose(anonymized_target(eps["c1"], eps["c2"], alpha).numpy(), target, atol=1e-5)
    by_hand = [((ap[i] - target[i]) ** 2).sum() / 16 for i in range(3)]
    assert np.allclose(id_loss(eps["ap"], eps["c1"], eps["c2"], alpha).numpy(), by_hand, rtol=1e-4)


def test_alpha_does_not_matter_where_c1_is_c2(eps: dict[str, torch.Tensor]) -> None:
    c = eps["c1"]
    for alpha in (0.0, 1.0, 7.0):
        assert torch.allclose(id_loss(eps["ap"], c, c, alpha), reg_loss(eps["ap"], c), rtol=1e-4)


def test_only_the_prefixed_prediction_carries_gradient(eps: dict[str, torch.Tensor]) -> None:
    parts = {k: v.clone().requires_grad_() for k, v in eps.items()}
    id_loss(parts["ap"], parts["c1"], parts["c2"], 1.0).sum().backward()
    assert parts["ap"].grad is not None and parts["ap"].grad.abs().sum() > 0
    assert parts["c1"].grad is None and parts["c2"].grad is None


def test_mixed_batch_is_a_mean_over_samples() -> None:
    l_id, l_reg = torch.tensor([1.0, 3.0]), torch.tensor([5.0])
    assert float(apl_loss(l_id, l_reg)) == pytest.approx(3.0)
    assert float(apl_loss(l_id, l_reg, reg_weight=0.0)) == pytest.approx(4 / 3)
    assert float(apl_loss(l_id, torch.zeros(0))) == pytest.approx(2.0)


def test_guided_loss_is_that_of_combined_predictions_over_s_squared(eps: dict[str, torch.Tensor]) -> None:
    """Written out with an unconditional prediction, which is then seen to cancel."""
    ap, c1, c2 = (eps[k].numpy().astype(np.float64) for k in ("ap", "c1", "c2"))
    scales, alpha = np.array([3.0, 7.5, 12.0]), 2.0
    u = np.random.default_rng(0).normal(size=ap.shape)
    s = scales.reshape(-1, 1, 1, 1)
    wanted = u + s * (c2 - u) + alpha * (c2 - c1)
    by_hand = (((u + s * (ap - u)) - wanted) ** 2).reshape(3, -1).mean(1) / scales**2
    found = id_loss(eps["ap"], eps["c1"], eps["c2"], guided_alpha(alpha, torch.from_numpy(scales)))
    assert np.allclose(found.numpy(), by_hand, rtol=1e-4)
    same = id_loss(eps["ap"], eps["c1"], eps["c2"], guided_alpha(alpha, torch.ones(3)))
    assert torch.equal(same, id_loss(eps["ap"], eps["c1"], eps["c2"], alpha))


def test_a_null_prefix_is_equation_5_at_minus_one(eps: dict[str, torch.Tensor]) -> None:
    found = id_loss(eps["ap"], eps["c1"], eps["c2"], -1.0)
    assert torch.allclose(found, reg_loss(eps["ap"], eps["c1"]), rtol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 4.0])
def test_the_released_loss_has_the_direction_of_alpha_0(eps: dict[str, torch.Tensor], alpha: float) -> None:
    """By hand: 2 (1 + alpha) (eps_ap - eps_c2) / n: Adam, which divides by the gradient's size, sees no alpha."""
    ap = eps["ap"].clone().requires_grad_()
    loss = released_loss(ap, eps["c2"], alpha)
    loss.sum().backward()
    difference = (eps["ap"] - eps["c2"]).numpy().astype(np.float64)
    assert np.allclose(ap.grad.numpy(), 2 * (1 + alpha) * difference / 16, rtol=1e-4, atol=1e-6)
    by_hand = ((1 + alpha) ** 2 * difference**2).sum((1, 2, 3)) / 16
    assert np.allclose(loss.detach().numpy(), by_hand, rtol=1e-4)


def test_the_released_loss_does_not_know_c1(eps: dict[str, torch.Tensor]) -> None:
    """Equation 5 with c1 encoded with the prefix: whatever c1 alone predicts, the loss is the same."""
    written_out = id_loss(eps["ap"], eps["ap"], eps["c2"], 1.0)
    assert torch.allclose(released_loss(eps["ap"], eps["c2"], 1.0), written_out, rtol=1e-5)
    assert not torch.allclose(id_loss(eps["ap"], eps["c1"], eps["c2"], 1.0), written_out, rtol=1e-2)
