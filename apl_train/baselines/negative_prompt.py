"""Negative prompt: what should not be shown takes the place of the empty prompt in classifier-free guidance.

Ho & Salimans, Classifier-Free Diffusion Guidance (arXiv 2207.12598, equation 6) with the unconditional prediction
replaced, as Liu et al. compose "not" (Compositional Visual Generation, arXiv 2206.01714, section 3.2):
eps = eps(x_t, c_neg) + g (eps(x_t, c) - eps(x_t, c_neg)).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from apl_train.baselines.protocol import Baseline, Person, one_of
from apl_train.baselines.wording import named_in
from apl_train.model.backend import Backend, Samples
from apl_train.model.edited import Edited

GENERIC = "a famous person, a recognisable face"
WHICH = ("mentioned", "everyone", "generic")


def negative_for(prompt: str, persons: Sequence[Person], which: str) -> str:
    """What the negative prompt says: the listed names in the prompt, all listed names, or words for any of them."""
    if which == "generic":
        return GENERIC
    return ", ".join(p.name for p in (persons if which == "everyone" else named_in(prompt, persons)))


class _Negative(Edited):
    """Samples with a negative prompt of its own for every row, beside the caller's."""

    def __init__(self, base: Backend, persons: Sequence[Person], which: str) -> None:
        super().__init__(base)
        self._persons, self._which = tuple(persons), which

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], *, negative: str = "", **options: Any) -> Samples:
        groups: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            words = [w for w in (negative, negative_for(prompt, self._persons, self._which)) if w]
            groups.setdefault(", ".join(words), []).append(row)
        parts = [(rows, super(_Negative, self).sample([prompts[r] for r in rows], [seeds[r] for r in rows],
                                                      negative=words, **options)) for words, rows in groups.items()]
        order = np.argsort(np.concatenate([rows for rows, _ in parts]))
        images = np.concatenate([made.images for _, made in parts])
        return Samples(torch.cat([made.latents for _, made in parts])[torch.from_numpy(order)],
                       images[order] if len(images) else images)


class NegativePrompt(Baseline):
    """`which`: of `WHICH`."""

    name = "negative-prompt"
    title = "Negative prompt"
    paper = "Ho & Salimans, arXiv 2207.12598; Liu et al., ECCV 2022, arXiv 2206.01714"
    changes = "sampler"
    defaults: Mapping[str, Any] = {"which": "mentioned"}
    grid = ({"which": "mentioned"}, {"which": "everyone"}, {"which": "generic"})

    def edit(self, backend: Backend, persons: Sequence[Person], settings: Mapping[str, Any], *, keep: Sequence[str],
             seed: int) -> tuple[Backend, dict[str, Any]]:
        """No weight changes."""
        return _Negative(backend, persons, one_of(settings, "which", WHICH)), {}


METHOD = NegativePrompt()
