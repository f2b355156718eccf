"""Semantic Surgery: the direction of a listed name is subtracted from the prompt's embedding, where it is found there.

Xiong et al., Semantic Surgery: Zero-Shot Concept Erasure in Diffusion Models (NeurIPS 2025, arXiv 2510.22851), section
3: with e the text states of a prompt, e_0 those of a neutral one and d_c = e_c - e_0 the direction of concept c,

    alpha_c = cos(e - e_0, d_c),   rho_c = sigmoid((alpha_c - beta) / gamma),   e' = e - rho d,

for the concepts with rho_c >= tau; several of them are encoded together as one ("co-occurrence encoding") with the
largest rho. Its feedback from the finished picture is left out: there is no detector of a person here but the
recogniser that the score is taken with.

Presence is read at the end-of-text token, where a prompt's meaning is summed up. The subtraction takes all rows but the
start token's, aligned at the end-of-text token: a name's tokens stand at other rows in a longer prompt. e_0 is the
paper's empty prompt or, as an anonymiser would rather have it, the person's description; both are in the grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from apl_core.placement import LENGTH
from apl_train.baselines.fine_tuning import states_of
from apl_train.baselines.protocol import Baseline, Person, between, one_of
from apl_train.baselines.wording import TEMPLATES, eos_row, mentions
from apl_train.model.backend import Backend
from apl_train.model.edited import Edited
from apl_train.model.text import Encoded

NEUTRAL = ("", "description")


def presence(states: Tensor, neutral: Tensor, concepts: Tensor) -> Tensor:
    """alpha_c of every prompt and concept: cosine of their directions away from the neutral one: float [N, C].

    states: [N, width], concepts: [C, width], neutral: [width], all at the end-of-text token.
    """
    one, other = (torch.nn.functional.normalize(x - neutral, dim=-1) for x in (states, concepts))
    return one @ other.T


def gate(alpha: Tensor, beta: float, gamma: float, tau: float) -> Tensor:
    """rho: how strongly each concept is there, 0 below tau: float, shaped as alpha."""
    rho = torch.sigmoid((alpha - beta) / gamma)
    return torch.where(rho >= tau, rho, torch.zeros_like(rho))


def shifted(states: Tensor, eos: int, to: int) -> Tensor:
    """Rows moved so that row `eos` comes to `to`: float [77, width]; rows that come from nowhere repeat the outermost.

    The start token's row stays where it is and is nobody's neighbour.
    """
    rows = (torch.arange(len(states)) - to + eos).clamp(1, len(states) - 1)
    rows[0] = 0
    return states[rows]


class _Surgery(Edited):
    """Encodes prompts with listed names cut out of them; all else is encoded as ever."""

    def __init__(self, base: Backend, persons: Sequence[Person], settings: Mapping[str, Any]) -> None:
        super().__init__(base)
        self._plain, self._persons, self._settings = base, tuple(persons), settings
        # a name is looked for in every sentence that it may stand in; the largest alpha counts
        listed = mentions(base, persons)
        states = states_of(base, [m.prompt for m in listed])
        self._concepts = states[torch.arange(len(listed)), torch.tensor([m.eos for m in listed])]
        self._neutral = states_of(base, [""])[0, eos_row(base, "")]

    def _direction(self, present: Sequence[Person], eos: int) -> Tensor:
        """d of the persons in a prompt, encoded together, with its end-of-text token at row `eos`: [77, width]."""
        words = ", ".join(p.name for p in present)
        neutral = ", ".join(p.description for p in present) if self._settings["neutral"] == "description" else ""
        with_name, without = (
            shifted(self._plain.encode([text], chunks=1, overflow="trim").states[0], eos_row(self._plain, text), eos)
            for text in (words, neutral)
        )
        return with_name - without

    def encode(self, prompts: Sequence[str], vectors: Any = None, **options: Any) -> Encoded:
        """As `Backend.encode`; the first chunk of a prompt is edited."""
        found = super().encode(prompts, vectors, **options)
        states, m = found.states.clone(), self.text.num_prefix(vectors)
        for row, prompt in enumerate(prompts):
            if not prompt:
                continue  # the unconditional branch has nothing to cut out
            eos = min(eos_row(self, prompt) + m, LENGTH - 1)
            alpha = presence(states[row, eos][None], self._neutral, self._concepts)[0]
            alpha = alpha.reshape(len(self._persons), -1).amax(dim=1)
            rho = gate(alpha, self._settings["beta"], self._settings["gamma"], self._settings["tau"])
            present = [p for p, r in zip(self._persons, rho.tolist(), strict=True) if r > 0]
            if present:
                # beyond a few, names no longer fit one text
                strongest = [self._persons[i] for i in rho.topk(min(len(present), self._settings["most"])).indices]
                states[row, :LENGTH] -= float(rho.max()) * self._direction(strongest, eos)
        return Encoded(states, found.pooled)


class SemanticSurgery(Baseline):
    """`neutral`: of `NEUTRAL`; `beta`, `gamma`, `tau`: of the gate; `most`: persons that are cut out at once."""

    name = "semantic-surgery"
    title = "Semantic Surgery-like"
    paper = "Xiong et al., NeurIPS 2025, arXiv 2510.22851"
    changes = "prompt"
    defaults: Mapping[str, Any] = {"neutral": "description", "beta": 0.95, "gamma": 0.02, "tau": 0.5, "most": 3}
    grid = ({"neutral": "description", "beta": 0.95}, {"neutral": "description", "beta": 0.85},
            {"neutral": "", "beta": 0.95})

    def edit(self, backend: Backend, persons: Sequence[Person], settings: Mapping[str, Any], *, keep: Sequence[str],
             seed: int) -> tuple[Backend, dict[str, Any]]:
        """Encodes the list; no weight changes, and it takes no captions to keep."""
        one_of(settings, "neutral", NEUTRAL)
        for key, low, high in (("beta", -1.0, 2.0), ("gamma", 1e-6, 10.0), ("tau", 0.0, 1.0), ("most", 1, 1000)):
            between(settings, key, low, high)
        return _Surgery(backend, persons, settings), {"sentences": len(persons) * len(TEMPLATES)}


METHOD = SemanticSurgery()
