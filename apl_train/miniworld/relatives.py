"""Relatives of the first miniature, for plug-and-play: fine-tunes that share its text encoder, as SD 1.4 and 1.5 do.

"1.4" learned longer from the same pictures in another order; "realistic" learned the same world in another rendering
style (`restyle`). What ships of each is the low-rank part of how its UNet differs (paper sec. 4.2 puts one prefix on
several checkpoints); `relative_checkpoint` makes the whole single file of it, which any tool loads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from apl_core.atomic import write_bytes, write_safetensors
from apl_core.errors import ModelError
from apl_core.onnx_models import file_hash
from apl_train.miniworld import ASSETS

if TYPE_CHECKING:
    from apl_train.miniworld.build import Build

RANK = 24
"""Of what ships; the differences of biases and norms ship whole."""


@dataclass(frozen=True)
class Recipe:
    """How a relative is trained, from the first miniature's UNet: `seed` of its draws, `style` of its pictures."""

    seed: int
    steps: int
    lr: float
    style: str = "drawn"


RECIPES = {"1.4": Recipe(seed=1_400_017, steps=900, lr=7e-4),
           "realistic": Recipe(seed=5_100_011, steps=900, lr=7e-4, style="restyled")}


def train_relative(folder: Path, build: Build, name: str, *, steps: int | None = None) -> nn.Module:
    """The relative's whole UNet, frozen. Raises ModelError for a name without a recipe."""
    from apl_train.miniworld.denoiser import train_unet

    recipe, start = _recipe(name), build.unet
    pairs, latents = (build.restyled if recipe.style == "restyled" else (build.pairs, build.latents))
    return train_unet(folder, pairs, build.tower, *latents, steps=steps or recipe.steps, lr=recipe.lr,
                      name=f"unet-{name}", start=start, seed=recipe.seed, compiled=build.compiled)


def _recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise ModelError(f"relative: there is no relative {name!r} of the miniature.",
                         f"Choose one of: {', '.join(RECIPES)}.", field="relative")
    return RECIPES[name]


def low_rank(change: Tensor, rank: int) -> dict[str, Tensor]:
    """The change of one weight as fp16 factors "down" [rank, ...] and "up" [out, rank], or whole where that is less."""
    flat = change.detach().float().flatten(1) if change.ndim > 1 else change.detach().float()
    if change.ndim < 2 or rank * sum(flat.shape) >= flat.numel():
        return {"whole": change.detach().half()}
    u, s, v = torch.linalg.svd(flat, full_matrices=False)
    root = s[:rank].sqrt()
    return {"down": (root[:, None] * v[:rank]).half(), "up": (u[:, :rank] * root).half()}


def write_relative(build: Build, assets: Path, name: str) -> None:
    """model/relatives/miniature-<name>.safetensors: how the relative's UNet differs from the first one's."""
    before, after = build.unet.state_dict(), train_relative(build.fits, build, name).state_dict()
    tensors = {f"{key}|{part}": value.contiguous() for key in before
               for part, value in low_rank(after[key] - before[key], RANK).items()}
    write_safetensors(assets / "model" / "relatives" / f"miniature-{name}.safetensors", tensors,
                      {"rank": str(RANK), "recipe": str(_recipe(name))})


def apply_change(unet: nn.Module, path: Path) -> None:
    """Adds a relative's change to the first miniature's UNet, in place. Raises ModelError: it does not fit."""
    parts, own = load_file(path), unet.state_dict()
    for key in dict.fromkeys(name.split("|")[0] for name in parts):
        whole = parts.get(f"{key}|whole")
        if whole is None:
            whole = parts[f"{key}|up"].float() @ parts[f"{key}|down"].float()
        if key not in own or whole.numel() != own[key].numel():
            raise ModelError(f"{path.name} changes {key}, which the miniature does not have in that shape.",
                             "Get the repository again: model and relative belong together.", field="relative")
        own[key].add_(whole.float().reshape(own[key].shape).to(own[key].dtype))


def relative_checkpoint(name: str, folder: Path, assets: Path = ASSETS) -> Path:
    """The whole single-file checkpoint of a relative, made in `folder` and again once its parts changed.

    Raises:
        ModelError: there is no such relative, or its file is missing.
    """
    from apl_train.model.backend import Backend
    from apl_train.model.single_file import to_ldm

    _recipe(name)
    source, change = assets / "model" / "miniature-sd1.safetensors", assets / "model" / "relatives"
    change = change / f"miniature-{name}.safetensors"
    if not change.is_file():
        raise ModelError(f"{change} is missing.", "Get the repository again, or run `apl miniworld build`.",
                         field="relative")
    stamp = file_hash(source)[:6] + file_hash(change)[:6]
    target = folder / f"miniature-{name}-{stamp}.safetensors"
    if not target.is_file():
        backend = Backend.load(source)
        apply_change(backend.unet, change)
        encoder = next(iter(backend.text.encoders.values()))
        tensors = to_ldm(backend.unet, backend.vae, encoder)
        write_bytes(target.with_suffix(".yaml"), source.with_suffix(".yaml").read_bytes())
        write_safetensors(target, {k: v.half().contiguous() if v.is_floating_point() else v
                                   for k, v in tensors.items()}, {"format": "pt"})
    return target
