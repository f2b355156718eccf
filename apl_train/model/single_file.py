"""Stable Diffusion 1 as one .safetensors file under LDM names, with its yaml: from diffusers' modules to tensors.

This is the file that web interfaces load; `checkpoint.py` reads it, through diffusers' own converters. The table of
names here is held to those converters by a round trip. Layout of the file:

    model.diffusion_model.*                     UNet: input_blocks, middle_block, output_blocks, time_embed, out
    first_stage_model.*                         VAE: encoder, decoder, quant_conv, post_quant_conv
    cond_stage_model.transformer.text_model.*   CLIP text encoder, transformers' names
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from apl_core.errors import ModelError

UNET = "model.diffusion_model."
VAE = "first_stage_model."
TEXT = "cond_stage_model.transformer.text_model."

_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
           "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_TEXT_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers",
              "num_attention_heads", "max_position_embeddings", "hidden_act", "layer_norm_eps", "bos_token_id",
              "eos_token_id", "pad_token_id")


def put(out: dict[str, Tensor], module: nn.Module, name: str, renamed: Mapping[str, str] | None = None) -> None:
    """Adds the module's tensors under `name`, with the parts of their own names in `renamed` replaced."""
    for key, value in module.state_dict().items():
        part, _, leaf = key.rpartition(".")
        part = (renamed or {}).get(part, part)
        out[".".join(filter(None, (name, part, leaf)))] = value.detach()


def _put_block(out: dict[str, Tensor], name: str, resnet: nn.Module, attentions: Any, j: int) -> int:
    """One input or output block of the UNet; returns the place of its next part."""
    put(out, resnet, f"{name}.0", _RESNET)
    if attentions is None:
        return 1
    put(out, attentions[j], f"{name}.1")
    return 2


def unet_to_ldm(unet: nn.Module) -> dict[str, Tensor]:
    """The UNet's weights by LDM name; size and class embeddings have none here."""
    out: dict[str, Tensor] = {}
    put(out, unet.time_embedding, "time_embed", {"linear_1": "0", "linear_2": "2"})
    put(out, unet.conv_in, "input_blocks.0.0")
    i = 0
    for block in unet.down_blocks:
        for j, resnet in enumerate(block.resnets):
            i += 1
            _put_block(out, f"input_blocks.{i}", resnet, getattr(block, "attentions", None), j)
        if block.downsamplers:
            i += 1
            put(out, block.downsamplers[0].conv, f"input_blocks.{i}.0.op")
    first, last = unet.mid_block.resnets
    put(out, first, "middle_block.0", _RESNET)
    put(out, unet.mid_block.attentions[0], "middle_block.1")
    put(out, last, "middle_block.2", _RESNET)
    i = -1
    for block in unet.up_blocks:
        for j, resnet in enumerate(block.resnets):
            i += 1
            place = _put_block(out, f"output_blocks.{i}", resnet, getattr(block, "attentions", None), j)
        if block.upsamplers:
            put(out, block.upsamplers[0].conv, f"output_blocks.{i}.{place}.conv")
    put(out, unet.conv_norm_out, "out.0")
    put(out, unet.conv_out, "out.2")
    return out


def _put_vae_mid(out: dict[str, Tensor], block: nn.Module, name: str) -> None:
    for k, resnet in enumerate(block.resnets):
        put(out, resnet, f"{name}.block_{k + 1}", {"conv_shortcut": "nin_shortcut"})
    attention: dict[str, Tensor] = {}
    put(attention, block.attentions[0], f"{name}.attn_1", _VAE_ATTENTION)
    # LDM's attention is made of 1x1 convolutions, diffusers' of linear layers
    out |= {key: value[:, :, None, None] if value.ndim == 2 else value for key, value in attention.items()}


def vae_to_ldm(vae: nn.Module) -> dict[str, Tensor]:
    """The VAE's weights by LDM name."""
    out: dict[str, Tensor] = {}
    for side, half, blocks in (("encoder", vae.encoder, vae.encoder.down_blocks),
                               ("decoder", vae.decoder, vae.decoder.up_blocks)):
        put(out, half.conv_in, f"{side}.conv_in")
        for i, block in enumerate(blocks):
            # LDM counts the decoder's levels from the finest, diffusers from the coarsest
            name = f"encoder.down.{i}" if side == "encoder" else f"decoder.up.{len(blocks) - 1 - i}"
            for j, resnet in enumerate(block.resnets):
                put(out, resnet, f"{name}.block.{j}", {"conv_shortcut": "nin_shortcut"})
            if side == "encoder" and block.downsamplers:
                put(out, block.downsamplers[0].conv, f"{name}.downsample.conv")
            if side == "decoder" and block.upsamplers:
                put(out, block.upsamplers[0].conv, f"{name}.upsample.conv")
        _put_vae_mid(out, half.mid_block, f"{side}.mid")
        put(out, half.conv_norm_out, f"{side}.norm_out")
        put(out, half.conv_out, f"{side}.conv_out")
    put(out, vae.quant_conv, "quant_conv")
    put(out, vae.post_quant_conv, "post_quant_conv")
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
    return {**part(UNET, unet_to_ldm, unet, "UNet"), **part(VAE, vae_to_ldm, vae, "VAE"),
            **part(TEXT, text_to_ldm, text_encoder, "text encoder")}


