"""Sampling by diffusers' own pipelines, from encoded prompts and given noise; and the checks of its settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apl_core.errors import ConfigError
from apl_train.model.conditioning import Sizes
from apl_train.model.text import Encoded

TIMESTEPS = 1000


def guided(family: str, vae: Any, unet: Any, scheduler: Any, device: torch.device) -> Any:
    """The family's pipeline without text encoders, for prompts that come encoded.

    Its guidance has a part wherever it is not 1, as in the hosts, and it computes on `device`.
    """
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    class Guided:
        # diffusers drops the negative prompt below 1 too, where it counts most; hosts drop it at 1 only
        @property
        def do_classifier_free_guidance(self) -> bool:
            return self._guidance_scale != 1.0

        # diffusers takes the device of its first part, which may be waiting on the CPU
        @property
        def _execution_device(self) -> torch.device:
            return device

    class GuidedOne(Guided, StableDiffusionPipeline):
        pass

    class GuidedXL(Guided, StableDiffusionXLPipeline):
        pass

    # without a text encoder they take prompts, which come encoded, in the UNet's dtype
    if family == "sdxl":
        pipe = GuidedXL(vae, None, None, None, None, unet, scheduler, add_watermarker=False)
    else:
        pipe = GuidedOne(vae, None, None, unet, scheduler, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, positive: Encoded, against: Encoded | None, noise: Tensor, *, steps: int, guidance: float,
         sizes: Sizes, pixels: tuple[int, int]) -> Tensor:
    """Final latents of N encoded prompts from their noise: [N, 4, h, w], on the pipeline's device.

    Args:
        against: the negative prompt, once for every row; None at guidance 1.
        sizes: what SDXL is told of sizes; no part of SD1.
        pixels: height and width of the pictures.
    """
    device, dtype = pipe._execution_device, pipe.unet.dtype

    def there(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(device, dtype)

    words = {"prompt_embeds": there(positive.states),
             "negative_prompt_embeds": there(against.states) if against else None}
    if positive.pooled is not None:
        words |= {"pooled_prompt_embeds": there(positive.pooled),
                  "negative_pooled_prompt_embeds": there(against.pooled) if against else None,
                  "original_size": sizes[:2], "crops_coords_top_left": sizes[2:4], "target_size": sizes[4:]}
    return pipe(**words, latents=there(noise), height=pixels[0], width=pixels[1], num_inference_steps=steps,
                guidance_scale=guidance, output_type="latent").images


def check(prompts: Sequence[str], seeds: Sequence[int], steps: int, size: int, batch: int, factor: int) -> None:
    """Raises ConfigError unless pictures can be drawn with these settings; `factor`: pixels of a latent's edge."""
    if isinstance(prompts, str) or not prompts:
        raise ConfigError(f"prompts is {prompts!r}.", "Give a list of at least one text.", field="prompts")
    if len(seeds) != len(prompts):
        raise ConfigError(f"There are {len(seeds)} seeds for {len(prompts)} prompts.", "Give one seed a prompt.",
                          field="seeds")
    for name, value, most in (("steps", steps, TIMESTEPS), ("size", size, 8192), ("batch", batch, 4096)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ConfigError(f"{name} is {value!r}, not a whole number from 1 to {most}.",
                              f"Set {name} in that range.", field=name)
    if size % factor:
        raise ConfigError(f"size is {size}, not a multiple of {factor}.", f"Use {size - size % factor or factor}.",
                          field="size")
