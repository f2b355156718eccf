"""Jobs in real processes: how they end is told rightly, whoever ended them, and nothing is run twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from apl_train.ui import jobs, supervise
from apl_train.ui.jobs import DONE, FAILED, LOST, QUEUED, RUNNING, STOPPED, Job

POSIX = pytest.mark.skipif(os.name == "nt", reason="signals as POSIX has them")


def make(folder: Path, code: str, python: str = sys.executable) -> Path:
    path = folder / "run-01" / "jobs" / "0001-train"
    path.mkdir(parents=True)
    job = {"kind": "train", "title": "run-01", "argv": [python, "-I", "-c", code], "created": 1.0}
    (path / "job.json").write_text(json.dumps(job))
    return path


def wait(path: Path, condition: Callable[[Job], bool], seconds: float = 90.0) -> Job:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        job = jobs.read(path)
        assert job is not None
        if condition(job):
            return job
        time.sleep(0.05)
    raise AssertionError(f"still {jobs.read(path)}, log: {jobs.log_lines(jobs.read(path))}")


def started(path: Path) -> Job:
    job = jobs.read(path)
    assert job is not None and job.state == QUEUED
    jobs.start(job)
    return job


def pid_in_log(path: Path) -> int:
    return int(wait(path, lambda job: any(line.isdigit() for line in jobs.log_lines(job))) and next(
        line for line in jobs.log_lines(jobs.read(path)) if line.isdigit()))


SAY_PID = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"


@pytest.mark.parametrize(("code", "state"), [(0, DONE), (3, FAILED), (130, STOPPED)])
def test_a_job_leaves_its_words_and_its_exit_code(tmp_path: Path, code: int, state: str) -> None:
    path = make(tmp_path, f"import os, sys; print('hello', os.environ['APL_JOB']); sys.exit({code})")
    started(path)
    job = wait(path, lambda job: job.state not in (QUEUED, RUNNING))
    assert (job.state, job.code) == (state, code) and jobs.log_lines(job) == [f"hello {path}"]
    assert job.run == tmp_path / "run-01" and job.ended is not None


@POSIX
def test_stop_lets_the_job_save(tmp_path: Path) -> None:
    path = make(tmp_path, "import os, signal, sys, time\n"
                          "def save(*_): print('saved'); sys.exit(130)\n"
                          "signal.signal(signal.SIGINT, save)\nprint(os.getpid(), flush=True)\ntime.sleep(600)")
    started(path)
    pid_in_log(path)
    jobs.tell(jobs.read(path), "stop")
    job = wait(path, lambda job: job.state != RUNNING)
    assert (job.state, job.code) == (STOPPED, 130) and jobs.log_lines(job)[-1] == "saved"


@POSIX
def test_a_job_that_does_not_listen_can_be_ended(tmp_path: Path) -> None:
    path = make(tmp_path, "import os, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
                          "print(os.getpid(), flush=True); time.sleep(600)")
    started(path)
    pid_in_log(path)
    jobs.tell(jobs.read(path), "stop")
    jobs.tell(jobs.read(path), "kill")
    assert wait(path, lambda job: job.state != RUNNING).state == STOPPED


@POSIX
def test_a_process_that_the_system_ended_has_failed_not_stopped(tmp_path: Path) -> None:
    path = make(tmp_path, SAY_PID)
    started(path)
    os.kill(pid_in_log(path), signal.SIGKILL)  # as the kernel does when memory runs out
    job = wait(path, lambda job: job.state != RUNNING)
    assert (job.state, job.code) == (FAILED, -9)


@POSIX
def test_a_job_whose_supervisor_is_gone_is_lost(tmp_path: Path) -> None:
    path = make(tmp_path, "import os, time; print(os.getppid(), flush=True); print(-os.getpid(), flush=True); "
                          "time.sleep(600)")
    started(path)
    supervisor = pid_in_log(path)
    wait(path, lambda job: len(jobs.log_lines(job)) == 2)
    child = -int(jobs.log_lines(jobs.read(path))[1])
    assert jobs.read(path).state == RUNNING
    os.kill(supervisor, signal.SIGKILL)
    os.kill(child, signal.SIGKILL)
    assert wait(path, lambda job: job.state != RUNNING).state == LOST


OUTLIVES = """
import json, os, pathlib, sys, time
folder = pathlib.Path(os.environ["APL_JOB"])
print(os.getppid(), flush=True)
while (word := (folder / "go").read_text() if (folder / "go").exists() else "") == "":
    time.sleep(0.02)
if word != "silent":
    (folder / "code.json").write_text(json.dumps({"code": int(word), "pid": os.getpid(), "time": 5.0}))
