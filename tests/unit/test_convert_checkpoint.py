"""Pickled checkpoints become safetensors without anything in them being run."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from fakes import tiny_models as tiny

from apl_train.commands import cli
from apl_train.model.files import read_parts
from apl_train.model.single_file import to_ldm

pytest.importorskip("diffusers")


@pytest.fixture
def lightning(monkeypatch: pytest.MonkeyPatch):
    """A class that is there while the checkpoint is written and gone when it is read, as a trainer's are."""
    module = ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    kind = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = kind
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        sys.modules[name] = module
    yield kind
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        sys.modules.pop(name, None)


def test_a_trainers_checkpoint_is_read_without_its_objects(
    lightning: type, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = (tiny.unet(width=64, channels=(320, 320), attention_head_dim=8), tiny.vae(channels=(32, 32, 64, 64)),
              tiny.text_encoder(width=64, heads=1))
    callback = lightning()
    callback.best = 0.5
    weights = to_ldm(*models) | {"model_ema.decay": torch.tensor(0.99)}
    torch.save({"state_dict": weights, "epoch": 3, "callbacks": {lightning: {"best": 1}, "other": callback}},
               tmp_path / "m.ckpt")
    for name in [n for n in sys.modules if n.startswith("pytorch_lightning")]:
        del sys.modules[name]
    assert cli.main(["convert", str(tmp_path / "m.ckpt"), "--out", str(tmp_path / "m.safetensors")]) == 0
    assert "m.safetensors" in capsys.readouterr().out
    found = read_parts(tmp_path / "m.safetensors")
    for old, new in zip(models, (found.unet, found.vae, found.text_encoder), strict=True):
        assert all(torch.equal(v, new.state_dict()[k]) for k, v in old.state_dict().items())
