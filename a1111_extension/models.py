"""Which text encoders the host's loaded model has, and whether a prefix fits all of them.

Found by what the objects can do, not by their names: AUTOMATIC1111 and its forks, and Forge, each have their own.
"""

from __future__ import annotations

import weakref
from typing import Any

from ..apl_core.errors import ModelError
from ..apl_core.families import FAMILIES
from ..apl_core.placement import BOS, EOS
from ..apl_core.prefix import AnonymizationPrompt

SUPPORTED = ("sd1", "sdxl")
_FLAGS = (("is_sdxl", "sdxl"), ("is_sd3", "sd3"), ("is_sd2", "sd2"), ("is_sd1", "sd1"))
_TOKENIZES = ("tokenize_line", "process_tokens")
_layers: weakref.WeakKeyDictionary[Any, tuple[str, int]] = weakref.WeakKeyDictionary()


def loaded_model() -> Any:
    """The model in memory, or None. Never loads one, as the host's own `shared.sd_model` would."""
    from modules import sd_models

    model = getattr(sd_models.model_data, "sd_model", None)
    # Forge has a stand-in there until the first picture.
    return None if type(model).__name__ == "FakeInitialModel" else model


def family_of(model: Any) -> str:
    """"sd1", "sdxl", or the name of what is not supported."""
    for flag, family in _FLAGS:
        if getattr(model, flag, False):
            return family
    return type(model).__name__


def encoders_of(model: Any) -> list[Any]:
    """Everything in a model that reads prompts: hijacked text encoders, or Forge's engines. T5 engines are among them.

    Raises:
        ModelError: there is none.
    """
    conditioner = getattr(model, "conditioner", None)
    if conditioner is not None:
        found = [each for each in conditioner.embedders if _reads_text(each)]
    elif _reads_text(getattr(model, "cond_stage_model", None)):
        found = [model.cond_stage_model]
    else:
        found = [value for value in vars(model).values() if _reads_text(value)]
    if not found:
        raise ModelError(f"The model ({family_of(model)}) has no text encoder that a prefix can be put into.",
                         "Use a Stable Diffusion 1.x or XL checkpoint.", field="model")
    return found


def _reads_text(value: Any) -> bool:
    # An encoder that takes "txt" and was not hijacked counts as well: it must be noticed, and refused.
    return value is not None and (
        any(hasattr(type(value), name) for name in _TOKENIZES)
        or type(value).__name__.endswith("TextProcessingEngine")
        or (getattr(value, "input_key", None) == "txt" and hasattr(value, "tokenize"))
    )


def embedding_layer(encoder: Any) -> tuple[str, int]:
    """(key, width) of the embedding layer into which the host puts textual inversions: ("clip_l", 768).

    Raises:
        ModelError: the encoder has no such layer, or several.
    """
    known = _layers.get(encoder)
    if known is not None:
        return known
    inner = getattr(encoder, "wrapped", None) or getattr(encoder, "text_encoder", None) or encoder
    layers = [module for module in inner.modules() if hasattr(module, "textual_inversion_key")] \
        if hasattr(inner, "modules") else []
    if len(layers) != 1:
        raise ModelError(f"The text encoder {type(encoder).__name__} has no place for a prefix.",
                         "Use a Stable Diffusion 1.x or XL checkpoint.", field="model")
    weight = getattr(layers[0], "weight", None)
    weight = weight if weight is not None else layers[0].wrapped.weight
    _layers[encoder] = found = (layers[0].textual_inversion_key, int(weight.shape[-1]))
    return found


def tensor_for(prefix: AnonymizationPrompt, encoder: Any) -> str:
    """The prefix's tensor that belongs to an encoder.

    Raises:
        ModelError: there is none, or it is of another width, or the encoder does not frame a prompt as CLIP does.
    """
    key, width = embedding_layer(encoder)
    name = key if key in prefix.tensors else "emb_params" if tuple(prefix.tensors) == ("emb_params",) else ""
    if not name:
        raise ModelError(f"{prefix.name} ({prefix.family}) has nothing for the text encoder {key}.",
                         "Choose a prefix made for this model's family.", field="prefix")
    if prefix.widths[name] != width:
        raise ModelError(
            f"{prefix.name} has vectors of width {prefix.widths[name]} for {key}; this model's are {width} wide.",
            "Choose a prefix made for this model's family.", field="prefix",
        )
    if (encoder.id_start, encoder.id_end) != (BOS, EOS):
        raise ModelError(f"The text encoder {type(encoder).__name__} is not one of Stable Diffusion 1.x or XL.",
                         "Use a Stable Diffusion 1.x or XL checkpoint.", field="model")
    return name


def check_model(model: Any, prefix: AnonymizationPrompt | None = None) -> str:
    """The family of a model that is supported and, where a prefix is given, fits it in every text encoder.

    Raises:
        ModelError: no model is loaded, its family is not supported, or the prefix is for another one.
    """
    if model is None:
        raise ModelError("No checkpoint is loaded.", "Choose a checkpoint first.", field="model")
    family = family_of(model)
    if family not in SUPPORTED:
        label = FAMILIES[family].label if family in FAMILIES else family
        raise ModelError(f"The loaded checkpoint is of {label}, which is not supported.",
                         "Anonymization prompts work with Stable Diffusion 1.x and XL checkpoints.", field="model")
    encoders = encoders_of(model)
    if prefix is None:
        return family
    if prefix.family != family:
        raise ModelError(
            f"{prefix.name} is for {FAMILIES[prefix.family].label}; the loaded checkpoint is {FAMILIES[family].label}.",
            "Choose a prefix made for this model's family.", field="prefix",
        )
    for encoder in encoders:
        tensor_for(prefix, encoder)
    return family


def why_unfit(prefix: AnonymizationPrompt) -> str:
    """Why the loaded model cannot take a prefix, in one line; "" where it can, or where no model is loaded yet."""
    model = loaded_model()
    if model is None:
        return ""
    try:
        check_model(model, prefix)
    except ModelError as error:
        return str(error)
    return ""
