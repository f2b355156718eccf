"""How much memory a training will take, before any of it is taken: counted on shapes without numbers.

Step shapes -> bytes. The model's own modules run one training step on the meta device, where tensors have shapes and
no memory; a ledger adds up what is alive at any moment. Attention counts as a fused kernel has it (SDPA): queries,
keys, values and the result, never the square of 4,096 positions.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from apl_core.placement import LENGTH
from apl_train.model import conditioning
from apl_train.model.backend import precision_of
from apl_train.model.files import read_parts
from apl_train.model.precision import DTYPES, Precision, vae_dtype
from apl_train.model.text import Encoded
from apl_train.training.config import TrainConfig
from apl_train.training.preflight import own_memory

GIB = 2**30
CUDA_CONTEXT = int(0.5 * GIB)
"""What CUDA, cuDNN and their kernels take on a device before the first tensor."""
CUDA_SLACK = 0.06
"""Share of the tensors that the allocator holds beyond them, as blocks do not fit without gaps."""


@dataclass(frozen=True)
class Estimate:
    """Bytes on the computing device, by phase; every phase includes the weights that are there in it.

    Attributes:
        device: "cuda", "mps" or "cpu".
        weights: of everything that stays on the device.
        train: the highest moment of a training step.
        encode: of the VAE making latents of one picture.
        sample: of drawing one picture with guidance.
        overhead: of CUDA's own libraries; on the CPU what this process holds already.
        available: free bytes now; None where the system does not say.
    """

    device: str
    weights: int
    train: int
    encode: int
    sample: int
    overhead: int
    available: int | None

    @property
    def peak(self) -> int:
        """The highest phase, with the overhead."""
        return max(self.train, self.encode, self.sample) + self.overhead

    def to_dict(self) -> dict[str, Any]:
        """Plain values, in bytes."""
        return {**asdict(self), "peak": self.peak}

    def text(self) -> str:
        """One line for people."""
        free = "" if self.available is None else f", {self.available / GIB:.1f} GiB are free"
        parts = (("weights", self.weights), ("training step", self.train), ("latents", self.encode),
                 ("sampling", self.sample), ("libraries", self.overhead))
        shown = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts if size)
        return f"memory on {self.device}: {self.peak / GIB:.1f} GiB at most ({shown}){free}"


class Ledger(TorchDispatchMode):
    """Adds up the storages that are alive; `peak` is their highest sum in bytes since the ledger was opened."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class _Fused(torch.autograd.Function):
    """What a fused attention kernel allocates and keeps; no numbers are computed."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, _gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


def _fused(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return _Fused.apply(query, key, value)


@contextlib.contextmanager
def _counting() -> Iterator[Ledger]:
    # replaced for the whole process, not by a torch function mode: checkpointing computes again in autograd's threads
    own = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _fused
    try:
        with Ledger() as ledger:
            yield ledger
    finally:
        F.scaled_dot_product_attention = own


def _bytes(*modules: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for m in modules for t in [*m.parameters(), *m.buffers()])


def _peak_of(work: Callable[[], Any]) -> int:
    with _counting() as ledger:
        work()
    return ledger.peak


def estimate(source: str | Path, config: TrainConfig, *, size: int | None = None,
             as_on: torch.device | None = None) -> Estimate:
    """What training with these settings takes; of the model, only header and configuration are read.

    Args:
        source: see `files.read_parts`.
        size: edge of the pictures in pixels; the model's own by default.
        as_on: a device to count for that need not be here; the settings' own by default.

    Raises:
        ModelError: the model is missing or unsupported. ConfigError: the settings ask for a device that is not here.
    """
    asked = precision_of(config) if as_on is None else Precision(
        as_on, DTYPES[config.dtype], config.gradient_checkpointing, config.offload)
    parts = read_parts(source, dtype=asked.dtype, vae=config.vae or None, meta=True)
    unet, vae, *texts = (m.requires_grad_(False) for m in (parts.unet, parts.vae, parts.text_encoder,
                                                           parts.text_encoder_2) if m is not None)
    vae.to(vae_dtype(asked.dtype, parts.family, vae.config))
    if asked.checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    edge = unet.config.sample_size if size is None else size // factor
    channels, widths = unet.config.in_channels, [text.config.hidden_size for text in texts]
    meta, xl = torch.device("meta"), parts.family == "sdxl"

    def latents(n: int, dtype: torch.dtype = asked.dtype) -> Tensor:
        return torch.empty(n, channels, edge, edge, dtype=dtype, device="meta")

    def predict(n: int, words: Encoded) -> Tensor:
        more = conditioning.added(words, conditioning.told(None, edge * factor, edge * factor), meta, asked.dtype)
        return unet(latents(n), torch.empty(n, dtype=torch.int64, device="meta"), added_cond_kwargs=more,
                    encoder_hidden_states=words.states.to(asked.dtype), return_dict=False)[0].float()

    def plain(n: int) -> Encoded:
        pooled = torch.empty(n, texts[1].config.projection_dim, device="meta") if xl else None
        return Encoded(torch.empty(n, LENGTH, sum(widths), device="meta"), pooled)

    def of_prefix(ids: Tensor) -> Encoded:
        out = [text(input_ids=ids, output_hidden_states=True) for text in texts]
        if not xl:
            return Encoded(out[0].last_hidden_state)
        return Encoded(torch.cat([one.hidden_states[-2] for one in out], dim=-1), out[1].text_embeds)

    def step() -> None:
        n = config.batch_size
        with torch.no_grad():
            kept = [predict(2 * n, plain(2 * n))]  # both frozen predictions, as one batch
        prefix = torch.empty(config.num_tokens, sum(widths), device="meta", requires_grad=True)
        ids = torch.empty(n, LENGTH, dtype=torch.int64, device="meta")
        with contextlib.ExitStack() as stack:
            # the prefix enters where TextStack puts it, so that the encoders' activations are kept too
            for text in texts:
                stack.callback(text.get_input_embeddings().register_forward_hook(
                    lambda _m, _a, out: out + prefix.sum()).remove)
            (predict(n, of_prefix(ids)) - kept[0][:n]).square().mean().backward()

    def encode() -> None:
        with torch.no_grad():
            pixels = torch.empty(1, 3, edge * factor, edge * factor, dtype=vae.dtype, device="meta")
            vae.encode(pixels, return_dict=False)[0].mode()

    def sample() -> None:
        with torch.no_grad():
            predict(2, plain(2))
            vae.decode(latents(1, vae.dtype), return_dict=False)[0].float()

    stay = [unet] + (texts if asked.offload != "all" else []) + ([vae] if asked.offload == "none" else [])
    weights, visiting = _bytes(*stay), 0 if asked.offload == "none" else _bytes(vae)
    cuda, here = asked.device.type == "cuda", as_on is None
    slack = 1 + CUDA_SLACK * cuda
    train, encoded, sampled = (int(_peak_of(work) * slack) for work in (step, encode, sample))
    overhead = CUDA_CONTEXT if cuda else own_memory() or 0
    return Estimate(asked.device.type, weights, weights + train, weights + visiting + encoded,
                    weights + visiting + sampled, overhead, free_memory(asked.device) if here else None)


def free_memory(device: torch.device) -> int | None:
    """Free bytes of a device, or of this machine for the CPU; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        import psutil
    except ImportError:
        return None
    return psutil.virtual_memory().available
