"""`apl make` under a real `accelerate launch`: two processes make the prefix of one, and one of them writes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fakes.launched import launched

from apl_core.prefix import load_prefix
from apl_train.datasets.cast import read_cast, table_of, write_cast
from apl_train.training.events import read_events

pytest.importorskip("diffusers")
pytest.importorskip("insightface")
pytest.importorskip("accelerate")
pytestmark = [pytest.mark.world, pytest.mark.slow, pytest.mark.timeout(3600)]
ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-4
"""As in test_processes: halves of a batch are added up in another order than the whole."""


def make(folder: Path, people: Path, processes: int) -> tuple[Path, dict[str, Any], list[str]]:
    """A run of `apl make`: its folder, the JSON that it printed, and what it said beside that."""
    run = folder / "run"
    argv = ["make", "--run", str(run), "--checkpoint", "miniature", "--people", str(people), "--persons", "", "--each",
            "2", "--neutral", "4", "--draw_steps", "2", "--steps", "2", "--score_persons", "2", "--score_seeds", "1",
            "--previews", "0", "--name", "mine", "--embeddings", str(folder / "prefixes"), "--json"]
    start = [*launched(processes), "-m", "apl_train"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true",
           "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*start, *argv], capture_output=True, text=True, timeout=3000, env=env, cwd=folder,
                          check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return run, json.loads(done.stdout), done.stderr.splitlines()


def test_two_processes_make_what_one_makes(tmp_path: Path) -> None:
    people = tmp_path / "people.csv"
    every = read_cast(table_of("miniature"))
    write_cast(people, [p for split in ("train", "test") for p in [p for p in every if p.split == split][:2]])
    found = {}
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        found[count] = make(folder, people, count)
    (one, said_by_one, _), (two, said_by_two, words) = found[1], found[2]
    ours, theirs = (load_prefix(run / "train" / "prefix" / "mine.safetensors", enforce=True) for run in (two, one))
    assert float((ours.vectors("emb_params") - theirs.vectors("emb_params")).abs().max()) <= TOLERANCE
    assert load_prefix(tmp_path / "2" / "prefixes" / "mine.safetensors").content_hash == ours.content_hash
    stages = [[e["stage"] for e in read_events(run) if e["event"] == "stage"] for run in (two, one)]
    assert stages[0] == stages[1] == ["generate", "validate", "cache", "train", "score", "install"]
    assert sum(line.startswith("== generate") for line in words) == 1  # one of them speaks
    assert {k: len(v) if isinstance(v, list) else bool(v) for k, v in said_by_two.items()} == \
        {k: len(v) if isinstance(v, list) else bool(v) for k, v in said_by_one.items()}
    for kind in ("s_id", "s_reg"):
        assert (two / kind / "metadata.csv").read_text() == (one / kind / "metadata.csv").read_text()
    for run in (one, two):
        scores = json.loads((run / "scores.json").read_text())
        assert scores["persons"]["test"]["on"]["n_persons"] == 2 and (run / "report.html").exists()
        assert not list(run.rglob("*.tmp"))
