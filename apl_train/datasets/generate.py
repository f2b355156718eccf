"""Pictures of S_ID and S_Reg, drawn by the base model itself (paper sec. 4.1), looked at, and drawn again where wrong.

Step prompts -> pictures. A folder is filled picture by picture, so that whatever interrupts it loses a batch at most;
the same command goes on. `plan.json` says what the folder is being filled with, `draws-*.json` what had to be redrawn.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from apl_core.atomic import write_bytes, write_json, write_text
from apl_core.errors import ConfigError, DatasetError, TrainingStopped
from apl_core.identity import FaceEmbedder
from apl_train.datasets.cast import CastMember, NeutralLine
from apl_train.datasets.contact_sheet import Frame, write_sheets
from apl_train.datasets.dataset import COLUMNS, TABLE
from apl_train.model.backend import Backend
from apl_train.processes import this_process
from apl_train.seeds import seed_of

TEMPLATES = ("A photo of {}", "A portrait of {}", "A close-up photo of {}", "A close-up portrait of {}")
"""c1 of S_ID, one after another (the paper's own code uses these)."""
PLAN = "plan.json"
FACES = {"id": (1, 1), "face": (1, 999), "nonface": (0, 0)}
"""Faces that a picture of a kind may show: least and most."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Wanted:
    """One picture to draw: `key` names its file, the rest is its row of metadata.csv."""

    key: str
    name: str
    prompt: str
    description: str
    kind: str


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn: denoising steps, guidance, seed, how often a wrong one is drawn again, rows a pass."""

    steps: int = 30
    guidance: float = 7.5
    seed: int = 0
    redraws: int = 3
    batch: int = 4


@dataclass(frozen=True)
class Outcome:
    """What became of a set.

    Attributes:
        drawn: pictures in the set.
        redrawn: drawings thrown away on the way, by reason ("no face", "several faces", "a face").
        given_up: what stayed wrong after all redraws and is left out: (name or prompt, reason).
        unchecked: whether nobody looked for faces.
    """

    drawn: int
    redrawn: dict[str, int]
    given_up: tuple[tuple[str, str], ...]
    unchecked: bool

    def text(self, what: str) -> str:
        """A few lines for people."""
        lines = [f"{what}: {self.drawn} pictures"]
        if self.unchecked:
            lines.append("  faces were not checked: no recogniser was given")
        if self.redrawn:
            lines.append("  drawn again: " + ", ".join(f"{n} with {why}" for why, n in sorted(self.redrawn.items())))
        if self.given_up:
            shown = ", ".join(f"{name!r} ({why})" for name, why in self.given_up[:8])
            more = f" and {len(self.given_up) - 8} more" if len(self.given_up) > 8 else ""
            lines.append(f"  left out: {shown}{more}")
        return "\n".join(lines)


def wanted_of_cast(people: Sequence[CastMember], each: int) -> list[Wanted]:
    """`each` pictures of every person with the split train: c1 by template, c2 the description."""
    chosen = [p for p in people if p.split == "train"]
    return [Wanted(f"{i:04d}-{k}", p.name, TEMPLATES[k % len(TEMPLATES)].format(p.name), p.description, "id")
            for i, p in enumerate(chosen) for k in range(each)]


def wanted_of_prompts(lines: Sequence[NeutralLine], count: int) -> list[Wanted]:
    """`count` pictures of neutral prompts, persons and things in equal parts as long as there are both."""
    # in an order of their own: neighbours in a list are often alike, and few pictures should still be various
    mixed = sorted(lines, key=lambda line: hashlib.sha256(line.prompt.encode()).digest())
    faces, things = ([p for p in mixed if p.kind == kind] for kind in ("face", "nonface"))
    mixed = [p for pair in zip(faces, things, strict=False) for p in pair]
    mixed += faces[len(things):] + things[len(faces):]
    if not mixed:
        raise DatasetError("There is no neutral prompt.", "Give a table with the columns prompt,kind.", field="prompt")
    return [Wanted(f"{i:05d}", "", mixed[i % len(mixed)].prompt, "", mixed[i % len(mixed)].kind) for i in range(count)]


class Studio:
    """Draws one set into one folder.

    Args:
        embedder: looks for faces; None: nobody looks.
        progress: called with (pictures done, pictures in all).
        stop: asked between passes.
    """

    def __init__(self, backend: Backend, folder: Path, drawing: Drawing, *, embedder: FaceEmbedder | None = None,
                 progress: Progress | None = None, stop: Callable[[], bool] | None = None) -> None:
        self._backend, self._folder, self._how = backend, folder, drawing
        self._embedder, self._progress, self._stop = embedder, progress, stop or (lambda: False)
        self._processes = this_process()
        self._failed: dict[str, list[str]] = {}

    def fill(self, wanted: Sequence[Wanted]) -> Outcome:
        """Draw what is not there yet, then write metadata.csv and contact sheets.

        Raises:
            ConfigError: the folder holds a set of another model or of other settings.
            DatasetError: nothing usable could be drawn.
            TrainingStopped: `stop()` said so; the same command goes on.
        """
        self._processes.once(lambda: self._check_plan(wanted))
        self._failed = self._read_failures()
        mine = self._processes.share(wanted)
        own = {w.key: self._failed[w.key] for w in mine if w.key in self._failed}  # its file is written anew
        for attempt in range(self._how.redraws + 1):
            waiting = [w for w in mine if not self._path(w).exists() and len(self._failed.get(w.key, ())) == attempt]
            for start in range(0, len(waiting), self._how.batch):
                if self._stop():
                    raise TrainingStopped(f"Stopped with {self._count(wanted)} of {len(wanted)} pictures drawn.",
                                          "Run the same command again to go on.")
                self._draw(waiting[start : start + self._how.batch], attempt, own)
                if self._progress:
                    self._progress(self._count(wanted), len(wanted))
        self._processes.wait()
        self._failed = self._read_failures()
        return self._processes.once(lambda: self._finish(wanted))

    def _path(self, w: Wanted) -> Path:
        return self._folder / f"{w.key}.png"

    def _count(self, wanted: Sequence[Wanted]) -> int:
        return sum(self._path(w).exists() for w in wanted)

    def _check_plan(self, wanted: Sequence[Wanted]) -> None:
        digest = hashlib.sha256(json.dumps([astuple(w) for w in wanted]).encode()).hexdigest()
        plan = {"model": self._backend.sha256, "rows": digest, "steps": self._how.steps, "seed": self._how.seed,
                "guidance": self._how.guidance, "size": self._backend.size,
                "recogniser": self._embedder.sha256 if self._embedder else None}
        if sizes := getattr(self._backend, "sizes", None):
            plan["sizes"] = list(sizes)
        path = self._folder / PLAN
        if path.exists():
            try:
                old = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                old = {}
            changed = [key for key in plan if old.get(key) != plan[key]]
            if changed:
                raise ConfigError(f"{self._folder} was begun with another {', '.join(changed)}.",
                                  "Choose another folder, or delete this one to draw it anew.", field=changed[0])
        elif (self._folder / TABLE).exists():
            raise ConfigError(f"{self._folder} holds a dataset that was not made by this command.",
                              "Choose another folder.", field="out")
        else:
            write_json(path, plan)
        for half in self._folder.glob(".*.tmp"):  # of a process that was ended while it wrote
            half.unlink(missing_ok=True)

    def _read_failures(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for path in sorted(self._folder.glob("draws-*.json")):
            try:
                found |= json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                continue  # drawn again, that is all
        return found

    def _draw(self, part: Sequence[Wanted], attempt: int, own: dict[str, list[str]]) -> None:
        seeds = [seed_of("apl-draw", self._how.seed, w.key, w.prompt, attempt) & 0x7FFFFFFF for w in part]
        made = self._backend.sample([w.prompt for w in part], seeds, steps=self._how.steps,
                                    guidance=self._how.guidance, batch=self._how.batch).images
        looked = self._embedder.faces_of(list(made)) if self._embedder else None
        for i, w in enumerate(part):
            reason = "" if looked is None else _fault(w.kind, len(looked[i]))
            if reason:
                self._failed.setdefault(w.key, []).append(reason)
                own[w.key] = self._failed[w.key]
                continue
            data = io.BytesIO()
            Image.fromarray(np.asarray(made[i])).save(data, "PNG")
            write_bytes(self._path(w), data.getvalue())
        if own:
            write_json(self._folder / f"draws-{self._processes.index}.json", own)

    def _finish(self, wanted: Sequence[Wanted]) -> Outcome:
        there = [w for w in wanted if self._path(w).exists()]
        if not there:
            raise DatasetError(f"None of the {len(wanted)} pictures could be used.",
                               "Look at the recogniser and at what the model draws with `apl sample`.", field="image")
        write_table(self._folder, [(f"{w.key}.png", w) for w in there])
        write_sheets(self._folder, [Frame(self._path(w), w.name or w.prompt) for w in there])
        reasons = [why for failures in self._failed.values() for why in failures]
        lost = tuple((w.name or w.prompt, self._failed[w.key][-1]) for w in wanted if not self._path(w).exists())
        return Outcome(len(there), {why: reasons.count(why) for why in set(reasons)}, lost, self._embedder is None)


def _fault(kind: str, faces: int) -> str:
    least, most = FACES[kind]
    if least <= faces <= most:
        return ""
    return "no face" if faces < least else "several faces" if least else "a face"


def write_table(folder: Path, rows: Sequence[tuple[str, Wanted]]) -> None:
    """metadata.csv of a set: (picture, row). Raises StorageError."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows((image, w.name, w.prompt, w.description, w.kind) for image, w in rows)
    write_text(folder / TABLE, out.getvalue())


def report(outcome: Outcome, folder: Path) -> dict[str, Any]:
    """Plain values for --json."""
    return {"folder": str(folder), "drawn": outcome.drawn, "redrawn": outcome.redrawn,
            "left_out": [list(pair) for pair in outcome.given_up], "faces_checked": not outcome.unchecked,
            "contact_sheets": [str(p) for p in sorted(folder.glob("contact-sheet-*.jpg"))]}
