"""Model files on disk: their parts, read offline and from safetensors only, and the hash of their weights.

Nothing here asks a network, and nothing is unpickled: a model comes from strangers as a prefix does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apl_core.errors import ModelError
from apl_train import single_file

SUPPORTED = (
    "Supported: a diffusers folder of Stable Diffusion 1.x, or its single .safetensors file with NAME.yaml and "
    "tokenizer/ beside it."
)
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_PARTS = ("text_encoder", "unet", "vae")
_AGAIN = "The model is damaged or incomplete: get it again."


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts of one model.

    Attributes:
        unet, vae, text_encoder: diffusers' UNet2DConditionModel and AutoencoderKL, transformers' CLIPTextModel.
        tokenizer: transformers' CLIPTokenizer.
        schedule: settings of diffusers' DDIMScheduler.
        name: of the file (without its ending) or folder.
        sha256: of the file, or of a folder's .safetensors files one after another in sorted order; lowercase hex.
    """

    unet: nn.Module
    vae: nn.Module
    text_encoder: nn.Module
    tokenizer: Any
    schedule: Mapping[str, Any]
    name: str = "model"
    sha256: str = ""


def read_parts(source: str | Path) -> Parts:
    """Read a diffusers folder, or an LDM single file (see `single_file`) with its yaml and tokenizer/ beside it.

    Raises:
        ModelError: it is missing, of an unsafe or unsupported kind, or damaged.
    """
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    if path.suffix.lower() in _PICKLES:
        raise ModelError(
            f"{path.name} is a pickle, which can run code when it is read.",
            "Get the model as .safetensors, or make a safe file of it once with `apl convert`.", field="base_model",
        )
    if path.is_file() and path.suffix == ".safetensors":
        return _read_single(path)
    state = "is not a model of a known kind" if path.exists() else "does not exist"
    raise ModelError(f"base_model: {path} {state}.", SUPPORTED, field="base_model")


def _read_single(path: Path) -> Parts:
    # The one kind read so far; a file without a yaml would be the next branch, with a configuration by its shapes.
    config = single_file.read_config(path)
    tokenizer = _read_tokenizer(path.parent / "tokenizer")
    return Parts(*single_file.read_ldm(path), tokenizer, single_file.schedule(config), path.stem, _hash([path]))


def _read_folder(folder: Path) -> Parts:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    kind = _read_json(folder / "model_index.json").get("_class_name")
    if kind != "StableDiffusionPipeline":
        raise ModelError(f"{folder.name} is a {kind}, not a StableDiffusionPipeline.", SUPPORTED, field="base_model")
    stated = _read_json(folder / "scheduler" / "scheduler_config.json")
    known = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
             "timestep_spacing", "rescale_betas_zero_snr")
    schedule = {key: stated[key] for key in known if key in stated}
    schedule |= {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    unet, vae, text = (_read_part(kind, folder / name) for kind, name in
                       ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"), (CLIPTextModel, "text_encoder")))
    files = [file for part in _PARTS for file in (folder / part).glob("*.safetensors")]
    return Parts(unet, vae, text, _read_tokenizer(folder / "tokenizer"), schedule, folder.resolve().name, _hash(files))


def _read_part(kind: Any, folder: Path) -> nn.Module:
    """A module of a diffusers folder, all of its weights from .safetensors files."""
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    if not files and any(file.suffix in _PICKLES for file in folder.glob("*")):
        raise ModelError(
            f"{folder} has no .safetensors file, only a pickle, which can run code when it is read.",
            "Get the model with .safetensors files, or make safe files of it once with `apl convert`.",
            field=folder.name,
        )
    if not files:
        raise ModelError(f"{folder} has no .safetensors file.", _AGAIN, field=folder.name)
    # many models are shared in half precision only
    variant = "fp16" if all(".fp16." in name or ".fp16-" in name for name in files) else None
    try:
        with torch.random.fork_rng(devices=[]):
            module, info = kind.from_pretrained(
                str(folder), use_safetensors=True, local_files_only=True, variant=variant, output_loading_info=True
            )
    except Exception as error:  # both libraries raise what their dependencies raise
        raise ModelError(f"Cannot read {folder}: {error}", _AGAIN, field=folder.name) from error
    # neither library minds weights that are not there: it draws them at random
    missing = sorted(key for key in info["missing_keys"] if not key.endswith("position_ids"))
    if missing:
        raise ModelError(f"{folder} lacks {len(missing)} weights, {missing[0]} first.", _AGAIN, field=folder.name)
    return module


def _read_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    if not folder.is_dir():
        raise ModelError(f"There is no {folder}.", "Put the model's tokenizer folder (vocab.json, merges.txt) there.",
                         field="tokenizer")
    try:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises what its dependencies raise
        raise ModelError(f"Cannot read {folder}: {error}", "Get the tokenizer folder again.",
                         field="tokenizer") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"Cannot read {path}: {error}", SUPPORTED, field=path.name) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object.", SUPPORTED, field=path.name)
    return value


def _hash(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as handle:
            for block in iter(lambda: handle.read(2**22), b""):
                digest.update(block)
    return digest.hexdigest()
