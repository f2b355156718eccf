"""What the frozen parts of a model say of a data set: latents of its pictures, token ids and states of its captions
(SDXL: and their pooled text).

None of it depends on the prefix, so it is computed once for a model and kept by content (see `shards`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from apl_core.errors import DatasetError
from apl_train.datasets.dataset import Dataset
from apl_train.model.backend import Backend
from apl_train.model.text import Encoded
from apl_train.training.shards import Progress, Rows, ShardStore, fingerprint

VERSION = 1
STATES_LIMIT = 4 * 2**30
"""Bytes of text states that are kept on disk; of a larger set they are computed step by step, which costs little."""


class Latents:
    """Scaled latents by row, float32 [N, 4, h, w], read from disk as they are indexed."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        shapes = rows.shapes("latents")
        if len(shapes) > 1:
            # w x h of the latents, eight pixels each
            found = ", ".join(sorted(f"{8 * w} x {8 * h}" for _, h, w in shapes))
            raise DatasetError(f"The pictures have several sizes: {found}.",
                               "Crop or resize all pictures to one size, such as the model's 512 x 512.", field="image")
        self.shape = torch.Size([len(rows), *next(iter(shapes), ())])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: Tensor | Sequence[int] | int) -> Tensor:
        if isinstance(rows, int):
            return self._rows.one("latents", rows).clone()
        return self._rows.take("latents", rows)


def _kind(backend: Backend, cache: Path, name: str) -> ShardStore:
    made_by = fingerprint(VERSION, backend.sha256, str(getattr(backend, "dtype", torch.float32)))
    return ShardStore(cache / name / made_by)


def cached_latents(backend: Backend, datasets: Sequence[Dataset], cache: Path, *, progress: Progress | None = None,
                   stop: Callable[[], bool] | None = None) -> Latents:
    """Latents of the data sets' pictures, one after the other.

    Raises:
        DatasetError: a picture cannot be read, or has another size than the rest.
    """
    keys = [key for dataset in datasets for key in dataset.picture_sha256]
    places = [(dataset, row) for dataset in datasets for row in range(len(dataset.records))]

    def make(positions: Sequence[int]) -> dict[str, Tensor]:
        parts: list[Tensor] = []
        start = 0
        while start < len(positions):  # runs of one data set each
            dataset, stop_at = places[positions[start]][0], start
            while stop_at < len(positions) and places[positions[stop_at]][0] is dataset:
                stop_at += 1
            pictures = dataset.images([places[p][1] for p in positions[start:stop_at]])
            parts.append(backend.to_latents(pictures))
            start = stop_at
        if len({part.shape[1:] for part in parts}) > 1:
            raise DatasetError("The pictures of the two sets have different sizes.",
                               "Crop or resize all pictures to one size, such as the model's 512 x 512.", field="image")
        return {"latents": torch.cat(parts)}

    return Latents(_kind(backend, cache, "latents").rows(keys, make, progress=progress, stop=stop))


class Captions:
    """tau(c) without prefix by caption, and the captions' token ids."""

    def __init__(self, backend: Backend, captions: Sequence[str], cache: Path, *, limit: int = STATES_LIMIT,
                 progress: Progress | None = None, stop: Callable[[], bool] | None = None) -> None:
        self._backend = backend
        distinct = list(dict.fromkeys(captions))
        self._row = {caption: row for row, caption in enumerate(distinct)}
        self._rows: Rows | None = None
        width = sum(backend.text.widths.values())  # SDXL's pooled text is a hundredth of it
        if len(distinct) * 77 * width * 4 > limit:
            return
        keys = [hashlib.sha256(caption.encode()).hexdigest() for caption in distinct]
        rows = _kind(backend, cache, "captions").rows(keys, lambda p: self._made([distinct[i] for i in p]),
                                                      progress=progress, stop=stop)
        self._rows = rows
        backend.text.remember({caption: [i for i in rows.one("ids", row).tolist() if i >= 0]
                               for caption, row in self._row.items()})

    def _made(self, captions: Sequence[str]) -> dict[str, Tensor]:
        ids = [self._backend.text.tokenize(caption) for caption in captions]
        longest = max(map(len, ids), default=0)
        padded = torch.tensor([one + [-1] * (longest - len(one)) for one in ids], dtype=torch.int32)
        found = self._encoded(captions)
        more = {} if found.pooled is None else {"pooled": found.pooled}
        return {"states": found.states, "ids": padded.reshape(len(captions), longest), **more}

    @torch.no_grad()
    def _encoded(self, captions: Sequence[str]) -> Encoded:
        return self._backend.encode(list(captions), overflow="trim")

    def encoded(self, captions: Sequence[str]) -> Encoded:
        """One chunk each; longer captions are cut."""
        if self._rows is None:
            return self._encoded(captions)
        rows = [self._row[caption] for caption in captions]
        pooled = self._rows.take("pooled", rows) if self._backend.family == "sdxl" else None
        return Encoded(self._rows.take("states", rows), pooled)
