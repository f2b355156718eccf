"""`apl evaluate` under a real `accelerate launch`: two processes share the cells of a table and find what one finds."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fakes.launched import launched

pytest.importorskip("diffusers")
pytest.importorskip("insightface")
pytest.importorskip("accelerate")
pytestmark = [pytest.mark.world, pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).resolve().parents[2]
PRESET = """\
models:
  - {name: miniature, checkpoint: miniature, paper: SD v1.5}
attributes: none
features: none
clip: none
steps: 2
sizes:
  table1: {persons: 2, seeds: 1}
"""
COMMAND = """\
import sys
from pathlib import Path
from apl_train import __main__, claims
claims.FILE = Path("nowhere", "claims.json")  # results go into the run, not into the checkout's own
sys.exit(__main__.main())
"""


def evaluate(folder: Path, processes: int) -> tuple[dict[str, Any], str]:
    """The table's JSON, and what was said beside it."""
    folder.mkdir()
    (folder / "two.yaml").write_text(PRESET, "utf-8")
    (folder / "command.py").write_text(COMMAND, "utf-8")
    start = launched(processes)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true",
           "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*start, "command.py", "evaluate", "--preset", "two.yaml", "--only", "table1", "--run", "run",
                           "--json"], capture_output=True, text=True, timeout=1500, env=env, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout), done.stderr


def test_two_processes_share_a_table(tmp_path: Path) -> None:
    one, said_by_one = evaluate(tmp_path / "one", 1)
    two, said_by_two = evaluate(tmp_path / "two", 2)
    tables = [json.loads((tmp_path / name / "run" / "results" / "table1-two.json").read_text()) for name in ("one",
                                                                                                            "two")]
    assert tables[0] == tables[1] and [row["name"] for row in tables[0]["rows"]] == ["miniature", "miniature + APL"]
    assert tables[0]["rows"][0]["values"]["test_mean"]["value"] is not None
    assert one["table1"]["rows"] == two["table1"]["rows"]
    cells = [sorted(p.name for p in (tmp_path / name / "run" / "cells").glob("*.safetensors")) for name in ("one",
                                                                                                           "two")]
    assert cells[0] == cells[1] and len(cells[0]) > 1
    done = [int(re.search(r"(\d+) were done", said)[1]) for said in (said_by_one, said_by_two)]
    assert done[0] == len(cells[0]) and 0 < done[1] < len(cells[0]), "each did a part"
