"""A model that shares everything with another but what a method changes: a copy of the UNet, texts, or sampling."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apl_core.errors import ModelError
from apl_train.model.backend import Backend


class Edited(Backend):
    """`base` with another UNet, or with methods of a subclass; nothing is moved, cast or frozen again.

    unet: an edited copy (see `copied_unet`), or None to share the base's.
    """

    def __init__(self, base: Backend, unet: nn.Module | None = None) -> None:
        self.__dict__.update(base.__dict__)
        if unet is not None:
            self.unet = unet


def copied_unet(backend: Backend) -> Any:
    """A frozen copy of the UNet, for a method to edit."""
    return copy.deepcopy(backend.unet).requires_grad_(False)


def cross_attentions(unet: nn.Module) -> list[tuple[str, Any]]:
    """Names and modules of the layers that attend to the text. Raises ModelError where there are none."""
    found = [(name, module) for name, module in unet.named_modules() if name.rsplit(".", 1)[-1] == "attn2"]
    if not found:
        raise ModelError("The UNet has no cross-attention that is named attn2.", "Use a Stable Diffusion 1.x model.",
                         field="unet")
    return found


def text_projections(unet: nn.Module, parts: str) -> list[tuple[str, nn.Linear]]:
    """The linear maps of text states to keys ("k"), values ("v") or both ("kv") in every cross-attention."""
    return [(f"{name}.to_{part}", getattr(module, f"to_{part}")) for name, module in cross_attentions(unet)
            for part in parts]


_drawn: dict[tuple[Any, ...], Tensor] = {}
"""The last pictures of `pictures_of`: a grid of settings asks for the same ones again and again."""


@torch.no_grad()
def pictures_of(backend: Backend, prompts: Sequence[str], seed: int, *, steps: int = 10) -> Tensor:
    """Final latents of the frozen model, one a prompt: float32 [N, 4, h, w]. Few steps: they are noised again."""
    key = (backend.sha256, str(backend.dtype), tuple(prompts), seed, steps)
    if key not in _drawn:
        _drawn.clear()
        _drawn[key] = _draw(backend, prompts, seed, steps)
    return _drawn[key].clone()


def _draw(backend: Backend, prompts: Sequence[str], seed: int, steps: int) -> Tensor:
    return backend.sample(prompts, [seed * 100_003 + row for row in range(len(prompts))], steps=steps,
                          decode=False).latents


def schedule(backend: Backend, steps: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(timestep, its cumulative alpha, that of the step after it) of a DDIM sampling with so many steps.

    Spaced as diffusers' DDIMScheduler does with the model's own configuration; the last alpha is its final one.
    """
    scheduler = type(backend._scheduler).from_config(backend._scheduler.config)
    scheduler.set_timesteps(steps)
    ratio = scheduler.config.num_train_timesteps // steps
    for t in scheduler.timesteps.tolist():
        after = scheduler.alphas_cumprod[t - ratio] if t >= ratio else scheduler.final_alpha_cumprod
        yield t, scheduler.alphas_cumprod[t].float(), after.float()


def ddim_step(x_t: Tensor, eps: Tensor, bar: Tensor, bar_after: Tensor) -> Tensor:
    """One deterministic step (Song et al., DDIM, equation 12 with sigma = 0): x_t and eps are float [N, 4, h, w]."""
    x_0 = (x_t - (1 - bar).sqrt() * eps) / bar.sqrt()
    return bar_after.sqrt() * x_0 + (1 - bar_after).sqrt() * eps
