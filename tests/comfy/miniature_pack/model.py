"""The miniatures as the host's model classes: Stable Diffusion 1, and SDXL with its two text encoders."""

from __future__ import annotations

import comfy.sd
import comfy.supported_models
import torch
from comfy import latent_formats, sd1_clip, sdxl_clip, supported_models_base

CHANNELS, WIDTH_L, WIDTH_G, HEADS = 64, 96, 128, 4
SDXL_EXTRA = 6 * 256  # what SDXL appends to the pooled text: six sizes, 256 values each


def text_sizes(state_dict: dict, start: str) -> dict:
    """The host's settings of a CLIP text model, from the shapes of its tensors."""
    layers = {int(key.removeprefix(f"{start}encoder.layers.").split(".")[0]) for key in state_dict
              if key.startswith(f"{start}encoder.layers.")}
    inner, width = state_dict[f"{start}encoder.layers.0.mlp.fc1.weight"].shape
    return {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": len(layers),
            "num_attention_heads": HEADS, "hidden_act": "quick_gelu", "projection_dim": width,
            "max_position_embeddings": 77, "eos_token_id": 49407, "bos_token_id": 49406}


def open_clip_sizes(state_dict: dict, start: str) -> dict:
    """The same of a text model under open_clip's names, as SDXL's second one is."""
    blocks = f"{start}transformer.resblocks."
    inner, width = state_dict[f"{blocks}0.mlp.c_fc.weight"].shape
    return {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": HEADS, "hidden_act": "gelu",
            "num_hidden_layers": len({key[len(blocks):].split(".")[0] for key in state_dict if key.startswith(blocks)}),
            "projection_dim": state_dict[f"{start}text_projection"].shape[1], "max_position_embeddings": 77,
            "eos_token_id": 49407, "bos_token_id": 49406}


class Tokenizer1(sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data=None) -> None:
        super().__init__(embedding_directory=embedding_directory, tokenizer_data=tokenizer_data or {})
        self.clip_l.embedding_size = WIDTH_L


class TokenizerXL(sdxl_clip.SDXLTokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data=None) -> None:
        super().__init__(embedding_directory=embedding_directory, tokenizer_data=tokenizer_data or {})
        self.clip_l.embedding_size, self.clip_g.embedding_size = WIDTH_L, WIDTH_G


def text_model_1(sizes: dict) -> type:
    class Clip1(sd1_clip.SD1ClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None) -> None:
            options = (model_options or {}) | {"clip_l_model_config": sizes}
            super().__init__(device=device, dtype=dtype, model_options=options)

    return Clip1


def text_model_xl(sizes_l: dict, sizes_g: dict) -> type:
    class ClipXL(sdxl_clip.SDXLClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None) -> None:
            options = (model_options or {}) | {"clip_l_model_config": sizes_l, "clip_g_model_config": sizes_g}
            super().__init__(device=device, dtype=dtype, model_options=options)

    return ClipXL


class Miniature1(comfy.supported_models.SD15):
    unet_config = {"context_dim": WIDTH_L, "model_channels": CHANNELS, "use_linear_in_transformer": False,  # noqa: RUF012
                   "adm_in_channels": None, "use_temporal_attention": False}
    unet_extra_config = {"num_heads": HEADS, "num_head_channels": -1}  # noqa: RUF012

    def clip_target(self, state_dict=None):
        start = next(key for key in state_dict if key.endswith("embeddings.position_embedding.weight"))
        sizes = text_sizes(state_dict, start.removesuffix("embeddings.position_embedding.weight"))
        return supported_models_base.ClipTarget(Tokenizer1, text_model_1(sizes))


class MiniatureXL(comfy.supported_models.SDXL):
    unet_config = {"context_dim": WIDTH_L + WIDTH_G, "model_channels": CHANNELS, "use_linear_in_transformer": True,  # noqa: RUF012
                   "adm_in_channels": WIDTH_G + SDXL_EXTRA, "use_temporal_attention": False}
    unet_extra_config = {"num_heads": HEADS, "num_head_channels": -1}  # noqa: RUF012
    latent_format = latent_formats.SD15

    def clip_target(self, state_dict=None):
        first = text_sizes(state_dict, "conditioner.embedders.0.transformer.text_model.")
        second = open_clip_sizes(state_dict, "conditioner.embedders.1.model.")
        return supported_models_base.ClipTarget(TokenizerXL, text_model_xl(first, second))


class AnyWidthVAE(comfy.sd.VAE):
    """The host's VAE, which takes sizes other than Stable Diffusion's only when it is told them."""

    def __init__(self, sd=None, *args, config=None, **kwargs) -> None:
        first = (sd or {}).get("encoder.conv_in.weight")
        if config is None and first is not None and first.ndim == 4 and first.shape[0] == CHANNELS:
            levels = {int(key.split(".")[2]) for key in sd if key.startswith("encoder.down.")}
            widths = [sd[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] // CHANNELS for i in sorted(levels)]
            config = {"params": {"embed_dim": 4, "ddconfig": {
                "double_z": True, "z_channels": 4, "resolution": 128, "in_channels": 3, "out_ch": 3, "ch": CHANNELS,
                "ch_mult": widths, "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}}}
        super().__init__(sd, *args, config=config, **kwargs)


def register() -> None:
    """Make both known to the running host."""
    torch.set_num_threads(1)
    comfy.supported_models.models += [Miniature1, MiniatureXL]
    comfy.sd.VAE = AnyWidthVAE
