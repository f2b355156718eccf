"""Run folders as the page sees them: how far a run is, how fast, what it drew, what it made, how it ended."""

from __future__ import annotations

import itertools
import json
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import jobs
from .jobs import DONE, FAILED, LOST, RUNNING, STOPPED, Job
from .place import Place
from .tail import FILE as EVENTS
from .tail import Events

PAUSED = "paused"
PLAN = "make.json"
_LEVEL = re.compile(r"(?P<base>.+)\.step-(?P<step>[0-9]{1,9})\.safetensors")
_FRESH = 60.0
"""Seconds since its last event within which a run without a job counts as running in a terminal."""
_WINDOW = 80


@dataclass(frozen=True)
class Preview:
    """One person at one step: file names of the pictures without and with the prefix, and the scores under them."""

    name: str
    split: str
    off: str
    on: str
    off_score: float | None
    on_score: float | None


@dataclass(frozen=True)
class Run:
    """One run folder, read now.

    Attributes:
        jobs: everything that was started for it, oldest first; empty for a run of the command line.
        state: one of jobs' states or "paused".
        step, steps: optimizer steps done and in all; 0 before the first event.
        losses: (step, l_id, l_reg) of every step; None where the batch had no such sample.
        rate: optimizer steps a second over the last steps; None before there are some.
        left: seconds left by that rate; None when nothing trains.
        levels: optimizer step to prefix file; the final file under `steps`.
        previews: step to what was drawn then.
        config: settings of the training, plain values.
        error: what ended it, in the trainer's own words; "" for nothing.
        scores: scores.json; {} where the run was not scored.
        stage, planned: of `apl make`: which stage it is in, and how many seconds it expected in all.
    """

    folder: Path
    jobs: tuple[Job, ...]
    state: str
    step: int = 0
    steps: int = 0
    losses: tuple[tuple[int, float | None, float | None], ...] = ()
    rate: float | None = None
    left: float | None = None
    levels: Mapping[int, Path] = field(default_factory=dict)
    previews: Mapping[int, tuple[Preview, ...]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    scores: Mapping[str, Any] = field(default_factory=dict)
    changed: float = 0.0
    stage: str = ""
    planned: float | None = None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def job(self) -> Job | None:
        """The newest one."""
        return self.jobs[-1] if self.jobs else None

    @property
    def final(self) -> Path | None:
        """The finished prefix, when there is one."""
        return self.levels.get(self.steps) if self.steps else None


def training_folder(run: Path) -> Path:
    """Where a run's training lies: in the run itself, or one level below, as a run of `apl make` has it."""
    return run / "train" if (run / "train" / "config.yaml").exists() else run


def read_run(run: Path, events: Events) -> Run | None:
    """The run of a folder; None where the folder is none."""
    if not run.is_dir():
        return None
    own = tuple(jobs.of_run(run))
    training = training_folder(run)
    if training == run and (run / PLAN).exists():
        training = run / "train"  # a run of `apl make` that has not come so far
    if not own and not (training / "config.yaml").exists() and not (training / EVENTS).exists():
        return None
    rows = events.of(training)
    around = events.of(run) if training != run or (run / PLAN).exists() else []
    stages = [row for row in around if row.get("event") == "stage"]
    steps = [row for row in rows if row.get("event") == "step" and isinstance(row.get("step"), int)]
    starts = [row for row in rows if row.get("event") == "start"]
    total = _whole(starts[-1].get("steps")) if starts else 0
    step = steps[-1]["step"] if steps else _whole(starts[-1].get("step")) if starts else 0
    state = _state(own, rows)
    rate = _rate(steps, starts) if steps else None
    config = read_settings(training / "config.yaml")
    total = total or _whole(config.get("steps"))
    return Run(
        folder=run, jobs=own, state=state, step=step, steps=total,
        losses=tuple((row["step"], _number(row.get("l_id")), _number(row.get("l_reg"))) for row in steps),
        rate=rate, left=(total - step) / rate if rate and state == RUNNING and step < total else None,
        levels=_levels(training, total), previews=_previews(training), config=config,
        error=_error(rows) or _error(around), scores=_object(run / "scores.json"), changed=_changed(run, training, own),
        stage=str(stages[-1].get("stage", "")) if stages else "", planned=_number(_object(run / PLAN).get("seconds")),
    )


def all_runs(place: Place, events: Events) -> list[Run]:
    """Every run below `place.runs`, the newest change first."""
    try:
        folders = sorted(place.runs.iterdir())
    except OSError:
        return []
    found = (read_run(folder, events) for folder in folders if not folder.name.startswith("."))
    return sorted((run for run in found if run is not None), key=lambda run: -run.changed)


def read_settings(path: Path) -> dict[str, Any]:
    """A YAML file of settings, {} where it cannot be read: the trainer, not the page, judges what is in it."""
    import yaml

    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def _state(own: Sequence[Job], rows: Sequence[Mapping[str, Any]]) -> str:
    if own:
        job = own[-1]
        return PAUSED if job.state == RUNNING and job.control == "pause" else job.state
    last = rows[-1] if rows else {}
    ends = {"done": DONE, "stopped": STOPPED, "error": FAILED}
    if last.get("event") in ends:
        return ends[last["event"]]
    return RUNNING if time.time() - (_number(last.get("time")) or 0.0) < _FRESH else LOST


def _rate(steps: Sequence[Mapping[str, Any]], starts: Sequence[Mapping[str, Any]]) -> float | None:
    """Steps a second from the times of the last steps; pauses and pictures between them are gaps and do not count."""
    began = _number(starts[-1].get("time")) if starts else None
    times = [t for row in steps[-_WINDOW:] if (t := _number(row.get("time"))) is not None and t >= (began or 0.0)]
    gaps = [b - a for a, b in itertools.pairwise(times) if b >= a]
    if not gaps:
        return None
    middle = statistics.median(gaps)
    usual = [gap for gap in gaps if gap <= 8 * middle] or gaps
    mean = sum(usual) / len(usual)
    return 1.0 / mean if mean > 0 else None


def _error(rows: Sequence[Mapping[str, Any]]) -> str:
    for row in reversed(rows):
        if row.get("event") in ("start", "step", "stage", "done"):
            return ""
        if row.get("event") == "error":
            return str(row.get("message", ""))
    return ""


def _levels(run: Path, total: int) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for path in sorted((run / "prefix").glob("*.safetensors")):
        match = _LEVEL.fullmatch(path.name)
        found[int(match["step"]) if match else total] = path
    return dict(sorted(found.items()))


def _previews(run: Path) -> dict[int, tuple[Preview, ...]]:
    found: dict[int, tuple[Preview, ...]] = {}
    for path in (run / "previews").glob("step-*.json"):
        value = _object(path)
        rows = [row for row in value.get("persons", ()) if isinstance(row, dict)]
        if isinstance(value.get("step"), int) and rows:
            found[value["step"]] = tuple(
                Preview(str(row.get("name", "")), str(row.get("split", "")), str(row.get("off", "")),
                        str(row.get("on", "")), _number(row.get("off_score")), _number(row.get("on_score")))
                for row in rows)
    return dict(sorted(found.items()))


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _changed(run: Path, training: Path, own: Sequence[Job]) -> float:
    times = [job.ended or job.created for job in own]
    for path in (training / EVENTS, training / "config.yaml"):
        try:
            times.append(path.stat().st_mtime)
        except OSError:
            continue
    return max(times, default=0.0)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
