"""The miniature SDXL on disk: what it does not share with the miniature SD1, and the whole file that hosts load.

Shipped are its UNet and its second text encoder. VAE and first text encoder are the miniature SD1's own, as
SDXL's first encoder is SD1's: one file on disk serves both, and the whole is put together where it is used.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from apl_core.atomic import write_bytes, write_safetensors, write_text
from apl_core.errors import ModelError
from apl_train.miniworld import ASSETS
from apl_train.model.base_model import read_header
from apl_train.model.checkpoint import open_checkpoint, read_ldm
from apl_train.model.single_file import TEXT, VAE
from apl_train.model.single_file_xl import CLIP_L, own_parts, sgm_config

PARTS, SD1 = ASSETS / "model_xl", ASSETS / "model" / "miniature-sd1.safetensors"
NAME, ARCH = "miniature-sdxl", "miniature-g"
_MADE_FROM = "apl.made_from"


def write_parts(folder: Path, unet: nn.Module, text_encoder_2: nn.Module) -> None:
    """What ships: UNet and second text encoder in half precision, and the yaml of the whole.

    The empty negative prompt is encoded, not zeroed: that is how the miniature learns to draw without words.

    Args:
        folder: for miniature-sdxl.safetensors and miniature-sdxl.yaml.
        unet, text_encoder_2: diffusers' UNet2DConditionModel and transformers' CLIPTextModelWithProjection.

    Raises:
        ModelError: a module is of another kind. StorageError: it cannot be written.
    """
    tensors = {key: value.half() for key, value in own_parts(unet, text_encoder_2).items()}
    _, vae, text = read_ldm(open_checkpoint(SD1), meta=True)
    config = sgm_config(unet, vae, text, text_encoder_2, arch=ARCH, zeros_for_empty_prompt=False)
    write_safetensors(folder / f"{NAME}.safetensors", tensors, {"format": "pt"})
    write_text(folder / f"{NAME}.yaml", yaml.safe_dump(config, sort_keys=False))


def _digest(*files: Path) -> str:
    """SHA-256 over the files' bytes, lowercase hex. Raises ModelError where one is missing."""
    digest = hashlib.sha256()
    for file in files:
        try:
            digest.update(file.read_bytes())
        except OSError as error:
            raise ModelError(f"{file.name} is not in this installation.",
                             "Install from a full clone, or make it with `apl miniworld build`.",
                             field="base_model") from error
    return digest.hexdigest()


def sdxl_checkpoint(folder: Path, *, parts: Path = PARTS, sd1: Path = SD1) -> Path:
    """The whole miniature SDXL as one file under sgm's names with its yaml, made anew only when a part changed.

    Args:
        folder: where it goes; several processes may ask at once.
        parts: folder that `write_parts` wrote. sd1: the checkpoint with VAE and first text encoder.

    Returns:
        the path of miniature-sdxl.safetensors.

    Raises:
        ModelError: a part is missing or damaged. StorageError: it cannot be written.
    """
    own, beside, whole = parts / f"{NAME}.safetensors", parts / f"{NAME}.yaml", folder / f"{NAME}.safetensors"
    made_from = _digest(own, beside, sd1)
    if whole.exists() and whole.with_suffix(".yaml").exists() and _header(whole).get(_MADE_FROM) == made_from:
        return whole
    write_bytes(whole.with_suffix(".yaml"), beside.read_bytes())
    write_safetensors(whole, _tensors(own) | _shared(sd1), {"format": "pt", _MADE_FROM: made_from})
    return whole


def _header(path: Path) -> dict[str, str]:
    try:
        return read_header(path)[1]
    except ModelError:
        return {}  # damaged: it is made again


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"Cannot read {path.name}: {error}", "The file is damaged or incomplete: copy it again.",
                         field="base_model") from error


def _shared(sd1: Path) -> dict[str, torch.Tensor]:
    """VAE and first text encoder of the SD1 file, under SDXL's names."""
    held: dict[str, Any] = {}
    for key, value in _tensors(sd1).items():
        if key.startswith(VAE):
            held[key] = value
        elif key.startswith(TEXT):
            held[CLIP_L + key.removeprefix(TEXT)] = value
    return held
