"""Equations 5-7 of the paper, one function each; everything here is a formula over noise predictions.

Shapes: every `eps_*` is float [N, 4, h, w], a prediction of the frozen model for the same noisy latents. `eps_c1` and
`eps_c2` are predictions for prompts WITHOUT the prefix; only `eps_ap` carries gradient (paper sec. 3.4).
Squared norms are means over a sample's elements, so that a loss does not depend on the picture's size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def anonymized_target(eps_c1: Tensor, eps_c2: Tensor, alpha: float | Tensor) -> Tensor:
    """Equation 5: eps(c2) + alpha (eps(c2) - eps(c1)), the composed score of "c2 and not c1" (equation 4).

    For a sample of S_Reg c1 = c2 and the target is eps(c) whatever alpha is. At alpha = -1 it is eps(c1): nothing is to
    change, and every sample is one of L_Reg (a null prefix). alpha: one number, or one a sample, float [N].
    """
    if isinstance(alpha, Tensor):
        alpha = alpha.to(eps_c2).view(-1, 1, 1, 1)
    return eps_c2 + alpha * (eps_c2 - eps_c1)


def guided_alpha(alpha: float, scales: Tensor) -> Tensor:
    """alpha of samples that guidance of these scales will multiply: alpha / s, float [N].

    Sampling uses eps(u) + s (eps - eps(u)). What it should give is eps(u) + s (eps(c2) - eps(u)), guided towards c2,
    with equation 5's push alpha (eps(c2) - eps(c1)) once, not s times. The squared distance of the two, over s^2 so
    that no scale outweighs another, is equation 6 with alpha / s: eps(u) stands on both sides and need not be computed.
    """
    return alpha / scales


def squared_error(eps_ap: Tensor, target: Tensor) -> Tensor:
    """|| eps_ap - target ||^2 of each sample, mean over its elements: float32 [N]. The target carries no gradient."""
    return (eps_ap.float() - target.detach().float()).square().flatten(1).mean(1)


def id_loss(eps_ap: Tensor, eps_c1: Tensor, eps_c2: Tensor, alpha: float | Tensor) -> Tensor:
    """Equation 6, L_ID of each sample of S_ID: float32 [N]."""
    return squared_error(eps_ap, anonymized_target(eps_c1, eps_c2, alpha))


def reg_loss(eps_ap: Tensor, eps_c: Tensor) -> Tensor:
    """Equation 7, L_Reg of each sample of S_Reg (c1 = c2 = c): float32 [N]."""
    return squared_error(eps_ap, eps_c)


def released_loss(eps_ap: Tensor, eps_c2: Tensor, alpha: float | Tensor) -> Tensor:
    """What the paper's released code minimises (shiliang26/APL train.py at 8e14d91), of samples of either set.

    It encodes c1 of equation 5's target WITH the prefix, so that the target moves along with the prediction: the
    gradient is (1 + alpha) times that of alpha = 0, a factor that Adam divides out again. float32 [N].
    """
    return id_loss(eps_ap, eps_ap.detach().float(), eps_c2.float(), alpha)


def apl_loss(l_id: Tensor, l_reg: Tensor, reg_weight: float = 1.0) -> Tensor:
    """L_APL = L_ID + L_Reg over a mixed batch (paper sec. 3.5): the mean over all of its samples, a scalar.

    The paper mixes samples of both sets with batch 1, which is a mean over samples, not a sum of two means.
    reg_weight: 1 in the paper; 0 is the ablation of Fig. 7.
    """
    return torch.cat([l_id, reg_weight * l_reg]).mean()
