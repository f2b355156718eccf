"""Words to a running training: an interface leaves "pause" or "stop" in its job's folder, to be obeyed after a step.

The folder is named by the variable APL_JOB, set by whoever started the process; without it nobody gives orders. Ctrl-C
works all the same, in a pause too.
"""

from __future__ import annotations

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
