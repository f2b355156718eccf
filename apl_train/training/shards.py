"""Rows of tensors that are computed once and kept: safetensors shards, found by content, mapped into memory.

A row belongs to a key, the hash of what it was made from (a picture's bytes, a caption), inside a folder that stands
for how it was made (model, precision). So it serves every run and every data set that has the same picture. A shard is
checked whole when it is opened; a damaged one is made again from the same rows, never trained on. Under `accelerate
launch` the missing shards are divided among the processes.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from apl_core.atomic import write_safetensors
from apl_core.errors import TrainingStopped
from apl_train.processes import Processes, this_process

SIZE = 32
"""Rows of a shard: what one pass through a model makes."""
_log = logging.getLogger("apl.cache")
Progress = Callable[[int, int], None]
Make = Callable[[Sequence[int]], Mapping[str, Tensor]]


def fingerprint(*parts: object) -> str:
    """32 hex digits for a folder or file name, equal on every machine."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:32]


def bytes_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes, lowercase hex: no bit of any type escapes it."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


class Rows:
    """The rows of some keys, in the order asked for; pages are read from disk when they are needed."""

    def __init__(self, places: Sequence[tuple[Mapping[str, Tensor], int]]) -> None:
        self._places = list(places)

    def __len__(self) -> int:
        return len(self._places)

    def shapes(self, name: str) -> set[tuple[int, ...]]:
        """The shapes that occur: one where all rows are alike."""
        return {tuple(shard[name].shape[1:]) for shard, _ in self._places}

    def one(self, name: str, row: int) -> Tensor:
        """One row, a view of the mapped file: not to be written to."""
        shard, place = self._places[row]
        return shard[name][place]

    def take(self, name: str, rows: Tensor | Sequence[int]) -> Tensor:
        """Copies of some rows, side by side: [len(rows), ...]."""
        wanted = rows.tolist() if isinstance(rows, Tensor) else rows
        return torch.stack([self.one(name, row) for row in wanted])


class ShardStore:
    """The shards of one folder, all made in one way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def rows(self, keys: Sequence[str], make: Make, *, size: int = SIZE, progress: Progress | None = None,
             stop: Callable[[], bool] | None = None, processes: Processes | None = None) -> Rows:
        """The rows of `keys`; what is missing or damaged is made now and kept.

        Args:
            keys: of the rows, in order; a key that occurs twice is made once.
            make: positions in `keys`, at most `size`, to named tensors with one row a position.
            progress: called with (rows there, rows in all).
            stop: asked between shards.

        Raises:
            TrainingStopped: `stop()` said so; the shards made until then are kept. StorageError: the disk is full.
        """
        processes = processes or this_process()
        first = {key: position for position, key in reversed(list(enumerate(keys)))}
        known = self._scan(first)
        # one list for all processes: what each sees of the folder may differ while the others write
        groups = processes.from_main(self._groups(keys, known, first, size))
        total, done = len(first), len(known)

        def fill(group: Sequence[int]) -> None:
            nonlocal done
            if stop and stop():
                raise TrainingStopped(f"Stopped with {done} of {total} rows of {self.folder.parent.name} computed; "
                                      "they are kept.", "Start again to go on from there.")
            self._write([keys[p] for p in group], make(group))
            done += len(group)
            if progress:
                progress(min(done, total), total)

        for group in processes.share(groups):
            fill(group)
        processes.wait()
        known = self._scan(first)
        # another machine's disk may hold what its processes made
        for group in self._groups(keys, known, first, size):
            fill(group)
            known |= self._scan({keys[p]: p for p in group})
        if progress:
            progress(total, total)
        return Rows([known[key] for key in keys])

    @staticmethod
    def _groups(keys: Sequence[str], known: Mapping[str, object], first: Mapping[str, int],
                size: int) -> list[list[int]]:
        missing = [p for p, key in enumerate(keys) if key not in known and first[key] == p]
        return [missing[start : start + size] for start in range(0, len(missing), size)]

    def _path(self, keys: Sequence[str]) -> Path:
        return self.folder / f"{fingerprint(*keys)}.safetensors"

    def _write(self, keys: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        header = {"keys": json.dumps(list(keys)), "content": bytes_hash(tensors)}
        write_safetensors(self._path(keys), tensors, header)

    def _scan(self, wanted: Mapping[str, object]) -> dict[str, tuple[Mapping[str, Tensor], int]]:
        """Where the wanted keys' rows are; shards that hold none of them are not read beyond their header."""
        found: dict[str, tuple[Mapping[str, Tensor], int]] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    header = file.metadata() or {}
                    keys = json.loads(header["keys"])
                    if not any(key in wanted and key not in found for key in keys):
                        continue
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                if bytes_hash(tensors) != header["content"] or any(len(t) != len(keys) for t in tensors.values()):
                    raise ValueError("its content is not what was stored")
            except FileNotFoundError:
                continue  # another process found it damaged first
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                _log.warning("%s is damaged (%s): it is made again.", path.name, error)
                self._drop(path)
                continue
            found |= {key: (tensors, row) for row, key in enumerate(keys) if key in wanted and key not in found}
        return found

    @staticmethod
    def _drop(path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:  # a cache that may only be read: the row is made again every time, which is slow
            _log.warning("%s cannot be removed: %s", path.name, error)
