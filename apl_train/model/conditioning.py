"""What SDXL's UNet is told beside the words: the pooled text, and six numbers of a picture's size and crop.

The numbers are those of the SDXL paper's sections 2.2 and 2.3: a model that learned from small and from cropped
pictures draws large and centred ones when it is told so. Stable Diffusion 1 is told nothing of the kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apl_train.model.precision import into_half
from apl_train.model.sizes import check_sizes
from apl_train.model.text import Encoded

Sizes = tuple[int, int, int, int, int, int]
"""Height and width of the original, top and left of the crop, height and width of the target; pixels."""


def checked(values: Sequence[int] | None) -> Sizes | None:
    """The six numbers of a setting; None for none. Raises ConfigError."""
    if values is None:
        return None
    check_sizes(values)
    return tuple(values)


def told(given: Sizes | None, height: int, width: int) -> Sizes:
    """The six numbers for pictures of this size in pixels: `given`, or the size itself without a crop."""
    return given or (height, width, 0, 0, height, width)


def added(encoded: Encoded, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> dict[str, Any] | None:
    """diffusers' `added_cond_kwargs` for N prompts: text_embeds [N, P], time_ids [N, 6]; None for SD1.

    Gradient flows to `encoded.pooled`.
    """
    if encoded.pooled is None:
        return None
    numbers = torch.tensor([sizes], dtype=dtype, device=device).expand(len(encoded.pooled), -1)
    return {"text_embeds": into_half(encoded.pooled.to(device), dtype), "time_ids": numbers}


def zeros_like(encoded: Encoded) -> Encoded:
    """No words at all, as SDXL takes an empty negative prompt: zeros for states and pooled text."""
    return Encoded(torch.zeros_like(encoded.states), torch.zeros_like(encoded.pooled))


def repeated(one: Encoded, like: Encoded) -> Encoded:
    """One encoded prompt for every row of `like`."""
    pooled: Tensor | None = None if one.pooled is None else one.pooled.expand_as(like.pooled)
    return Encoded(one.states.expand_as(like.states), pooled)
