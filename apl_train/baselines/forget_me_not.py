"""Forget-Me-Not: the cross-attentions learn to look away from the tokens of a listed name.

Zhang et al., Forget-Me-Not: Learning to Forget in Text-to-Image Diffusion Models (CVPR 2024 workshops, arXiv
2303.17591), section 3.2, attention resteering: with A_l the attention map of layer l and its columns of the name's
tokens, on noised pictures of the person,

    L = sum over layers |A_l[:, name]|^2,

minimised over the cross-attention weights. The sum of squares is a mean here, so that layers of all sizes count alike.
The pictures are the model's own, drawn from the name. The paper's textual inversion of a concept that has no good name
is not needed for persons who are asked for by theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from apl_train.baselines.fine_tuning import Student, draws, noise_like, predicted, states_of
from apl_train.baselines.protocol import Baseline, Person, between
from apl_train.baselines.wording import TEMPLATES, mentions
from apl_train.model.backend import Backend
from apl_train.model.edited import pictures_of
from apl_train.training.bank import add_noise


class Watched:
    """A processor of diffusers' Attention that keeps the maps of its last call: float [N, heads, places, tokens]."""

    def __init__(self) -> None:
        self.maps: Tensor | None = None

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                 attention_mask: Tensor | None = None, **_: Any) -> Tensor:
        """Attention over text states [N, tokens, width] for places [N, places, channels]."""
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (linear(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                             for linear, x in ((attn.to_q, hidden_states), (attn.to_k, text), (attn.to_v, text)))
        self.maps = (query @ key.transpose(-1, -2) * attn.scale).softmax(dim=-1)
        out = (self.maps @ value).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


def attention_to(maps: Sequence[Tensor], columns: Tensor) -> Tensor:
    """Mean square of the maps in the columns of the names' tokens, summed over layers: a scalar.

    maps: float [N, heads, places, tokens] a layer; columns: bool [N, tokens].
    """
    share = columns[:, None, None, :].to(maps[0])
    return sum(((m * share).square().sum() / (share.sum() * m.shape[1] * m.shape[2]) for m in maps),
               torch.zeros((), device=maps[0].device))


class ForgetMeNot(Baseline):
    """`iterations`: steps of Adam; the paper takes few, since attention moves fast."""

    name = "fmn"
    title = "Forget-Me-Not"
    paper = "Zhang et al., CVPRW 2024, arXiv 2303.17591"
    changes = "weights"
    defaults: Mapping[str, Any] = {"learning_rate": 1e-4, "iterations": 40, "batch": 4}
    grid = ({"learning_rate": 3e-5}, {"learning_rate": 3e-4}, {"learning_rate": 3e-3})

    def edit(self, backend: Backend, persons: Sequence[Person], settings: Mapping[str, Any], *, keep: Sequence[str],
             seed: int) -> tuple[Backend, dict[str, Any]]:
        """Draws a picture of every person, then trains a copy; it takes no captions to keep."""
        iterations, batch = int(between(settings, "iterations", 1, 1e6)), int(between(settings, "batch", 1, 1024))
        student = Student(backend, between(settings, "learning_rate", 1e-8, 10.0))
        asked = mentions(backend, persons)
        pictures = pictures_of(backend, [m.prompt for m in asked[len(TEMPLATES) - 1 :: len(TEMPLATES)]], seed)
        states = states_of(backend, [m.prompt for m in asked])
        columns = torch.zeros(len(asked), states.shape[1], dtype=torch.bool)
        for row, mention in enumerate(asked):
            columns[row, mention.start : mention.end] = True
        ordinary = [module.processor for module in student.attentions]
        watchers = [Watched() for _ in ordinary]
        for module, watcher in zip(student.attentions, watchers, strict=True):
            module.set_processor(watcher)
        g = torch.Generator("cpu").manual_seed(seed)
        for picks in islice(draws(len(asked), batch, g), iterations):
            t = torch.randint(len(backend.alphas_bar), (batch,), generator=g)
            noise = noise_like((batch, *pictures.shape[1:]), g)
            x_t = add_noise(pictures[picks // len(TEMPLATES)], noise, t, backend.alphas_bar)
            predicted(student.backend, x_t.to(backend.device), t, states[picks])
            student.learn(attention_to([w.maps for w in watchers], columns[picks].to(backend.device)))
        for module, processor in zip(student.attentions, ordinary, strict=True):
            module.set_processor(processor)
        return student.done()


METHOD = ForgetMeNot()
