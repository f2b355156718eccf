"""Runs one job to its end, apart from the page that asked for it: `python -I supervise.py JOB_FOLDER`.

It holds the job's lock while the command lives (so any page can tell a running job from one that was lost), sends what
the command prints to `log.txt`, passes `control` on and leaves `exit.json`. Standard library only: it starts in any
interpreter at once, and nothing that breaks the trainer's packages can keep it from telling so.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

POLL = 0.2


def take_lock(path: Path) -> IO[bytes] | None:
    """The opened lock file, locked until it is closed or the process ends in any way; None when another holds it."""
    handle = path.open("ab")
    try:
        if os.name == "nt":
            import msvcrt

            handle.seek(0)
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        return None
    return handle


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock."""
    if not path.exists():
        return False
    try:
        handle = take_lock(path)
    except OSError:
        return False
    if handle is None:
        return True
    handle.close()
    return False


def put_json(path: Path, value: object) -> None:
    """Whole or not at all, as apl_core.atomic does, which this process must not need."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as out:
        json.dump(value, out, ensure_ascii=False, indent=2)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(path)


def _signal(child: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(OSError):  # it may have just ended
        if os.name == "nt":
            if number == signal.SIGTERM:
                child.terminate()  # a request to save is read from `control` by the training itself
        else:
            os.killpg(child.pid, number)  # its own workers too


def run(folder: Path) -> int:
    """Runs the command of `job.json`; returns its exit code (a negative one: ended by that signal)."""
    for _ in range(20):  # a page that looks whether the lock is held holds it for a moment
        if (lock := take_lock(folder / "lock")) is not None:
            break
        time.sleep(0.1)
    else:
        return 0  # another supervisor runs it already
    with lock:
        job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        environment = os.environ | job.get("env", {}) | {"APL_JOB": str(folder), "PYTHONUNBUFFERED": "1"}
        with (folder / "log.txt").open("ab") as log:
            try:
                child = subprocess.Popen(job["argv"], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                         cwd=job.get("cwd"), env=environment, start_new_session=True)
            except OSError as error:
                log.write(f"error: {job['argv'][0]} cannot be started: {error.strerror}.\n".encode())
                put_json(folder / "exit.json", {"code": 127, "time": time.time()})
                return 127
            signal.signal(signal.SIGTERM, lambda *_: _signal(child, signal.SIGINT))
            told = ""
            while (code := child.poll()) is None:
                with contextlib.suppress(OSError):
                    word = (folder / "control").read_text(encoding="utf-8").strip()
                    if word != told and word in ("stop", "kill"):
                        _signal(child, signal.SIGINT if word == "stop" else getattr(signal, "SIGKILL", signal.SIGTERM))
                    told = word
                time.sleep(POLL)
        put_json(folder / "exit.json", {"code": code, "time": time.time()})
    return code


if __name__ == "__main__":
    sys.exit(0 if run(Path(sys.argv[1])) == 0 else 1)
