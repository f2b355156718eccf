"""Resume state: one file, the newest whole one counts, randomness belongs to the step."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from apl_core.errors import TrainingError
from apl_train.seeds import seed_of, step_generator
from apl_train.training.state import KEEP, TrainState, load_state, only_one, save_state


def state(step: int) -> TrainState:
    return TrainState({"vectors.emb_params": torch.full((2, 3), float(step))}, step, {"steps": 9}, {"model": "a"})


def test_round_trip_and_only_the_newest_are_kept(tmp_path) -> None:
    for step in (1, 2, 3, 12):
        save_state(tmp_path, state(step))
    assert len(list((tmp_path / "state").iterdir())) == KEEP
    back = load_state(tmp_path)
    assert (back.step, back.config, back.hashes) == (12, {"steps": 9}, {"model": "a"})
    assert torch.equal(back.tensors["vectors.emb_params"], torch.full((2, 3), 12.0))


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_a_damaged_state_is_passed_over(tmp_path, damage: str) -> None:
    save_state(tmp_path, state(5))
    path = save_state(tmp_path, state(6))
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        data = data[:-3]
    else:
        data[-1] ^= 1
    path.write_bytes(data)
    assert load_state(tmp_path).step == 5


def test_nothing_to_resume_is_an_error_with_a_way_out(tmp_path) -> None:
    with pytest.raises(TrainingError) as caught:
        load_state(tmp_path)
    assert "apl train" in caught.value.hint


def test_a_step_has_its_own_randomness() -> None:
    first = torch.randn(4, generator=step_generator(3, 7))
    torch.manual_seed(999)
    torch.randn(100)
    assert torch.equal(first, torch.randn(4, generator=step_generator(3, 7)))
    assert not torch.equal(first, torch.randn(4, generator=step_generator(3, 8)))
    assert not torch.equal(first, torch.randn(4, generator=step_generator(4, 7)))
    # pinned: a changed derivation would make old states continue differently
    digest = hashlib.sha256(b"apl-step\x000\x000").digest()
    assert seed_of("apl-step", 0, 0) == int.from_bytes(digest[:8], "little") >> 1


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="needs fork")
@pytest.mark.parametrize("place", ["write", "fsync", "replace", "after replace", "drop the oldest"])
def test_killed_inside_a_save_the_last_whole_state_counts(tmp_path: Path, place: str) -> None:
    """SIGKILL at every boundary of a save that follows two others, in a process of its own."""
    for step in (5, 6):
        save_state(tmp_path, state(step))
    pid = os.fork()
    if pid == 0:
        def die(*_a: object, **_k: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        from apl_core import atomic

        if place == "write":
            atomic.save_file = lambda tensors, path, *_: (Path(path).write_bytes(b"half"), die())
        elif place == "fsync":
            os.fsync = die
        elif place == "replace":
            Path.replace = die
        elif place == "after replace":
            atomic._sync_folder = die
        else:
            Path.unlink = die
        save_state(tmp_path, state(7))
        os._exit(0)  # not reached: a wrong place would show as a process that ended well
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    back = load_state(tmp_path)
    assert back.step == (7 if place in ("after replace", "drop the oldest") else 6)
    assert torch.equal(back.tensors["vectors.emb_params"], torch.full((2, 3), float(back.step)))
    with only_one(tmp_path):  # what the next training does first
        assert not list((tmp_path / "state").glob(".*"))
    save_state(tmp_path, state(8))
    assert load_state(tmp_path).step == 8 and len(list((tmp_path / "state").iterdir())) == KEEP


def test_two_processes_cannot_train_in_one_folder(tmp_path: Path) -> None:
    code = ("import sys, pathlib; from apl_train.training.state import only_one\n"
            "with only_one(pathlib.Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()")
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             cwd=Path(__file__).resolve().parents[2])
    try:
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(TrainingError, match="Another process is training"), only_one(tmp_path):
            pass
        other.kill()
        other.wait()
        with only_one(tmp_path):  # a killed process leaves no lock behind
            pass
    finally:
        other.kill()
        other.wait()
        other.stdin.close()
        other.stdout.close()
