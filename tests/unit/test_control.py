"""Orders to a training: pause holds it, go on lets it go, stop and Ctrl-C end it even then; its exit code is left."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from apl_train.__main__ import main
from apl_train.commands import cli
from apl_train.training.control import FILE, VARIABLE, leave_code, obeying


def test_without_a_job_only_signals_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    asked = [False]
    stop = obeying(lambda: asked[0], pytest.fail)
    assert stop() is False
    asked[0] = True
    assert stop() is True


def test_the_job_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    stop = obeying(lambda: False, pytest.fail)
    assert stop() is False
    (tmp_path / FILE).write_text("stop\n")
    assert stop() is True


@pytest.mark.parametrize(("then", "stops"), [("", False), ("stop", True), ("kill", True), ("another word", False)])
def test_a_pause_lasts_until_another_word(tmp_path: Path, then: str, stops: bool) -> None:
    told: list[str] = []
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            (tmp_path / FILE).write_text(then)

    (tmp_path / FILE).write_text("pause")
    assert obeying(lambda: False, told.append, tmp_path, wait)() is stops
    assert told == ["paused", "continued"] and len(waited) == 3


def test_ctrl_c_ends_a_pause(tmp_path: Path) -> None:
    waited: list[float] = []
    (tmp_path / FILE).write_text("pause")
    assert obeying(lambda: len(waited) >= 2, lambda _: None, tmp_path, waited.append)() is True
    assert len(waited) == 2


def test_a_pause_that_is_taken_back_by_removing_the_file_ends(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("pause")
    assert obeying(lambda: False, lambda _: None, tmp_path, lambda _: (tmp_path / FILE).unlink())() is False


@pytest.mark.parametrize("others", [False, True])
def test_the_exit_code_is_left_by_the_jobs_own_process_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: bool
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    (tmp_path / "process.json").write_text(json.dumps({"pid": os.getpid() + others}))
    monkeypatch.setattr(cli, "main", lambda argv: int(argv[0]))
    assert main(["5"]) == 5
    assert (tmp_path / "code.json").exists() is not others
    if not others:
        left = json.loads((tmp_path / "code.json").read_text())
        assert (left["code"], left["pid"]) == (5, os.getpid())


@pytest.mark.parametrize(("ended", "code"), [(SystemExit(2), 2), (SystemExit(), 0), (SystemExit("words"), 1),
                                             (KeyError("a bug"), 1)])
def test_the_exit_code_is_left_however_the_process_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: BaseException, code: int
) -> None:
    def end(_argv: list[str]) -> int:
        raise ended

    monkeypatch.setenv(VARIABLE, str(tmp_path))
    (tmp_path / "process.json").write_text(json.dumps({"pid": os.getpid()}))
    monkeypatch.setattr(cli, "main", end)
    with pytest.raises(type(ended)):
        main([])
    assert json.loads((tmp_path / "code.json").read_text())["code"] == code


def test_without_a_process_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_code(3)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    leave_code(3)
    (tmp_path / "process.json").write_text("[]")
    leave_code(3)
    assert not (tmp_path / "code.json").exists()
