"""S_ID and S_Reg as the trainer holds them: cached latents, captions and which rows are of which kind.

Latents are computed once per (model, dataset) and kept as safetensors; unprefixed text states are kept in memory.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from apl_core.atomic import write_safetensors
from apl_core.errors import ConfigError, DatasetError
from apl_train.backend import Backend
from apl_train.dataset import Dataset
from apl_train.text import Encoded

_log = logging.getLogger("apl.samples")
Progress = Callable[[int, int], None]


def cached_latents(backend: Backend, dataset: Dataset, cache: Path, progress: Progress | None = None) -> Tensor:
    """Scaled latents of a dataset's images, float32 [N, 4, h, w]; a damaged cache file is made again."""
    path = cache / f"latents-{backend.sha256[:16]}-{dataset.content_sha256[:16]}.safetensors"
    if path.exists():
        try:
            latents = load_file(path)["latents"]
            if len(latents) == len(dataset.records):
                return latents.float()
        except (SafetensorError, OSError, KeyError) as error:
            _log.warning("%s is damaged (%s); it is made again", path.name, error)
    parts, total = [], len(dataset.records)
    for start in range(0, total, 32):
        parts.append(backend.to_latents(dataset.images(range(start, min(total, start + 32)))))
        if progress:
            progress(min(total, start + 32), total)
    latents = torch.cat(parts)
    write_safetensors(path, {"latents": latents})
    return latents


class TrainingSet:
    """Both datasets in one table of rows.

    Attributes:
        latents: float32 [N, 4, h, w].
        c1, c2: captions by row; equal for S_Reg.
        kinds: "id", "face" or "nonface" by row.
        id_rows, face_rows, nonface_rows: int64 row indices; `id_rows` only of the first `persons` persons.
        every_id_row: of all persons.
        sha256: of both datasets.
    """

    def __init__(self, backend: Backend, s_id: Dataset, s_reg: Dataset | None, cache: Path, *,
                 persons: int | None = None, progress: Progress | None = None) -> None:
        sets = [s_id] + ([s_reg] if s_reg else [])
        records = [r for d in sets for r in d.records]
        self.latents = torch.cat([cached_latents(backend, d, cache, progress) for d in sets])
        self.c1, self.c2 = [r.c1 for r in records], [r.c2 for r in records]
        self.kinds = [r.kind for r in records]
        names = list(dict.fromkeys(r.name for r in s_id.records))
        if persons is not None and persons > len(names):
            raise ConfigError(f"persons is {persons}, but S_ID has {len(names)}.", "Lower it, or leave it out.",
                              field="persons")
        chosen = set(names[:persons])
        self.persons = len(chosen)
        self.every_id_row = self._where(lambda i: self.kinds[i] == "id")
        self.id_rows = self._where(lambda i: self.kinds[i] == "id" and records[i].name in chosen)
        self.face_rows = self._where(lambda i: self.kinds[i] == "face")
        self.nonface_rows = self._where(lambda i: self.kinds[i] == "nonface")
        if s_reg is not None and not len(self.face_rows) + len(self.nonface_rows):
            raise DatasetError("S_Reg has no rows.", "Add pictures of things and unnamed persons, or set no_reg.",
                               field="s_reg")
        self.sha256 = hashlib.sha256("".join(d.content_sha256 for d in sets).encode()).hexdigest()
        self._states: dict[str, Tensor] = {}

    def _where(self, holds: Callable[[int], bool]) -> Tensor:
        return torch.tensor([i for i in range(len(self.kinds)) if holds(i)], dtype=torch.int64)

    def count_id(self, rows: Tensor) -> int:
        """How many of `rows` are of S_ID."""
        return sum(self.kinds[r] == "id" for r in rows.tolist())

    def plain_states(self, backend: Backend, captions: Sequence[str]) -> Encoded:
        """tau(c) without prefix for each caption, remembered per caption; one chunk each (longer captions are cut)."""
        missing = [c for c in dict.fromkeys(captions) if c not in self._states]
        if missing:
            with torch.no_grad():
                states = backend.encode(missing, overflow="trim").states
            self._states.update(zip(missing, states, strict=True))
        return Encoded(states=torch.stack([self._states[c] for c in captions]), pooled=None)
