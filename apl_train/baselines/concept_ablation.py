"""Concept Ablation: for a listed name the model learns to predict what it predicts for an anchor.

Kumari et al., Ablating Concepts in Text-to-Image Diffusion Models (ICCV 2023, arXiv 2303.13516), section 3.2, the
model-based variant: with pictures x of the anchor prompt c, the name's prompt c* and sg the stop of the gradient,

    L = E_{eps, x, c, c*, t} w_t | sg(Phi(x_t, c, t)) - Phi(x_t, c*, t) |^2      (w_t = 1),

plus lambda times the ordinary diffusion loss on (x, c), which keeps the anchor. Keys and values of the cross-attention
learn. The anchor is each person's description, as APL's c2: the paper's own anchors ("a person") lose attributes
(APL, table 2); both are in the grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from apl_train.baselines.fine_tuning import Student, draws, frozen, noise_like, predicted, states_of
from apl_train.baselines.protocol import Baseline, Person, between, one_of
from apl_train.baselines.uce import ANCHORS
from apl_train.baselines.wording import TEMPLATES, mentions
from apl_train.model.backend import Backend
from apl_train.model.edited import pictures_of
from apl_train.training.bank import add_noise


def ablation_loss(eps_anchor: Tensor, eps_name: Tensor) -> Tensor:
    """Mean square of the difference, a scalar; no gradient reaches the anchor's prediction."""
    return (eps_anchor.detach() - eps_name).square().mean()


class ConceptAblation(Baseline):
    """`anchor`: of UCE's; `anchor_weight`: lambda; `iterations`: steps of Adam."""

    name = "ca"
    title = "Concept Ablation"
    paper = "Kumari et al., ICCV 2023, arXiv 2303.13516"
    changes = "weights"
    defaults: Mapping[str, Any] = {"anchor": "description", "learning_rate": 3e-4, "iterations": 60, "batch": 4,
                                   "anchor_weight": 1.0}
    grid = ({"anchor": "description", "learning_rate": 1e-4}, {"anchor": "description", "learning_rate": 1e-3},
            {"anchor": "a person", "learning_rate": 1e-3})

    def edit(self, backend: Backend, persons: Sequence[Person], settings: Mapping[str, Any], *, keep: Sequence[str],
             seed: int) -> tuple[Backend, dict[str, Any]]:
        """Draws a picture of every anchor, then trains a copy; it takes no captions to keep."""
        anchor = one_of(settings, "anchor", ANCHORS)
        weight = between(settings, "anchor_weight", 0.0, 1e3)
        iterations, batch = int(between(settings, "iterations", 1, 1e6)), int(between(settings, "batch", 1, 1024))
        student = Student(backend, between(settings, "learning_rate", 1e-8, 10.0), ("k", "v"))
        words = [p.description if anchor == "description" else anchor for p in persons]
        pictures = pictures_of(backend, words, seed)
        asked = states_of(backend, [m.prompt for m in mentions(backend, persons)])
        anchors = states_of(backend, words)
        g = torch.Generator("cpu").manual_seed(seed)
        for picks in islice(draws(len(asked), batch, g), iterations):
            person = picks // len(TEMPLATES)  # mentions are person by person, template by template
            t = torch.randint(len(backend.alphas_bar), (batch,), generator=g)
            noise = noise_like((batch, *pictures.shape[1:]), g)
            x_t = add_noise(pictures[person], noise, t, backend.alphas_bar).to(backend.device)
            # one pass with gradient for name and anchor where the anchor's own loss counts
            if weight:
                eps = predicted(student.backend, x_t.repeat(2, 1, 1, 1), t.repeat(2),
                                torch.cat([asked[picks], anchors[person]]))
                of_name, of_anchor = eps.chunk(2)
                loss = ablation_loss(of_anchor, of_name)
                loss = loss + weight * (of_anchor - noise.to(of_anchor)).square().mean()
            else:
                of_anchor, = frozen(student.backend, x_t, t, anchors[person])
                loss = ablation_loss(of_anchor, predicted(student.backend, x_t, t, asked[picks]))
            student.learn(loss)
        return student.done()


METHOD = ConceptAblation()
