"""Stable Diffusion 1 in one .safetensors file under LDM names, and its yaml: from diffusers' modules and back.

This is the file that web interfaces load. Reading goes through diffusers' own converters; writing has its own table
of names, held to those converters by a round trip. Layout of the file:

    model.diffusion_model.*                     UNet: input_blocks, middle_block, output_blocks, time_embed, out
    first_stage_model.*                         VAE: encoder, decoder, quant_conv, post_quant_conv
    cond_stage_model.transformer.text_model.*   CLIP text encoder, transformers' names
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from apl_core.errors import APLError, ModelError

UNET = "model.diffusion_model."
VAE = "first_stage_model."
TEXT = "cond_stage_model.transformer.text_model."

_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
           "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_TEXT_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers",
              "num_attention_heads", "max_position_embeddings", "hidden_act", "layer_norm_eps", "bos_token_id",
              "eos_token_id", "pad_token_id")


def _put(out: dict[str, Tensor], module: nn.Module, name: str, renamed: Mapping[str, str] | None = None) -> None:
    """Adds the module's tensors under `name`, with the parts of their own names in `renamed` replaced."""
    for key, value in module.state_dict().items():
        part, _, leaf = key.rpartition(".")
        part = (renamed or {}).get(part, part)
        out[".".join(filter(None, (name, part, leaf)))] = value.detach()


def _put_block(out: dict[str, Tensor], name: str, resnet: nn.Module, attentions: Any, j: int) -> int:
    """One input or output block of the UNet; returns the place of its next part."""
    _put(out, resnet, f"{name}.0", _RESNET)
    if attentions is None:
        return 1
    _put(out, attentions[j], f"{name}.1")
    return 2


def _unet_to_ldm(unet: nn.Module) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    _put(out, unet.time_embedding, "time_embed", {"linear_1": "0", "linear_2": "2"})
    _put(out, unet.conv_in, "input_blocks.0.0")
    i = 0
    for block in unet.down_blocks:
        for j, resnet in enumerate(block.resnets):
            i += 1
            _put_block(out, f"input_blocks.{i}", resnet, getattr(block, "attentions", None), j)
        if block.downsamplers:
            i += 1
            _put(out, block.downsamplers[0].conv, f"input_blocks.{i}.0.op")
    first, last = unet.mid_block.resnets
    _put(out, first, "middle_block.0", _RESNET)
    _put(out, unet.mid_block.attentions[0], "middle_block.1")
    _put(out, last, "middle_block.2", _RESNET)
    i = -1
    for block in unet.up_blocks:
        for j, resnet in enumerate(block.resnets):
            i += 1
            place = _put_block(out, f"output_blocks.{i}", resnet, getattr(block, "attentions", None), j)
        if block.upsamplers:
            _put(out, block.upsamplers[0].conv, f"output_blocks.{i}.{place}.conv")
    _put(out, unet.conv_norm_out, "out.0")
    _put(out, unet.conv_out, "out.2")
    return out


def _put_vae_mid(out: dict[str, Tensor], block: nn.Module, name: str) -> None:
    for k, resnet in enumerate(block.resnets):
        _put(out, resnet, f"{name}.block_{k + 1}", {"conv_shortcut": "nin_shortcut"})
    attention: dict[str, Tensor] = {}
    _put(attention, block.attentions[0], f"{name}.attn_1", _VAE_ATTENTION)
    # LDM's attention is made of 1x1 convolutions, diffusers' of linear layers
    out |= {key: value[:, :, None, None] if value.ndim == 2 else value for key, value in attention.items()}


