"""Safe Latent Diffusion: a third prediction, for what must not be shown, pushes the guidance away from it.

Schramowski et al., Safe Latent Diffusion (CVPR 2023, arXiv 2211.05105), section 3: with c_S the text of what must not
be shown, element by element,

    mu_t = min(1, |s_S (eps(c) - eps(c_S))|)  where eps(c) - eps(c_S) < lambda, else 0,
    gamma_t = mu_t (eps(c_S) - eps(null)) + s_m nu_t,      nu_t+1 = beta_m nu_t + (1 - beta_m) gamma_t,
    eps = eps(null) + s_g (eps(c) - eps(null) - gamma_t)   from step delta on, ordinary guidance before.

The paper's configurations (its section 5) count delta in steps of 50; it is scaled to the steps that are taken. c_S
names the listed persons who stand in the prompt, or everybody listed whom there is room for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apl_train.baselines.fine_tuning import frozen
from apl_train.baselines.negative_prompt import WHICH, negative_for
from apl_train.baselines.protocol import Baseline, Person, one_of
from apl_train.model.backend import Backend, Samples
from apl_train.model.edited import Edited, ddim_step, schedule


@dataclass(frozen=True)
class Strength:
    """One configuration of the paper: delta (of 50 steps), s_S, lambda, s_m, beta_m."""

    warmup: int
    scale: float
    threshold: float
    momentum: float
    decay: float


STRENGTHS = {"medium": Strength(10, 1000.0, 0.01, 0.3, 0.4), "strong": Strength(7, 2000.0, 0.025, 0.5, 0.7),
             "max": Strength(0, 5000.0, 1.0, 0.5, 0.7)}


def safety_term(eps: Tensor, eps_null: Tensor, eps_unsafe: Tensor, nu: Tensor, s: Strength) -> tuple[Tensor, Tensor]:
    """(gamma_t, nu_t+1), shaped as the predictions [N, 4, h, w]."""
    difference = eps - eps_unsafe
    mu = (s.scale * difference).abs().clamp(max=1)
    mu = torch.where(difference < s.threshold, mu, torch.zeros_like(mu))
    gamma = mu * (eps_unsafe - eps_null) + s.momentum * nu
    return gamma, s.decay * nu + (1 - s.decay) * gamma


class _Safe(Edited):
    """Samples with the safety term; a prompt that has no c_S is sampled as ever."""

    def __init__(self, base: Backend, persons: Sequence[Person], which: str, strength: Strength) -> None:
        super().__init__(base)
        self._persons, self._which, self._strength = tuple(persons), which, strength

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], *, steps: int = 20, guidance: float = 3.0,
        negative: str = "", size: int | None = None, batch: int = 16, vectors: Any = None,
        progress: Callable[[int, int], None] | None = None, decode: bool = True,
    ) -> Samples:
        """As `Backend.sample`; DDIM steps are taken here, three predictions each."""
        unsafe = [negative_for(p, self._persons, self._which) for p in prompts]
        plain = [row for row, words in enumerate(unsafe) if not words]
        made: list[tuple[list[int], Samples]] = []
        if plain:
            made.append((plain, super().sample(
                [prompts[r] for r in plain], [seeds[r] for r in plain], vectors=vectors, steps=steps, guidance=guidance,
                negative=negative, size=size, batch=batch, decode=decode)))
        rest = [row for row, words in enumerate(unsafe) if words]
        for start in range(0, len(rest), batch):
            rows = rest[start : start + batch]
            latents = self._guided([prompts[r] for r in rows], [unsafe[r] for r in rows], [seeds[r] for r in rows],
                                   negative, vectors, steps, guidance, size or self.size)
            empty = np.empty((0, *[size or self.size] * 2, 3), np.uint8)
            made.append((rows, Samples(latents.cpu(), self.decode(latents) if decode else empty)))
            if progress:
                progress(len(plain) + start + len(rows), len(prompts))
        order = np.argsort(np.concatenate([rows for rows, _ in made]))
        images = np.concatenate([m.images for _, m in made])
        return Samples(torch.cat([m.latents for _, m in made])[torch.from_numpy(order)],
                       images[order] if len(images) else images)

    @torch.no_grad()
    def _guided(self, prompts: Sequence[str], unsafe: Sequence[str], seeds: Sequence[int], negative: str, vectors: Any,
                steps: int, guidance: float, size: int) -> Tensor:
        s = self._strength
        c = self.encode(prompts, vectors, chunks=1, overflow="trim").states
        forbidden = self.encode(unsafe, chunks=1, overflow="trim").states
        null = self.encode([negative], chunks=1, overflow="trim").states.expand_as(c)
        x = torch.stack([self._noise(seed, size) for seed in seeds]).to(self.device)
        nu = torch.zeros_like(x)
        for step, (time, bar, after) in enumerate(schedule(self, steps)):
            t = torch.full((len(x),), time, dtype=torch.int64)
            eps_null, eps, eps_unsafe = frozen(self, x, t, null, c, forbidden)
            gamma, nu = safety_term(eps, eps_null, eps_unsafe, nu, s)
            if step < s.warmup * steps / 50:
                gamma = torch.zeros_like(gamma)
            x = ddim_step(x, eps_null + guidance * (eps - eps_null - gamma), bar, after)
        return x


class SafeGuidance(Baseline):
    """`strength`: of `STRENGTHS`; `which`: of the negative prompt's."""

    name = "sld"
    title = "Safe Latent Diffusion"
    paper = "Schramowski et al., CVPR 2023, arXiv 2211.05105"
    changes = "sampler"
    defaults: Mapping[str, Any] = {"strength": "strong", "which": "mentioned"}
    grid = ({"strength": "medium", "which": "mentioned"}, {"strength": "max", "which": "mentioned"},
            {"strength": "strong", "which": "generic"})

    def edit(self, backend: Backend, persons: Sequence[Person], settings: Mapping[str, Any], *, keep: Sequence[str],
             seed: int) -> tuple[Backend, dict[str, Any]]:
        """No weight changes."""
        return _Safe(backend, persons, one_of(settings, "which", WHICH),
                     STRENGTHS[one_of(settings, "strength", tuple(STRENGTHS))]), {}


METHOD = SafeGuidance()
