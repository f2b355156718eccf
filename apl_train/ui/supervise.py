"""Runs one job to its end, apart from the page that asked for it: `python -I supervise.py JOB_FOLDER`.

It holds the job's lock while the command lives (so any page can tell a running job from one that was lost), sends what
the command prints to `log.txt`, passes `control` on and leaves `exit.json`. Standard library only: it starts in any
interpreter at once, and nothing that breaks the trainer's packages can keep it from telling so.

Should it be ended alone, the command goes on: `process.json` says which process that is, by its number and by when it
began (numbers are used again), and the supervisor started next takes it over. Its exit code is then what it left in
`code.json` itself, as `apl` does at its end; a command that left none was ended from outside.
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
from typing import IO, Any

POLL = 0.2
_ENDED_FROM_OUTSIDE = -9


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


def get_json(path: Path) -> dict[str, Any]:
    """The object in a file; {} where there is none or it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def birth(pid: int) -> str:
    """When a living process began, in words of the system that no second process of that number can have; "" for one
    that ended, or where the system does not say."""
    if sys.platform == "linux":
        try:
            after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        except OSError:
            return ""
        state, *rest = after_name.split()
        return "" if state in "ZX" else f"{boot} {rest[18]}"  # field 22 of proc(5): clock ticks after boot
    if os.name == "nt":
        return _birth_on_windows(pid)
    ask = ["ps", "-o", "stat=,lstart=", "-p", str(pid)]
    try:
        found = subprocess.run(ask, capture_output=True, text=True, check=False, timeout=10).stdout.split(None, 1)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if len(found) < 2 or found[0].startswith("Z") else found[1].strip()


def _birth_on_windows(pid: int) -> str:
    import ctypes

    kernel = ctypes.windll.kernel32  # type: ignore[attr-defined]
    kernel.OpenProcess.restype = ctypes.c_void_p
    handle = kernel.OpenProcess(0x1000, False, pid)  # PROCESS_QUERY_LIMITED_INFORMATION
    if not handle:
        return ""
    times, code = [ctypes.c_uint64() for _ in range(4)], ctypes.c_uint32()
    try:
        known = kernel.GetProcessTimes(ctypes.c_void_p(handle), *map(ctypes.byref, times))
        kernel.GetExitCodeProcess(ctypes.c_void_p(handle), ctypes.byref(code))
    finally:
        kernel.CloseHandle(ctypes.c_void_p(handle))
    return str(times[0].value) if known and code.value == 259 else ""  # STILL_ACTIVE


def living(folder: Path) -> int | None:
    """The process of a job that was started and still lives; None where there is none."""
    found = get_json(folder / "process.json")
    pid, began = found.get("pid"), found.get("began")
    return pid if isinstance(pid, int) and began and birth(pid) == began else None


def last_word(folder: Path) -> int | None:
    """The exit code that a job's own process left; None where it left none."""
    left, process = get_json(folder / "code.json"), get_json(folder / "process.json")
    code = left.get("code")
    return code if isinstance(code, int) and left.get("pid") == process.get("pid") else None


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(OSError):  # it may have just ended
        if os.name == "nt":
            if number == signal.SIGTERM:
                os.kill(pid, number)  # a request to save is read from `control` by the training itself
        else:
            os.killpg(pid, number)  # its own workers too


def _begin(folder: Path) -> subprocess.Popen[bytes]:
    """Starts the command of `job.json`. Raises OSError where it cannot be."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    environment = os.environ | job.get("env", {}) | {"APL_JOB": str(folder), "PYTHONUNBUFFERED": "1"}
    with (folder / "log.txt").open("ab") as log:
        try:
            child = subprocess.Popen(job["argv"], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                     cwd=job.get("cwd"), env=environment, start_new_session=True)
        except OSError as error:
            log.write(f"error: {job['argv'][0]} cannot be started: {error.strerror}.\n".encode())
            raise
    put_json(folder / "process.json", {"pid": child.pid, "began": birth(child.pid)})
    return child


def run(folder: Path) -> int:
    """Runs the command of `job.json`, or takes over the one that runs; returns its exit code (a negative one: ended by
    that signal)."""
    for _ in range(20):  # a page that looks whether the lock is held holds it for a moment
        if (lock := take_lock(folder / "lock")) is not None:
            break
        time.sleep(0.1)
    else:
        return 0  # another supervisor runs it already
    with lock:
        if (folder / "exit.json").exists():
            return 0
        if (folder / "process.json").exists():  # never begun twice, whether it still lives or not
            pid = get_json(folder / "process.json").get("pid", 0)

            def ended() -> int | None:
                if living(folder) is not None:
                    return None
                word = last_word(folder)
                return _ENDED_FROM_OUTSIDE if word is None else word
        else:
            try:
                child = _begin(folder)
            except OSError:
                put_json(folder / "exit.json", {"code": 127, "time": time.time()})
                return 127
            pid, ended = child.pid, child.poll
        signal.signal(signal.SIGTERM, lambda *_: _signal(pid, signal.SIGINT))
        told = ""
        while (code := ended()) is None:
            with contextlib.suppress(OSError):
                word = (folder / "control").read_text(encoding="utf-8").strip()
                if word != told and word in ("stop", "kill"):
                    _signal(pid, signal.SIGINT if word == "stop" else getattr(signal, "SIGKILL", signal.SIGTERM))
                told = word
            time.sleep(POLL)
        put_json(folder / "exit.json", {"code": code, "time": time.time()})
    return code


if __name__ == "__main__":
    sys.exit(0 if run(Path(sys.argv[1])) == 0 else 1)
