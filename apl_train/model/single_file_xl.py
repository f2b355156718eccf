"""Stable Diffusion XL as one .safetensors file under sgm's names, with its yaml: from diffusers' modules to tensors.

`checkpoint_xl.py` reads this file through diffusers' own converters, which a round trip holds the names to. Layout:

    model.diffusion_model.*                        UNet, as in Stable Diffusion 1, and label_emb (sizes, pooled text)
    first_stage_model.*                            VAE, as in Stable Diffusion 1
    conditioner.embedders.0.transformer.*          CLIP-L, transformers' names
    conditioner.embedders.1.model.*                CLIP-G, open_clip's names: queries, keys and values in one matrix
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from apl_core.errors import ModelError
from apl_train.model.single_file import (
    UNET,
    VAE,
    part,
    put,
    text_settings,
    text_to_ldm,
    unet_params,
    unet_to_ldm,
    vae_params,
    vae_to_ldm,
)

CLIP_L = "conditioner.embedders.0.transformer.text_model."
CLIP_G = "conditioner.embedders.1.model."
CLIP_G_PLAIN = "conditioner.embedders.1.transformer."
"""CLIP-G under transformers' names, as some tools write it."""
KIND = "Stable Diffusion XL"
_LAYER = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
          "mlp.fc2": "mlp.c_proj"}
_LOGIT_SCALE = math.log(100)
"""What every open_clip model ends its training with; nothing that draws reads it, but files have it."""


def unet_to_sgm(unet: nn.Module) -> dict[str, Tensor]:
    """The UNet's weights by sgm name."""
    out = unet_to_ldm(unet)
    put(out, unet.add_embedding, "label_emb.0", {"linear_1": "0", "linear_2": "2"})
    return out


def clip_to_open_clip(text_encoder: nn.Module) -> dict[str, Tensor]:
    """A CLIPTextModelWithProjection's weights by open_clip's names, without `logit_scale`.

    Three matrices of a layer's attention become one; its projection is the transposed one.
    """
    inner = getattr(text_encoder, "text_model", text_encoder)
    out = {"token_embedding.weight": inner.embeddings.token_embedding.weight.detach(),
           "positional_embedding": inner.embeddings.position_embedding.weight.detach(),
           "text_projection": text_encoder.text_projection.weight.detach().T}
    put(out, inner.final_layer_norm, "ln_final")
    for i, layer in enumerate(inner.encoder.layers):
        name, held = f"transformer.resblocks.{i}", layer.state_dict()
        for kind in ("weight", "bias"):
            out[f"{name}.attn.in_proj_{kind}"] = torch.cat([held[f"self_attn.{p}_proj.{kind}"] for p in "qkv"])
            out |= {f"{name}.{new}.{kind}": held[f"{old}.{kind}"] for old, new in _LAYER.items()}
    return out


def _checked_clip_g(text_encoder: nn.Module) -> dict[str, Tensor]:
    """The same under its place in the file. Raises ModelError for another kind of module."""
    try:
        found = clip_to_open_clip(text_encoder)
    except (AttributeError, KeyError) as error:
        raise ModelError(f"This second text encoder is not of {KIND}'s kind: {error}.",
                         "Use a CLIPTextModelWithProjection.", field="text_encoder_2") from error
    numbers = sum(v.numel() for k, v in text_encoder.state_dict().items() if not k.endswith("position_ids"))
    if sum(value.numel() for value in found.values()) != numbers:
        raise ModelError("Some weights of the second text encoder have no open_clip name.",
                         "Use a CLIPTextModelWithProjection.", field="text_encoder_2")
    scale = torch.tensor(_LOGIT_SCALE, dtype=next(iter(found.values())).dtype)
    return {CLIP_G + key: value for key, value in (found | {"logit_scale": scale}).items()}


def own_parts(unet: nn.Module, text_encoder_2: nn.Module) -> dict[str, Tensor]:
    """The parts that Stable Diffusion XL does not share with Stable Diffusion 1, in the dtype they have."""
    return {**part(UNET, unet_to_sgm, unet, "UNet", KIND), **_checked_clip_g(text_encoder_2)}


