"""Reading a Stable Diffusion 1 checkpoint: one .safetensors file under LDM names, its yaml where there is one.

Step file -> modules. Names and shapes go through diffusers' own converters; what a yaml would say is told from the
shapes where there is none, so that nothing has to be asked of a hub. `single_file.py` writes what this file reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from apl_core.errors import APLError, ModelError
from apl_train.base_model import SD1_CHANNELS, ModelKind, kind_of, read_header, standard_name
from apl_train.single_file import TEXT, UNET, VAE

_GET_AGAIN = "Get the model's configuration again."
_SD1_HEADS, _SD1_EDGE = 8, 64


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose header was read and found good: `names` are its tensors' own names by `standard_name`."""

    path: Path
    config: Mapping[str, Any]
    kind: ModelKind
    shapes: Mapping[str, tuple[int, ...]]
    names: Mapping[str, str]

    def tensors(self, start: str, dtype: torch.dtype, *, meta: bool = False) -> dict[str, Tensor]:
        """The part's tensors by standard name, in `dtype`; on the meta device they are shapes only. Raises ModelError.

        They are copies: a view into the file would keep the whole file mapped for as long as the model lives.
        """
        from safetensors import SafetensorError, safe_open

        wanted = [key for key in self.names if key.startswith(start)]
        if meta:
            return {key: torch.empty(self.shapes[key], dtype=dtype, device="meta") for key in wanted}
        try:
            with safe_open(self.path, framework="pt") as file:
                return {key: file.get_tensor(self.names[key]).to(dtype, copy=True) for key in wanted}
        except (OSError, SafetensorError) as error:
            raise ModelError(f"Cannot read {self.path.name}: {error}",
                             "The file is damaged or incomplete: copy it again.", field="base_model") from error


def read_config(path: str | Path) -> dict[str, Any] | None:
    """The LDM yaml beside the single file `path`, checked to be one of Stable Diffusion 1; None where there is none.

    Raises:
        ModelError: it describes another kind of model.
    """
    beside = Path(path).with_suffix(".yaml")
    try:
        config = yaml.safe_load(beside.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ModelError(f"{beside.name} is not YAML: {error}", _GET_AGAIN, field="config") from error
    for keys in (("unet_config", "params"), ("first_stage_config", "params", "ddconfig"), ("cond_stage_config",)):
        found: Any = config
        for key in ("model", "params", *keys):
            found = found.get(key) if isinstance(found, dict) else None
        if not isinstance(found, dict):
            raise ModelError(f"{beside.name} has no model.params.{'.'.join(keys)}.",
                             "Supported: Stable Diffusion 1.x as LDM describes it.", field=".".join(keys))
    return config


def _numbers(shapes: Mapping[str, Any], pattern: str) -> int:
    """How many numbers the first group of `pattern` takes over all names: 0, 1, ... n - 1 gives n."""
    return len({m.group(1) for key in shapes if (m := re.match(pattern, key))})


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]], name: str) -> dict[str, Any]:
    """What a yaml would say of a model without one, told from its shapes.

    Raises:
        ModelError: its first layer is not as wide as Stable Diffusion 1's, so the number of heads cannot be known.
    """
    first = shapes.get(f"{UNET}input_blocks.0.0.weight", (0, 0))
    if first[0] != SD1_CHANNELS:
        raise ModelError(
            f"{name} has no yaml beside it, and is {first[0]} wide where Stable Diffusion 1 is {SD1_CHANNELS}.",
            f"Put its LDM configuration beside it as {Path(name).stem}.yaml.", field="config",
        )
    return {"model": {"params": {
        "image_size": _SD1_EDGE, "scale_factor": 0.18215, "unet_config": {"params": _unet_params(shapes, first)},
        "first_stage_config": {"params": vae_params(shapes)}, "cond_stage_config": {},
    }}}


