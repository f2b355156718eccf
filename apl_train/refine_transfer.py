"""A carried prefix brought nearer to what it does, by the text encoders alone: no UNet, no picture (as POST's).

Step prefix of SDXL's family + captions -> prefix. A ridge map M from CLIP-L's penultimate states to CLIP-G's is fitted
on clean captions, whose positions align one to one: both encoders share a tokenizer. Then, from the closed form's
vectors u, the change that the prefix causes is matched, word by word:

    sum over captions c of || M[tau_L(P + c) - tau_L(c)] - [tau_g(u + c) - tau_g(c)] ||^2

The rows of the prefix itself, which stand nowhere in c, are compared as they are. The vectors that do best on captions
kept aside are returned; where nothing is better than the start, the start.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apl_core.errors import ConfigError, DatasetError, ModelError
from apl_core.prefix import AnonymizationPrompt
from apl_core.transfer import RECORD
from apl_train.model.text import TextStack

FIT, VALIDATE, BATCH = 256, 32, 8
"""Captions that M is fitted on, that steps are judged by, and of one step."""
EVERY = 25
RHO = 1e-3
RATE = 0.02
"""Adam's learning rate, in standard deviations of the start's numbers."""


@dataclass(frozen=True, eq=False)
class Refined:
    """The prefix, and the loss on captions kept aside: of the start and of the prefix, as shares of the variance of
    CLIP-G's states."""

    prefix: AnonymizationPrompt
    before: float
    after: float
    steps: int

    @property
    def text(self) -> str:
        """In words."""
        return f"refined: loss {self.before:.4f} -> {self.after:.4f} on captions kept aside, {self.steps} steps"


