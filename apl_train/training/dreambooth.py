"""DreamBooth: a few pictures of somebody bind that person to a rare word (Ruiz et al. 2023, paper reference [34]).

The recipe of diffusers' example: the UNet learns to denoise the pictures under "A photo of [V] [noun]", and pictures of
its own under "A photo of a [noun]" keep the noun what it was (prior preservation). Whole UNet, as the paper's Fig. 5
takes it, or LoRA matrices on its attention (peft). VAE and text encoder stay frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from apl_core.errors import ConfigError, DatasetError, TrainingError
from apl_train.model.backend import Backend
from apl_train.model.edited import Edited, copied_unet
from apl_train.model.text import Encoded
from apl_train.seeds import seed_of, step_generator
from apl_train.training.bank import add_noise

LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass(frozen=True)
class DreamBooth:
    """Settings of one teaching. Raises ConfigError from `__post_init__` for a value out of range."""

    method: str = "full"
    """"full" (every weight of the UNet) or "lora" (needs peft)."""
    token: str = "sks"
    """The rare word."""
    template: str = "A photo of {}"
    """Caption of the pictures, {} is "[V] [noun]"."""
    learning_rate: float = 5e-6
    """AdamW's (diffusers' example: 5e-6 for the whole UNet, 1e-4 for LoRA)."""
    batch_size: int = 1
    """Pictures of the person a step; as many of the noun stand beside them."""
    prior_weight: float = 1.0
    """Weight of prior preservation; 0 = none."""
    prior_pictures: int = 200
    """Pictures of the noun that the model draws of itself ahead of the teaching (diffusers' example: 200)."""
    rank: int = 16
    """Of LoRA matrices."""
    seed: int = 0
    """Seed of everything."""

    def __post_init__(self) -> None:
        if self.method not in ("full", "lora"):
            raise ConfigError(f"method is {self.method!r}.", "Use full or lora.", field="method")
        if not self.token.strip() or "{}" not in self.template:
            raise ConfigError(f"token is {self.token!r} and template {self.template!r}.",
                              "Give a word, and a caption with {} where it belongs.", field="template")
        for name, low, high in (("batch_size", 1, 256), ("prior_pictures", 1, 10_000), ("rank", 1, 1024)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ConfigError(f"{name} is {value!r}, not a whole number from {low} to {high}.",
                                  f"Set {name} in that range.", field=name)
        for name, high in (("learning_rate", 1.0), ("prior_weight", 100.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
                raise ConfigError(f"{name} is {value!r}, not a number from 0 to {high:g}.",
                                  f"Set {name} in that range.", field=name)


def subject(settings: DreamBooth, noun: str) -> str:
    """How prompts name the taught person: "[V] [noun]"."""
    return f"{settings.token} {noun}"


def _of_noun(noun: str, template: str) -> str:
    return template.replace("{}", f"a {noun}")


def prior_latents(backend: Backend, noun: str, template: str, count: int, seed: int) -> torch.Tensor:
    """The noun as the model draws it before anybody is taught: final latents, float32 [count, 4, h, w]."""
    seeds = [seed_of("dreambooth-prior", seed, i) % 2**31 for i in range(count)]
    return backend.sample([_of_noun(noun, template)] * count, seeds, decode=False).latents


class Teaching:
    """A copy of a model that learns one person; the model itself stays as it was.

    Args:
        backend: the model. A copy of its UNet learns in float32 whatever the model's numbers are.
        pictures: uint8 [N, H, W, 3] RGB, of the model's size.
        noun: what the person is: "woman", "man", "person".
        prior: latents of the noun from `prior_latents`, float32 [N, 4, h, w], which persons of one noun may share;
            drawn here when not given.

    Raises:
        DatasetError: no picture. ConfigError: peft is needed and not installed.
    """

    def __init__(self, backend: Backend, pictures: NDArray[np.uint8], noun: str, settings: DreamBooth, *,
                 prior: torch.Tensor | None = None) -> None:
        if not len(pictures):
            raise DatasetError("There is no picture to learn from.", "Give three to six.", field="pictures")
        self.settings, self.step, self.losses = settings, 0, []
        unet = copied_unet(backend).float()
        self.backend: Backend = Edited(backend, unet)
        self.backend.dtype = torch.float32
        self._parameters = _learnable(unet, settings)
        self._adam = torch.optim.AdamW(self._parameters, lr=settings.learning_rate, weight_decay=1e-2)
        self._x0 = backend.to_latents(pictures)
        captions = [settings.template.replace("{}", subject(settings, noun))]
        if settings.prior_weight:
            self._prior = (prior_latents(backend, noun, settings.template, settings.prior_pictures, settings.seed)
                           if prior is None else prior)
            captions.append(_of_noun(noun, settings.template))
        with torch.no_grad():
            self._states = backend.encode(captions, chunks=1).states

    def teach(self, steps: int, stop: Callable[[], bool] | None = None) -> None:
        """So many further optimizer steps. Raises TrainingError for a loss that is not finite."""
        for _ in range(steps):
            if stop is not None and stop():
                return
            loss = self._loss(step_generator(seed_of("dreambooth", self.settings.seed) % 2**31, self.step))
            if not torch.isfinite(loss):
                raise TrainingError(f"The loss is {float(loss.detach())} at step {self.step}.", "Lower learning_rate.",
                                    field="learning_rate")
            self._adam.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
            self._adam.step()
            self.losses.append(float(loss.detach()))
            self.step += 1

    def _loss(self, g: torch.Generator) -> torch.Tensor:
        """Equation 1 on the person's pictures, plus as much on the noun's (prior preservation)."""
        count = self.settings.batch_size
        total = self._denoised(self._x0, 0, count, g)
        if self.settings.prior_weight:
            total = total + self.settings.prior_weight * self._denoised(self._prior, 1, count, g)
        return total

    def _denoised(self, pool: torch.Tensor, caption: int, count: int, g: torch.Generator) -> torch.Tensor:
        x0 = pool[torch.randint(len(pool), (count,), generator=g)]
        t = torch.randint(len(self.backend.alphas_bar), (count,), generator=g)
        noise = torch.randn(x0.shape, generator=g)
        x_t = add_noise(x0, noise, t, self.backend.alphas_bar)
        eps = self.backend.predict(x_t, t, Encoded(self._states[caption : caption + 1].expand(count, -1, -1)))
        return torch.nn.functional.mse_loss(eps.cpu().float(), noise)


def _learnable(unet: Any, settings: DreamBooth) -> list[torch.nn.Parameter]:
    """The parameters that learn: all, or fresh LoRA matrices beside frozen weights."""
    if settings.method == "full":
        return list(unet.requires_grad_(True).parameters())
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigError("peft is not installed; it makes the LoRA matrices.", "pip install peft, or use method full.",
                          field="method") from error
    torch.manual_seed(seed_of("dreambooth-lora", settings.seed) % 2**31)  # peft draws from the global generator
    unet.add_adapter(LoraConfig(r=settings.rank, lora_alpha=settings.rank, init_lora_weights="gaussian",
                                target_modules=LORA_TARGETS))
    return [p for p in unet.parameters() if p.requires_grad]
