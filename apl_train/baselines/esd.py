"""ESD-x: the cross-attentions learn to predict what negative guidance away from the listed name would give.

Gandikota et al., Erasing Concepts from Diffusion Models (ICCV 2023, arXiv 2303.07345), section 4.1: with frozen
weights theta* and strength eta,

    eps_theta(x_t, c, t)  <-  eps_theta*(x_t, t) - eta [eps_theta*(x_t, c, t) - eps_theta*(x_t, t)].

x_t comes from the model that is being edited, sampled part of the way from noise with guidance towards c (the paper's
training needs no pictures). Here every step of such a sampling is learned from, not its end alone: the student's
prediction that moves the sampling on is the one that carries the gradient. ESD-x trains all cross-attention weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from apl_train.baselines.fine_tuning import Student, draws, frozen, noise_like, predicted, states_of
from apl_train.baselines.protocol import Baseline, Person, between
from apl_train.baselines.wording import mentions
from apl_train.model.backend import Backend
from apl_train.model.edited import ddim_step, schedule


def erased_target(eps_null: Tensor, eps_c: Tensor, eta: float) -> Tensor:
    """eps(x_t) - eta (eps(x_t, c) - eps(x_t)), float [N, 4, h, w]; both of the frozen model."""
    return eps_null - eta * (eps_c - eps_null)


class ESD(Baseline):
    """`eta`: negative guidance; `iterations`: steps of Adam; `guidance`, `sampling_steps`: of the samplings."""

    name = "esd"
    title = "ESD-x"
    paper = "Gandikota et al., ICCV 2023, arXiv 2303.07345"
    changes = "weights"
    defaults: Mapping[str, Any] = {"eta": 1.0, "learning_rate": 3e-4, "iterations": 40, "batch": 4, "guidance": 3.0,
                                   "sampling_steps": 10}
    grid = ({"eta": 1.0, "learning_rate": 1e-4}, {"eta": 1.0, "learning_rate": 5e-4},
            {"eta": 3.0, "learning_rate": 1e-4})

    def edit(self, backend: Backend, persons: Sequence[Person], settings: Mapping[str, Any], *, keep: Sequence[str],
             seed: int) -> tuple[Backend, dict[str, Any]]:
        """Trains a copy for `iterations` steps; it takes no captions to keep."""
        eta, guidance = between(settings, "eta", 0.0, 100.0), between(settings, "guidance", 0.0, 100.0)
        iterations, batch = int(between(settings, "iterations", 1, 1e6)), int(between(settings, "batch", 1, 1024))
        steps = int(between(settings, "sampling_steps", 1, 1000))
        student = Student(backend, between(settings, "learning_rate", 1e-8, 10.0))
        g = torch.Generator("cpu").manual_seed(seed)
        asked = states_of(backend, [m.prompt for m in mentions(backend, persons)])
        nothing = states_of(backend, [""])
        size = int(backend.unet.config.sample_size)
        stream = draws(len(asked), batch, g)
        while len(student.losses) < iterations:
            picks = next(stream)
            c, null = asked[picks], nothing.expand(batch, -1, -1)
            x = noise_like((batch, backend.unet.config.in_channels, size, size), g).to(backend.device)
            for time, bar, after in schedule(backend, steps):
                t = torch.full((batch,), time, dtype=torch.int64)
                teacher_null, teacher_c = frozen(backend, x, t, null, c)
                own = predicted(student.backend, x, t, c)
                moving, = frozen(student.backend, x, t, null)
                x = ddim_step(x, moving + guidance * (own.detach() - moving), bar, after)
                student.learn((own - erased_target(teacher_null, teacher_c, eta)).square().mean())
                if len(student.losses) == iterations:
                    break
        return student.done()


METHOD = ESD()
