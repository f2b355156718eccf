"""Run folders as the page reads them: progress, pace, pictures and ends, from files that may be cut off or hostile."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from apl_train.training.events import EventLog
from apl_train.ui import jobs, runs
from apl_train.ui.place import Place
from apl_train.ui.runs import read_run
from apl_train.ui.tail import Events


def write_events(run: Path, rows: list[dict[str, Any]]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def steps(times: list[float], first: int = 1, l_id: float = 0.5) -> list[dict[str, Any]]:
    return [{"event": "step", "time": t, "step": first + i, "l_id": l_id, "l_reg": None} for i, t in enumerate(times)]


START = {"event": "start", "time": 100.0, "step": 0, "steps": 10}


def job_of(run: Path, state: dict[str, Any] | None = None, control: str = "") -> None:
    path = jobs.create(Place(runs=run.parent), run, "train", run.name, ["train"])
    (path / "started.json").write_text(json.dumps({"time": time.time()}))
    if state:
        (path / "exit.json").write_text(json.dumps(state))
    if control:
        (path / "control").write_text(control)


def test_progress_pace_and_time_left(tmp_path: Path) -> None:
    run = tmp_path / "a"
    write_events(run, [START, *steps([101.0, 103.0, 105.0, 107.0])])
    job_of(run)
    found = read_run(run, Events())
    assert (found.state, found.step, found.steps) == (jobs.RUNNING, 4, 10)
    assert found.rate == pytest.approx(0.5) and found.left == pytest.approx(6 / 0.5)
    assert found.losses == tuple((n, 0.5, None) for n in (1, 2, 3, 4))


def test_a_pause_and_pictures_between_steps_do_not_count_as_slowness(tmp_path: Path) -> None:
    run = tmp_path / "a"
    write_events(run, [START, *steps([101.0, 102.0, 103.0, 703.0, 704.0, 705.0])])
    job_of(run)
    assert read_run(run, Events()).rate == pytest.approx(1.0)


def test_time_before_a_resume_does_not_count(tmp_path: Path) -> None:
    run = tmp_path / "a"
    resumed = {"event": "start", "time": 500.0, "step": 3, "steps": 10}
    write_events(run, [START, *steps([101.0, 102.0, 103.0]), resumed, *steps([504.0, 508.0], first=4)])
    job_of(run)
    assert read_run(run, Events()).rate == pytest.approx(0.25)


@pytest.mark.parametrize(("left", "control", "state"), [
    (None, "", "running"), (None, "pause", "paused"), ({"code": 0}, "", "done"), ({"code": 9}, "", "failed"),
    ({"code": 130}, "stop", "stopped"), ({"code": -9}, "kill", "stopped"), ({"code": -9}, "", "failed"),
    ({"code": 0}, "pause", "done"),
])
def test_states(tmp_path: Path, left: dict[str, Any] | None, control: str, state: str) -> None:
    write_events(tmp_path / "a", [START])
    job_of(tmp_path / "a", left, control)
    assert read_run(tmp_path / "a", Events()).state == state


@pytest.mark.parametrize(("last", "state"), [
    ({"event": "done"}, "done"), ({"event": "stopped"}, "stopped"), ({"event": "error", "message": "no"}, "failed"),
    ({"event": "step", "step": 1, "time": 5.0}, "lost"), ({"event": "step", "step": 1, "time": 9e9}, "running"),
])
def test_runs_of_the_command_line_are_seen_too(tmp_path: Path, last: dict[str, Any], state: str) -> None:
    write_events(tmp_path / "a", [START, last])
    assert read_run(tmp_path / "a", Events()).state == state


def test_an_error_is_told_until_a_new_start(tmp_path: Path) -> None:
    rows = [START, {"event": "error", "step": 3, "message": "The loss is nan at step 3."}]
    write_events(tmp_path / "a", rows)
    assert read_run(tmp_path / "a", Events()).error == "The loss is nan at step 3."
    write_events(tmp_path / "a", [*rows, START])
    assert read_run(tmp_path / "a", Events()).error == ""


def test_levels_and_the_final_prefix(tmp_path: Path) -> None:
    write_events(tmp_path / "a", [START, *steps([101.0])])
    (tmp_path / "a" / "prefix").mkdir()
    for name in ("p.safetensors", "p.step-4.safetensors", "p.step-8.safetensors", "notes.txt"):
        (tmp_path / "a" / "prefix" / name).touch()
    found = read_run(tmp_path / "a", Events())
    assert {k: v.name for k, v in found.levels.items()} == {
        4: "p.step-4.safetensors", 8: "p.step-8.safetensors", 10: "p.safetensors"}
    assert found.final.name == "p.safetensors"


def test_previews_are_read_and_damaged_ones_left_out(tmp_path: Path) -> None:
    write_events(tmp_path / "a", [START])
    folder = tmp_path / "a" / "previews"
    folder.mkdir()
    good = {"step": 4, "persons": [{"name": "ab", "split": "test", "off": "0.png", "on": "1.png", "off_score": 0.75,
                                    "on_score": None}, "nonsense"]}
    (folder / "step-4.json").write_text(json.dumps(good))
    (folder / "step-5.json").write_text('{"step": 5, "pers')
    (folder / "step-6.json").write_text('{"step": "6", "persons": [{}]}')
    found = read_run(tmp_path / "a", Events())
    assert list(found.previews) == [4]
    assert found.previews[4] == (runs.Preview("ab", "test", "0.png", "1.png", 0.75, None),)


def test_a_folder_that_is_no_run_is_none(tmp_path: Path) -> None:
    assert read_run(tmp_path, Events()) is None and read_run(tmp_path / "none", Events()) is None


def test_runs_come_newest_first(tmp_path: Path) -> None:
    for name, when in (("old", 10.0), ("new", 90.0)):
        write_events(tmp_path / name, [START])
        job_of(tmp_path / name, {"code": 0, "time": when})
        os.utime(tmp_path / name / "events.jsonl", (when, when))
    (tmp_path / "cache").mkdir()
    assert [r.name for r in runs.all_runs(Place(runs=tmp_path), Events())] == ["new", "old"]


def test_events_are_read_as_they_grow_and_anew_after_a_cut(tmp_path: Path) -> None:
    log, events = EventLog(tmp_path), Events()
    assert events.of(tmp_path) == []
    for step in (1, 2, 3):
        log.write("step", step=step)
        assert [row["step"] for row in events.of(tmp_path)] == list(range(1, step + 1))
    log.cut(2)  # what `apl resume` does
    assert [row["step"] for row in events.of(tmp_path)] == [1, 2]
    with log.path.open("a") as out:
        out.write('{"event": "step", "st')
    assert len(events.of(tmp_path)) == 2
    with log.path.open("a") as out:
        out.write('ep": 3}\n[1]\nnot json\n')
    assert [row["step"] for row in events.of(tmp_path)] == [1, 2, 3]


def test_events_of_many_runs_do_not_mix(tmp_path: Path) -> None:
    events = Events(keep=2)
    for name in "abcd":
        write_events(tmp_path / name, [{"event": "step", "step": ord(name)}])
    for name in "abcdabcd":
        assert [row["step"] for row in events.of(tmp_path / name)] == [ord(name)]
