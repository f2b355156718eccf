"""`apl generate` under a real `accelerate launch`: two processes draw the set of one; a lost one leaves it whole."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fakes import tiny_models as tiny
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

from apl_train.commands import cli
from apl_train.model.single_file import ldm_config, to_ldm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).resolve().parents[2]
PEOPLE = ("Ann Abel", "Bob Bain", "Cid Cole")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import yaml
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("model")
    models = tiny.unet(), tiny.vae(), tiny.text_encoder()
    save_file({k: v.contiguous() for k, v in to_ldm(*models).items()}, root / "tiny.safetensors")
    (root / "tiny.yaml").write_text(yaml.safe_dump(ldm_config(*models)))
    lines = [f"{name},A tall man with short hair,train" for name in PEOPLE]
    (root / "people.csv").write_text("\n".join(["name,description,split", *lines]) + "\n")
    return root


def arguments(model: Path, out: Path) -> list[str]:
    return ["generate", "id", "--out", str(out), "--base-model", str(model / "tiny.safetensors"), "--people",
            str(model / "people.csv"), "--each", "3", "--steps", "2", "--guidance", "2", "--json"]


def launch(*argv: str) -> subprocess.CompletedProcess:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
             "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port",
             str(port)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true",
           "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    return subprocess.run([*start, *argv], capture_output=True, text=True, timeout=1500, env=env, cwd=ROOT, check=False)


@pytest.fixture(scope="module")
def alone(model: Path) -> Path:
    """The set that one process draws."""
    assert cli.main(arguments(model, model / "alone")) == 0
    return model / "alone"


def pictures(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))}


def assert_equal_sets(folder: Path, alone: Path) -> None:
    """A picture may be drawn beside other neighbours: its values then differ by a rounding."""
    ours, theirs = pictures(folder), pictures(alone)
    assert ours.keys() == theirs.keys() and len(ours) == 9
    assert all(abs(ours[name] - theirs[name]).max() <= 1 for name in ours)
    assert len({picture.tobytes() for picture in ours.values()}) == 9
    for name in ("metadata.csv", "plan.json"):
        assert (folder / name).read_text() == (alone / name).read_text()
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in alone.iterdir())


def test_two_processes_draw_the_set_of_one(model: Path, alone: Path) -> None:
    done = launch("-m", "apl_train", *arguments(model, model / "two"))
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads(done.stdout)  # one of them speaks
    assert said["drawn"] == 9 and said["folder"] == str(model / "two")
    assert_equal_sets(model / "two", alone)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_lost_while_it_writes_leaves_nothing_half_done(model: Path, alone: Path, lost: int) -> None:
    out = model / f"lost{lost}"
    script = str(ROOT / "tests" / "fakes" / "lost_process.py")
    done = launch(script, str(lost), *arguments(model, out))
    assert done.returncode != 0 and not done.stdout.strip()
    assert not (out / "metadata.csv").exists()  # no table of a set that is not whole
    there = pictures(out)
    assert there and len(there) < 9 and all(picture.shape == (64, 64, 3) for picture in there.values())
    before = {name: (out / name).stat().st_mtime_ns for name in there}
    assert cli.main(arguments(model, out)) == 0
    assert_equal_sets(out, alone)
    assert {name: (out / name).stat().st_mtime_ns for name in there} == before  # what was drawn is not drawn again
