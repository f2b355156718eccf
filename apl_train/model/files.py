"""Model files on disk: their parts, read offline and from safetensors only, and the hash of their weights.

Nothing here asks a network, and nothing is unpickled: a model comes from strangers as a prefix does. What a file or
folder does not bring along (tokenizer, configuration) ships with this project.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apl_core.errors import ModelError
from apl_train.model import checkpoint as ldm
from apl_train.model.base_model import SUPPORTED, read_header
from apl_train.model.checkpoint_xl import read_sgm, zeros_for_empty_prompt
from apl_train.model.single_file import VAE

TOKENIZER = Path(__file__).parent.parent / "miniworld" / "assets" / "model" / "tokenizer"
"""CLIP's vocabulary, which is the same for every Stable Diffusion 1.x and XL model."""
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
PAD_G = "!"
"""What CLIP-G's tokenizer pads with: token 0."""
_PIPELINES = {"StableDiffusionPipeline": "sd1", "StableDiffusionXLPipeline": "sdxl"}
_VAE_NEEDED = "Give a VAE of Stable Diffusion 1.x or XL."
_AGAIN = "The model is damaged or incomplete: get it again."
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
             "timestep_spacing", "rescale_betas_zero_snr")


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts of one model.

    Attributes:
        unet, vae, text_encoder: diffusers' UNet2DConditionModel and AutoencoderKL, transformers' CLIPTextModel.
        tokenizer: transformers' CLIPTokenizer.
        text_encoder_2, tokenizer_2: SDXL's second ones, a CLIPTextModelWithProjection and its CLIPTokenizer; else None.
        zeros_for_empty_prompt: SDXL: whether an empty negative prompt means zeros instead of its encoding.
        schedule: settings of diffusers' DDIMScheduler.
        name: of the file (without its ending), the folder, or the hub model.
        sha256: of the file, or of a folder's .safetensors files one after another in sorted order; lowercase hex. A
            VAE from elsewhere is hashed after them.
    """

    unet: nn.Module
    vae: nn.Module
    text_encoder: nn.Module
    tokenizer: Any
    schedule: Mapping[str, Any]
    name: str = "model"
    sha256: str = ""
    text_encoder_2: nn.Module | None = None
    tokenizer_2: Any = None
    zeros_for_empty_prompt: bool = True

    @property
    def family(self) -> str:
        """"sd1" or "sdxl"."""
        return "sd1" if self.text_encoder_2 is None else "sdxl"


def find_model(source: str | Path) -> Path:
    """The file or folder of a setting: itself, or where this machine keeps the hub id `owner/name`; nothing is fetched.

    Raises:
        ModelError: there is none, or it is a pickle.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() in _PICKLES and not path.is_dir():
        raise ModelError(
            f"{path.name} is a pickle, which can run code when it is read.",
            f"Make a safe file of it once: apl convert {path} --out {path.with_suffix('.safetensors').name}",
            field="base_model",
        )
    if path.is_dir() or (path.is_file() and path.suffix == ".safetensors"):
        return path
    if not path.exists() and _HUB_ID.fullmatch(path.as_posix()) and path.suffix != ".safetensors":
        return _in_hub_cache(path.as_posix())
    state = "is not a model of a known kind" if path.exists() else "does not exist"
    raise ModelError(f"base_model: {path} {state}.", SUPPORTED, field="base_model")


