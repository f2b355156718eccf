"""Two CPU processes under `accelerate launch` do what one does: the same prefix, the same pictures, a clean end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import tiny_models as tiny
from PIL import Image

from apl_core.errors import ConfigError
from apl_core.prefix import load_prefix
from apl_train.processes import Processes, this_process

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

from fakes import two_processes as script

from apl_train import claims
from apl_train.model.single_file import ldm_config, to_ldm
from apl_train.training import command as training
from apl_train.training.events import read_events
from apl_train.training.state import load_state

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-4
"""Largest difference of a vector's element after 6 steps of size 0.01: two halves of a batch are added up in another
order than the whole, and Adam divides by the root of what may be close to zero."""


def write_set(folder: Path, rows: list[tuple[str, str, str, str]]) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(len(rows))
    lines = ["image,name,prompt,description,kind"]
    for i, (name, c1, c2, kind) in enumerate(rows):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(folder / f"{i}.png")
        lines.append(f'{i}.png,{name},{c1},"{c2}",{kind}')
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")


def launch(root: Path, what: str) -> subprocess.CompletedProcess:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # accelerate has no word of its own for several CPU processes on one machine: without a GPU, --multi_gpu starts them
    argv = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
            "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
            "--main_process_port", str(port),
            str(ROOT / "tests" / "fakes" / "two_processes.py"), str(root), what]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(argv, capture_output=True, text=True, timeout=800, env=env, cwd=ROOT, check=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import yaml
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("world")
    models = tiny.unet(), tiny.vae(), tiny.text_encoder()
    tiny.write_tokenizer(root / "tokenizer")
    save_file({k: v.contiguous() for k, v in to_ldm(*models).items()}, root / "tiny.safetensors")
    (root / "tiny.yaml").write_text(yaml.safe_dump(ldm_config(*models)))
    write_set(root / "id", [(n, f"photo of {n}", "a man", "id") for n in ("ab", "cd", "ef", "gh", "ij")])
    # more than a shard of pictures, so that both processes have some to encode
    write_set(root / "reg", [("", f"a {'tree' if i % 2 else 'man'} {i}", "", "nonface" if i % 2 else "face")
                             for i in range(40)])
    return root


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[str, Any]:
    """What one process makes of the same settings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    backend = script.load(root)
    made = {name: training.train(root / name, script.settings(root, bank=bank), backend=backend, cache=root / "cache1")
            for name, bank in (("one", 0), ("one-bank", 70))}
    found = {name: prompt.vectors() for name, prompt in made.items()}
    found |= {"latents": script.generate(backend), "seen": script.observe(backend, root / "observed1")}
    torch.set_num_threads(threads)
    return found


@pytest.fixture(scope="module")
def both(root: Path, alone: dict[str, Any]) -> list[dict]:
    done = launch(root, "all")
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((root / f"found{index}.json").read_text()) for index in (0, 1)]


def vectors(run: Path, name: str = "anonymize") -> torch.Tensor:
    return load_prefix(run / "prefix" / f"{name}.safetensors", enforce=True).vectors()


def test_two_processes_learn_the_prefix_of_one(root: Path, both: list[dict], alone: dict[str, Any]) -> None:
    assert [(one["index"], one["count"]) for one in both] == [(0, 2), (1, 2)]
    differences = [float((vectors(root / f"two{name}") - alone[f"one{name}"]).abs().max()) for name in ("", "-bank")]
    assert max(differences) <= TOLERANCE
    if os.environ.get("APL_RECORD_CLAIMS"):
        claims.record({"two-processes": (1e6 * max(differences), None, 2)})
    moved = (alone["one"] - script.Trainer(script.load(root), training.load_training_set(
        script.load(root), script.settings(root), root / "cache1"), script.settings(root), root / "x").vectors[
        "emb_params"].detach()).abs().max()
    assert moved > 100 * TOLERANCE  # the bound would be no proof if nothing had been learned


def test_losses_are_those_of_the_whole_batch(root: Path, both: list[dict]) -> None:
    one, two = ([e for e in read_events(root / run) if e["event"] == "step"] for run in ("one", "two"))
    assert [e["step"] for e in two] == [1, 2, 3, 4, 5, 6]  # written once, by the first process
    for a, b in zip(one, two, strict=True):
        for key in ("l_id", "l_reg", "loss"):
            assert (a[key] is None) == (b[key] is None)
            assert a[key] is None or b[key] == pytest.approx(a[key], rel=1e-3)


def test_caches_are_equal_and_made_once(root: Path, both: list[dict]) -> None:
    kinds = ("latents", "captions", "bank")
    names = [{p.relative_to(root / cache) for kind in kinds for p in (root / cache / kind).rglob("*.safetensors")}
             for cache in ("cache1", "cache2")]
    assert names[0] == names[1] and len(names[0]) == 5  # two of each, and one of targets
    assert not list((root / "cache2").rglob("*.tmp"))


def test_generation_is_split_without_overlap_or_loss(both: list[dict], alone: dict[str, Any]) -> None:
    assert both[0]["shares"] == both[1]["shares"] == [[0, 2, 4, 6], [1, 3, 5]]
    for one in both:
        assert torch.allclose(torch.tensor(one["latents"]), alone["latents"], atol=1e-4)


def test_scoring_is_split_without_overlap_or_loss(root: Path, both: list[dict], alone: dict[str, Any]) -> None:
    wanted = alone["seen"]
    assert sum(wanted["counts"]) > 0 and 0 in wanted["counts"]
    for one in (both[0]["seen"], both[1]["seen"]):
        assert one["counts"] == wanted["counts"] and one["cached"] == [False, True] and one["same"]
        assert one["kept"] == [list(shot) for shot in wanted["kept"]]
        assert np.allclose(one["faces"], wanted["faces"], atol=1.0)  # a colour's mean of 0 to 255
        assert torch.allclose(torch.tensor(one["latents"]), torch.tensor(wanted["latents"]), atol=1e-4)
    assert len(list((root / "observed2").iterdir())) == 1


def test_one_that_is_asked_to_stop_stops_both_and_resumes(root: Path, both: list[dict],
                                                          alone: dict[str, Any]) -> None:
    for one in both:
        assert "Stopped at step 3 of 6" in one["stopped"] and "apl resume" in one["stopped"]
    assert (vectors(root / "stop") - alone["one"]).abs().max() <= TOLERANCE


def test_errors_reach_both_processes(both: list[dict]) -> None:
    for one in both:
        assert "already holds a training" in one["refused"][0] and "apl resume" in one["refused"][0]
        assert "batch_size is 1, for 2 processes" in one["refused"][1]


def test_a_killed_process_ends_the_other_cleanly_and_can_be_resumed(root: Path, alone: dict[str, Any]) -> None:
    done = launch(root, "die")
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "At step 3: Another process of this command ended" in line and "apl resume" in line
    assert load_state(root / "die").step == 3  # later than the last regular save, at step 0
    assert not (root / "die" / "prefix" / "anonymize.safetensors").exists()
    training.resume(root / "die", backend=script.load(root), cache=root / "cache1")
    assert (vectors(root / "die") - alone["one"]).abs().max() <= TOLERANCE


def test_alone() -> None:
    process = Processes()
    assert process.main and process.share([1, 2, 3]) == [1, 2, 3] == process.merge([1, 2, 3])
    assert process.once(lambda: 5) == process.from_main(5) == 5 and process.everyone(7) == [7]
    with pytest.raises(ConfigError, match="no"):
        process.once(lambda: (_ for _ in ()).throw(ConfigError("no", "yes")))
    assert this_process().count == 1