sys.exit(7)
"""


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """A job that goes on though what watched it was ended."""
    path = make(tmp_path, OUTLIVES)
    started(path)
    os.kill(pid_in_log(path), signal.SIGKILL)
    until = time.monotonic() + 30
    while supervise.is_locked(path / "lock") and time.monotonic() < until:
        time.sleep(0.02)
    return path


def long_ago(path: Path) -> Job:
    (path / "started.json").write_text(json.dumps({"time": time.time() - jobs.STARTING - 1}))
    return jobs.read(path)


@POSIX
def test_a_job_that_goes_on_without_its_supervisor_is_taken_over(alone: Path) -> None:
    job = long_ago(alone)
    assert job.state == RUNNING and not supervise.is_locked(alone / "lock")
    assert jobs.adopt(job) and not jobs.adopt(job)  # not a second time at once
    wait(alone, lambda job: supervise.is_locked(alone / "lock"))
    assert not jobs.adopt(long_ago(alone))  # it is watched again
    assert len(jobs.log_lines(job)) == 1  # the one that runs, no second one
    (alone / "go").write_text("0")
    job = wait(alone, lambda job: (alone / "exit.json").exists())
    assert (job.state, job.code) == (DONE, 0)  # its own word; the system tells its exit code to nobody


@POSIX
def test_a_job_that_was_taken_over_can_be_ended(alone: Path) -> None:
    jobs.adopt(long_ago(alone))
    jobs.tell(jobs.read(alone), "kill")
    job = wait(alone, lambda job: (alone / "exit.json").exists())
    assert (job.state, job.code) == (STOPPED, -9)


@POSIX
@pytest.mark.parametrize(("word", "state", "code"), [("0", DONE, 0), ("8", FAILED, 8), ("silent", LOST, None)])
def test_a_job_that_ended_while_nobody_watched(alone: Path, word: str, state: str, code: int | None) -> None:
    long_ago(alone)
    (alone / "go").write_text(word)
    job = wait(alone, lambda job: job.state != RUNNING)
    assert (job.state, job.code) == (state, code)
    assert not jobs.adopt(job)
    assert supervise.run(alone) == (-9 if code is None else code)  # told, not begun again
    assert len(jobs.log_lines(job)) == 1


@POSIX
def test_a_number_that_was_used_again_is_another_process(tmp_path: Path) -> None:
    path = make(tmp_path, "")
    (path / "lock").touch()
    for began, alive in ((supervise.birth(os.getpid()), True), ("another boot 17", False), ("", False), (None, False)):
        (path / "process.json").write_text(json.dumps({"pid": os.getpid(), "began": began}))
        assert (long_ago(path).state == RUNNING) is alive
    time.sleep(0.05)  # births are told apart by the clock's ticks
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        assert supervise.birth(os.getpid()) != supervise.birth(other.pid) != ""
    assert supervise.birth(2**22 + 1) == ""


@POSIX
def test_a_zombie_is_no_living_process(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert supervise.birth(child) == ""
    os.waitpid(child, 0)


def test_an_interpreter_that_is_not_there_is_told(tmp_path: Path) -> None:
    path = make(tmp_path, "", python=str(tmp_path / "no-python"))
    started(path)
    job = jobs.read(path)
    assert (job.state, job.code) == (FAILED, 127) and "cannot be started" in jobs.log_lines(job)[0]


def test_a_second_supervisor_leaves_a_running_job_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path, "raise SystemExit('ran twice')")
    monkeypatch.setattr(supervise.time, "sleep", lambda _: None)
    with supervise.take_lock(path / "lock"):
        assert jobs.read(path).state == RUNNING
        assert supervise.run(path) == 0
    assert not (path / "exit.json").exists() and not (path / "log.txt").exists()


@pytest.mark.parametrize("lock", [False, True])
def test_a_job_that_never_began_is_lost_after_a_while(tmp_path: Path, lock: bool) -> None:
    """A lock file that nobody holds yet is no sign of an end: the queue would start a second job beside it."""
    path = make(tmp_path, "")
    if lock:
        (path / "lock").touch()
    (path / "started.json").write_text(json.dumps({"time": time.time()}))
    assert jobs.read(path).state == RUNNING
    (path / "started.json").write_text(json.dumps({"time": time.time() - jobs.STARTING - 1}))
    assert jobs.read(path).state == LOST


def test_of_a_progress_bar_only_the_last_state_is_shown(tmp_path: Path) -> None:
    path = make(tmp_path, "")
    (path / "log.txt").write_bytes(b"loading\r\n" + b"".join(b"\rtrain %d%%" % i for i in range(101)) + b"\n\xff!\nend")
    assert jobs.log_lines(jobs.read(path)) == ["loading", "train 100%", "\ufffd!", "end"]
    assert jobs.log_lines(jobs.read(path), 1) == ["end"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"argv": 3, "created": 1}', '{"argv": [], "created": "x"}'])
def test_what_is_no_job_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "job.json").write_text(text)
    assert jobs.read(tmp_path) is None
