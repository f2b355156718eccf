"""Where a model computes and in which numbers: device, dtype, what may wait on the CPU, gradients in half precision.

The prefix, the loss and the text encoder are float32 always: a prefix is 7,680 numbers learned with steps of 1e-3, and
the encoder costs a hundredth of a step. UNet and VAE may be bf16 or fp16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apl_core.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEVICES = ("auto", "cpu", "cuda", "mps")
OFFLOADS = ("none", "vae", "all")
_GRADIENT_SCALE = 1024.0
"""fp16 gradients of a mean over 16,384 elements lie below its smallest normal number; a power of two loses nothing."""


@dataclass(frozen=True)
class Precision:
    """How a model is held.

    Attributes:
        device: where the UNet computes.
        dtype: of UNet and VAE.
        checkpointing: keep block inputs only and compute the rest again on the way back: less memory, a third more
            work (field study: 2.26 instead of 1.67 TFLOP a step at 512 px).
        offload: "none"; "vae": the VAE is on the device only while it works; "all": the text encoder stays on the CPU.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    checkpointing: bool = False
    offload: str = "none"


def chosen(
    device: str = "auto", dtype: str = "fp32", *, checkpointing: bool = False, offload: str = "none"
) -> Precision:
    """The precision that settings ask for; "auto" is a GPU where there is one.

    Raises:
        ConfigError: an unknown word, a device that is not here, or fp16 on a CPU.
    """
    for field, value, allowed in (("dtype", dtype, tuple(DTYPES)), ("offload", offload, OFFLOADS)):
        if value not in allowed:
            raise ConfigError(f"{field} is {value!r}.", f"Use one of: {', '.join(allowed)}.", field=field)
    base = device.partition(":")[0]
    if base not in DEVICES:
        raise ConfigError(f"device is {device!r}.", f"Use one of: {', '.join(DEVICES)}.", field="device")
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    found = next(name for name in ("cuda", "mps", "cpu") if has[name]) if base == "auto" else device
    if not has[found.partition(":")[0]]:
        raise ConfigError(f"device is {device!r}, which this PyTorch does not see.",
                          "Use device cpu, or install a PyTorch build for your GPU.", field="device")
    if found == "cpu" and dtype == "fp16":
        raise ConfigError("dtype is 'fp16', which CPUs compute slower than fp32.", "Use fp32 or bf16 on a CPU.",
                          field="dtype")
    return Precision(torch.device(found), DTYPES[dtype], checkpointing, offload)


def vae_dtype(dtype: torch.dtype, family: str, vae_config: Any) -> torch.dtype:
    """Numbers of the VAE: SDXL's leaves the range of fp16 unless its configuration says that it was mended."""
    return torch.float32 if family == "sdxl" and dtype == torch.float16 and vae_config.force_upcast else dtype


class _Scaled(torch.autograd.Function):
    """The identity whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def into_half(states: Tensor, dtype: torch.dtype) -> Tensor:
    """`states` in `dtype`, at the entry of a region whose gradients are scaled where `dtype` is fp16."""
    if dtype != torch.float16:
        return states.to(dtype)
    return _Scaled.apply(states.float(), 1 / _GRADIENT_SCALE).to(dtype)


def out_of_half(prediction: Tensor) -> Tensor:
    """A prediction as float32, at the way out of that region."""
    if prediction.dtype != torch.float16:
        return prediction.float()
    return _Scaled.apply(prediction.float(), _GRADIENT_SCALE)
