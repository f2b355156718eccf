"""What kind of model a checkpoint file is, told from the names and shapes in its header; no weight is read for it.

Step file -> kind. Stable Diffusion 1.x and XL go on, with their fine-tunes and merges (Turbo and Lightning are such);
everything else is refused by name, because "missing keys" would tell nobody that the file is an SDXL refiner.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from apl_core.errors import ModelError
from apl_train.model.single_file import TEXT, UNET, VAE
from apl_train.model.single_file_xl import CLIP_G, CLIP_G_PLAIN, CLIP_L

SUPPORTED = (
    "Supported: Stable Diffusion 1.x and Stable Diffusion XL for text to image, their fine-tunes and merges, as one "
    ".safetensors file, a diffusers folder, or the hub id of one that is on this machine."
)
SD1_CHANNELS = 320
"""Channels of the first level of Stable Diffusion 1's UNet, and of XL's."""
_INPUT = f"{UNET}input_blocks.0.0.weight"
_MIDDLE = f"{UNET}middle_block.1.transformer_blocks.0.attn1.to_q.weight"
_OLD_TEXT = re.compile(r"(cond_stage_model|conditioner\.embedders\.0)\.transformer\."
                       r"(?=(embeddings|encoder|final_layer_norm)\.)")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ModelKind:
    """One Stable Diffusion 1.x or XL checkpoint.

    Attributes:
        prediction: "epsilon", or "v_prediction" where file or yaml say so.
        zero_snr: whether the noise schedule is rescaled to end in pure noise.
        text_width: of the first text encoder's states; 768 but for small models.
        has_vae: whether the file brings its own.
        family: "sd1" or "sdxl".
    """

    prediction: str
    zero_snr: bool
    text_width: int
    has_vae: bool
    family: str = "sd1"


def standard_name(key: str) -> str:
    """The name that LDM's code has today: merges keep those of other versions of transformers."""
    return _OLD_TEXT.sub(r"\1.transformer.text_model.", key)


def family_of(shapes: Shapes) -> str:
    """"sdxl" where there are SDXL's text encoders, else "sd1"."""
    return "sdxl" if any(key.startswith("conditioner.embedders.") for key in shapes) else "sd1"


def read_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """(name to shape of every tensor, text metadata) of a .safetensors file. Raises ModelError for a damaged one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {n: tuple(file.get_slice(n).get_shape()) for n in names}, dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ModelError(f"Cannot read {path.name}: {error}", "The file is damaged or incomplete: copy it again.",
                         field="base_model") from error


def _other_kind(shapes: Shapes) -> str:
    """What a file is that is no whole Stable Diffusion 1.x or XL model; "" when nothing speaks against one."""
    def some(*parts: str) -> bool:
        return any(part in key for key in shapes for part in parts)

    def starts(*parts: str) -> bool:
        return any(key.startswith(parts) for key in shapes)

    channels = shapes.get(_INPUT, (0, 0))[1]
    kinds = (
        (not shapes, "an empty file"),
        (starts("lora_unet_", "lora_te") or some(".lora_down.", ".lora_A.", ".lora.down."), "a LoRA, no whole model"),
        (starts("control_model.", "controlnet_"), "a ControlNet"),
        (len(shapes) <= 6 and all(len(shape) <= 2 for shape in shapes.values()), "an embedding, not a model"),
        (some("joint_blocks."), "a Stable Diffusion 3 model"),
        (some("double_blocks.", "double_stream"), "a Flux model"),
        (starts("conditioner.embedders.0.model."), "the refiner of Stable Diffusion XL"),
        (some("edm_mean", "edm_vpred.", "edm_std"), "a model of EDM's noise schedule (Playground 2.5, CosXL)"),
        (starts("cond_stage_model.model."), "a Stable Diffusion 2.x model"),
        (channels == 9, "an inpainting model"),
        (channels == 8, "an InstructPix2Pix model"),
        (starts(VAE, "encoder.down.") and not starts(UNET), "a VAE alone"),
        (starts("down_blocks.", "up_blocks."), "one part of a diffusers folder"),
        (not starts(UNET), "no Stable Diffusion model"),
        (_INPUT not in shapes, "a model of another architecture"),
        (family_of(shapes) == "sdxl" and _MIDDLE not in shapes,
         "a smaller relative of Stable Diffusion XL (SSD-1B, Vega)"),
    )
    return next((label for holds, label in kinds if holds), "")


def kind_of(shapes: Shapes, header: Mapping[str, str], name: str, parameterization: str = "") -> ModelKind:
    """The kind of a checkpoint with tensors of these names (as `standard_name` gives them) and shapes.

    Args:
        header: the file's text metadata.
        name: of the file, for messages.
        parameterization: what the yaml beside it says, "eps" or "v"; "" when it says nothing or there is none.

    Raises:
        ModelError: it is something else, or a part is missing.
    """
    if other := _other_kind(shapes):
        raise ModelError(f"{name} is {other}.", SUPPORTED, field="base_model")
    family = family_of(shapes)
    for needed in ((TEXT,),) if family == "sd1" else ((CLIP_L,), (CLIP_G, CLIP_G_PLAIN)):
        if not any(key.startswith(needed) for key in shapes):
            raise ModelError(f"{name} has no CLIP text encoder ({needed[0]}*): it is a pruned or a split model.",
                             SUPPORTED, field="base_model")
    start = TEXT if family == "sd1" else CLIP_L
    width = shapes.get(f"{start}embeddings.token_embedding.weight", (0, 0))[1]
    stated = header.get("modelspec.prediction_type", "").lower()
    is_v = parameterization == "v" or (not parameterization and (stated.startswith("v") or "v_pred" in shapes))
    if parameterization not in ("", "eps", "v"):
        raise ModelError(f"The yaml beside {name} says parameterization: {parameterization}.",
                         "Use a model that predicts noise (eps) or velocity (v).", field="parameterization")
    return ModelKind("v_prediction" if is_v else "epsilon", "ztsnr" in shapes, width,
                     any(key.startswith(VAE) for key in shapes), family)
