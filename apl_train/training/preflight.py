"""One real training step and one real prediction before the first of thousands: does it fit, and how long will it take?

Step settings -> seconds and bytes. `memory.estimate` counts on shapes beforehand; this measures on the device itself.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from apl_core.errors import TrainingError
from apl_train.model.backend import Backend
from apl_train.training.config import TrainConfig
from apl_train.training.losses import apl_loss, id_loss, reg_loss

_CAPTION = "a photo of a person in a park"


@dataclass(frozen=True)
class Measured:
    """What a dry run found.

    Attributes:
        step_seconds: a training step with both frozen predictions.
        predict_seconds: a prediction with guidance (two rows), the unit of sampling.
        decode_seconds: the VAE making one picture.
        peak_bytes: most memory held on the device while training, weights included; None where it cannot be read.
    """

    step_seconds: float
    predict_seconds: float
    decode_seconds: float
    peak_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def picture_seconds(self, steps: int) -> float:
        """One picture of so many denoising steps."""
        return steps * self.predict_seconds + self.decode_seconds


class PeakMemory:
    """Most memory that a process holds for itself while a block runs: `bytes`, None where the system does not say.

    On a GPU what its allocator had handed out; else anonymous memory, sampled: pages of mapped files can be given back.
    """

    def __init__(self, device: torch.device, every: float = 0.02) -> None:
        self._device, self._every = device, every
        self.bytes: int | None = None
        self._done = threading.Event()

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self.bytes = own_memory()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(self._every):
            now = own_memory()
            self.bytes = max(self.bytes or 0, now or 0) or None

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device)
        else:
            self._done.set()
            self._thread.join()


def own_memory() -> int | None:
    """Bytes of anonymous memory of this process (Linux); elsewhere its resident set; None without psutil."""
    if sys.platform == "linux":
        with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123 (read fifty times a second)
            for line in status:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    try:
        import psutil
    except ImportError:
        return None
    return psutil.Process().memory_info().rss


def _timed(device: torch.device, work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _fastest(device: torch.device, work: Callable[[], Any], patience: float = 5.0, most: int = 5) -> float:
    """Seconds of the fastest of a few runs: the first one warms up, and is the only one where it takes long."""
    took = [_timed(device, work)]
    while len(took) < most and sum(took) < patience:
        took.append(_timed(device, work))
    return min(took)


def dry_run(backend: Backend, config: TrainConfig) -> Measured:
    """Trains a few steps on noise, one where that takes long; nothing is kept.

    With a target bank (config.bank) the frozen predictions are no part of a step, as in the training.

    Raises:
        TrainingError: the device ran out of memory, with what to change.
    """
    edge, n = int(backend.unet.config.sample_size), config.batch_size
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, backend.unet.config.in_channels, edge, edge, generator=g)
    t = torch.full((n,), 500)
    ids = max(1, round(n * config.id_share)) if n > 1 else 1
    vectors = {key: torch.zeros(config.num_tokens, width, requires_grad=True)
               for key, width in backend.text.widths.items()}

    @torch.no_grad()
    def targets() -> torch.Tensor:
        plain = backend.encode([_CAPTION] * 2 * n)
        return backend.predict(torch.cat([x, x]), torch.cat([t, t]), plain)

    def step() -> None:
        frozen = torch.cat([x, x]).to(backend.device) if config.bank else targets()
        eps = backend.predict(x, t, backend.encode([_CAPTION] * n, vectors))
        apl_loss(id_loss(eps[:ids], frozen[:ids], frozen[n : n + ids], config.alpha),
                 reg_loss(eps[ids:], frozen[ids:n])).backward()

    @torch.no_grad()
    def predict() -> None:
        backend.predict(torch.cat([x[:1], x[:1]]), torch.cat([t[:1], t[:1]]), backend.encode([_CAPTION] * 2))

    try:
        with PeakMemory(backend.device) as peak:
            took = _fastest(backend.device, step)
        seconds = [_fastest(backend.device, work) for work in (predict, lambda: backend.decode(x[:1]))]
    except (MemoryError, RuntimeError) as error:  # CUDA's own error is a RuntimeError
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise TrainingError(f"One training step does not fit into the memory of {backend.device}.",
                            "Use the preset sd15-8gb, a smaller batch_size, or gradient_checkpointing.",
                            field="batch_size") from error
    return Measured(took, *seconds, peak.bytes)
