"""FLOPs of a training step at SDXL's full size, 1024 px, beside the paper's schedule and the floor.

    python benchmarks/step_cost_sdxl.py

Counted on the meta device with SDXL's published configuration: no weights. The paper transfers its prefix to SDXL and
publishes no training there; its schedule is that of its SD1.5 code (see other_ways.py). With APL_RECORD_CLAIMS=1 the
figures become rows of benchmarks/claims.json.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from step_cost import LENGTH, VECTORS, counted, per_sample
from torch import Tensor

from apl_train import claims
from apl_train.training import config

PRESET = "sdxl-fast"
EDGE = 128
"""Latent places along an edge of 1024 pixels."""


@dataclass(frozen=True)
class Sdxl:
    """SDXL's modules on the meta device; `texts` are CLIP-L and CLIP-G."""

    unet: Any
    vae: Any
    texts: tuple[Any, Any]


def sdxl() -> Sdxl:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=EDGE, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=2048,
            transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=1024)
        small = CLIPTextModel(CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12))
        large = CLIPTextModelWithProjection(CLIPTextConfig(
            vocab_size=49408, hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
            projection_dim=1280, hidden_act="gelu"))
    return Sdxl(unet, vae, (small, large))


def _meta(*shape: int, **kind: Any) -> Tensor:
    return torch.empty(*shape, device="meta", **kind)


def encoded(model: Sdxl, vectors: tuple[Tensor, ...] | None = None) -> tuple[Tensor, Tensor]:
    """(states [1, 77, 2048], pooled [1, 1280]), with vectors after BOS where there are any."""
    states, pooled = [], None
    ids = _meta(1, LENGTH, dtype=torch.int64)
    for i, text in enumerate(model.texts):
        def replace(_m: Any, _a: Any, out: Tensor, i: int = i) -> Tensor:
            return torch.cat([out[:, :1], vectors[i][None], out[:, 1 + VECTORS :]], 1)

        handle = text.get_input_embeddings().register_forward_hook(replace) if vectors else None
        out = text(input_ids=ids, output_hidden_states=True)
        if handle:
            handle.remove()
        states.append(out.hidden_states[-2])
        pooled = getattr(out, "text_embeds", pooled)
    return torch.cat(states, -1), pooled


def predict(model: Sdxl, states: Tensor, pooled: Tensor) -> Tensor:
    more = {"text_embeds": pooled, "time_ids": _meta(1, 6)}
    return model.unet(_meta(1, 4, EDGE, EDGE), _meta(1, dtype=torch.int64), encoder_hidden_states=states,
                      added_cond_kwargs=more, return_dict=False)[0]


def learning(model: Sdxl) -> Callable[[], None]:
    """One sample's gradient with respect to the prefix: text encoders and UNet, forward and back."""
    def work() -> None:
        vectors = tuple(_meta(VECTORS, text.config.hidden_size).requires_grad_(True) for text in model.texts)
        predict(model, *encoded(model, vectors)).sum().backward()
    return work


def counts() -> dict[str, float]:
    """FLOPs of the pieces, of the paper's schedule, and of a sample with the preset."""
    model = sdxl()
    for module in (model.unet, model.vae, *model.texts):
        module.eval().requires_grad_(False)
    with torch.no_grad():
        found = {"text forward": counted(lambda: encoded(model)),
                 "UNet forward": counted(lambda: predict(model, _meta(1, LENGTH, 2048), _meta(1, 1280))),
                 "VAE encode": counted(lambda: model.vae.encode(_meta(1, 3, 8 * EDGE, 8 * EDGE)))}
    found["floor"] = counted(learning(model))
    model.unet.requires_grad_(True)
    unfrozen = counted(learning(model))
    found["paper's schedule"] = found["VAE encode"] + 2 * (found["UNet forward"] + found["text forward"]) + unfrozen
    found[f"preset {PRESET}"] = per_sample(config.from_dict(config.preset(PRESET)), found)
    return found


def main() -> None:
    found = counts()
    paper, floor = found["paper's schedule"], found["floor"]
    sys.stdout.write(f"{'SDXL, 1024 px, one sample':34}{'TFLOP':>9}{'/ paper':>10}{'/ floor':>10}\n")
    for name, value in found.items():
        sys.stdout.write(f"{name:34}{value / 1e12:9.3f}{value / paper:10.3f}{value / floor:10.3f}\n")
    if os.environ.get("APL_RECORD_CLAIMS"):
        ours = found[f"preset {PRESET}"]
        claims.record({"sdxl-flops-paper": (ours / paper, None, 1), "sdxl-flops-floor": (ours / floor, None, 1)})


if __name__ == "__main__":
    main()
