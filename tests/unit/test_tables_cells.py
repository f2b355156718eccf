"""Cells of an evaluation: stored whole, done once, shared among processes, kept through a kill."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from apl_core.errors import ScoreError, TrainingStopped
from apl_train.processes import Processes
from apl_train.tables.cells import Cell, CellStore, Outcome, Runner

ROOT = Path(__file__).resolve().parents[2]
CELLS = [Cell(f"cell {i}", {"i": i}, weight=i + 1) for i in range(6)]


def square(cell: Cell) -> Outcome:
    return Outcome({"square": torch.tensor([cell.key["i"] ** 2])}, {"name": cell.label})


class Part(Processes):
    """One of two processes that run one after the other here: what the first wrote, the second finds."""

    def __init__(self, index: int, have: list[Any]) -> None:
        self.index, self.count, self._have = index, 2, have

    def from_main(self, value: Any) -> Any:
        if self.main:
            self._have[:] = [value]
        return self._have[0]

    def everyone(self, value: Any) -> list[Any]:
        return [value]


def test_the_key_alone_tells_cells_apart() -> None:
    a, b = Cell("one", {"x": 1, "y": [2]}), Cell("another label", {"y": [2], "x": 1})
    assert a.digest == b.digest
    assert len({Cell("", {"x": v}).digest for v in (1, 2, "1", None, [1])}) == 5


def test_a_second_run_does_nothing_and_gives_the_same(tmp_path: Path) -> None:
    first = Runner(tmp_path, quiet=True)
    found = first.fill("t", CELLS, square)
    assert [int(o.tensors["square"]) for o in found] == [0, 1, 4, 9, 16, 25] and first.done == 6

    def never(_cell: Cell) -> Outcome:
        raise AssertionError("it was stored")

    again = Runner(tmp_path, quiet=True)
    assert [int(o.tensors["square"]) for o in again.fill("t", CELLS[::-1], never)] == [25, 16, 9, 4, 1, 0]
    assert (again.done, again.skipped) == (0, 6)
    assert [o.values["name"] for o in again.fill("t", CELLS[:2], never)] == ["cell 0", "cell 1"]


def test_equal_cells_are_done_once(tmp_path: Path) -> None:
    runner = Runner(tmp_path, quiet=True)
    found = runner.fill("t", [CELLS[2], Cell("twin", {"i": 2}), CELLS[2]], square)
    assert runner.done == 1 and {int(o.tensors["square"]) for o in found} == {4}


@pytest.mark.parametrize("harm", ["cut", "bits", "other key", "empty"])
def test_a_damaged_cell_is_done_again(tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    store, cell = CellStore(tmp_path), CELLS[3]
    store.save(cell, square(cell))
    path = store.path(cell)
    data = path.read_bytes()
    if harm == "cut":
        path.write_bytes(data[:-4])
    elif harm == "bits":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif harm == "empty":
        path.write_bytes(b"")
    else:
        other = Cell(cell.label, {"i": 99})
        store.save(other, square(other))
        store.path(other).replace(path)
    with caplog.at_level(logging.WARNING, logger="apl.evaluate"):
        assert store.load(cell) is None
    assert "is done again" in caplog.text
    assert int(Runner(tmp_path, quiet=True).fill("t", [cell], square)[0].tensors["square"]) == 9
    assert store.load(cell) is not None


def test_a_missing_cell_is_no_reason_for_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert CellStore(tmp_path).load(CELLS[0]) is None
    assert not caplog.text


def test_stop_keeps_what_is_done(tmp_path: Path) -> None:
    asked: list[bool] = []

    def stop() -> bool:
        asked.append(True)
        return len(asked) > 2

    runner = Runner(tmp_path, stop=stop, quiet=True)
    with pytest.raises(TrainingStopped, match="kept") as error:
        runner.fill("t", CELLS, square)
    assert "same command" in error.value.hint
    rest = Runner(tmp_path, quiet=True)
    rest.fill("t", CELLS, square)
    assert (rest.skipped, rest.done) == (2, 4)


def test_two_processes_divide_what_is_missing(tmp_path: Path) -> None:
    CellStore(tmp_path).save(CELLS[0], square(CELLS[0]))
    worked: dict[int, list[str]] = {0: [], 1: []}
    have: list[Any] = []

    def of(index: int) -> Any:
        def work(cell: Cell) -> Outcome:
            worked[index].append(cell.label)
            return square(cell)
        return work

    first = Runner(tmp_path, processes=Part(0, have), quiet=True)
    with pytest.raises(ScoreError, match="is not in"):  # the second has not been there yet
        first.fill("t", CELLS, of(0))
    second = Runner(tmp_path, processes=Part(1, have), quiet=True)
    found = second.fill("t", CELLS, of(1))
    assert [int(o.tensors["square"]) for o in found] == [0, 1, 4, 9, 16, 25]
    assert worked == {0: ["cell 1", "cell 3", "cell 5"], 1: ["cell 2", "cell 4"]}


def test_what_goes_wrong_in_a_cell_is_raised_and_the_rest_kept(tmp_path: Path) -> None:
    def work(cell: Cell) -> Outcome:
        if cell.key["i"] == 2:
            raise ScoreError("it broke")
        return square(cell)

    runner = Runner(tmp_path, quiet=True)
    with pytest.raises(ScoreError, match="it broke"):
        runner.fill("t", CELLS, work)
    assert runner.done == 2 and len(list(tmp_path.iterdir())) == 2


def test_what_goes_wrong_elsewhere_is_raised_here_too(tmp_path: Path) -> None:
    class Beside(Processes):
        count = 1

        def everyone(self, value: Any) -> list[Any]:
            return [value, (False, ScoreError("there it broke"))]

    with pytest.raises(ScoreError, match="there it broke"):
        Runner(tmp_path, processes=Beside(), quiet=True).fill("t", CELLS[:1], square)


def test_file_names_are_plain_whatever_the_label(tmp_path: Path) -> None:
    store = CellStore(tmp_path)
    names = [store.path(Cell(label, {})).name for label in ("../../etc", "a/b\\c", "", "x" * 300, "ü ö")]
    assert all(n.endswith(".safetensors") and len(n) < 100 and "/" not in n and "\\" not in n for n in names)
    assert {store.path(Cell(label, {})).parent for label in ("../../etc", "a/b")} == {tmp_path}


def test_values_and_empty_tensors_come_back(tmp_path: Path) -> None:
    cell = Cell("none", {"none": True})
    CellStore(tmp_path).save(cell, Outcome({"faces": torch.zeros(0, 4)}, {"attributes": [None, {"hair": "long"}]}))
    found = CellStore(tmp_path).load(cell)
    assert found is not None and found.tensors["faces"].shape == (0, 4)
    assert found.values == {"attributes": [None, {"hair": "long"}]}
    with safe_open(str(CellStore(tmp_path).path(cell)), framework="pt") as opened:
        assert set(opened.metadata()) == {"apl.key", "apl.values", "apl.content"}


SCRIPT = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
import torch
from apl_train.tables.cells import Cell, Outcome, Runner
folder, log = Path(sys.argv[1]), Path(sys.argv[2])
def work(cell):
    with log.open("a") as out:
        out.write(f"{{cell.key['i']}}\\n")
    time.sleep(float(sys.argv[3]))
    return Outcome({{"x": torch.full((1000,), float(cell.key["i"]))}})
found = Runner(folder, quiet=True).fill("t", [Cell(f"c{{i}}", {{"i": i}}) for i in range(8)], work)
print(sum(float(o.tensors["x"].sum()) for o in found))
"""


def lines(path: Path) -> Sequence[str]:
    return path.read_text().split() if path.exists() else []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(os.name == "nt", reason="kill -9 is of POSIX")
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    script, log, folder = tmp_path / "run.py", tmp_path / "log", tmp_path / "cells"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    run = subprocess.Popen([sys.executable, str(script), str(folder), str(log), "0.5"])
    try:
        deadline = time.monotonic() + 400
        while len(lines(log)) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    began = lines(log)
    assert len(began) >= 4
    kept = len(list(folder.glob("*.safetensors")))
    assert kept >= len(began) - 1
    done = subprocess.run([sys.executable, str(script), str(folder), str(log), "0"], capture_output=True, text=True,
                          check=True, timeout=400)
    assert float(done.stdout) == 1000 * sum(range(8))
    assert len(lines(log)) == len(began) + 8 - kept, "only what was missing is done"
    assert not [p for p in folder.iterdir() if p.suffix != ".safetensors"], "no half file stays"