class Behaviour:
    """What a prefix does to captions in both encoders of SDXL.

    Args:
        stack: SDXL's text encoders. captions: short enough for one chunk beside the prefix; longer ones are left out.
        room: rows of the prefix.

    Raises:
        ModelError: the stack has one encoder only. DatasetError: fewer than 16 captions are left.
    """

    def __init__(self, stack: TextStack, captions: Sequence[str], room: int) -> None:
        if stack.family != "sdxl":
            raise ModelError(f"The model is of family {stack.family}; refining needs SDXL's two text encoders.",
                             "Name a Stable Diffusion XL model.", field="to")
        self.stack, self.room = stack, room
        fitting = [c for c in dict.fromkeys(captions) if stack.tokenize(c) and stack.chunks_of(c, room) == 1]
        if len(fitting) < 16:
            raise DatasetError(f"captions: {len(fitting)} different ones fit into one chunk; 16 are needed.",
                               "Give more, or shorter ones.", field="captions")
        order = torch.randperm(len(fitting), generator=torch.Generator().manual_seed(0)).tolist()
        few = min(VALIDATE, len(fitting) // 4)
        self.aside = [fitting[i] for i in order[:few]]
        self.train = [fitting[i] for i in order[few:]]
        self._width = stack.widths["clip_l"]
        self._mean, self._map, self.variance = self._fitted(self.train[:FIT])

    def _states(self, captions: Sequence[str], vectors: Mapping[str, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Penultimate states of both, [N, 77, wl] and [N, 77, wg]."""
        states = self.stack.encode(captions, vectors).states
        return states[..., : self._width], states[..., self._width :]

    def _words(self, captions: Sequence[str]) -> Tensor:
        """bool [N, 77]: BOS, the words and EOS of a caption without a prefix."""
        lengths = torch.tensor([len(self.stack.tokenize(c)) + 2 for c in captions])
        return torch.arange(77)[None] < lengths[:, None]

    def _fitted(self, captions: Sequence[str]) -> tuple[tuple[Tensor, Tensor], Tensor, float]:
        """((means), M [wl, wg], variance of CLIP-G's states) by ridge regression on clean captions."""
        left, right = [], []
        with torch.no_grad():
            for start in range(0, len(captions), 32):
                some = captions[start : start + 32]
                words = self._words(some)
                one, two = self._states(some, None)
                left.append(one.cpu()[words])
                right.append(two.cpu()[words])
        x, y = torch.cat(left).double(), torch.cat(right).double()
        means = x.mean(0), y.mean(0)
        x, y = x - means[0], y - means[1]
        gram = x.T @ x
        gram.diagonal().add_(RHO * float(gram.trace()) / len(gram))
        device = self.stack.embedding_table("clip_g").device
        fitted = torch.linalg.solve(gram, x.T @ y)
        return (means[0].float().to(device), means[1].float().to(device)), fitted.float().to(device), \
            float(y.square().mean())

    def loss(self, captions: Sequence[str], vectors: Mapping[str, Tensor]) -> Tensor:
        """Mean squared distance of the changes, divided by the variance of CLIP-G's states; gradient to `clip_g`."""
        with torch.no_grad():
            plain_l, plain_g = self._states(captions, None)
        moved_l, moved_g = self._states(captions, vectors)
        moved_l = moved_l.detach()
        device, m = moved_g.device, self.room
        inside = self._words(captions).to(device)[:, 1 : 77 - m]  # words and EOS, without BOS
        wanted = (moved_l[:, 1 + m :] - plain_l[:, 1 : 77 - m]) @ self._map
        found = moved_g[:, 1 + m :] - plain_g[:, 1 : 77 - m]
        words = (wanted - found).square().mean(-1)[inside]
        own = (moved_l[:, 1 : 1 + m] - self._mean[0]) @ self._map + self._mean[1] - moved_g[:, 1 : 1 + m]
        return torch.cat([words, own.square().mean(-1).flatten()]).mean() / self.variance


def refine(stack: TextStack, prefix: AnonymizationPrompt, captions: Sequence[str], steps: int = 200) -> Refined:
    """Optimise a carried prefix's `clip_g` vectors; `clip_l` stays.

    Raises:
        ConfigError: steps is out of range, or the prefix stands elsewhere than ahead of the words.
        ModelError, DatasetError: as `Behaviour`.
    """
    if not 1 <= steps <= 100_000:
        raise ConfigError(f"refine is {steps} steps, not 1 to 100000.", "200 is usual.", field="refine")
    if prefix.meta.placement != "prefix":
        raise ConfigError(f"{prefix.name} stands as {prefix.meta.placement}; refining knows prefixes ahead of the "
                          "words only.", "Leave refining out.", field="refine")
    behaviour = Behaviour(stack, captions, prefix.num_tokens)
    device = stack.embedding_table("clip_g").device
    fixed = prefix.vectors("clip_l").to(device)
    free = prefix.vectors("clip_g").to(device).clone().requires_grad_(True)
    optimizer = torch.optim.Adam([free], lr=RATE * float(free.detach().std(unbiased=False)))
    draw = torch.Generator().manual_seed(0)

    def judged() -> float:
        with torch.no_grad():
            parts = [(len(some), float(behaviour.loss(some, {"clip_l": fixed, "clip_g": free})))
                     for some in (behaviour.aside[i : i + BATCH] for i in range(0, len(behaviour.aside), BATCH))]
        return sum(n * value for n, value in parts) / sum(n for n, _ in parts)

    before = best = judged()
    kept = free.detach().clone()
    for step in range(1, steps + 1):
        some = [behaviour.train[i] for i in torch.randint(len(behaviour.train), (BATCH,), generator=draw).tolist()]
        optimizer.zero_grad()
        behaviour.loss(some, {"clip_l": fixed, "clip_g": free}).backward()
        optimizer.step()
        if (step % EVERY == 0 or step == steps) and (now := judged()) < best:
            best, kept = now, free.detach().clone()
    record = json.loads(prefix.meta.extra.get(RECORD, "{}"))
    record["refined"] = {"steps": steps, "loss_before": round(before, 6), "loss_after": round(best, 6)}
    meta = prefix.meta.with_fields(extra={**prefix.meta.extra, RECORD: json.dumps(record, sort_keys=True)})
    tensors = {"clip_l": prefix.vectors("clip_l"), "clip_g": kept.cpu()}
    return Refined(AnonymizationPrompt(prefix.family, tensors, meta), before, best, steps)


def refine_all(model: Path, made: Mapping[Path, AnonymizationPrompt], captions: Sequence[str],
               steps: int) -> tuple[dict[Path, AnonymizationPrompt], list[dict[str, Any]]]:
    """Refines several prefixes with the text encoders of one SDXL model; ({file: prefix}, what came of each)."""
    stack = _stack_of(model)
    found = {out: refine(stack, prefix, captions, steps) for out, prefix in made.items()}
    notes = [{"file": str(out), "before": each.before, "after": each.after, "steps": each.steps,
              "text": f"{out.name}: {each.text}"} for out, each in found.items()]
    return {out: each.prefix for out, each in found.items()}, notes


def _stack_of(model: Path) -> TextStack:
    """The text encoders of a whole SDXL model, on the GPU where there is one."""
    from apl_train.model.files import read_parts
    from apl_train.model.precision import chosen

    parts = read_parts(model)
    second = getattr(parts, "text_encoder_2", None)
    if second is None:
        raise ModelError(f"{model.name} has one text encoder; refining needs SDXL's two.",
                         "Name a Stable Diffusion XL model.", field="to")
    device = chosen("auto", "fp32").device
    return TextStack("sdxl", {"clip_l": parts.tokenizer, "clip_g": parts.tokenizer_2},
                     {"clip_l": parts.text_encoder.to(device), "clip_g": second.to(device)})