def vae_params(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """LDM's VAE parameters of tensors under `first_stage_model.` names; SD1's where there are none."""
    start = f"{VAE}encoder."
    levels = _numbers(shapes, re.escape(start) + r"down\.(\d+)\.")
    ch = shapes.get(f"{start}conv_in.weight", (128,))[0]
    ends = [shapes[f"{start}down.{i}.block.0.conv1.weight"][0] for i in range(levels)] or [128, 256, 512, 512]
    latent = shapes.get(f"{VAE}post_quant_conv.weight", (4, 4))[1]
    return {"embed_dim": latent, "ddconfig": {
        "z_channels": latent, "resolution": 8 * _SD1_EDGE, "in_channels": 3, "out_ch": 3, "ch": ch,
        "ch_mult": [end // ch for end in ends], "attn_resolutions": [],
        "num_res_blocks": _numbers(shapes, re.escape(start) + r"down\.0\.block\.(\d+)\.") or 2}}


def _unet_params(shapes: Mapping[str, tuple[int, ...]], first: tuple[int, ...]) -> dict[str, Any]:
    """LDM's UNet parameters: a level ends where a block only makes the picture smaller."""
    start = re.escape(f"{UNET}input_blocks.")
    blocks = _numbers(shapes, start + r"(\d+)\.")
    smaller = {i for i in range(blocks) if f"{UNET}input_blocks.{i}.0.op.weight" in shapes}
    mult, attended, level, per_level = [], [], 0, 0
    for i in range(1, blocks):
        if i in smaller:
            level += 1
            continue
        per_level += level == 0
        width = shapes.get(f"{UNET}input_blocks.{i}.0.out_layers.3.weight", first)[0]
        mult[level:] = [width // first[0]]
        if f"{UNET}input_blocks.{i}.1.norm.weight" in shapes and 2**level not in attended:
            attended.append(2**level)
    keys = [k for k in shapes if re.match(start + r"\d+\.1\.transformer_blocks\.0\.attn2\.to_k\.weight", k)]
    return {"image_size": _SD1_EDGE, "in_channels": first[1], "out_channels": shapes[f"{UNET}out.2.weight"][0],
            "model_channels": first[0], "attention_resolutions": attended, "num_res_blocks": per_level,
            "channel_mult": mult, "num_heads": _SD1_HEADS, "use_spatial_transformer": True, "transformer_depth": 1,
            "context_dim": shapes[keys[0]][1] if keys else None, "legacy": False}


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read the header (and the yaml) of a single file.

    Raises:
        ModelError: it is damaged, of another kind, or lacks a part.
    """
    path = Path(path)
    found, header = read_header(path)
    names = {standard_name(key): key for key in found if not key.startswith("model_ema.")}
    shapes = {key: found[own] for key, own in names.items()}
    config = read_config(path)
    stated = str(config["model"]["params"].get("parameterization", "eps")) if config else ""
    kind = kind_of(shapes, header, path.name, stated)
    try:
        config = config or config_from_shapes(shapes, path.name)
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise ModelError(f"{path.name} lacks layers of Stable Diffusion 1: {error}.", "The file is incomplete: get it "
                         "again.", field="base_model") from error
    return Checkpoint(path, config, kind, shapes, names)


def schedule(checkpoint: Checkpoint) -> dict[str, Any]:
    """The noise schedule of the yaml as settings of diffusers' DDIMScheduler, or SD1's. Raises ModelError."""
    params = checkpoint.config["model"]["params"]
    try:
        ends = {"num_train_timesteps": int(params.get("timesteps", 1000)),
                "beta_start": float(params.get("linear_start", 0.00085)),
                "beta_end": float(params.get("linear_end", 0.012))}
    except (TypeError, ValueError) as error:
        raise ModelError(f"The yaml's noise schedule is not made of numbers: {error}.", _GET_AGAIN,
                         field="linear_start") from error
    # LDM's "linear" is linear in sqrt(beta)
    return {**ends, "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False,
            "steps_offset": 1, "prediction_type": checkpoint.kind.prediction,
            **({"rescale_betas_zero_snr": True} if checkpoint.kind.zero_snr else {})}


def _text_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """transformers' text configuration: the yaml's `text_config`, or what the shapes of CLIP-L's kind tell."""
    stage = checkpoint.config["model"]["params"]["cond_stage_config"]
    stated = stage.get("text_config") or (stage.get("params") or {}).get("text_config")
    if stated:
        return dict(stated)
    shapes = checkpoint.shapes
    vocabulary, width = shapes[f"{TEXT}embeddings.token_embedding.weight"]
    if width % 64:
        raise ModelError(
            f"The text encoder is {width} wide, from which its number of heads cannot be told.",
            "Add cond_stage_config.text_config with num_attention_heads to the yaml.", field="text_config",
        )
    return {"vocab_size": vocabulary, "hidden_size": width, "projection_dim": width, "hidden_act": "quick_gelu",
            "num_hidden_layers": _numbers(shapes, re.escape(TEXT) + r"encoder\.layers\.(\d+)\."),
            "num_attention_heads": width // 64,
            "intermediate_size": shapes[f"{TEXT}encoder.layers.0.mlp.fc1.weight"][0],
            "max_position_embeddings": shapes[f"{TEXT}embeddings.position_embedding.weight"][0],
            "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}


def _filled(module: nn.Module, tensors: Mapping[str, Tensor], label: str) -> nn.Module:
    """The module with these weights. Raises ModelError naming what is missing, left over or misshapen."""
    own = module.state_dict()
    wrong = [f"{key} is missing" for key in own if key not in tensors]
    wrong += [f"{key} is left over" for key in tensors if key not in own]
    wrong += [f"{key} is {list(tensors[key].shape)} instead of {list(own[key].shape)}" for key in own
              if key in tensors and tensors[key].shape != own[key].shape]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ModelError(f"The weights do not fit the {label} that the yaml describes: {'; '.join(wrong[:3])}{more}.",
                         "File and yaml belong to different models: get both again.", field=label)
    module.load_state_dict(dict(tensors), assign=True)
    return module.eval()


def built(label: str, build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` makes, the libraries' own errors turned into ModelError; the caller's random numbers stay."""
    try:
        with torch.random.fork_rng(devices=[]):
            return build()
    except APLError:
        raise
    except Exception as error:  # both libraries raise what their dependencies raise, over settings they cannot use
        raise ModelError(f"The yaml does not describe a {label}: {type(error).__name__} {error}.",
                         "Compare it with LDM's v1-inference.yaml.", field=label) from error


def vae_from(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    """AutoencoderKL of tensors under `first_stage_model.` names. Raises ModelError."""
    from diffusers import AutoencoderKL
    from diffusers.loaders import single_file_utils as convert

    def build() -> nn.Module:
        with torch.device("meta"):
            module = AutoencoderKL(**convert.create_vae_diffusers_config_from_ldm(config, tensors))
        return _filled(module, convert.convert_ldm_vae_checkpoint(dict(tensors), dict(module.config)), "VAE")

    return built("VAE", build)


def read_ldm(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, *, meta: bool = False,
             own_vae: bool = True) -> tuple[nn.Module, nn.Module | None, nn.Module]:
    """(UNet2DConditionModel, AutoencoderKL, CLIPTextModel) in eval mode; the text encoder is float32 always.

    Args:
        dtype: of UNet and VAE.
        meta: shapes without weights.
        own_vae: whether to read the file's VAE; None stands in its place if not.

    Raises:
        ModelError: the file is damaged, lacks parts, or does not fit its yaml.
    """
    from diffusers import UNet2DConditionModel
    from diffusers.loaders import single_file_utils as convert
    from transformers import CLIPTextConfig, CLIPTextModel

    config = checkpoint.config
    if own_vae and not checkpoint.kind.has_vae:
        raise ModelError(f"{checkpoint.path.name} has no VAE of its own ({VAE}*).",
                         "Name one with the setting vae: a .safetensors VAE or a diffusers VAE folder.", field="vae")

    def unet() -> nn.Module:
        tensors = checkpoint.tensors(UNET, dtype, meta=meta)
        settings = convert.create_unet_diffusers_config_from_ldm(config, tensors)
        # diffusers guesses the picture size from the file's keys; the yaml knows it
        settings["sample_size"] = int(config["model"]["params"].get("image_size", settings["sample_size"]))
        with torch.device("meta"):
            module = UNet2DConditionModel(**settings)
        return _filled(module, convert.convert_ldm_unet_checkpoint(tensors, dict(module.config)), "UNet")

    def text() -> nn.Module:
        with torch.device("meta" if meta else "cpu"):
            module = CLIPTextModel(CLIPTextConfig(**_text_config(checkpoint)))
        wrapped = "text_model." if hasattr(module, "text_model") else ""
        found = convert.convert_ldm_clip_checkpoint(checkpoint.tensors(TEXT, torch.float32, meta=meta))
        weights = {wrapped + key.removeprefix("text_model."): value for key, value in found.items()
                   if not key.endswith("position_ids")}
        return _filled(module, weights, "text encoder")

    vae = vae_from(checkpoint.tensors(VAE, dtype, meta=meta), config) if own_vae else None
    return built("UNet", unet), vae, built("text encoder", text)
