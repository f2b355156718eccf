"""kill -9 at 20 random moments, some of them inside a save: 20 steps straight = killed + resumed, tensor for tensor."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from apl_train import claims, shipped
from apl_train.training.config import TrainConfig
from apl_train.training.trainer import Trainer, write_config

pytestmark = [pytest.mark.world, pytest.mark.slow,
              pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="needs fork")]
KILLS = 20


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory):
    from apl_train.model.backend import Backend
    from apl_train.training.command import load_training_set

    torch.set_num_threads(1)
    config = TrainConfig(num_tokens=4, batch_size=2, steps=20, levels_every=10, save_every=2, learning_rate=0.01)
    backend = Backend.load(shipped.locate("base_model", "miniature"))
    return backend, load_training_set(backend, config, tmp_path_factory.mktemp("cache")), config


def _child(parts, run: Path, resume: bool) -> int:
    """Forks a training; returns the child's process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        trainer = Trainer(*parts, run)
        if resume:
            trainer.restore()
        trainer.fit()
        os._exit(0)
    except BaseException:
        os._exit(1)


@pytest.mark.timeout(600)
def test_twenty_kills(parts, tmp_path: Path) -> None:
    straight = Trainer(*parts, _run(tmp_path / "straight", parts[2]))
    began = time.monotonic()
    wanted = straight.fit()
    pace = (time.monotonic() - began) / 20
    rng, equal, killed = random.Random(5), 0, 0
    for k in range(KILLS):
        run = _run(tmp_path / f"run{k}", parts[2])
        pid = _child(parts, run, resume=False)
        while not list((run / "state").glob("step-*")):
            time.sleep(0.01)
        if k % 4 == 0:  # inside a save: kill as soon as a temporary file shows
            deadline = time.monotonic() + 20 * pace
            while not list((run / "state").glob(".*.tmp")) and time.monotonic() < deadline:
                pass
        else:
            time.sleep(rng.uniform(0, 16) * pace)
        os.kill(pid, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        _, status = os.waitpid(_child(parts, run, resume=True), 0)
        assert os.WEXITSTATUS(status) == 0
        from apl_core.prefix import load_prefix

        found = load_prefix(run / "prefix" / f"{parts[2].name}.safetensors", enforce=True)
        equal += torch.equal(found.vectors(), wanted.vectors())
    assert equal == KILLS
    assert killed >= KILLS // 2  # the others had finished before the signal came
    if os.environ.get("APL_RECORD_CLAIMS"):
        claims.record({"kill-resume": (equal, None, KILLS)})


def _run(folder: Path, config: TrainConfig) -> Path:
    folder.mkdir()
    write_config(folder, config)
    return folder
