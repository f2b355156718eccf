"""A full-size SD1.5 checkpoint for Forge, which takes no yaml: random text encoder, everything else zeros. 2.1 GB.

    WEBUI_PYTHON tests/a1111/make_sd15.py WEBUI_DIR OUT.safetensors

Run by an AUTOMATIC1111 checkout's interpreter, whose `ldm` package knows the names and shapes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file


def main(webui: Path, out: Path) -> None:
    sys.path.insert(0, str(webui / "repositories" / "stable-diffusion-stability-ai"))
    from ldm.util import get_obj_from_str
    from omegaconf import OmegaConf
    from transformers import CLIPTextConfig, CLIPTextModel

    params = OmegaConf.load(webui / "configs" / "v1-inference.yaml").model.params
    held = {}
    with torch.device("meta"):
        for stem, config in (("model.diffusion_model.", params.unet_config),
                             ("first_stage_model.", params.first_stage_config)):
            made = get_obj_from_str(config.target)(**OmegaConf.to_container(config.params))
            held |= {stem + key: value for key, value in made.state_dict().items()}
    held = {key: torch.zeros(value.shape, dtype=torch.float16) for key, value in held.items()
            if not key.startswith("first_stage_model.loss")}
    torch.manual_seed(11)
    text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                                        num_attention_heads=12, hidden_act="quick_gelu"))
    for name, value in text.state_dict().items():
        if name.endswith("norm.bias") or ("layer_norm" in name and name.endswith("bias")):
            value += 0.05  # the default emphasis divides by a mean
        short = name.removeprefix("text_model.")
        held[f"cond_stage_model.transformer.text_model.{short}"] = value.half().contiguous()
    held["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    held["alphas_cumprod"] = torch.cumprod(1 - betas, 0).float()
    save_file(held, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