def _vae_to_ldm(vae: nn.Module) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for side, half, blocks in (("encoder", vae.encoder, vae.encoder.down_blocks),
                               ("decoder", vae.decoder, vae.decoder.up_blocks)):
        _put(out, half.conv_in, f"{side}.conv_in")
        for i, block in enumerate(blocks):
            # LDM counts the decoder's levels from the finest, diffusers from the coarsest
            name = f"encoder.down.{i}" if side == "encoder" else f"decoder.up.{len(blocks) - 1 - i}"
            for j, resnet in enumerate(block.resnets):
                _put(out, resnet, f"{name}.block.{j}", {"conv_shortcut": "nin_shortcut"})
            if side == "encoder" and block.downsamplers:
                _put(out, block.downsamplers[0].conv, f"{name}.downsample.conv")
            if side == "decoder" and block.upsamplers:
                _put(out, block.upsamplers[0].conv, f"{name}.upsample.conv")
        _put_vae_mid(out, half.mid_block, f"{side}.mid")
        _put(out, half.conv_norm_out, f"{side}.norm_out")
        _put(out, half.conv_out, f"{side}.conv_out")
    _put(out, vae.quant_conv, "quant_conv")
    _put(out, vae.post_quant_conv, "post_quant_conv")
    return out


def to_ldm(unet: nn.Module, vae: nn.Module, text_encoder: nn.Module) -> dict[str, Tensor]:
    """All weights of a Stable Diffusion 1 model under LDM names, in the dtype they have.

    Args:
        unet: diffusers' UNet2DConditionModel of SD1's kind (plain and cross-attention blocks).
        vae: diffusers' AutoencoderKL with attention in its middle block.
        text_encoder: transformers' CLIPTextModel.

    Raises:
        ModelError: a module is of another kind, so that some of its tensors have no LDM name.
    """
    clip = getattr(text_encoder, "text_model", text_encoder)  # transformers 5 flattened CLIPTextModel
    text = {key: value.detach() for key, value in clip.state_dict().items() if not key.endswith("position_ids")}
    parts = ((UNET, unet, _converted(_unet_to_ldm, unet, "UNet")), (VAE, vae, _converted(_vae_to_ldm, vae, "VAE")),
             (TEXT, text, text))
    tensors: dict[str, Tensor] = {}
    for start, module, part in parts:
        expected = len(module if isinstance(module, dict) else module.state_dict())
        if len(part) != expected:
            raise ModelError(
                f"{expected - len(part)} of {expected} tensors of {type(module).__name__} have no LDM name.",
                "Use a model of Stable Diffusion 1's kind.", field=start.rstrip("."),
            )
        tensors |= {start + key: value for key, value in part.items()}
    return tensors


def _converted(convert: Any, module: nn.Module, label: str) -> dict[str, Tensor]:
    try:
        return convert(module)
    except (AttributeError, ValueError, TypeError) as error:
        raise ModelError(
            f"This {label} is not of Stable Diffusion 1's kind: {error}.", "Use such a model.", field=label.lower()
        ) from error


def ldm_config(unet: nn.Module, vae: nn.Module, text_encoder: nn.Module, *, beta_start: float = 0.00085,
               beta_end: float = 0.012) -> dict[str, Any]:
    """What belongs into the yaml beside the file, as LDM's code reads it; `params.image_size` is in latent pixels.

    `cond_stage_config.text_config` stands beside `params`, where LDM ignores it: its encoder class takes a folder name
    (`params.version`), which the caller may add.

    Raises:
        ModelError: the widths are no whole multiples of the first one, or up and down blocks do not mirror.
    """
    widths = {"unet": list(unet.config.block_out_channels), "vae": list(vae.config.block_out_channels)}
    for name, channels in widths.items():
        if any(c % channels[0] for c in channels):
            raise ModelError(f"{name}.block_out_channels is {channels}.", "LDM needs whole multiples of the first.",
                             field="block_out_channels")
    attended = [hasattr(block, "attentions") for block in unet.down_blocks]
    if attended != [hasattr(block, "attentions") for block in unet.up_blocks][::-1]:
        raise ModelError("The UNet's up blocks do not mirror its down blocks.", "Use the same block types in both.",
                         field="up_block_types")
    text = {key: getattr(text_encoder.config, key) for key in _TEXT_KEYS}
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {
        "linear_start": beta_start,
        "linear_end": beta_end,
        "timesteps": 1000,
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "image_size": unet.config.sample_size,
        "channels": unet.config.in_channels,
        "conditioning_key": "crossattn",
        "scale_factor": vae.config.scaling_factor,
        "use_ema": False,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": {
            "image_size": unet.config.sample_size,
            "in_channels": unet.config.in_channels,
            "out_channels": unet.config.out_channels,
            "model_channels": widths["unet"][0],
            "attention_resolutions": [2**i for i, has in enumerate(attended) if has],
            "num_res_blocks": unet.config.layers_per_block,
            "channel_mult": [c // widths["unet"][0] for c in widths["unet"]],
            # diffusers calls SD1's number of heads attention_head_dim
            "num_heads": unet.config.attention_head_dim,
            "use_spatial_transformer": True,
            "transformer_depth": 1,
            "context_dim": unet.config.cross_attention_dim,
            "legacy": False,
        }},
        "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {
            "embed_dim": vae.config.latent_channels,
            "ddconfig": {
                "double_z": True,
                "z_channels": vae.config.latent_channels,
                "resolution": unet.config.sample_size * 2 ** (len(widths["vae"]) - 1),
                "in_channels": vae.config.in_channels,
                "out_ch": vae.config.out_channels,
                "ch": widths["vae"][0],
                "ch_mult": [c // widths["vae"][0] for c in widths["vae"]],
                "num_res_blocks": vae.config.layers_per_block,
                "attn_resolutions": [],
            },
            "lossconfig": {"target": "torch.nn.Identity"},
        }},
        "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder", "text_config": text},
    }}}