def to_sgm(unet: nn.Module, vae: nn.Module, text_encoder: nn.Module, text_encoder_2: nn.Module) -> dict[str, Tensor]:
    """All weights of a Stable Diffusion XL model under sgm's names, in the dtype they have.

    Args:
        unet: diffusers' UNet2DConditionModel with SDXL's conditioning ("text_time").
        vae: diffusers' AutoencoderKL.
        text_encoder: transformers' CLIPTextModel, CLIP-L.
        text_encoder_2: transformers' CLIPTextModelWithProjection, CLIP-G.

    Raises:
        ModelError: a module is of another kind, so that some of its tensors have no such name.
    """
    return {**own_parts(unet, text_encoder_2), **part(VAE, vae_to_ldm, vae, "VAE", KIND),
            **part(CLIP_L, text_to_ldm, text_encoder, "text encoder", KIND)}


def _heads(unet: nn.Module) -> dict[str, int]:
    """sgm's word for the attention heads: one number for all levels, or one width of a head."""
    heads = unet.config.attention_head_dim  # diffusers' name for their number
    if isinstance(heads, int):
        return {"num_heads": heads}
    widths = {c // h for c, h in zip(unet.config.block_out_channels, heads, strict=True)}
    if len(widths) > 1:
        raise ModelError(f"unet.attention_head_dim is {list(heads)}: heads of several widths.",
                         "sgm needs one width, or one number of heads.", field="attention_head_dim")
    return {"num_head_channels": widths.pop()}


def sgm_config(unet: nn.Module, vae: nn.Module, text_encoder: nn.Module, text_encoder_2: nn.Module, *,
               arch: str = "ViT-bigG-14", zeros_for_empty_prompt: bool = True) -> dict[str, Any]:
    """What belongs into the yaml beside the file, as sgm's code reads it; widths and numbers are read off the modules.

    Beside `params`, where sgm ignores them, stand what our reader needs and shapes do not say: both encoders'
    `text_config`, the UNet's `image_size` in latent pixels, and `zeros_for_empty_prompt`.

    Args:
        arch: open_clip's name of the second encoder.
        zeros_for_empty_prompt: whether an empty negative prompt means zeros instead of its encoding.

    Raises:
        ModelError: sgm has no words for the UNet's or the VAE's shape.
    """
    embed, diffusion = "sgm.modules.encoders.modules.", "sgm.modules.diffusionmodules."
    depth = unet.config.transformer_layers_per_block
    sizes = [{"is_trainable": False, "input_key": key, "target": embed + "ConcatTimestepEmbedderND",
              "params": {"outdim": unet.config.addition_time_embed_dim}}
             for key in ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")]
    texts = [
        {"is_trainable": False, "input_key": "txt", "target": embed + "FrozenCLIPEmbedder",
         # counted from the token embeddings on: the last layer but one
         "params": {"layer": "hidden", "layer_idx": text_encoder.config.num_hidden_layers - 1},
         "text_config": text_settings(text_encoder)},
        {"is_trainable": False, "input_key": "txt", "target": embed + "FrozenOpenCLIPEmbedder2",
         "params": {"arch": arch, "version": None, "freeze": True, "layer": "penultimate",
                    "always_return_pooled": True, "legacy": False},
         "text_config": text_settings(text_encoder_2)},
    ]
    return {"model": {"target": "sgm.models.diffusion.DiffusionEngine", "params": {
        "scale_factor": vae.config.scaling_factor,
        "disable_first_stage_autocast": True,
        "denoiser_config": {"target": diffusion + "denoiser.DiscreteDenoiser", "params": {
            "num_idx": 1000,
            "weighting_config": {"target": diffusion + "denoiser_weighting.EpsWeighting"},
            "scaling_config": {"target": diffusion + "denoiser_scaling.EpsScaling"},
            "discretization_config": {"target": diffusion + "discretizer.LegacyDDPMDiscretization"},
        }},
        "network_config": {"target": diffusion + "openaimodel.UNetModel", "image_size": unet.config.sample_size,
                           "params": {
            **unet_params(unet),
            "adm_in_channels": unet.config.projection_class_embeddings_input_dim,
            "num_classes": "sequential",
            "use_checkpoint": False,
            **_heads(unet),
            "use_spatial_transformer": True,
            "use_linear_in_transformer": True,
            "transformer_depth": depth if isinstance(depth, int) else list(depth),
            "context_dim": unet.config.cross_attention_dim,
            "legacy": False,
        }},
        "conditioner_config": {"target": "sgm.modules.GeneralConditioner",
                               "zeros_for_empty_prompt": zeros_for_empty_prompt, "params": {
            "emb_models": [*texts, *sizes],
        }},
        "first_stage_config": {"target": "sgm.models.autoencoder.AutoencoderKLInferenceWrapper",
                               "params": vae_params(unet, vae) | {"monitor": "val/rec_loss"}},
    }}}
