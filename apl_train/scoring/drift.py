"""Drift: how far a prefix moves pictures whose prompts name nobody (APL sec. 4.3, "Quality Preservation").

Step image -> score. Pictures of one prompt and one seed are compared with and without the prefix. Two pictures of one
prompt and different seeds, both without it, are the yardstick: a ratio of 1 is a wholly different picture.
Distances are averaged over a prompt's seeds, then over prompts; intervals resample prompts, since the pictures of one
prompt are not independent.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apl_core.errors import ScoreError
from apl_core.id_scores import RESAMPLES, Interval, PersonScores, cluster_bootstrap, paired_bootstrap
from apl_core.prefix import AnonymizationPrompt


@dataclass(frozen=True, eq=False)
class Distances:
    """Distances of pairs, float64 [prompts, pairs], rows in the order of `prompts`.

    Raises:
        ScoreError: the number of rows is not that of the prompts.
    """

    prompts: tuple[str, ...]
    values: NDArray[np.float64]

    def __post_init__(self) -> None:
        values = np.asarray(self.values, dtype=np.float64)
        if values.ndim != 2 or len(values) != len(self.prompts):
            raise ScoreError(f"{len(self.prompts)} prompts have distances of shape {list(values.shape)}.",
                             "Give one row of pairs for every prompt.", field="values")
        object.__setattr__(self, "values", values)

    @property
    def mean(self) -> float:
        """Mean over pairs, then over prompts."""
        return self.interval().value

    def interval(self, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
        """The mean with its 95% interval over prompts."""
        return cluster_bootstrap(self._clusters(), resamples=resamples, seed=seed)

    def ratio(self, base: Distances, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
        """mean / base.mean with its paired 95% interval. Raises `ScoreError` unless both have the same prompts."""
        return paired_bootstrap(base._clusters(), self._clusters(), resamples=resamples, seed=seed).ratio

    def _clusters(self) -> list[PersonScores]:
        # A prompt is a cluster of pictures as a person is. A distance that is not finite (the sampler diverged) is a
        # missing value here; it is left out like a picture without a face.
        kept = [row[np.isfinite(row)] for row in self.values]
        return [PersonScores(p, row, self.values.shape[1]) for p, row in zip(self.prompts, kept, strict=True)]


def latent_rms(a: Tensor, b: Tensor) -> NDArray[np.float64]:
    """Root mean square difference of each pair of final latents: [N, 4, h, w] twice -> float64 [N]."""
    _same_shape(a, b)
    return (a.double() - b.double()).square().flatten(1).mean(1).sqrt().cpu().numpy()


def pixel_rms(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Root mean square difference of each pair of pictures in [0, 1]: uint8 [N, H, W, 3] twice -> float64 [N]."""
    _same_shape(a, b)
    if not len(a):
        return np.zeros(0)
    # picture by picture: a batch of large pictures in float64 would take eight times its memory
    pairs = zip(a, b, strict=True)
    return np.array([np.sqrt(np.mean(np.square((x.astype(np.float64) - y) / 255))) for x, y in pairs])


def seed_pairs(seeds: int) -> list[tuple[int, int]]:
    """All pairs of different seeds of one prompt. Raises `ScoreError` below two seeds."""
    if seeds < 2:
        raise ScoreError(f"{seeds} seed a prompt gives no two pictures to compare.", "Use two or more.", field="seeds")
    return list(itertools.combinations(range(seeds), 2))


def paired_latents(prompts: Sequence[str], off: Tensor, other: Tensor) -> Distances:
    """Latents with equal prompts and seeds, [prompts * seeds, 4, h, w], the seeds of a prompt side by side."""
    return Distances(tuple(prompts), latent_rms(off, other).reshape(len(prompts), -1))


def two_seed_latents(prompts: Sequence[str], off: Tensor) -> Distances:
    """The yardstick: distances of different seeds of one prompt; `off` is [prompts * seeds, 4, h, w]."""
    rows = off.reshape(len(prompts), -1, *off.shape[1:])
    pairs = seed_pairs(rows.shape[1])
    values = [latent_rms(rows[:, i], rows[:, j]) for i, j in pairs]
    return Distances(tuple(prompts), np.stack(values, axis=1))


def _same_shape(a: Tensor | NDArray, b: Tensor | NDArray) -> None:
    if tuple(a.shape) != tuple(b.shape):
        raise ScoreError(f"Pictures of shapes {list(a.shape)} and {list(b.shape)} cannot be compared.",
                         "Sample both with the same size, prompts and seeds.", field="shape")


def random_vectors(vectors: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """The control: Gaussian rows, each with the norm of the learned row it stands for; key to float32 [m, width].

    What such a prefix does too is an effect of standing there, not of what was learned.
    """
    g = torch.Generator("cpu").manual_seed(seed)
    made = {}
    for key in sorted(vectors):
        learned = vectors[key].detach().to("cpu", torch.float32)
        rows = torch.randn(learned.shape, generator=g)
        made[key] = rows / rows.norm(dim=1, keepdim=True) * learned.norm(dim=1, keepdim=True)
    return made


def standing_as(vectors: Mapping[str, Tensor], prompt: Any) -> Mapping[str, Tensor] | AnonymizationPrompt:
    """Vectors to encode with where `prompt` stands: a loaded suffix is not to be measured as a prefix."""
    if not isinstance(prompt, AnonymizationPrompt) or prompt.meta.placement == "prefix":
        return vectors
    return AnonymizationPrompt(prompt.family, vectors, prompt.meta)
