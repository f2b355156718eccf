"""The trained miniature in the form of SDXL, for tests: the same pictures, with a second text encoder beside.

The second encoder is random and its share of the cross-attention zero, as is the embedding of sizes: what comes out is
the SD1 miniature's picture, by SDXL's code.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from apl_core.atomic import write_safetensors
from apl_core.metadata import PrefixMetadata
from apl_core.prefix import AnonymizationPrompt, load_prefix, save_prefix

WIDTH_G, LAYERS_G, EXTRA = 128, 3, 6 * 256
UNET, TEXT = "model.diffusion_model.", "cond_stage_model.transformer."


def _unet(key: str, value: torch.Tensor) -> torch.Tensor:
    if value.ndim == 4 and ("proj_in" in key or "proj_out" in key) and key.startswith(UNET):
        return value[:, :, 0, 0].contiguous()  # SDXL's are linear
    if ".attn2.to_k." in key or ".attn2.to_v." in key:
        return torch.cat([value, value.new_zeros(len(value), WIDTH_G)], dim=1)
    return value


def _second_encoder() -> dict[str, torch.Tensor]:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(5)
    model = CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=49408, hidden_size=WIDTH_G, intermediate_size=2 * WIDTH_G, projection_dim=WIDTH_G,
        num_hidden_layers=LAYERS_G, num_attention_heads=4, max_position_embeddings=77))
    return {key: value.half() for key, value in model.state_dict().items() if not key.endswith("position_ids")}


def write_sdxl(source: Path, target: Path) -> None:
    """An SDXL checkpoint of the miniature SD1 file `source`."""
    sd1 = load_file(source)
    out = {key.replace(TEXT, "conditioner.embedders.0.transformer."): _unet(key, value) for key, value in sd1.items()}
    width = sd1[f"{UNET}time_embed.0.weight"].shape[0]
    for name, shape in (("0.0.weight", (width, WIDTH_G + EXTRA)), ("0.0.bias", (width,)),
                        ("0.2.weight", (width, width)), ("0.2.bias", (width,))):
        out[f"{UNET}label_emb.{name}"] = torch.zeros(shape, dtype=torch.float16)
    out |= {f"conditioner.embedders.1.transformer.{key}": value for key, value in _second_encoder().items()}
    write_safetensors(target, out, {"format": "pt"})


def write_sdxl_prefix(source: Path, target: Path) -> None:
    """An SDXL prefix: the SD1 prefix `source` for the first encoder, random rows for the second."""
    prefix = load_prefix(source)
    rows = prefix.vectors()
    second = torch.randn(len(rows), WIDTH_G, generator=torch.Generator().manual_seed(6)) * 0.02
    meta = PrefixMetadata(title=target.stem, family="sdxl", num_tokens=len(rows))
    save_prefix(AnonymizationPrompt("sdxl", {"clip_l": rows, "clip_g": second}, meta), target)
