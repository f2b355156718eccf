"""`apl sample`: the same prompt and seed without and with a prefix, side by side."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from apl_core.atomic import write_bytes
from apl_core.errors import ConfigError
from apl_core.prefix import load_prefix
from apl_core.strength import blend
from apl_train import shipped
from apl_train.model.backend import Backend
from apl_train.model.precision import chosen


def write_pairs(prompts: Sequence[str], prefix: str, base_model: str, seeds: Sequence[int], *, steps: int,
                guidance: float, out: Path, strength: float | None = None, null: str | None = None) -> list[Path]:
    """One PNG a prompt: upper row without, lower row with the prefix, one column a seed. Returns the files.

    strength, null: see `apl_core.strength.blend`; without a strength the prefix is taken as it is.

    Raises:
        PrefixFileError, LibraryError, ModelError, ConfigError: before anything is drawn.
    """
    prompt = load_prefix(shipped.prefix_file(prefix))
    if strength is not None:
        if null is None:
            raise ConfigError(f"strength is {strength:g}, but there is no null prefix to start from.",
                              "Name one with --null; `apl train --preset null` makes it.", field="null")
        prompt = blend(load_prefix(shipped.prefix_file(null)), prompt, strength)
    backend = Backend.load(shipped.locate("base_model", base_model), device=chosen().device)
    rows = [p for p in prompts for _ in seeds]
    every = list(seeds) * len(prompts)
    with tqdm(total=2 * len(rows), desc="sample", unit="picture") as bar:
        pictures = []
        for vectors in (None, prompt):
            start = bar.n
            made = backend.sample(rows, every, vectors=vectors, steps=steps, guidance=guidance,
                                  progress=lambda done, _total, start=start: bar.update(start + done - bar.n))
            pictures.append(made.images)
    written, n = [], len(seeds)
    for i, text in enumerate(prompts):
        grid = np.concatenate([np.concatenate(list(p[i * n : (i + 1) * n]), 1) for p in pictures], 0)
        name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "prompt"
        path = out / f"{i:02d}-{name}.png"
        data = io.BytesIO()
        Image.fromarray(grid).save(data, "PNG")
        write_bytes(path, data.getvalue())
        written.append(path)
    return written
