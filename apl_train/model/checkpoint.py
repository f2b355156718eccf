"""Reading a checkpoint: one .safetensors file under LDM's or sgm's names, its yaml where there is one.

Step file -> modules. Names and shapes go through diffusers' own converters; what a yaml would say is told from the
shapes where there is none, so that nothing has to be asked of a hub. `single_file.py` writes what this file reads;
what Stable Diffusion XL has beyond Stable Diffusion 1 is in `checkpoint_xl.py` and `single_file_xl.py`.
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
from apl_train.model.base_model import SD1_CHANNELS, ModelKind, family_of, kind_of, read_header, standard_name
from apl_train.model.single_file import TEXT, UNET, VAE

_GET_AGAIN = "Get the model's configuration again."
_SD1_HEADS, _SD1_EDGE, _XL_HEAD = 8, 64, 64
_SECTIONS = {
    "sd1": (("unet_config", "params"), ("first_stage_config", "params", "ddconfig"), ("cond_stage_config",)),
    "sdxl": (("network_config", "params"), ("first_stage_config", "params", "ddconfig"),
             ("conditioner_config", "params")),
}
_NAMES = {"sd1": "Stable Diffusion 1", "sdxl": "Stable Diffusion XL"}
_SCALES = {"sd1": 0.18215, "sdxl": 0.13025}
_SCALINGS = {"EpsScaling": "eps", "VScaling": "v"}
"""sgm's classes for what a UNet predicts."""


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


def read_config(path: str | Path, family: str = "sd1") -> dict[str, Any] | None:
    """The yaml beside the single file `path`, checked to be one of its family; None where there is none.

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
    for keys in _SECTIONS[family]:
        if not isinstance(below(config, "model", "params", *keys), dict):
            raise ModelError(f"{beside.name} has no model.params.{'.'.join(keys)}.",
                             "Supported: Stable Diffusion 1.x as LDM describes it, and XL as sgm does.",
                             field=".".join(keys))
    return config


def below(config: Any, *keys: str) -> Any:
    """What stands at `keys` in nested dicts; None where nothing does."""
    for key in keys:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def _stated_prediction(config: Mapping[str, Any] | None) -> str:
    """What a yaml says that the model predicts, as LDM's word for it; "" where it says nothing."""
    if config is None:
        return ""
    scaling = below(config, "model", "params", "denoiser_config", "params", "scaling_config", "target")
    if scaling is None:
        return str(config["model"]["params"].get("parameterization", "eps"))
    return _SCALINGS.get(str(scaling).rpartition(".")[2], str(scaling))


def _numbers(shapes: Mapping[str, Any], pattern: str) -> int:
    """How many numbers the first group of `pattern` takes over all names: 0, 1, ... n - 1 gives n."""
    return len({m.group(1) for key in shapes if (m := re.match(pattern, key))})


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]], name: str, family: str = "sd1") -> dict[str, Any]:
    """What a yaml would say of a model without one, told from its shapes.

    Raises:
        ModelError: its first layer is not as wide as the published model's, so the number of heads cannot be known.
    """
    first = shapes.get(f"{UNET}input_blocks.0.0.weight", (0, 0))
    if first[0] != SD1_CHANNELS:
        raise ModelError(
            f"{name} has no yaml beside it, and is {first[0]} wide where {_NAMES[family]} is {SD1_CHANNELS}.",
            f"Put its configuration beside it as {Path(name).stem}.yaml.", field="config",
        )
    unet, depth = _unet_params(shapes, first)
    stages = {"scale_factor": _SCALES[family], "first_stage_config": {"params": vae_params(shapes)}}
    if family == "sdxl":
        wide = shapes[f"{UNET}label_emb.0.0.weight"][1]
        unet |= {"num_head_channels": _XL_HEAD, "use_linear_in_transformer": True, "transformer_depth": depth,
                 "num_classes": "sequential", "adm_in_channels": wide}
        return {"model": {"params": stages | {
            "network_config": {"params": unet}, "conditioner_config": {"params": {}}}}}
    unet |= {"image_size": _SD1_EDGE, "num_heads": _SD1_HEADS, "transformer_depth": 1}
    return {"model": {"params": stages | {
        "image_size": _SD1_EDGE, "unet_config": {"params": unet}, "cond_stage_config": {}}}}


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


