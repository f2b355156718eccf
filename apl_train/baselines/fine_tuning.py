"""What the fine-tuning baselines share: Adam on a copy's cross-attentions, a draw of listed persons, text states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apl_core.errors import TrainingError
from apl_train.model.backend import Backend
from apl_train.model.edited import Edited, copied_unet, cross_attentions
from apl_train.model.text import Encoded


class Student:
    """A copy of a model whose cross-attentions learn; everything else of it is frozen.

    Args:
        parts: which of the four linear maps of a cross-attention learn: of "q", "k", "v" and "out".
        learning_rate: Adam's.
    """

    def __init__(self, backend: Backend, learning_rate: float, parts: Sequence[str] = ("q", "k", "v", "out")) -> None:
        unet = copied_unet(backend)
        self.backend = Edited(backend, unet)
        self.attentions = [module for _, module in cross_attentions(unet)]
        self.parameters: list[nn.Parameter] = [
            parameter for module in self.attentions for part in parts
            for parameter in getattr(module, f"to_{part}").parameters()
        ]
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self._adam = torch.optim.Adam(self.parameters, lr=learning_rate)
        self.losses: list[float] = []

    def learn(self, loss: Tensor) -> None:
        """One step of Adam. Raises TrainingError when the loss is not finite."""
        if not torch.isfinite(loss):
            raise TrainingError(f"The loss is {float(loss)} at step {len(self.losses)}.", "Lower learning_rate.",
                                field="learning_rate")
        self._adam.zero_grad(set_to_none=True)
        loss.backward()
        self._adam.step()
        self.losses.append(float(loss.detach()))

    def done(self) -> tuple[Backend, dict[str, Any]]:
        """The model to sample with, frozen again, and how the loss went."""
        for parameter in self.parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        tenth = max(1, len(self.losses) // 10)
        first, last = self.losses[:tenth], self.losses[-tenth:]
        return self.backend, {"steps": len(self.losses), "loss_first": round(sum(first) / len(first), 6),
                              "loss_last": round(sum(last) / len(last), 6)}


def draws(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of indices below `count`: everybody comes once before anybody comes again. int64 [batch]."""
    queue = torch.empty(0, dtype=torch.int64)
    while True:
        while len(queue) < batch:
            queue = torch.cat([queue, torch.randperm(count, generator=generator)])
        yield queue[:batch]
        queue = queue[batch:]


@torch.no_grad()
def states_of(backend: Backend, prompts: Sequence[str]) -> Tensor:
    """Text states, one chunk each: float32 [N, 77, width]; the text encoder is frozen."""
    return backend.encode(list(prompts), chunks=1).states


def predicted(backend: Backend, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
    """eps of noisy latents under text states; gradient flows to weights that learn."""
    return backend.predict(x_t, t, Encoded(states))


@torch.no_grad()
def frozen(backend: Backend, x_t: Tensor, t: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
    """The same under several text states in one pass, without gradient."""
    count = len(states)
    found = backend.predict(x_t.repeat(count, 1, 1, 1), t.repeat(count), Encoded(torch.cat(states)))
    return found.chunk(count)


def noise_like(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal, drawn on the CPU: float32."""
    return torch.randn(tuple(shape), generator=generator)
