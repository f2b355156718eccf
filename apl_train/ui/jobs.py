"""Jobs as folders, `<run>/jobs/<number>-<kind>/`: what to run, whether it runs, what it printed, how it ended.

    job.json   the command and who asked for it          lock          held by what watches it
    log.txt    what it printed                           control       "pause", "stop" or "kill", for it to obey
    exit.json  its exit code; written at its end         process.json  which process it is; code.json: its own last word

Nothing else is known of a job: the queue's database only remembers an order, and can be thrown away.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import supervise
from .core import core
from .place import ROOT, Place

QUEUED, RUNNING, DONE, STOPPED, FAILED, LOST = "queued", "running", "done", "stopped", "failed", "lost"
STARTING = 30.0
"""Seconds within which a started job must have begun its process, or it counts as lost."""
AGAIN = 5.0
"""Seconds between two attempts to take over a job whose supervisor is gone."""
_STOPPED_CODES = (130, -2, -15)


@dataclass(frozen=True)
class Job:
    """One job. `code`: exit code, None while it has none; `created`, `ended`: seconds since 1970."""

    folder: Path
    kind: str
    title: str
    argv: tuple[str, ...]
    created: float
    state: str
    code: int | None
    ended: float | None

    @property
    def run(self) -> Path:
        return self.folder.parent.parent

    @property
    def control(self) -> str:
        """What it was last told."""
        return _word(self.folder)


def create(place: Place, run: Path, kind: str, title: str, arguments: Sequence[str]) -> Path:
    """A new job of the run folder `run`: `apl <arguments>` in the trainer's interpreter. Raises StorageError."""
    folder = run / "jobs"
    number = 1 + max((int(p.name[:4]) for p in folder.glob("[0-9][0-9][0-9][0-9]-*")), default=0)
    path = folder / f"{number:04d}-{kind}"
    packages = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    core("atomic").write_json(path / "job.json", {
        "kind": kind, "title": title, "argv": [place.python, "-m", "apl_train", *arguments],
        "cwd": str(place.runs.parent), "env": {"PYTHONPATH": packages}, "created": time.time(),
    })
    return path


def read(folder: Path) -> Job | None:
    """The job of a folder as it is now; None where there is none, or it cannot be read."""
    job = _json(folder / "job.json")
    if not isinstance(job.get("argv"), list) or not isinstance(job.get("created"), int | float):
        return None
    state, code, ended = _state(folder)
    return Job(folder, str(job.get("kind", "")), str(job.get("title", "")), tuple(map(str, job["argv"])),
               float(job["created"]), state, code, ended)


def of_run(run: Path) -> list[Job]:
    """All jobs of a run folder, oldest first."""
    found = (read(path) for path in sorted((run / "jobs").glob("[0-9][0-9][0-9][0-9]-*")))
    return [job for job in found if job is not None]


def start(job: Job) -> None:
    """Starts the supervisor of a job, which outlives this process. Raises StorageError."""
    core("atomic").write_json(job.folder / "started.json", {"time": time.time()})
    argv = [job.argv[0], "-I", supervise.__file__, str(job.folder)]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    # apart from this process and its terminal, whose end must not be the training's
    apart: dict[str, Any] = {"start_new_session": True}
    if os.name == "nt":
        apart = {"creationflags": subprocess.DETACHED_PROCESS | subprocess.CREATE_NEW_PROCESS_GROUP}
    try:
        subprocess.Popen(argv, **apart, **quiet)
    except OSError as error:
        core("atomic").write_text(job.folder / "log.txt", f"error: {argv[0]} cannot be started: {error.strerror}.\n")
        end(job, 127)


def adopt(job: Job) -> bool:
    """Starts a supervisor for a job that goes on without one. Raises StorageError."""
    since = time.time() - float(_json(job.folder / "started.json").get("time") or 0.0)
    if since < AGAIN or supervise.is_locked(job.folder / "lock") or supervise.living(job.folder) is None:
        return False
    start(job)
    return True


def tell(job: Job, word: str) -> None:
    """Leaves a word for a running job: "pause", "stop" (save first), "kill", or "" to go on. Raises StorageError."""
    core("atomic").write_text(job.folder / "control", word)


def end(job: Job, code: int) -> None:
    """Closes a job that will not run: one taken out of the queue, or that could not be started."""
    core("atomic").write_json(job.folder / "exit.json", {"code": code, "time": time.time()})


def log_lines(job: Job, most: int = 40, tail: int = 64 * 1024) -> list[str]:
    """The last lines that a job printed; of a progress bar only its last state."""
    try:
        with (job.folder / "log.txt").open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - tail))
            text = log.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    lines = (line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n"))
    return [line for line in lines if line][-most:]


def _word(folder: Path) -> str:
    try:
        return (folder / "control").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _state(folder: Path) -> tuple[str, int | None, float | None]:
    if (folder / "exit.json").exists():
        return _ended(folder, _json(folder / "exit.json"))
    if supervise.is_locked(folder / "lock"):
        return RUNNING, None, None
    started = _json(folder / "started.json").get("time")
    if not isinstance(started, int | float):
        return QUEUED, None, None
    if (folder / "exit.json").exists():  # it ended between the first look and the lock
        return _state(folder)
    if supervise.living(folder) is not None:  # its supervisor alone was ended
        return RUNNING, None, None
    if supervise.last_word(folder) is not None:  # it came to its end without one
        return _ended(folder, _json(folder / "code.json"))
    # a lock file alone says nothing: it is made before it is locked, and whoever looks holds it for a moment
    starting = not (folder / "process.json").exists() and time.time() - started < STARTING
    return (RUNNING if starting else LOST), None, None


def _ended(folder: Path, left: Mapping[str, Any]) -> tuple[str, int, float | None]:
    """State, code and time of a job that left a code."""
    code = left.get("code") if isinstance(left.get("code"), int) else 1
    asked = code in _STOPPED_CODES or _word(folder) in ("stop", "kill")
    state = DONE if code == 0 else STOPPED if asked else FAILED
    return state, code, left.get("time") if isinstance(left.get("time"), int | float) else None