def _in_hub_cache(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise ModelError(
            f"base_model: {name} is neither a file here nor a hub model that is on this machine.",
            f'Fetch it once yourself: hf download {name} --include "*.json" "*.txt" "*.safetensors"; or give a path.',
            field="base_model",
        ) from error
    if (folder / "model_index.json").exists():
        return folder
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise ModelError(f"base_model: {name} has no model_index.json and {len(files)} .safetensors files.",
                         f"Give the path of one of them: {folder}", field="base_model")
    return files[0]


def read_parts(source: str | Path, *, dtype: torch.dtype = torch.float32, vae: str | Path | None = None,
               meta: bool = False) -> Parts:
    """Read a single file (see `checkpoint`), a diffusers folder, or a hub id that is in this machine's cache.

    Args:
        dtype: of UNet and VAE; text encoders are float32, a prefix is learned through them.
        vae: a VAE to use instead of the model's own: a .safetensors file or a diffusers VAE folder.
        meta: modules without weights, and no hash: for estimates.

    Raises:
        ModelError: it is missing, of an unsafe or unsupported kind, or damaged.
    """
    path = find_model(source)
    other = Path(vae).expanduser() if vae else None
    read = _read_folder if path.is_dir() else _read_file
    parts, files, scale = read(path, dtype, other is None, meta)
    given = Path(source).expanduser()
    if path != given:  # a snapshot in the hub's cache is called by its commit
        parts = replace(parts, name=given.name)
    if other is not None:
        own, more = _read_vae(other, dtype, meta, scale)
        parts, files = replace(parts, vae=own), [*files, *more]
    return parts if meta else replace(parts, sha256=_hash(files))


def _read_file(path: Path, dtype: torch.dtype, own_vae: bool, meta: bool) -> tuple[Parts, list[Path], float]:
    """(parts without hash, files, scale of its latents) of a single file."""
    found = ldm.open_checkpoint(path)
    beside = path.parent / "tokenizer"
    folder = beside if beside.is_dir() else TOKENIZER
    scale = float(ldm.below(found.config, "model", "params", "scale_factor") or 0.18215)
    tokenizer, schedule = read_tokenizer(folder), ldm.schedule(found)
    if found.kind.family == "sd1":
        unet, vae, text = ldm.read_ldm(found, dtype, meta=meta, own_vae=own_vae)
        return Parts(unet, vae, text, tokenizer, schedule, path.stem), [path], scale
    unet, vae, text, second = read_sgm(found, dtype, meta=meta, own_vae=own_vae)
    return Parts(unet, vae, text, tokenizer, schedule, path.stem, "", second, read_tokenizer(folder, PAD_G),
                 zeros_for_empty_prompt(found)), [path], scale


def _read_folder(folder: Path, dtype: torch.dtype, own_vae: bool, meta: bool) -> tuple[Parts, list[Path], float]:
    """(parts without hash, files, scale of its latents) of a diffusers folder."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    index = _read_json(folder / "model_index.json")
    kind = index.get("_class_name")
    if kind not in _PIPELINES:
        raise ModelError(f"{folder.name} is a {kind}, not a {' or '.join(_PIPELINES)}.", SUPPORTED, field="base_model")
    stated = _read_json(folder / "scheduler" / "scheduler_config.json")
    schedule = {key: stated[key] for key in _SCHEDULE if key in stated}
    schedule |= {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    unet = _read_part(UNet2DConditionModel, folder / "unet", dtype, meta)
    text = _read_part(CLIPTextModel, folder / "text_encoder", torch.float32, meta)
    vae = _read_part(AutoencoderKL, folder / "vae", dtype, meta) if own_vae else None
    beside, second = folder / "tokenizer", folder / "tokenizer_2"
    tokenizer = read_tokenizer(beside if beside.is_dir() else TOKENIZER)
    found = Parts(unet, vae, text, tokenizer, schedule, folder.resolve().name)
    names = ["text_encoder", "unet", *(["vae"] if own_vae else [])]
    scale = 0.18215
    if _PIPELINES[kind] == "sdxl":
        large = _read_part(CLIPTextModelWithProjection, folder / "text_encoder_2", torch.float32, meta)
        pads = read_tokenizer(second) if second.is_dir() else read_tokenizer(TOKENIZER, PAD_G)
        found = replace(found, text_encoder_2=large, tokenizer_2=pads,
                        zeros_for_empty_prompt=bool(index.get("force_zeros_for_empty_prompt", True)))
        names, scale = [*names, "text_encoder_2"], 0.13025
    if (folder / "vae" / "config.json").exists():
        scale = float(_read_json(folder / "vae" / "config.json").get("scaling_factor", scale))
    return found, sorted(file for name in names for file in (folder / name).glob("*.safetensors")), scale


def _read_vae(path: Path, dtype: torch.dtype, meta: bool, scale: float) -> tuple[nn.Module, list[Path]]:
    """(AutoencoderKL, its files) of a diffusers VAE folder or a .safetensors file, under LDM names or bare ones.

    scale: of the model's latents; a file does not say.
    """
    from diffusers import AutoencoderKL

    if path.is_dir():
        return _read_part(AutoencoderKL, path, dtype, meta), sorted(path.glob("*.safetensors"))
    if path.suffix != ".safetensors" or not path.is_file():
        raise ModelError(f"vae: {path} is no .safetensors file and no folder.", _VAE_NEEDED, field="vae")
    shapes, _ = read_header(path)
    start = "" if any(key.startswith(VAE) for key in shapes) else VAE
    names = {start + key: key for key in shapes if (start + key).startswith(VAE)}
    shapes = {name: shapes[key] for name, key in names.items()}
    if f"{VAE}encoder.conv_in.weight" not in shapes:
        raise ModelError(f"vae: {path.name} is no VAE of Stable Diffusion.", _VAE_NEEDED, field="vae")
    found = ldm.Checkpoint(path, {}, ldm.ModelKind("epsilon", False, 0, True), shapes, names)
    config = {"model": {"params": {"scale_factor": scale, "first_stage_config": {"params": ldm.vae_params(shapes)}}}}
    return ldm.vae_from(found.tensors(VAE, dtype, meta=meta), config), [path]


def _read_part(kind: Any, folder: Path, dtype: torch.dtype, meta: bool) -> nn.Module:
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
        if meta:
            return _shapes_of(kind, folder, dtype)
        with torch.random.fork_rng(devices=[]):
            module, info = kind.from_pretrained(
                str(folder), use_safetensors=True, local_files_only=True, variant=variant, torch_dtype=dtype,
                output_loading_info=True,
            )
    except Exception as error:  # both libraries raise what their dependencies raise
        raise ModelError(f"Cannot read {folder}: {error}", _AGAIN, field=folder.name) from error
    # neither library minds weights that are not there: it draws them at random
    missing = sorted(key for key in info["missing_keys"] if not key.endswith("position_ids"))
    if missing:
        raise ModelError(f"{folder} lacks {len(missing)} weights, {missing[0]} first.", _AGAIN, field=folder.name)
    return module


def _shapes_of(kind: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """The module that the folder's config.json describes, on the meta device."""
    with torch.device("meta"):
        if hasattr(kind, "from_config"):
            module = kind.from_config(kind.load_config(str(folder), local_files_only=True))
        else:
            module = kind(kind.config_class.from_pretrained(str(folder), local_files_only=True))
    return module.to(dtype).eval()


def read_tokenizer(folder: Path, pad: str | None = None) -> Any:
    """The CLIPTokenizer of a folder with vocab.json and merges.txt. Raises ModelError.

    pad: token to pad with, instead of the folder's own.
    """
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True, **({"pad_token": pad} if pad else {}))
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
    for file in files:
        with file.open("rb") as handle:
            for block in iter(lambda: handle.read(2**22), b""):
                digest.update(block)
    return digest.hexdigest()
