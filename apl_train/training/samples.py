"""S_ID and S_Reg as the trainer holds them: cached latents and text states, and which rows are of which kind."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from apl_core.errors import ConfigError, DatasetError
from apl_train.datasets.dataset import Dataset
from apl_train.model.backend import Backend
from apl_train.model.text import Encoded
from apl_train.training.latent_cache import Captions, cached_latents
from apl_train.training.shards import Progress


class TrainingSet:
    """Both datasets in one table of rows.

    Attributes:
        latents: float32 [N, 4, h, w], indexed like a tensor; on disk (see `latent_cache`).
        c1, c2: captions by row; equal for S_Reg.
        names: the person's name by row; "" for S_Reg.
        kinds: "id", "pseudo" (of S_ID too, see `pseudo_identity`), "face" or "nonface" by row.
        id_rows, pseudo_rows, face_rows, nonface_rows: int64 row indices; `id_rows` only of the first `persons` persons.
        every_id_row: of all persons.
        sha256: of the datasets.
    """

    def __init__(self, backend: Backend, s_id: Dataset, s_reg: Dataset | None, cache: Path, *,
                 persons: int | None = None, progress: Progress | None = None,
                 caption_progress: Progress | None = None, stop: Callable[[], bool] | None = None,
                 pseudo: Dataset | None = None) -> None:
        """Raises DatasetError for pictures that cannot be read or differ in size, TrainingStopped when `stop()`."""
        sets = [s_id] + ([s_reg] if s_reg else []) + ([pseudo] if pseudo else [])
        records = [r for d in sets for r in d.records]
        self.c1, self.c2 = [r.c1 for r in records], [r.c2 for r in records]
        self.names = [r.name for r in records]
        self.kinds = ["pseudo" if d is pseudo else r.kind for d in sets for r in d.records]
        names = list(dict.fromkeys(r.name for r in s_id.records))
        if persons is not None and persons > len(names):
            raise ConfigError(f"persons is {persons}, but S_ID has {len(names)}.", "Lower it, or leave it out.",
                              field="persons")
        chosen = set(names[:persons])
        self.persons = len(chosen)
        self.every_id_row = self._where(lambda i: self.kinds[i] == "id")
        self.id_rows = self._where(lambda i: self.kinds[i] == "id" and records[i].name in chosen)
        self.pseudo_rows = self._where(lambda i: self.kinds[i] == "pseudo")
        self.face_rows = self._where(lambda i: self.kinds[i] == "face")
        self.nonface_rows = self._where(lambda i: self.kinds[i] == "nonface")
        if s_reg is not None and not len(self.face_rows) + len(self.nonface_rows):
            raise DatasetError("S_Reg has no rows.", "Add pictures of things and unnamed persons, or set no_reg.",
                               field="s_reg")
        self.latents = cached_latents(backend, sets, cache, progress=progress, stop=stop)
        self._captions = Captions(backend, [*self.c1, *self.c2], cache, progress=caption_progress, stop=stop)
        self.sha256 = hashlib.sha256("".join(d.content_sha256 for d in sets).encode()).hexdigest()

    def _where(self, holds: Callable[[int], bool]) -> Tensor:
        return torch.tensor([i for i in range(len(self.kinds)) if holds(i)], dtype=torch.int64)

    def count_id(self, rows: Tensor) -> int:
        """How many of `rows` are of S_ID."""
        return sum(self.kinds[r] in ("id", "pseudo") for r in rows.tolist())

    def plain_states(self, captions: Sequence[str]) -> Encoded:
        """tau(c) without prefix for each caption; one chunk each (longer captions are cut)."""
        return self._captions.encoded(captions)
