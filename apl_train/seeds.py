"""Seeds and generators by name: what is drawn depends on what it is for, never on what was drawn before.

Every training step draws from a generator seeded by (seed, step), so step n is the same whether it was reached or
resumed.
"""

from __future__ import annotations

import hashlib

import torch


def seed_of(*parts: object) -> int:
    """A 63-bit seed from any values, equal on every platform."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def step_generator(seed: int, step: int) -> torch.Generator:
    """The generator of one optimizer step: sample indices, timesteps and noise come from it and from nowhere else."""
    return torch.Generator("cpu").manual_seed(seed_of("apl-step", seed, step))
