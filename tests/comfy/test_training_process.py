"""The node's training process with the real trainer on the miniature, host-free: progress, stop that saves, resume."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from in_pack import module

from apl_core.prefix import load_prefix
from apl_train import claims
from apl_train.training.state import has_state, load_state

process = module("comfy_nodes.training_process")
pictures = module("comfy_nodes.training_pictures")
errors = module("apl_core.errors")
pytestmark = [pytest.mark.world, pytest.mark.slow, pytest.mark.timeout(1800)]


class Asked(Exception):
    """Stands for the host's exception of an interrupted run."""


def _plan(runs: Path, **changes: object):
    settings = {"name": "small", "preset": "fast", "base_model": "miniature", "s_id": "miniature",
                "s_reg": "miniature", "steps": 12, "levels_every": 6, "previews": 2, "batch_size": 2}
    return process.Plan(runs, settings | changes)


def _gone(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_interrupted_it_saves_and_resumed_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(process.PYTHON, __import__("sys").executable)
    plan, steps, pids, asked = _plan(tmp_path), [], [], []
    start = process.Training.start
    monkeypatch.setattr(process.Training, "start", lambda self: (start(self), pids.append(self.pid)))

    def interrupted() -> None:
        if len(steps) >= 3:
            asked.append(time.monotonic())
            raise Asked

    with pytest.raises(Asked):
        for event in process.follow(plan, interrupted):
            if event["event"] == "step":
                steps.append(event["step"])
    seconds = time.monotonic() - asked[0]
    if os.environ.get("APL_RECORD_CLAIMS"):
        claims.record({"comfy-interrupt": (seconds, None, 1)})
    assert has_state(plan.run) and not plan.result.exists()
    saved = load_state(plan.run).step
    assert 3 <= saved < 12
    assert all(_gone(pid) for pid in pids), "something of the training is left"

    more = list(process.follow(plan, lambda: None))
    assert [e["step"] for e in more if e["event"] == "start"] == [saved]
    assert [e["step"] for e in more if e["event"] == "step"] == list(range(saved + 1, 13))
    prefix = load_prefix(plan.result)
    assert more[-1]["content_hash"] == prefix.content_hash and prefix.meta.steps == 12
    assert all(_gone(pid) for pid in pids)

    found = pictures.levels(plan.run)
    assert [level["step"] for level in found] == [0, 6, 12]
    assert pictures.grid(plan.run, found).shape == (4 * (128 + 24), 2 * 128, 3)
    assert list(process.follow(plan, lambda: None)) == [], "a finished run is not trained again"


def test_settings_choose_the_run_folder(tmp_path: Path) -> None:
    assert _plan(tmp_path).run == _plan(tmp_path).run
    assert _plan(tmp_path, alpha=2.0).run != _plan(tmp_path).run
    for name in ("../out", "", "a/b"):
        with pytest.raises(errors.APLError):
            _ = _plan(tmp_path, name=name).run


def test_what_goes_wrong_is_told_in_the_trainers_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(process.PYTHON, __import__("sys").executable)
    with pytest.raises(errors.TrainingError, match="num_tokens is 99"):
        list(process.follow(_plan(tmp_path, num_tokens=99), lambda: None))
    monkeypatch.setenv(process.PYTHON, str(tmp_path / "no-python"))
    with pytest.raises(errors.TrainingError, match="cannot be started"):
        list(process.follow(_plan(tmp_path), lambda: None))


def test_presets_are_the_trainers() -> None:
    from apl_train.training.config import preset_names

    text = (Path(process.ROOT) / "comfy_nodes" / "nodes_train.py").read_text("utf-8")
    presets = text.partition("\nPRESETS = (")[2].partition(")")[0]
    assert sorted(presets.split('"')[1::2]) == preset_names()