def read_config(path: str | Path) -> dict[str, Any]:
    """The LDM yaml beside the single file `path`, checked to be one of Stable Diffusion 1.

    Raises:
        ModelError: there is none, or it describes another kind of model.
    """
    beside = Path(path).with_suffix(".yaml")
    try:
        config = yaml.safe_load(beside.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"There is no readable {beside.name} beside {Path(path).name}.", "Single files are read with "
                         "their LDM configuration beside them; or give a diffusers folder.", field="config") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ModelError(f"{beside.name} is not YAML: {error}", "Get the model's configuration again.",
                         field="config") from error
    for keys in (("unet_config", "params"), ("first_stage_config", "params", "ddconfig"), ("cond_stage_config",)):
        found: Any = config
        for key in ("model", "params", *keys):
            found = found.get(key) if isinstance(found, dict) else None
        if not isinstance(found, dict):
            raise ModelError(f"{beside.name} has no model.params.{'.'.join(keys)}.",
                             "Supported: Stable Diffusion 1.x as LDM describes it.", field=".".join(keys))
    parameterization = config["model"]["params"].get("parameterization", "eps")
    if parameterization != "eps":
        raise ModelError(f"{beside.name} says parameterization: {parameterization}.", "Use a model that predicts the "
                         "noise (eps).", field="parameterization")
    return config


def schedule(config: Mapping[str, Any]) -> dict[str, Any]:
    """The noise schedule of an LDM yaml as settings of diffusers' DDIMScheduler, or SD1's. Raises ModelError."""
    params = config["model"]["params"]
    try:
        ends = {"num_train_timesteps": int(params.get("timesteps", 1000)),
                "beta_start": float(params.get("linear_start", 0.00085)),
                "beta_end": float(params.get("linear_end", 0.012))}
    except (TypeError, ValueError) as error:
        raise ModelError(f"The yaml's noise schedule is not made of numbers: {error}.",
                         "Get the model's configuration again.", field="linear_start") from error
    # LDM's "linear" is linear in sqrt(beta)
    return {**ends, "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False,
            "steps_offset": 1, "prediction_type": "epsilon"}


