"""From settings to a run folder: a wrong dataset is told whole before anything is trained, and then started again."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fakes import tiny_models as tiny

from apl_core.errors import ConfigError, DatasetError
from apl_core.placement import capacity
from apl_core.prefix import load_prefix

pytest.importorskip("diffusers")

from apl_train.model.backend import Backend
from apl_train.model.files import read_parts
from apl_train.training.command import _checked, ctrl_c, load_training_set, resume, train
from apl_train.training.config import TrainConfig
from apl_train.training.events import read_events
from apl_train.training.trainer import read_config

GOOD = [("ab", "photo of ab", "a man", "id"), ("cd", "photo of cd", "a lady", "id")]
REG = [("", "a tree", "", "nonface"), ("", "a man", "", "face")]


class NoBackend:
    """Counts words as tokens; whatever else is asked of it is more than looking at the table needs."""

    text = SimpleNamespace(tokenize=lambda text: text.split())


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Backend:
    root = tmp_path_factory.mktemp("model")
    return Backend(read_parts(tiny.write_checkpoint(root)))


def test_a_good_set_passes(tmp_path: Path) -> None:
    found = _checked(tiny.write_set(tmp_path, GOOD), "id", NoBackend(), TrainConfig())
    assert [r.name for r in found.records] == ["ab", "cd"]


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    room = capacity(10)
    rows = [*GOOD, ("ef", "photo of ef", "a man like ef", "id"), ("gh", "photo", "a lady", "id"),
            ("ij", "photo of ij " + "x " * room, "a man", "id"), ("kl", "photo of kl", "a man", "face")]
    folder = tiny.write_set(tmp_path, rows)
    (folder / "1.png").unlink()
    with pytest.raises(DatasetError) as caught:
        _checked(folder, "id", NoBackend(), TrainConfig(num_tokens=10))
    message = caught.value.message
    lines = message.splitlines()
    assert lines[0] == f"{folder} has 5 problem(s):" and "nothing was trained" in caught.value.hint
    assert [line.split(",")[0].strip() for line in lines[1:]] == ["row 3", "row 4", "row 5", "row 6", "row 7"]
    for words in ("there is no picture 1.png", "of the name 'ef'", "'gh' is not in its prompt", "3 tokens too long",
                  "kind is 'face'"):
        assert words in message, words
    assert caught.value.field == "image"


def test_room_is_what_the_vectors_leave(tmp_path: Path) -> None:
    for m in (1, 10, 40):
        room = 75 - m
        folder = tiny.write_set(tmp_path, [("ab", "ab" + " x" * (room - 1), "a man", "id")])
        _checked(folder, "id", NoBackend(), TrainConfig(num_tokens=m))
        folder = tiny.write_set(tmp_path, [("ab", "ab" + " x" * room, "a man", "id")])
        with pytest.raises(DatasetError, match="1 tokens too long"):
            _checked(folder, "id", NoBackend(), TrainConfig(num_tokens=m))


def test_of_many_problems_ten_are_shown(tmp_path: Path) -> None:
    folder = tiny.write_set(tmp_path, [("ab", "photo of ab", f"{i} years and ab", "id") for i in range(13)])
    with pytest.raises(DatasetError) as caught:
        _checked(folder, "id", NoBackend(), TrainConfig())
    lines = caught.value.message.splitlines()
    assert len(lines) == 12 and "has 13 problem(s)" in lines[0] and lines[-1].strip() == "and 3 more"


def test_both_sets_are_looked_at_before_the_model_is_used(tmp_path: Path) -> None:
    tiny.write_set(tmp_path / "id", GOOD)
    tiny.write_set(tmp_path / "reg", [("", "a tree", "", "tree")])
    config = TrainConfig(s_id=str(tmp_path / "id"), s_reg=str(tmp_path / "reg"))
    with pytest.raises(DatasetError, match="kind is 'tree'"):
        load_training_set(NoBackend(), config, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_run_that_never_began_is_started_again_and_a_begun_one_is_not(backend: Backend, tmp_path: Path) -> None:
    s_id, s_reg, run = tmp_path / "id", tiny.write_set(tmp_path / "reg", REG), tmp_path / "run"
    tiny.write_set(s_id, [GOOD[0], ("cd", "photo", "a lady", "id")])
    config = TrainConfig(s_id=str(s_id), s_reg=str(s_reg), num_tokens=2, batch_size=2, steps=2, name="mine")
    for start in (lambda: train(run, config, backend=backend), lambda: resume(run, backend=backend)):
        with pytest.raises(DatasetError, match="not in its prompt"):
            start()
    tiny.write_set(s_id, GOOD)
    made = train(run, config, backend=backend)
    assert read_config(run) == config
    assert load_prefix(run / "prefix" / "mine.safetensors").content_hash == made.content_hash
    assert [e["event"] for e in read_events(run)] == ["start", "step", "step", "done"]
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match="already holds a training") as caught:
        train(run, TrainConfig(steps=5), backend=backend)
    assert "apl resume" in caught.value.hint
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_resume_begins_a_run_that_was_cut_off_before_its_first_step(backend: Backend, tmp_path: Path) -> None:
    s_id, s_reg = tiny.write_set(tmp_path / "id", GOOD), tiny.write_set(tmp_path / "reg", REG)
    config = TrainConfig(s_id=str(s_id), s_reg=str(s_reg), num_tokens=2, batch_size=2, steps=2, name="mine")
    made = train(tmp_path / "whole", config, backend=backend)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.yaml").write_bytes((tmp_path / "whole" / "config.yaml").read_bytes())
    again = resume(tmp_path / "cut", backend=backend)
    assert torch.equal(again.vectors("emb_params"), made.vectors("emb_params"))


def test_resume_needs_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no training") as caught:
        resume(tmp_path, backend=NoBackend())
    assert "apl train" in caught.value.hint and not list(tmp_path.iterdir())


def test_the_first_ctrl_c_asks_and_the_second_one_ends() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with ctrl_c() as asked:
        assert not asked.is_set()
        signal.raise_signal(signal.SIGINT)
        assert asked.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_in_another_thread_signals_are_left_alone() -> None:
    """As in a host's worker."""
    seen: list[bool] = []

    def work() -> None:
        with ctrl_c() as asked:
            seen.append(asked.is_set())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
