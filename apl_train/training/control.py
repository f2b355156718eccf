"""Words to a running training: an interface leaves "pause" or "stop" in its job's folder, to be obeyed after a step.

The folder is named by the variable APL_JOB, set by whoever started the process; without it nobody gives orders. Ctrl-C
works all the same, in a pause too. At its end the process leaves its exit code there: whoever started it may be gone by
then, and nobody else can be told it by the system.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

VARIABLE = "APL_JOB"
FILE = "control"
POLL = 0.25
"""Seconds between two looks while paused."""


def job_folder() -> Path | None:
    """Where orders for this process are left; None for a process that nobody but the terminal commands."""
    value = os.environ.get(VARIABLE, "")
    return Path(value) if value else None


def leave_code(code: int) -> None:
    """Leaves the exit code of this process in its job's folder; nothing where it is not that job's own process."""
    folder = job_folder()
    if folder is None:
        return
    try:
        own = json.loads((folder / "process.json").read_text(encoding="utf-8")).get("pid") == os.getpid()
    except (OSError, ValueError, AttributeError):
        return
    if own:
        from apl_core.atomic import write_json
        from apl_core.errors import StorageError

        with contextlib.suppress(StorageError):  # a full disk was told already
            write_json(folder / "code.json", {"code": code, "pid": os.getpid(), "time": time.time()})


def obeying(asked: Callable[[], bool], tell: Callable[[str], object], folder: Path | None = None,
            wait: Callable[[float], object] = time.sleep) -> Callable[[], bool]:
    """The `stop` of a training that obeys: True when it has to save and end; does not return while it is paused.

    Args:
        asked: whether a signal asked to stop.
        tell: called with "paused" and "continued".
        folder: where orders are left; by default `job_folder()`.
        wait: sleeps; for tests.
    """
    folder = folder or job_folder()
    if folder is None:
        return asked
    path = folder / FILE

    def word() -> str:
        try:
            return path.read_text(encoding="utf-8").strip()
        except OSError:
            return ""

    def stop() -> bool:
        said = word()
        if said == "pause" and not asked():
            tell("paused")
            while said == "pause" and not asked():
                wait(POLL)
                said = word()
            tell("continued")
        return asked() or said in ("stop", "kill")

    return stop
