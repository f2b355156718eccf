"""A training as a process beside the host: start or resume it, read what it says, stop it so that it saves.

Step settings -> run folder -> prefix file. The trainer never runs inside the host (its text encoder cannot be learned
through, and its libraries need others than the trainer's): `python -m apl_train` does the work and tells of it in
events.jsonl. No host module is imported here.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..apl_core.atomic import write_text
from ..apl_core.errors import TrainingError
from ..apl_core.library import safe_name

ROOT = Path(__file__).resolve().parents[1]
PYTHON = "APL_TRAIN_PYTHON"
"""Variable that names the interpreter with the trainer's packages; never an input, which anyone could fill in."""
POLL = 0.2
GRACE = 20.0
"""Seconds in which a training that was told to stop may save; it takes one step, then it is ended."""
# On Linux the kernel tells the training to stop and save when the host dies, however it dies.
_BOOT = """import contextlib, runpy, signal, sys
with contextlib.suppress(Exception):
    import ctypes
    ctypes.CDLL(None).prctl(1, signal.SIGINT)
sys.argv[0] = "apl"
runpy.run_module("apl_train", run_name="__main__", alter_sys=True)
"""


def training_python() -> str:
    """The interpreter that trains: `APL_TRAIN_PYTHON`, else the .venv of this checkout, else the host's own."""
    if named := os.environ.get(PYTHON, "").strip():
        return named
    venv = ROOT / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    return str(venv) if venv.is_file() else sys.executable


@dataclass(frozen=True)
class Plan:
    """One training: `settings` are options of `apl train` (TrainConfig's names, and preset), `runs` holds all runs.

    The run folder follows from the settings, so that the same ones go on where they were interrupted.
    """

    runs: Path
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name of the prefix."""
        return safe_name(str(self.settings["name"]))

    @property
    def run(self) -> Path:
        """The run folder: NAME-<first eight digits of the settings' hash>."""
        said = json.dumps(dict(self.settings), sort_keys=True)
        return self.runs / f"{self.name}-{hashlib.sha256(said.encode()).hexdigest()[:8]}"

    @property
    def result(self) -> Path:
        """The finished prefix's file; there once the training is done."""
        return self.run / "prefix" / f"{self.name}.safetensors"

    @property
    def log(self) -> Path:
        """What the training printed."""
        return self.run / "comfyui" / "log.txt"

    def arguments(self) -> list[str]:
        """Words after `python -m apl_train`: `resume` where a state is saved, else `train`."""
        if (self.run / "config.yaml").exists() and any((self.run / "state").glob("*.safetensors")):
            return ["resume", str(self.run)]
        rest = {key: value for key, value in self.settings.items() if key != "preset"}
        words = ["train", "--preset", str(self.settings.get("preset", "fast")), "--run", str(self.run)]
        for key, value in sorted(rest.items()):
            words += [f"--{key}", str(value).lower() if isinstance(value, bool) else str(value)]
        return words


class Training:
    """The running process of a plan. `start` it, `events` are what it said since the last look, `stop` lets it save."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._offset = 0
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Raises TrainingError when the interpreter cannot be started."""
        plan = self.plan
        job = plan.log.parent
        job.mkdir(parents=True, exist_ok=True)
        write_text(job / "control", "")
        events = plan.run / "events.jsonl"
        self._offset = events.stat().st_size if events.exists() else 0
        env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        env |= {"APL_JOB": str(job), "PYTHONUNBUFFERED": "1"}
        if (ROOT / "apl_train").is_dir():  # a copy of the node pack alone has none: it must be installed then
            env["PYTHONPATH"] = str(ROOT)
        python = training_python()
        kind = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {
            "start_new_session": True}
        with plan.log.open("wb") as log:
            try:
                self._process = subprocess.Popen([python, "-c", _BOOT, *plan.arguments()], cwd=plan.run, env=env,
                                                 stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, **kind)
            except OSError as error:
                raise TrainingError(f"{python} cannot be started: {error.strerror}.",
                                    f"Set {PYTHON} to a Python with the trainer's packages.", field=PYTHON) from error
        atexit.register(self.stop)

    @property
    def code(self) -> int | None:
        """Exit code; None while it runs."""
        return None if self._process is None else self._process.poll()

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def events(self) -> list[dict[str, Any]]:
        """What it said since the last call; a line that is not whole yet is left for the next."""
        try:
            with (self.plan.run / "events.jsonl").open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                if size < self._offset:  # a resumed training drops what it will say again
                    self._offset = 0
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        rows = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
        return [row for row in rows if isinstance(row, dict)]

    def stop(self, grace: float = GRACE) -> None:
        """Let it save, and end it once it said so, or when it does not. Returns when nothing of it is left."""
        atexit.unregister(self.stop)
        process = self._process
        if process is None or process.poll() is not None:
            return
        with contextlib.suppress(Exception):  # a full disk must not keep it running
            write_text(self.plan.log.parent / "control", "stop")
        if os.name != "nt":
            _signal_group(process, signal.SIGINT)
        end = time.monotonic() + grace
        while process.poll() is None and time.monotonic() < end:
            # saved: what is left is the interpreter's own way out, which takes seconds with a model in memory
            if any(event.get("event") == "stopped" for event in self.events()):
                break
            time.sleep(0.05)
        if process.poll() is None:
            if os.name == "nt":
                process.kill()
            else:
                _signal_group(process, signal.SIGKILL)
            process.wait()

    def failure(self) -> TrainingError:
        """What went wrong, in the training's own words: it prints `error: ...` and the way out below."""
        try:
            text = self.plan.log.read_text("utf-8", errors="replace")
        except OSError:
            text = ""
        lines = [line.rpartition("\r")[2].strip() for line in text.split("\n")]
        lines = [line for line in lines if line]
        at = max((i for i, line in enumerate(lines) if line.startswith("error: ")), default=None)
        if at is not None:
            said, hint = lines[at].removeprefix("error: "), " ".join(lines[at + 1 :][:2])
        else:
            said, hint = f"The training ended with code {self.code}: {(lines or ['it said nothing'])[-1][:300]}", ""
        if "is not installed" in said or "No module named" in said:
            hint = (f"Training needs packages that ComfyUI does not have. Run `python install.py demo` in {ROOT} once, "
                    f"or set {PYTHON} to a Python that has them.")
        return TrainingError(said, hint or f"See {self.plan.log}.", field="training")


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(OSError):  # it may have just ended
        os.killpg(process.pid, number)


def follow(plan: Plan, interrupted: Callable[[], None], *, poll: float = POLL) -> Iterator[dict[str, Any]]:
    """Runs a plan to its end, yielding its events as they come; nothing when it is done already.

    Args:
        interrupted: raises when the user asked to stop; the training saves and ends first, then that is raised.

    Raises:
        TrainingError: in the training's own words; what it saved is kept.
    """
    if plan.result.is_file():
        return
    training = Training(plan)
    training.start()
    try:
        while True:
            ended = training.code is not None
            yield from training.events()
            if ended:
                break
            interrupted()
            time.sleep(poll)
    finally:
        training.stop()
    if training.code != 0 or not plan.result.is_file():
        raise training.failure()