def _text_config(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """transformers' text configuration: the yaml's `text_config`, or what the shapes of CLIP-L's kind tell."""
    stage = config["model"]["params"]["cond_stage_config"]
    stated = stage.get("text_config") or (stage.get("params") or {}).get("text_config")
    if stated:
        return dict(stated)
    vocabulary, width = tensors[f"{TEXT}embeddings.token_embedding.weight"].shape
    if width % 64:
        raise ModelError(
            f"The text encoder is {width} wide, from which its number of heads cannot be told.",
            "Add cond_stage_config.text_config with num_attention_heads to the yaml.", field="text_config",
        )
    layers = {int(m.group(1)) for key in tensors if (m := re.match(re.escape(TEXT) + r"encoder\.layers\.(\d+)\.", key))}
    return {"vocab_size": vocabulary, "hidden_size": width, "projection_dim": width, "num_hidden_layers": len(layers),
            "num_attention_heads": width // 64, "hidden_act": "quick_gelu",
            "intermediate_size": tensors[f"{TEXT}encoder.layers.0.mlp.fc1.weight"].shape[0],
            "max_position_embeddings": tensors[f"{TEXT}embeddings.position_embedding.weight"].shape[0],
            "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}


def _filled(module: nn.Module, tensors: Mapping[str, Tensor], label: str) -> nn.Module:
    """The module with these weights as float32. Raises ModelError naming what is missing, left over or misshapen."""
    own = module.state_dict()
    wrong = [f"{key} is missing" for key in own if key not in tensors]
    wrong += [f"{key} is left over" for key in tensors if key not in own]
    wrong += [f"{key} is {list(tensors[key].shape)} instead of {list(own[key].shape)}" for key in own
              if key in tensors and tensors[key].shape != own[key].shape]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ModelError(f"The weights do not fit the {label} that the yaml describes: {'; '.join(wrong[:3])}{more}.",
                         "File and yaml belong to different models: get both again.", field=label)
    module.load_state_dict({key: value.float() for key, value in tensors.items()}, assign=True)
    return module.eval()


def _built(label: str, build: Any) -> nn.Module:
    try:
        # weights come from the file: none are drawn, and the caller's random numbers stay as they are
        with torch.random.fork_rng(devices=[]):
            return build()
    except APLError:
        raise
    except Exception as error:  # both libraries raise what their dependencies raise, over settings they cannot use
        raise ModelError(f"The yaml does not describe a {label}: {type(error).__name__} {error}.",
                         "Compare it with LDM's v1-inference.yaml.", field=label) from error


def read_ldm(path: str | Path) -> tuple[nn.Module, nn.Module, nn.Module]:
    """(UNet2DConditionModel, AutoencoderKL, CLIPTextModel) of a file with its yaml beside it: float32, in eval mode.

    Raises:
        ModelError: the file is damaged, lacks parts, or does not fit its yaml.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders import single_file_utils as convert
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import CLIPTextConfig, CLIPTextModel

    path = Path(path)
    config = read_config(path)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"Cannot read {path.name}: {error}", "The file is damaged or incomplete: copy it again.",
                         field="path") from error
    for start, label in ((UNET, "UNet"), (VAE, "VAE"), (TEXT, "CLIP text encoder")):
        if not any(key.startswith(start) for key in tensors):
            raise ModelError(f"{path.name} has no {label} ({start}*).", "Supported: whole models of Stable Diffusion "
                             "1.x under LDM names.", field=start.rstrip("."))

    def unet() -> nn.Module:
        settings = convert.create_unet_diffusers_config_from_ldm(config, tensors)
        # diffusers guesses the picture size from the file's keys; the yaml knows it
        settings["sample_size"] = int(config["model"]["params"].get("image_size", settings["sample_size"]))
        with torch.device("meta"):
            module = UNet2DConditionModel(**settings)
        return _filled(module, convert.convert_ldm_unet_checkpoint(tensors, dict(module.config)), "UNet")

    def vae() -> nn.Module:
        settings = convert.create_vae_diffusers_config_from_ldm(config, tensors)
        with torch.device("meta"):
            module = AutoencoderKL(**settings)
        return _filled(module, convert.convert_ldm_vae_checkpoint(tensors, dict(module.config)), "VAE")

    def text() -> nn.Module:
        module = CLIPTextModel(CLIPTextConfig(**_text_config(config, tensors)))
        wrapped = "text_model." if hasattr(module, "text_model") else ""
        found = convert.convert_ldm_clip_checkpoint({k: v for k, v in tensors.items() if k.startswith(TEXT)})
        weights = {wrapped + key.removeprefix("text_model."): value for key, value in found.items()
                   if not key.endswith("position_ids")}
        return _filled(module, weights, "text encoder")

    return _built("UNet", unet), _built("VAE", vae), _built("text encoder", text)