def text_to_ldm(text_encoder: nn.Module) -> dict[str, Tensor]:
    """A CLIP text encoder's weights by transformers' names below `text_model`."""
    clip = getattr(text_encoder, "text_model", text_encoder)  # transformers 5 flattened CLIPTextModel
    return {key: value.detach() for key, value in clip.state_dict().items() if not key.endswith("position_ids")}


def part(start: str, convert: Callable[[Any], dict[str, Tensor]], module: nn.Module, label: str,
         kind: str = "Stable Diffusion 1") -> dict[str, Tensor]:
    """What `convert` makes of a module, under `start`. Raises ModelError where a tensor has no name there."""
    try:
        found = convert(module)
    except (AttributeError, ValueError, TypeError) as error:
        raise ModelError(
            f"This {label} is not of {kind}'s kind: {error}.", "Use such a model.", field=label.lower()
        ) from error
    expected = sum(not key.endswith("position_ids") for key in module.state_dict())
    if len(found) != expected:
        raise ModelError(
            f"{expected - len(found)} of {expected} tensors of {type(module).__name__} have no LDM name.",
            f"Use a model of {kind}'s kind.", field=start.rstrip("."),
        )
    return {start + key: value for key, value in found.items()}


def ldm_config(unet: nn.Module, vae: nn.Module, text_encoder: nn.Module, *, beta_start: float = 0.00085,
               beta_end: float = 0.012) -> dict[str, Any]:
    """What belongs into the yaml beside the file, as LDM's code reads it; `params.image_size` is in latent pixels.

    `cond_stage_config.text_config` stands beside `params`, where LDM ignores it: its encoder class takes a folder name
    (`params.version`), which the caller may add.

    Raises:
        ModelError: the widths are no whole multiples of the first one, or up and down blocks do not mirror.
    """
    text = text_settings(text_encoder)
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
            **unet_params(unet),
            # diffusers calls SD1's number of heads attention_head_dim
            "num_heads": unet.config.attention_head_dim,
            "use_spatial_transformer": True,
            "transformer_depth": 1,
            "context_dim": unet.config.cross_attention_dim,
            "legacy": False,
        }},
        "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": vae_params(unet, vae)},
        "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder", "text_config": text},
    }}}


def text_settings(text_encoder: nn.Module) -> dict[str, Any]:
    """What a yaml has to say of a CLIP text encoder, as transformers' settings."""
    return {key: getattr(text_encoder.config, key) for key in _TEXT_KEYS}


def _multiples(name: str, module: nn.Module) -> tuple[int, list[int]]:
    """(width of the first level, the others as its multiples). Raises ModelError."""
    channels = list(module.config.block_out_channels)
    if any(c % channels[0] for c in channels):
        raise ModelError(f"{name}.block_out_channels is {channels}.", "LDM needs whole multiples of the first.",
                         field="block_out_channels")
    return channels[0], [c // channels[0] for c in channels]


def unet_params(unet: nn.Module) -> dict[str, Any]:
    """LDM's settings of a UNet's levels. Raises ModelError where LDM has no words for them."""
    first, multiples = _multiples("unet", unet)
    attended = [hasattr(block, "attentions") for block in unet.down_blocks]
    if attended != [hasattr(block, "attentions") for block in unet.up_blocks][::-1]:
        raise ModelError("The UNet's up blocks do not mirror its down blocks.", "Use the same block types in both.",
                         field="up_block_types")
    return {"in_channels": unet.config.in_channels, "out_channels": unet.config.out_channels, "model_channels": first,
            "attention_resolutions": [2**i for i, has in enumerate(attended) if has],
            "num_res_blocks": unet.config.layers_per_block, "channel_mult": multiples}


def vae_params(unet: nn.Module, vae: nn.Module) -> dict[str, Any]:
    """LDM's settings of a VAE beside this UNet. Raises ModelError."""
    first, multiples = _multiples("vae", vae)
    return {"embed_dim": vae.config.latent_channels, "ddconfig": {
        "double_z": True,
        "z_channels": vae.config.latent_channels,
        "resolution": unet.config.sample_size * 2 ** (len(multiples) - 1),
        "in_channels": vae.config.in_channels,
        "out_ch": vae.config.out_channels,
        "ch": first,
        "ch_mult": multiples,
        "num_res_blocks": vae.config.layers_per_block,
        "attn_resolutions": [],
    }, "lossconfig": {"target": "torch.nn.Identity"}}
