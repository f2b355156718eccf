"""What ends a training before its end: each is told with its way out, the last good state stays, and it goes on."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import tiny_models as tiny

from apl_core.errors import DatasetError, StorageError, TrainingError, TrainingStopped
from apl_core.prefix import load_prefix

pytest.importorskip("diffusers")

from apl_train.model.backend import Backend
from apl_train.model.files import read_parts
from apl_train.training import command as training
from apl_train.training.config import TrainConfig
from apl_train.training.events import EventLog, read_events
from apl_train.training.state import load_state
from apl_train.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    tiny.write_checkpoint(root)
    tiny.write_set(root / "id", [("ab", "photo of ab", "a man", "id"), ("cd", "photo of cd", "a lady", "id")])
    tiny.write_set(root / "reg", [("", f"a tree {i}", "", "nonface" if i % 2 else "face") for i in range(38)])
    return root


@pytest.fixture(scope="module")
def backend(root: Path) -> Backend:
    return Backend(read_parts(root / "tiny.safetensors"))


@pytest.fixture(scope="module")
def straight(root: Path, backend: Backend) -> torch.Tensor:
    """The vectors of a training that nothing happened to."""
    return training.train(root / "straight", settings(root), backend=backend).vectors()


def settings(root: Path, **changes: object) -> TrainConfig:
    return TrainConfig(**{"s_id": str(root / "id"), "s_reg": str(root / "reg"), "num_tokens": 2, "batch_size": 2,
                          "steps": 6, "levels_every": 2, "save_every": 2, "learning_rate": 0.01, **changes})


def fill_disk(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """From the moment on that `when` names, nothing can be written."""
    real_open, real_replace = Path.open, Path.replace

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if when == "a line of events":
        def opened(self: Path, mode: str = "r", *args: object, **options: object):
            if self.name == "events.jsonl" and "a" in mode and len(read_events(self.parent)) > 3:
                with real_open(self, "a", encoding="utf-8") as out:
                    out.write('{"event": "st')  # what fits
                full()
            return real_open(self, mode, *args, **options)

        monkeypatch.setattr(Path, "open", opened)
    else:
        part = "step-0000004" if when == "a state" else "anonymize.step-4"
        monkeypatch.setattr(Path, "replace", lambda self, target: (
            full() if part in Path(target).name else real_replace(self, target)))


@pytest.mark.parametrize("when", ["a state", "a level", "a line of events"])
def test_full_disk(root: Path, backend: Backend, straight: torch.Tensor, tmp_path: Path,
                   monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    fill_disk(monkeypatch, when)
    with pytest.raises(StorageError, match="No space left on device") as caught:
        training.train(tmp_path / "run", settings(root), backend=backend, cache=root / "cache")
    assert "free some space" in caught.value.hint and f"apl resume {tmp_path / 'run'}" in caught.value.hint
    assert caught.value.exit_code == 8
    monkeypatch.undo()
    assert load_state(tmp_path / "run").step == 2
    assert not list((tmp_path / "run").rglob("*.tmp"))
    for level in (tmp_path / "run" / "prefix").iterdir():  # those that are there are whole
        load_prefix(level, enforce=True)
    made = training.resume(tmp_path / "run", backend=backend, cache=root / "cache")
    assert torch.equal(made.vectors(), straight)
    events = read_events(tmp_path / "run")
    assert [e["step"] for e in events if e["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "run" / "events.jsonl").read_text().count("\n") == len(events)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_not_a_number(root: Path, backend: Backend, straight: torch.Tensor, tmp_path: Path,
                      monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    real, steps = Trainer.one_step, []

    class Nan(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: object, value: torch.Tensor) -> torch.Tensor:
            return value * float("nan") if what == "loss" else value.clone()

        @staticmethod
        def backward(_ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * float("inf")

    def one_step(self: Trainer) -> dict:
        steps.append(self.step)
        if self.step == 3:
            predict = backend.predict
            monkeypatch.setattr(backend, "predict", lambda *a: Nan.apply(predict(*a)))
        before = self.vectors["emb_params"].detach().clone()
        try:
            return real(self)
        except TrainingError:
            assert torch.equal(self.vectors["emb_params"], before)
            raise

    monkeypatch.setattr(Trainer, "one_step", one_step)
    with pytest.raises(TrainingError, match="loss is nan at step 3" if what == "loss" else "gradient is not finite"
                       ) as caught:
        training.train(tmp_path / "run", settings(root), backend=backend, cache=root / "cache")
    assert "learning_rate" in caught.value.hint and caught.value.exit_code == 9
    monkeypatch.undo()
    assert load_state(tmp_path / "run").step == 2
    assert read_events(tmp_path / "run")[-1]["event"] == "error"
    assert torch.equal(training.resume(tmp_path / "run", backend=backend, cache=root / "cache").vectors(), straight)


@pytest.mark.parametrize("gone", ["the folder", "a picture", "a damaged picture"])
def test_unplugged_dataset(root: Path, backend: Backend, straight: torch.Tensor, tmp_path: Path, gone: str) -> None:
    mine = {"id": tmp_path / "id", "reg": tmp_path / "reg"}
    for name, folder in mine.items():
        folder.mkdir()
        for file in (root / name).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    config = settings(root, s_id=str(mine["id"]), s_reg=str(mine["reg"]))
    run, real = tmp_path / "run", Trainer.one_step
    picture, elsewhere = mine["id"] / "1.png", tmp_path / "elsewhere"

    def unplug(self: Trainer) -> dict:
        if self.step == 3 and not elsewhere.exists():
            (mine["id"] if gone == "the folder" else picture).rename(elsewhere)
            if gone == "a damaged picture":
                picture.write_bytes(elsewhere.read_bytes()[:-30])
        if self.step == 5:  # latents and states are cached: the pictures are not needed while it runs
            raise KeyboardInterrupt
        return real(self)

    Trainer.one_step = unplug
    try:
        with pytest.raises(KeyboardInterrupt):
            training.train(run, config, backend=backend, cache=tmp_path / "cache")
    finally:
        Trainer.one_step = real
    before = load_state(run)
    assert before.step == 4
    with pytest.raises(DatasetError) as caught:
        training.resume(run, backend=backend, cache=tmp_path / "cache")
    assert caught.value.hint
    assert (str(mine["id"]) if gone == "the folder" else "1.png") in caught.value.message
    assert load_state(run).step == before.step
    if gone == "a damaged picture":
        picture.unlink()
    elsewhere.rename(mine["id"] if gone == "the folder" else picture)
    assert torch.equal(training.resume(run, backend=backend, cache=tmp_path / "cache").vectors(), straight)


@pytest.mark.parametrize("kind", ["latents", "captions", "bank"])
def test_a_damaged_cache_is_made_again_not_trained_on(root: Path, backend: Backend, tmp_path: Path, kind: str) -> None:
    config = settings(root, bank=40, steps=24)
    made = training.train(tmp_path / "one", config, backend=backend, cache=tmp_path / "cache").vectors()
    files = sorted((tmp_path / "cache" / kind).rglob("*.safetensors"))
    assert len(files) >= 2
    for file in files[:1]:
        data = bytearray(file.read_bytes())
        data[-200] ^= 0x40  # the sign of an exponent: it still loads
        file.write_bytes(bytes(data))
    again = training.train(tmp_path / "two", config, backend=backend, cache=tmp_path / "cache").vectors()
    assert torch.equal(again, made)
    assert sorted((tmp_path / "cache" / kind).rglob("*.safetensors")) == files


def test_ctrl_c_while_the_cache_is_filled(root: Path, backend: Backend, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    real, once = backend.to_latents, [signal.SIGINT]

    def interrupted(images: np.ndarray) -> torch.Tensor:
        if once:
            signal.raise_signal(once.pop())
        return real(images)

    monkeypatch.setattr(backend, "to_latents", interrupted)
    with pytest.raises(TrainingStopped, match="32 of 38"):
        training.train(tmp_path / "run", settings(root), backend=backend, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache" / "latents").rglob("*.safetensors"))) == 1
    monkeypatch.undo()
    training.resume(tmp_path / "run", backend=backend, cache=tmp_path / "cache")


def test_a_line_cut_off_by_a_crash_does_not_swallow_the_next(tmp_path: Path) -> None:
    EventLog(tmp_path).write("start", step=0)
    with (tmp_path / "events.jsonl").open("a") as out:
        out.write('{"event": "st')
    EventLog(tmp_path).write("step", step=1)
    assert [e["event"] for e in read_events(tmp_path)] == ["start", "step"]


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_of_a_real_process(root: Path, tmp_path: Path, number: str) -> None:
    """`apl train` in a process of its own: exit code 130, no traceback, and the state is that of the last step."""
    code = ("import signal, sys, torch; torch.set_num_threads(1)\n"
            "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # under nohup the tests themselves ignore it
            "from apl_train.training.trainer import Trainer; real = Trainer.one_step\n"
            "import time; Trainer.one_step = lambda self: (time.sleep(0.3), real(self))[1]\n"
            "from apl_train.commands.cli import main; sys.exit(main(sys.argv[1:]))")
    argv = [sys.executable, "-c", code, "train", "--preset", "paper", "--run", str(tmp_path / "run"), "--s_id",
            str(root / "id"), "--s_reg", str(root / "reg"), "--base_model", str(root / "tiny.safetensors"),
            "--num_tokens", "2", "--batch_size", "2", "--steps", "40", "--save_every", "100", "--learning_rate", "0.01"]
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    deadline = time.monotonic() + 300
    while not [e for e in read_events(tmp_path / "run") if e["event"] == "step"] and time.monotonic() < deadline:
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.05)
    child.send_signal(getattr(signal, number))
    _, err = child.communicate(timeout=300)
    assert child.returncode == 130 and "Traceback" not in err
    assert "everything is saved" in err and "apl resume" in err
    assert load_state(tmp_path / "run").step == read_events(tmp_path / "run")[-1]["step"] >= 1
