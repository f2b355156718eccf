"""Stable Diffusion 1 in small: 64 wide text encoder of three layers, UNet of 32 channels, random weights, no VAE."""

from __future__ import annotations

import os

import comfy.ops
import comfy.sd
import comfy.sdxl_clip
import comfy.supported_models
import folder_paths
import torch
from comfy import sd1_clip, supported_models_base
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

WIDTH_L, WIDTH_G = 64, 80
SMALL = {"num_hidden_layers": 3, "num_attention_heads": 4}
OPTIONS = {"clip_l_model_config": SMALL | {"hidden_size": WIDTH_L, "intermediate_size": 64},
           "clip_g_model_config": SMALL | {"hidden_size": WIDTH_G, "intermediate_size": 96}}


class TinyTokenizer(sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data=None) -> None:
        super().__init__(embedding_directory=embedding_directory, tokenizer_data=tokenizer_data or {})
        self.clip_l.embedding_size = WIDTH_L


class TinyClip(sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None) -> None:
        super().__init__(device=device, dtype=dtype, model_options=(model_options or {}) | OPTIONS)


class TinySD1(comfy.supported_models.SD15):
    unet_config = {"context_dim": WIDTH_L, "use_linear_in_transformer": False, "adm_in_channels": None,  # noqa: RUF012
                   "use_temporal_attention": False}
    unet_extra_config = {"num_heads": 4, "num_head_channels": -1}  # noqa: RUF012

    def clip_target(self, state_dict=None):
        return supported_models_base.ClipTarget(TinyTokenizer, TinyClip)


def random_weights(module: torch.nn.Module, seed: int, scale: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: (torch.randn(value.shape, generator=generator) * scale).to(torch.float16)
            for key, value in module.state_dict().items() if value.is_floating_point()}


def write_checkpoint(path: str, seed: int = 0) -> None:
    import safetensors.torch

    unet = UNetModel(image_size=16, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=[1, 1],
                     channel_mult=(1, 2), num_heads=4, use_spatial_transformer=True, context_dim=WIDTH_L,
                     transformer_depth=[0, 1], transformer_depth_output=[0, 0, 1, 1], transformer_depth_middle=1,
                     use_linear_in_transformer=False, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    clip = TinyClip(dtype=torch.float32)
    tensors = {f"model.diffusion_model.{key}": value for key, value in random_weights(unet, seed, 0.08).items()}
    text = random_weights(clip.clip_l.transformer.text_model, seed + 1, 0.3)
    tensors |= {f"cond_stage_model.transformer.text_model.{key}": value for key, value in text.items()}
    safetensors.torch.save_file(tensors, path)


def clip_of(kind: str):
    """A CLIP of the host's own classes, random: sdxl, refiner, sd3 (CLIP-L and CLIP-G only), t5."""
    import comfy.text_encoders.sd3_clip as sd3
    from comfy import sdxl_clip

    t5 = {"d_ff": 64, "d_kv": 8, "d_model": 32, "num_heads": 4, "num_layers": 2, "vocab_size": 32128}

    class RefinerTokenizer(sd1_clip.SD1Tokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data=None) -> None:
            super().__init__(embedding_directory=embedding_directory, tokenizer_data=tokenizer_data or {},
                             clip_name="g", tokenizer=sdxl_clip.SDXLClipGTokenizer)

    class T5Words(sd1_clip.SDTokenizer):  # CLIP's vocabulary: T5's own is not in every checkout, and it is refused
        def __init__(self, embedding_directory=None, tokenizer_data=None) -> None:
            super().__init__(embedding_directory=embedding_directory, embedding_size=32, embedding_key="t5xxl",
                             tokenizer_data=tokenizer_data or {})

    class T5Tokenizer(sd1_clip.SD1Tokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data=None) -> None:
            super().__init__(embedding_directory=embedding_directory, tokenizer_data=tokenizer_data or {},
                             name="t5xxl", tokenizer=T5Words)

    class T5Clip(sd1_clip.SD1ClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None) -> None:
            super().__init__(device=device, dtype=dtype, name="t5xxl", clip_model=sd3.T5XXLModel,
                             model_options=(model_options or {}) | {"t5xxl_model_config": t5})

    target = {"sdxl": (sdxl_clip.SDXLTokenizer, sdxl_clip.SDXLClipModel),
              "refiner": (RefinerTokenizer, sdxl_clip.SDXLRefinerClipModel),
              "sd3": (sdxl_clip.SDXLTokenizer, sd3.sd3_clip(clip_l=True, clip_g=True, t5=False)),
              "t5": (T5Tokenizer, T5Clip)}[kind]
    made = comfy.sd.CLIP(supported_models_base.ClipTarget(*target),
                         embedding_directory=folder_paths.get_folder_paths("embeddings"),
                         model_options=OPTIONS | {"dtype": torch.float32})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(made.cond_stage_model.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return made


def register() -> None:
    """The model class, and its file where the host looks for checkpoints."""
    comfy.supported_models.models.append(TinySD1)
    folder = folder_paths.get_folder_paths("checkpoints")[0]
    os.makedirs(folder, exist_ok=True)  # noqa: PTH103 - the host's paths are text
    for seed, name in ((0, "tiny.safetensors"), (10, "tiny2.safetensors")):
        path = os.path.join(folder, name)  # noqa: PTH118
        if not os.path.exists(path):  # noqa: PTH110
            write_checkpoint(path, seed)
