"""The event log: appended line by line, cut when a training goes back, readable after a crash in mid-line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apl_core.errors import StorageError
from apl_train.training.events import EVENTS, EventLog, read_events


def test_events_are_appended_one_json_object_a_line(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    row = log.write("start", step=0, model="mini – Ü")
    log.write("step", step=1, loss=0.5)
    EventLog(tmp_path).write("done", step=1)  # another process goes on with the same file
    lines = (tmp_path / EVENTS).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["start", "step", "done"]
    assert json.loads(lines[0]) == row and row["model"] == "mini – Ü" and row["time"] > 1e9
    assert read_events(tmp_path) == read_events(tmp_path / EVENTS) == [json.loads(line) for line in lines]


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    EventLog(tmp_path).write("step", step=1, loss=float("nan"), l_id=float("-inf"), l_reg=None, rate=0.25)
    text = (tmp_path / EVENTS).read_text(encoding="utf-8")
    assert "NaN" not in text and "Infinity" not in text
    (row,) = read_events(tmp_path)
    assert (row["loss"], row["l_id"], row["l_reg"], row["rate"]) == (None, None, None, 0.25)


def test_cut_drops_what_came_after(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.cut(3)  # nothing there yet
    assert not log.path.exists()
    log.write("start", step=0)
    for step in range(1, 6):
        log.write("step", step=step)
    log.write("level", step=3, path="x")
    log.write("note")
    log.cut(3)
    assert [(e["event"], e.get("step")) for e in read_events(tmp_path)] == [
        ("start", 0), ("step", 1), ("step", 2), ("step", 3), ("level", 3), ("note", None)]
    log.write("step", step=4)
    assert read_events(tmp_path)[-1]["step"] == 4


def test_a_line_cut_off_by_a_crash_is_left_out_and_mended(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.write("step", step=1)
    log.write("step", step=2, model="Ü")
    data = log.path.read_bytes()
    for length in range(data.index(b"\n") + 1, len(data) - 2):  # also within a character
        log.path.write_bytes(data[:length])
        assert [e["step"] for e in read_events(tmp_path)] == [1]
    log.cut(1)
    log.write("step", step=2)
    assert [e["step"] for e in read_events(tmp_path)] == [1, 2]


def test_what_is_no_event_is_left_out(tmp_path: Path) -> None:
    assert read_events(tmp_path) == read_events(tmp_path / "nowhere" / EVENTS) == []
    (tmp_path / EVENTS).write_text('[1]\n"x"\n{"event": "step", "step": 1}\nnull\n\n', encoding="utf-8")
    assert [e["step"] for e in read_events(tmp_path)] == [1]


def test_a_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        EventLog(tmp_path / "nowhere").write("start", step=0)
