"""What a Stable Diffusion XL file has beyond a Stable Diffusion 1 one: a second text encoder, pooled text, sizes.

Step file -> modules, by the tools of `checkpoint.py`. The second encoder stands under open_clip's names in most files
and under transformers' in some; both go through diffusers' converters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from apl_core.errors import ModelError
from apl_train.model.checkpoint import Checkpoint, below, built, clip_of, filled, own_vae_of, unet_of
from apl_train.model.single_file_xl import CLIP_G, CLIP_G_PLAIN, CLIP_L

SIZES = 256
"""Width of the embedding of one size in the published model."""
EDGE = 128
"""Edge of its latents, eight pixels each; sgm's yaml has no place for it."""


def zeros_for_empty_prompt(checkpoint: Checkpoint) -> bool:
    """Whether an empty negative prompt means zeros; so it is in SDXL (diffusers' force_zeros_for_empty_prompt)."""
    stated = below(checkpoint.config, "model", "params", "conditioner_config", "zeros_for_empty_prompt")
    return True if stated is None else bool(stated)


def read_sgm(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, *, meta: bool = False,
             own_vae: bool = True) -> tuple[nn.Module, nn.Module | None, nn.Module, nn.Module]:
    """(UNet2DConditionModel, AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection) in eval mode.

    Arguments and errors are those of `checkpoint.read_ldm`; both text encoders are float32 always.
    """
    first, second, embedded = _stages(checkpoint)
    network = checkpoint.config["model"]["params"]["network_config"]
    # diffusers takes the conditioning of sizes for SDXL's at SDXL's own widths only, and the picture's edge for SD1's
    more = {"class_embed_type": None, "addition_embed_type": "text_time", "addition_time_embed_dim": embedded,
            "sample_size": int(network.get("image_size", EDGE))}
    vae = own_vae_of(checkpoint, dtype, meta=meta) if own_vae else None
    return (unet_of(checkpoint, dtype, meta=meta, more=more), vae, clip_of(checkpoint, first, CLIP_L, meta=meta),
            _clip_g(checkpoint, second, meta))


def _stages(checkpoint: Checkpoint) -> tuple[Mapping[str, Any], Mapping[str, Any], int]:
    """(the yaml's part about CLIP-L, about CLIP-G, width of a size's embedding); {} where it says nothing."""
    models = below(checkpoint.config, "model", "params", "conditioner_config", "params", "emb_models")
    if models is None:
        return {}, {}, SIZES
    widths = {below(each, "params", "outdim") for each in models if isinstance(each, Mapping)} - {None}
    texts = [each for each in models if isinstance(each, Mapping) and each.get("input_key") == "txt"]
    if len(texts) != 2 or len(widths) > 1:
        raise ModelError(f"The yaml's conditioner has {len(texts)} text encoders and sizes embedded as "
                         f"{sorted(widths)}.", "Stable Diffusion XL has two, and one width for its sizes.",
                         field="conditioner_config")
    return texts[0], texts[1], int(next(iter(widths), SIZES))


def _clip_g(checkpoint: Checkpoint, stage: Mapping[str, Any], meta: bool) -> nn.Module:
    from diffusers.loaders import single_file_utils as convert
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    plain = any(key.startswith(CLIP_G_PLAIN) for key in checkpoint.shapes)

    def build() -> nn.Module:
        config = dict(stage.get("text_config") or _text_config(checkpoint.shapes, plain))
        with torch.device("meta" if meta else "cpu"):
            module = CLIPTextModelWithProjection(CLIPTextConfig(**config))
        tensors = checkpoint.tensors(CLIP_G_PLAIN if plain else CLIP_G, torch.float32, meta=meta)
        if plain:
            found = convert.convert_ldm_clip_checkpoint(tensors, CLIP_G_PLAIN)
        else:
            found = convert.convert_open_clip_checkpoint(module, tensors, CLIP_G)
        found = {key: value for key, value in found.items() if not key.endswith("position_ids")}
        return filled(module, found, "second text encoder")

    return built("second text encoder", build)


def _text_config(shapes: Mapping[str, tuple[int, ...]], plain: bool) -> dict[str, Any]:
    """transformers' configuration of CLIP-G, told from shapes."""
    if plain:
        stem = f"{CLIP_G_PLAIN}text_model."
        table, inner = f"{stem}embeddings.token_embedding.weight", f"{stem}encoder.layers.0.mlp.fc1.weight"
        layers, projected = rf"{re.escape(stem)}encoder\.layers\.(\d+)\.", f"{CLIP_G_PLAIN}text_projection.weight"
    else:
        table, inner = f"{CLIP_G}token_embedding.weight", f"{CLIP_G}transformer.resblocks.0.mlp.c_fc.weight"
        layers, projected = rf"{re.escape(CLIP_G)}transformer\.resblocks\.(\d+)\.", f"{CLIP_G}text_projection"
    vocabulary, width = shapes[table]
    if width % 64:
        raise ModelError(
            f"The second text encoder is {width} wide, from which its number of heads cannot be told.",
            "Add its text_config with num_attention_heads to the yaml.", field="text_config")
    return {"vocab_size": vocabulary, "hidden_size": width, "projection_dim": shapes[projected][0 if plain else 1],
            "hidden_act": "gelu", "num_attention_heads": width // 64, "intermediate_size": shapes[inner][0],
            "num_hidden_layers": len({m.group(1) for key in shapes if (m := re.match(layers, key))}),
            "max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 0}
