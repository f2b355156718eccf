"""UCE: keys and values of listed names become those of their anchors, in one least-squares solution.

Gandikota et al., Unified Concept Editing in Diffusion Models (WACV 2024, arXiv 2308.14761), equation 7: with E the
embeddings to edit, v* = W_old c* the values of their anchors, and P the embeddings to preserve,

    W = (sum_E v* c^T + sum_P W_old c c^T) (sum_E c c^T + sum_P c c^T)^-1.

Here both sums are means, weighed against each other by `erase`, and the term of its equation 4 (lambda |W - W_old|^2,
as in TIME) keeps the inverse well posed. Keys and values of the cross-attention are edited, as in the paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from apl_train.baselines.protocol import Baseline, Person, between, one_of
from apl_train.baselines.wording import aligned_rows, eos_row, mentions
from apl_train.model.backend import Backend
from apl_train.model.edited import Edited, copied_unet, text_projections

ANCHORS = ("description", "a person", "")


def anchored_rows(backend: Backend, persons: Sequence[Person], anchor: str) -> tuple[Tensor, Tensor]:
    """Text states of listed names and of what they should become: float32 [n, width] twice.

    anchor: "description" stands for each person's own c2, any other words for themselves.
    """
    names, targets = [], []
    for mention in mentions(backend, persons):
        words = mention.person.description if anchor == "description" else anchor
        own, to = (backend.encode([text], chunks=1).states[0].cpu() for text in (mention.prompt, words))
        rows, anchors = aligned_rows(mention, to, eos_row(backend, words))
        names.append(own[rows])
        targets.append(to[anchors])
    return torch.cat(names), torch.cat(targets)


def caption_rows(backend: Backend, captions: Sequence[str], batch: int = 64) -> Iterator[Tensor]:
    """Text states of captions, float32 [n, width] a batch, all rows; long captions are cut to one chunk."""
    for start in range(0, len(captions), batch):
        yield backend.encode(list(captions[start : start + batch]), overflow="trim").states.flatten(0, 1).cpu()


def moment(parts: Iterator[Tensor], width: int) -> Tensor:
    """Mean of c c^T over all rows: float64 [width, width]; zero when there are none."""
    total, count = torch.zeros(width, width, dtype=torch.float64), 0
    for rows in parts:
        total += rows.double().T @ rows.double()
        count += len(rows)
    return total / max(count, 1)


def edited_projection(weight: Tensor, names: Tensor, anchors: Tensor, kept: Tensor, erase: float,
                      ridge: float) -> Tensor:
    """Equation 7 with means: float64 [out, width].

    weight: W_old [out, width]; names, anchors: c and c* of E [n, width]; kept: mean of c c^T over P.
    """
    w, c, a = weight.double(), names.double(), anchors.double()
    eye = torch.eye(w.shape[1], dtype=torch.float64)
    left = erase * (w @ a.T @ c) / len(c) + w @ kept + ridge * w
    right = erase * (c.T @ c) / len(c) + kept + ridge * eye
    return torch.linalg.solve(right, left.T).T  # the matrix on the right is symmetric


class UCE(Baseline):
    """`anchor`: of `ANCHORS`; `erase`: weight of E against P; `ridge`: of lambda, relative to the mean of c c^T."""

    name = "uce"
    title = "UCE"
    paper = "Gandikota et al., WACV 2024, arXiv 2308.14761"
    changes = "weights"
    defaults: Mapping[str, Any] = {"anchor": "description", "erase": 1.0, "ridge": 1e-3}
    grid = ({"anchor": "description", "erase": 1.0}, {"anchor": "description", "erase": 10.0},
            {"anchor": "a person", "erase": 1.0})

    @torch.no_grad()
    def edit(self, backend: Backend, persons: Sequence[Person], settings: Mapping[str, Any], *, keep: Sequence[str],
             seed: int) -> tuple[Backend, dict[str, Any]]:
        """Edits a copy's cross-attention keys and values; the empty prompt is always among what is preserved."""
        anchor = one_of(settings, "anchor", ANCHORS)
        erase, ridge = between(settings, "erase", 1e-6, 1e6), between(settings, "ridge", 1e-12, 1e6)
        names, anchors = anchored_rows(backend, persons, anchor)
        kept = moment(caption_rows(backend, ["", *keep]), names.shape[1])
        ridge *= float(kept.diagonal().mean())
        unet, moved = copied_unet(backend), []
        for _, linear in text_projections(unet, "kv"):
            new = edited_projection(linear.weight.cpu(), names, anchors, kept, erase, ridge)
            moved.append(float((new - linear.weight.cpu().double()).norm() / linear.weight.double().norm()))
            linear.weight.copy_(new.to(linear.weight))
        return Edited(backend, unet), {"relative_change": round(sum(moved) / len(moved), 4)}


METHOD = UCE()
