"""The queue: one at a time, in order, the order kept over restarts and rebuilt from folders when the index is lost."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from apl_train.ui import jobs, supervise
from apl_train.ui.job_queue import FILE, Queue
from apl_train.ui.place import Place


@pytest.fixture(autouse=True)
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of runs whose supervisors would have been started; none is."""
    names: list[str] = []

    def start(job: jobs.Job) -> None:
        names.append(job.run.name)
        (job.folder / "started.json").write_text(json.dumps({"time": time.time()}))

    monkeypatch.setattr(jobs, "start", start)
    return names


def finish(queue: Queue, name: str, code: int = 0) -> None:
    (queue.place.runs / name / "jobs" / "0001-train" / "exit.json").write_text(json.dumps({"code": code, "time": 1.0}))


def fill(place: Place, names: str = "abc") -> Queue:
    queue = Queue(place)
    for name in names:
        queue.add(jobs.create(place, place.runs / name, "train", name, ["train"]))
    return queue


def order(queue: Queue) -> str:
    return "".join(job.run.name for job in queue.waiting())


def test_one_runs_at_a_time_in_order(tmp_path: Path, begun: list[str]) -> None:
    queue = fill(Place(runs=tmp_path))
    for _ in range(3):
        queue.tick()
    assert begun == ["a"] and order(queue) == "abc"
    finish(queue, "a", 1)  # a failed run does not hold the others up
    queue.tick()
    assert begun == ["a", "b"] and order(queue) == "bc"


def test_a_run_can_be_the_next(tmp_path: Path, begun: list[str]) -> None:
    queue = fill(Place(runs=tmp_path))
    queue.tick()
    queue.first(tmp_path / "c" / "jobs" / "0001-train")
    assert order(queue) == "acb"
    finish(queue, "a")
    queue.tick()
    assert begun == ["a", "c"]


def test_the_order_survives_a_restart(tmp_path: Path) -> None:
    fill(Place(runs=tmp_path)).first(tmp_path / "c" / "jobs" / "0001-train")
    assert order(Queue(Place(runs=tmp_path))) == "cab"


@pytest.mark.parametrize("damage", ["gone", "no database"])
def test_a_lost_index_is_made_again_from_the_run_folders(tmp_path: Path, damage: str, begun: list[str]) -> None:
    queue = fill(Place(runs=tmp_path))
    queue.tick()
    finish(queue, "a")
    (tmp_path / FILE).unlink() if damage == "gone" else (tmp_path / FILE).write_bytes(b"x" * 5000)
    again = Queue(Place(runs=tmp_path))
    assert order(again) == "bc"
    again.tick()
    assert begun == ["a", "b"]


def test_what_was_taken_out_is_never_started(tmp_path: Path, begun: list[str]) -> None:
    queue = fill(Place(runs=tmp_path))
    jobs.end(queue.waiting()[0], 130)
    queue.tick()
    assert begun == ["b"]


def test_many_pages_start_one_job_once(tmp_path: Path, begun: list[str]) -> None:
    fill(Place(runs=tmp_path))
    queues = [Queue(Place(runs=tmp_path)) for _ in range(8)]
    threads = [threading.Thread(target=queue.tick) for queue in queues]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert begun == ["a"]


def test_a_job_that_runs_unwatched_is_watched_again_and_holds_the_queue(
    tmp_path: Path, begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = fill(Place(runs=tmp_path), "ab")
    queue.tick()
    path = tmp_path / "a" / "jobs" / "0001-train"
    (path / "started.json").write_text(json.dumps({"time": 1.0}))
    monkeypatch.setattr(supervise, "living", lambda folder: 7 if folder == path else None)
    queue.tick()
    queue.tick()
    assert begun == ["a", "a"] and order(queue) == "ab"


def test_a_run_folder_that_was_deleted_is_forgotten(tmp_path: Path, begun: list[str]) -> None:
    queue = fill(Place(runs=tmp_path))
    (tmp_path / "a" / "jobs" / "0001-train" / "job.json").unlink()
    queue.tick()
    assert begun == ["b"] and order(queue) == "bc"


def test_choices_are_remembered(tmp_path: Path) -> None:
    assert Queue(Place(runs=tmp_path / "none")).recall("run") == ""
    Queue(Place(runs=tmp_path)).remember("run", "b")
    assert Queue(Place(runs=tmp_path)).recall("run") == "b"


def test_looking_makes_no_folder(tmp_path: Path) -> None:
    assert Queue(Place(runs=tmp_path / "none")).waiting() == [] and not (tmp_path / "none").exists()


def test_serving_starts_what_waits_with_one_thread_a_folder(tmp_path: Path, begun: list[str]) -> None:
    queue = fill(Place(runs=tmp_path))
    before = threading.active_count()
    try:
        queue.serve()
        Queue(Place(runs=tmp_path)).serve()  # as a host does when its page is built anew
        assert threading.active_count() == before + 1
        until = time.monotonic() + 60
        while not begun and time.monotonic() < until:
            time.sleep(0.05)
        assert begun == ["a"]
    finally:
        queue.close()
