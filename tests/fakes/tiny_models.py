"""Tiny random models with the contracts of the real ones: a CLIP tokenizer, CLIP text encoders, a UNet and a VAE."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch

BOS, EOS = 49406, 49407


def write_tokenizer(folder: Path, pad_token: str = "<|endoftext|>") -> Any:
    """A CLIPTokenizer that knows single ASCII letters and "!!" (one token each), with CLIP's ids of BOS and EOS.

    pad_token: "!" is token 0, as SDXL's second tokenizer pads.
    """
    from transformers import CLIPTokenizer

    letters = ["!", *(c for c in string.ascii_lowercase + string.digits + string.punctuation if c != "!")]
    vocabulary = {c: i for i, c in enumerate(letters)} | {f"{c}</w>": 256 + i for i, c in enumerate(letters)}
    # CLIP has "!" itself as token 0, but the word "!" is "!</w>"
    vocabulary |= {"!!</w>": 512, "<|startoftext|>": BOS, "<|endoftext|>": EOS}
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
               "pad_token": pad_token}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n! !</w>\n", "utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special), "utf-8")
    settings = {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _livened(module: Any, scale: float) -> Any:
    """Every weight away from its neat start, so that a mixed-up norm or bias shows."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape))
    return module.eval()


def text_encoder(seed: int = 0, width: int = 32, layers: int = 3, heads: int = 4, act: str = "quick_gelu",
                 eos: int = EOS, projection: int | None = None) -> Any:
    """A CLIPTextModel; with `projection`, a CLIPTextModelWithProjection of so many pooled features."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    config = CLIPTextConfig(vocab_size=49408, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
                            projection_dim=projection or width, num_attention_heads=heads, hidden_act=act,
                            bos_token_id=BOS, eos_token_id=eos, pad_token_id=1)
    return _livened((CLIPTextModelWithProjection if projection else CLIPTextModel)(config), 0.1)


def unet(seed: int = 1, width: int = 32, channels: tuple[int, ...] = (32, 64), **changes: Any) -> Any:
    """A UNet2DConditionModel of SD1's kind for 8x8 latents."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    n = len(channels)
    return _livened(UNet2DConditionModel(**{
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "cross_attention_dim": width,
        "down_block_types": ["CrossAttnDownBlock2D"] * n, "up_block_types": ["CrossAttnUpBlock2D"] * n,
        "block_out_channels": channels, "attention_head_dim": 4, "norm_num_groups": 32} | changes), 0.02)


def unet_xl(seed: int = 1, width: int = 80, pooled: int = 40, channels: tuple[int, ...] = (32, 64),
            **changes: Any) -> Any:
    """A UNet2DConditionModel of SDXL's kind for 8x8 latents: attention at the lower level, linear projections."""
    n, sizes = len(channels), 16
    return unet(seed, width, channels, **{
        "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * (n - 1)],
        "up_block_types": [*["CrossAttnUpBlock2D"] * (n - 1), "UpBlock2D"],
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": sizes,
        "projection_class_embeddings_input_dim": pooled + 6 * sizes} | changes)


def models_xl() -> tuple[Any, Any, Any, Any]:
    """(UNet, VAE, CLIP-L, CLIP-G) of SDXL's kind: 32 and 48 wide, 40 pooled features."""
    return unet_xl(), vae(), text_encoder(5), text_encoder(6, 48, 4, 6, "gelu", projection=40)


def vae(seed: int = 2, channels: tuple[int, ...] = (32, 32, 64, 32), layers: int = 1) -> Any:
    """An AutoencoderKL of SD1's kind: f = 8, 4 latent channels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    n = len(channels)
    return _livened(AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * n, up_block_types=["UpDecoderBlock2D"] * n, layers_per_block=layers,
        block_out_channels=channels, latent_channels=4, norm_num_groups=32, sample_size=64), 0.02)


def write_checkpoint(folder: Path) -> Path:
    """A single-file checkpoint of the tiny models in Stable Diffusion 1's names, with its yaml and tokenizer."""
    import yaml
    from safetensors.torch import save_file

    from apl_train.model.single_file import ldm_config, to_ldm

    models = unet(), vae(), text_encoder()
    write_tokenizer(folder / "tokenizer")
    save_file({k: v.contiguous() for k, v in to_ldm(*models).items()}, folder / "tiny.safetensors")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(ldm_config(*models)), "utf-8")
    return folder / "tiny.safetensors"


def write_set(folder: Path, rows: list[tuple[str, str, str, str]]) -> Path:
    """A dataset of noise, 64 px, with these (name, prompt, description, kind)."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    lines = ["image,name,prompt,description,kind"]
    for i, (name, c1, c2, kind) in enumerate(rows):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(folder / f"{i}.png")
        lines.append(f'{i}.png,{name},{c1},"{c2}",{kind}')
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", "utf-8")
    return folder
