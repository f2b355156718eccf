"""SPEED: as UCE, but the change of a weight is confined to directions that kept captions do not use.

Li et al., SPEED: Scalable, Precise, and Efficient Concept Erasure for Diffusion Models (ICLR 2026, arXiv 2503.07392).
With C1 the states of listed names, C* those of their anchors, C2 states that must not move at all, and P the projector
to the null space of the retained states C0, its closed form solves

    min_D |(W + D P) C1 - W C*|^2 + lambda |D P|^2   subject to   D P C2 = 0,

by D P = W (C* - C1) C1^T P Q M with M = (C1 C1^T P + lambda I)^-1 and Q = I - M C2 (C2^T P M C2)^-1 C2^T P.
`confined_change` computes the same minimiser in an orthonormal basis of what both constraints leave free, which stays
well posed when rows of C2 depend on each other. C2: the start token and the empty prompt's end-of-text token (its
invariant equality constraints); the 75 rows of padding behind the latter, which alone would fill a small model's space,
are retained with C0. C0: the captions that an unconfined edit would move more than the average one (its influence-based
prior filtering). Its augmentation of C0 by noise is left out. Kept captions fill the whole space of states, so the
null space is taken as the directions that hold the smallest `energy` share of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from apl_train.baselines.protocol import Baseline, Person, between, one_of
from apl_train.baselines.uce import ANCHORS, anchored_rows, moment
from apl_train.model.backend import Backend
from apl_train.model.edited import Edited, copied_unet, text_projections


def free_directions(retained: Tensor, fixed: Tensor, energy: float) -> Tensor:
    """Orthonormal directions that the retained states hardly use and the fixed ones not at all: float64 [width, r].

    retained: mean of c c^T over C0 [width, width]; fixed: C2 as rows [n, width]; energy: the share of the retained
    states' squared length that may lie in the directions, 0 to 1.
    """
    values, vectors = torch.linalg.eigh(retained.double())  # ascending
    values = values.clamp(min=0)
    total = values.sum()
    share = (values.cumsum(0) / total).clamp(max=1) if total > 0 else torch.zeros_like(values)  # rounding passes 1
    # without anything retained all directions are free
    free = vectors[:, share <= energy] if total > 0 else vectors
    if not len(fixed) or not free.shape[1]:
        return free
    inside = fixed.double() @ free
    _, singular, rows = torch.linalg.svd(inside, full_matrices=True)
    rank = int((singular > 1e-9 * fixed.double().norm()).sum())
    return free @ rows[rank:].T


def confined_change(weight: Tensor, names: Tensor, anchors: Tensor, free: Tensor, ridge: float) -> Tensor:
    """The change of a weight that does most for the names within the free directions: float64 [out, width].

    weight: W [out, width]; names, anchors: C1, C* as rows [n, width]; free: [width, r]; ridge: lambda, against the mean
    over the rows.
    """
    w, c, a = weight.double(), names.double(), anchors.double()
    wanted = w @ (a - c).T @ c @ free / len(c)
    gram = free.T @ (c.T @ c / len(c)) @ free + ridge * torch.eye(free.shape[1], dtype=torch.float64)
    return torch.linalg.solve(gram, wanted.T).T @ free.T


def most_affected(weights: Sequence[Tensor], names: Tensor, anchors: Tensor, captions: Tensor, ridge: float) -> Tensor:
    """Which captions an unconfined edit of the weights moves more than the average caption: bool [captions].

    captions: states [captions, rows, width].
    """
    whole = torch.eye(names.shape[1], dtype=torch.float64)
    moved = torch.zeros(len(captions), dtype=torch.float64)
    for weight in weights:
        change = confined_change(weight, names, anchors, whole, ridge)
        moved += (captions.double() @ change.T).square().sum((1, 2))
    return moved >= moved.mean()


class NullSpace(Baseline):
    """`energy`: see `free_directions`; `anchor`: of UCE's; `ridge`: lambda, relative to the mean of c c^T; `parts`."""

    name = "speed"
    title = "SPEED-like (null space)"
    paper = "Li et al., ICLR 2026, arXiv 2503.07392"
    changes = "weights"
    defaults: Mapping[str, Any] = {"anchor": "description", "energy": 0.01, "ridge": 1e-3, "parts": "kv"}
    grid = ({"energy": 0.001}, {"energy": 0.01}, {"energy": 0.05})

    @torch.no_grad()
    def edit(self, backend: Backend, persons: Sequence[Person], settings: Mapping[str, Any], *, keep: Sequence[str],
             seed: int) -> tuple[Backend, dict[str, Any]]:
        """Edits a copy's cross-attention keys and values inside the free directions."""
        anchor, parts = one_of(settings, "anchor", ANCHORS), one_of(settings, "parts", ("k", "v", "kv"))
        energy, ridge = between(settings, "energy", 0.0, 1.0), between(settings, "ridge", 1e-12, 1e6)
        names, anchors = anchored_rows(backend, persons, anchor)
        width = names.shape[1]
        empty = backend.encode([""], chunks=1).states[0].cpu()  # its first row is the start token's, alike everywhere
        unet = copied_unet(backend)
        linears = [linear for _, linear in text_projections(unet, parts)]
        weights = [linear.weight.cpu() for linear in linears]
        ridge *= float(names.double().square().mean())
        chosen = torch.empty(0, *empty.shape)
        if keep:
            states = backend.encode(list(keep), overflow="trim").states.cpu()
            chosen = states[most_affected(weights, names, anchors, states, ridge)]
        retained = moment(iter([empty[2:], *chosen]), width)
        free = free_directions(retained, empty[:2], energy)
        for linear, weight in zip(linears, weights, strict=True):
            linear.weight.copy_((weight.double() + confined_change(weight, names, anchors, free, ridge)).to(weight))
        return Edited(backend, unet), {"free_directions": free.shape[1], "of": width, "retained_captions": len(chosen)}


METHOD = NullSpace()
