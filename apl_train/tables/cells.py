"""Cells: the units of work of an evaluation, each stored whole under a run folder and never done twice.

A cell's key names everything that its result depends on (model, prefix, persons, seed, measuring models), so that two
tables that need the same pictures share them, and an interrupted evaluation goes on where it was. Under
`accelerate launch` the cells that are missing are divided among the processes, which share the run folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from apl_core.atomic import write_safetensors
from apl_core.errors import APLError, ScoreError, TrainingStopped
from apl_core.metadata import content_hash
from apl_train.processes import Processes, this_process

VERSION = 1
_log = logging.getLogger("apl.evaluate")


@dataclass(frozen=True)
class Cell:
    """One unit of work.

    Attributes:
        label: short words for people: progress and the beginning of the file's name.
        key: JSON values; everything that the result depends on.
        weight: pictures in it (or any measure of its length), for the time left.
    """

    label: str
    key: Mapping[str, Any]
    weight: int = 1

    @property
    def digest(self) -> str:
        """SHA-256 of the key, lowercase hex."""
        text = json.dumps({"version": VERSION, **self.key}, sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a cell found: tensors by name, and JSON values."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)


class CellStore:
    """The stored cells of one folder. Embeddings of faces are personal data: the folder belongs to the user alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, cell: Cell) -> Path:
        plain = re.sub(r"[^A-Za-z0-9.-]+", "-", cell.label).strip("-")[:60] or "cell"
        return self.folder / f"{plain}-{cell.digest[:16]}.safetensors"

    def save(self, cell: Cell, outcome: Outcome) -> None:
        """Writes the cell whole or not at all. Raises StorageError."""
        tensors = {k: v.detach().cpu().contiguous() for k, v in outcome.tensors.items()}
        write_safetensors(self.path(cell), tensors, {
            "apl.key": cell.digest, "apl.values": json.dumps(outcome.values), "apl.content": content_hash(tensors)})

    def load(self, cell: Cell) -> Outcome | None:
        """What was stored; None, with a warning unless it is simply missing, when it cannot be trusted."""
        path = self.path(cell)
        if not path.is_file():
            return None
        try:
            with safe_open(str(path), framework="pt") as opened:
                meta = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            if meta.get("apl.key") != cell.digest or meta.get("apl.content") != content_hash(tensors):
                raise ValueError("its content is not what was stored")
            return Outcome(tensors, json.loads(meta["apl.values"]))
        except Exception as error:  # safetensors, I/O and JSON errors alike: the cell is simply done again
            _log.warning("The cell %s is damaged (%s): it is done again.", path.name, error)
            return None


class Runner:
    """Does the cells that are missing and gives back all of them.

    Args:
        folder: where they are kept; on several machines it must be one that all of them see.
        stop: asked between two cells; True ends the work with what is done kept.
        quiet: no progress bar.
    """

    def __init__(self, folder: Path, *, processes: Processes | None = None, stop: Callable[[], bool] | None = None,
                 quiet: bool = False) -> None:
        self.store, self.processes = CellStore(folder), processes or this_process()
        self._stop, self._quiet = stop or (lambda: False), quiet
        self.done, self.skipped = 0, 0

    def fill(self, title: str, cells: Sequence[Cell], work: Callable[[Cell], Outcome]) -> list[Outcome]:
        """The outcomes of all cells, in their order; `work` is called for those that are not stored.

        Raises:
            TrainingStopped: `stop()` said so; finished cells are kept.
            APLError: what `work` raised, in every process whichever it happened in; finished cells are kept.
            ScoreError: another process's cells are not to be seen.
        """
        found: dict[str, Outcome] = {}
        unique = {cell.digest: cell for cell in cells}
        if self.processes.main:
            found = {d: o for d, cell in unique.items() if (o := self.store.load(cell)) is not None}
        have = set(self.processes.from_main(sorted(found)))
        todo = [cell for digest, cell in unique.items() if digest not in have]
        mine = self.processes.share(todo)
        self.skipped += len(have)
        total, first = sum(c.weight for c in unique.values()), sum(c.weight for d, c in unique.items() if d in have)
        stopped, failure = False, None
        # one process speaks for all: the others are about as far as it is
        with tqdm(total=total, initial=first, desc=title, unit="picture", dynamic_ncols=True,
                  disable=self._quiet or not self.processes.main) as bar:
            for cell in mine:
                if stopped := self._stop():
                    break
                bar.set_postfix_str(cell.label, refresh=True)
                try:
                    outcome = work(cell)
                    self.store.save(cell, outcome)
                except APLError as error:
                    failure = error  # told to the others first: they wait for this process below
                    break
                found[cell.digest] = outcome
                self.done += 1
                bar.update(min(cell.weight * self.processes.count, total - bar.n))
        ends = self.processes.everyone((stopped, failure))
        for _, error in ends:
            if error is not None:
                raise error
        if any(stopped for stopped, _ in ends):
            raise TrainingStopped(f"Stopped in {title}; the cells that are done are kept in {self.store.folder}.",
                                  "The same command goes on from there.")
        return [found.get(cell.digest) or self._of_others(cell) for cell in cells]

    def _of_others(self, cell: Cell) -> Outcome:
        outcome = self.store.load(cell)
        if outcome is None:
            raise ScoreError(f"The cell {cell.label} is not in {self.store.folder}, though a process did it.",
                             "Several machines need a run folder that all of them see.", field="run")
        return outcome