def _unet_params(shapes: Mapping[str, tuple[int, ...]], first: tuple[int, ...]) -> tuple[dict[str, Any], list[int]]:
    """(LDM's UNet parameters, attention blocks by level): a level ends where a block only makes the picture smaller."""
    start = re.escape(f"{UNET}input_blocks.")
    blocks = _numbers(shapes, start + r"(\d+)\.")
    smaller = {i for i in range(blocks) if f"{UNET}input_blocks.{i}.0.op.weight" in shapes}
    mult, attended, depth, level, per_level = [], [], [], 0, 0
    for i in range(1, blocks):
        if i in smaller:
            level += 1
            continue
        per_level += level == 0
        width = shapes.get(f"{UNET}input_blocks.{i}.0.out_layers.3.weight", first)[0]
        mult[level:] = [width // first[0]]
        blocks_here = _numbers(shapes, start + rf"{i}\.1\.transformer_blocks\.(\d+)\.")
        depth[level:] = [blocks_here or 1]
        if f"{UNET}input_blocks.{i}.1.norm.weight" in shapes and 2**level not in attended:
            attended.append(2**level)
    keys = [k for k in shapes if re.match(start + r"\d+\.1\.transformer_blocks\.0\.attn2\.to_k\.weight", k)]
    return {"in_channels": first[1], "out_channels": shapes[f"{UNET}out.2.weight"][0], "model_channels": first[0],
            "attention_resolutions": attended, "num_res_blocks": per_level, "channel_mult": mult,
            "use_spatial_transformer": True, "context_dim": shapes[keys[0]][1] if keys else None,
            "legacy": False}, depth


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read the header (and the yaml) of a single file.

    Raises:
        ModelError: it is damaged, of another kind, or lacks a part.
    """
    path = Path(path)
    found, header = read_header(path)
    names = {standard_name(key): key for key in found if not key.startswith("model_ema.")}
    shapes = {key: found[own] for key, own in names.items()}
    config = read_config(path, family_of(shapes))
    kind = kind_of(shapes, header, path.name, _stated_prediction(config))
    try:
        config = config or config_from_shapes(shapes, path.name, kind.family)
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise ModelError(f"{path.name} lacks layers of {_NAMES[kind.family]}: {error}.", "The file is incomplete: get "
                         "it again.", field="base_model") from error
    return Checkpoint(path, config, kind, shapes, names)


def schedule(checkpoint: Checkpoint) -> dict[str, Any]:
    """The noise schedule of the yaml as settings of diffusers' DDIMScheduler, or SD1's, which is XL's too.

    Raises:
        ModelError: its numbers are none.
    """
    params = checkpoint.config["model"]["params"]
    if "network_config" in params:
        params = below(params, "denoiser_config", "params", "discretization_config", "params") or {}
    try:
        ends = {"num_train_timesteps": int(params.get("timesteps", params.get("num_timesteps", 1000))),
                "beta_start": float(params.get("linear_start", 0.00085)),
                "beta_end": float(params.get("linear_end", 0.012))}
    except (TypeError, ValueError) as error:
        raise ModelError(f"The yaml's noise schedule is not made of numbers: {error}.", _GET_AGAIN,
                         field="linear_start") from error
    # LDM's "linear" is linear in sqrt(beta)
    return {**ends, "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False,
            "steps_offset": 1, "prediction_type": checkpoint.kind.prediction,
            **({"rescale_betas_zero_snr": True} if checkpoint.kind.zero_snr else {})}


def _text_config(stage: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], start: str) -> dict[str, Any]:
    """transformers' text configuration: the yaml's `text_config`, or what the shapes of CLIP-L's kind tell."""
    stated = stage.get("text_config") or (stage.get("params") or {}).get("text_config")
    if stated:
        return dict(stated)
    vocabulary, width = shapes[f"{start}embeddings.token_embedding.weight"]
    if width % 64:
        raise ModelError(
            f"The text encoder is {width} wide, from which its number of heads cannot be told.",
            "Add its text_config with num_attention_heads to the yaml.", field="text_config",
        )
    return {"vocab_size": vocabulary, "hidden_size": width, "projection_dim": width, "hidden_act": "quick_gelu",
            "num_hidden_layers": _numbers(shapes, re.escape(start) + r"encoder\.layers\.(\d+)\."),
            "num_attention_heads": width // 64,
            "intermediate_size": shapes[f"{start}encoder.layers.0.mlp.fc1.weight"][0],
            "max_position_embeddings": shapes[f"{start}embeddings.position_embedding.weight"][0],
            "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}


def filled(module: nn.Module, tensors: Mapping[str, Tensor], label: str) -> nn.Module:
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
        return filled(module, convert.convert_ldm_vae_checkpoint(dict(tensors), dict(module.config)), "VAE")

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
    vae = own_vae_of(checkpoint, dtype, meta=meta) if own_vae else None
    stage = checkpoint.config["model"]["params"]["cond_stage_config"]
    return unet_of(checkpoint, dtype, meta=meta), vae, clip_of(checkpoint, stage, TEXT, meta=meta)


def own_vae_of(checkpoint: Checkpoint, dtype: torch.dtype, *, meta: bool) -> nn.Module:
    """The file's own AutoencoderKL. Raises ModelError."""
    if not checkpoint.kind.has_vae:
        raise ModelError(f"{checkpoint.path.name} has no VAE of its own ({VAE}*).",
                         "Name one with the setting vae: a .safetensors VAE or a diffusers VAE folder.", field="vae")
    return vae_from(checkpoint.tensors(VAE, dtype, meta=meta), checkpoint.config)


def unet_of(checkpoint: Checkpoint, dtype: torch.dtype, *, meta: bool,
            more: Mapping[str, Any] | None = None) -> nn.Module:
    """The file's UNet2DConditionModel. Raises ModelError.

    more: settings that diffusers does not find in the yaml.
    """
    from diffusers import UNet2DConditionModel
    from diffusers.loaders import single_file_utils as convert

    params = checkpoint.config["model"]["params"]

    def build() -> nn.Module:
        tensors = checkpoint.tensors(UNET, dtype, meta=meta)
        settings = convert.create_unet_diffusers_config_from_ldm(checkpoint.config, tensors)
        # diffusers guesses the picture size from the file's keys; the yaml knows it
        settings["sample_size"] = int(params.get("image_size", settings["sample_size"]))
        settings |= more or {}
        with torch.device("meta"):
            module = UNet2DConditionModel(**settings)
        return filled(module, convert.convert_ldm_unet_checkpoint(tensors, dict(module.config)), "UNet")

    return built("UNet", build)


def clip_of(checkpoint: Checkpoint, stage: Mapping[str, Any], start: str, *, meta: bool) -> nn.Module:
    """The CLIPTextModel whose weights stand under `start`, float32. Raises ModelError.

    stage: the yaml's part about it, or {}.
    """
    from diffusers.loaders import single_file_utils as convert
    from transformers import CLIPTextConfig, CLIPTextModel

    def build() -> nn.Module:
        with torch.device("meta" if meta else "cpu"):
            module = CLIPTextModel(CLIPTextConfig(**_text_config(stage, checkpoint.shapes, start)))
        wrapped = "text_model." if hasattr(module, "text_model") else ""
        found = convert.convert_ldm_clip_checkpoint(checkpoint.tensors(start, torch.float32, meta=meta))
        weights = {wrapped + key.removeprefix("text_model."): value for key, value in found.items()
                   if not key.endswith("position_ids")}
        return filled(module, weights, "text encoder")

    return built("text encoder", build)
