"""`apl blend`, `apl pseudo` and `apl sample --strength`, on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import tiny_models as tiny

from apl_core.metadata import PrefixMetadata
from apl_core.prefix import AnonymizationPrompt, load_prefix, save_prefix
from apl_train.commands import cli


def prefix(path: Path, seed: int, width: int = 32) -> Path:
    vectors = torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
    save_prefix(AnonymizationPrompt("sd1", {"emb_params": vectors},
                                    PrefixMetadata(title=path.stem, family="sd1", widths={"emb_params": width})), path)
    return path


def test_blend_writes_a_prefix_between_two(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    null, own = prefix(tmp_path / "null.safetensors", 1), prefix(tmp_path / "own.safetensors", 2)
    out = tmp_path / "half.safetensors"
    assert cli.main(["blend", str(own), "--null", str(null), "--strength", "0.5", "--out", str(out), "--json"]) == 0
    found = load_prefix(out, enforce=True)
    assert json.loads(capsys.readouterr().out)["content_hash"] == found.content_hash
    middle = (load_prefix(null).vectors().numpy() + load_prefix(own).vectors().numpy()) / 2
    assert np.allclose(found.vectors().numpy(), middle, atol=1e-6)
    assert cli.main(["blend", str(own), "--null", str(null), "--strength", "3", "--out", str(out)]) == 2
    assert "strength is 3.0" in capsys.readouterr().err


def test_sample_takes_a_strength_only_with_a_null_prefix(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("diffusers")
    model = tiny.write_checkpoint(tmp_path / "model")
    null, own = prefix(tmp_path / "null.safetensors", 1), prefix(tmp_path / "own.safetensors", 2)
    argv = ["sample", "--base-model", str(model), "--prefix", str(own), "--prompt", "ab", "--steps", "2",
            "--seeds", "1", "--strength"]
    assert cli.main([*argv, "0.5", "--out", str(tmp_path / "no")]) == 2
    assert "--null" in capsys.readouterr().err and not (tmp_path / "no").exists()
    for strength in ("0", "1"):
        assert cli.main([*argv, strength, "--null", str(null), "--out", str(tmp_path / strength)]) == 0
    alone = ["sample", "--base-model", str(model), "--prefix", str(null), "--prompt", "ab", "--steps", "2", "--seeds",
             "1", "--out", str(tmp_path / "null")]
    assert cli.main(alone) == 0
    pictures = {name: (tmp_path / name / "00-ab.png").read_bytes() for name in ("0", "1", "null")}
    assert pictures["0"] == pictures["null"] != pictures["1"]


def test_pseudo_makes_a_folder_that_a_training_takes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("diffusers")
    model = tiny.write_checkpoint(tmp_path / "model")
    reg = tiny.write_set(tmp_path / "reg", [("", "a tree", "", "nonface"), ("", "a man with hats", "", "face")])
    s_id = tiny.write_set(tmp_path / "id", [("ab", "photo of ab", "a man", "id"), ("ef", "ef", "a boy", "id")])
    out = tmp_path / "pseudo"
    made = ["pseudo", "--base-model", str(model), "--out", str(out), "--steps", "2", "--batch-size", "2"]
    assert cli.main([*made, "--faces", str(reg), "--count", "0"]) == 2
    assert cli.main([*made, "--faces", str(reg), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["words"] == 1
    train = ["train", "--base_model", str(model), "--s_id", str(s_id), "--s_reg", str(reg), "--steps", "2",
             "--batch_size", "4", "--pseudo", str(out), "--pseudo_share", "0.5", "--run", str(tmp_path / "run")]
    assert cli.main([*train, "--json"]) == 0
    assert load_prefix(tmp_path / "run" / "prefix" / "anonymize.safetensors", enforce=True).num_tokens == 10
    fictional = tmp_path / "fictional"
    assert cli.main([*made[:4], str(fictional), *made[5:], "--faces", str(s_id)]) == 0
    assert len((fictional / "metadata.csv").read_text("utf-8").splitlines()) == 3
