"""A prefix for the shipped miniature SDXL, for tests of hosts: any rows that stand there in both encoders will do."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from apl_core.library import PrefixLibrary, shipped_folder
from apl_core.metadata import PrefixMetadata
from apl_core.prefix import AnonymizationPrompt, load_prefix, save_prefix
from apl_train.miniworld.sdxl_file import NAME, PARTS
from apl_train.model.files import TOKENIZER, read_tokenizer

HALF = PARTS / f"{NAME}.safetensors"
WHY_NOT = f"no {HALF.name} in this installation"


def write_prefix(target: Path) -> AnonymizationPrompt:
    """The shipped SD1 prefix for the first encoder, which is SD1's own; for the second the words it began with."""
    prefix = load_prefix(PrefixLibrary([shipped_folder()]).resolve("anonymize-miniature"))
    rows = prefix.vectors()
    words = read_tokenizer(TOKENIZER)("a stranger who resembles", add_special_tokens=False).input_ids
    with safe_open(HALF, "pt") as file:
        table = file.get_tensor("conditioner.embedders.1.model.token_embedding.weight").float()
    tensors = {"clip_l": rows.float(), "clip_g": table[(words * len(rows))[: len(rows)]]}
    made = AnonymizationPrompt("sdxl", tensors, PrefixMetadata(title=target.stem, family="sdxl", num_tokens=len(rows)))
    save_prefix(made, target)
    return made


def latents(edge: int, seed: int = 9) -> tuple[torch.Tensor, list[int], list[str], list[bool]]:
    """(noise float32 [8, 4, edge, edge], timesteps, prompts, whether the prefix is on) to compare predictions of."""
    x_t = torch.randn(8, 4, edge, edge, generator=torch.Generator().manual_seed(seed))
    prompts = ["", "a dog", "A close-up portrait of otis kelzan", "a red bicycle"] * 2
    return x_t, [20, 150, 300, 450, 600, 750, 900, 990], prompts, [False] * 4 + [True] * 4
