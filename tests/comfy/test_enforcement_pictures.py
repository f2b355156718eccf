"""Enforced pictures are the ones that a careful user would have wired, to the last bit of their latents."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from enforced_server import ROOT, host_folder, host_python, make_base, write_policy

pytestmark = [
    pytest.mark.skipif(host_folder() is None, reason="no ComfyUI: set COMFYUI_DIR (tests/comfy/README.md)"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    folder = tmp_path_factory.mktemp("enforced-pictures")
    write_policy(folder)
    make_base(folder)
    keep = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "APL_POLICY")}
    done = subprocess.run(
        [host_python(host_folder()), str(Path(__file__).with_name("enforced_in_host.py")), str(host_folder()),
         str(ROOT), str(folder)], cwd=host_folder(), env=keep | {"OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, check=False, timeout=800)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_the_prefix_is_on_the_positive_alone(found: dict[str, float]) -> None:
    assert found["enforced - prefix on the positive by hand"] == 0.0, found
    # The instrument: the other wirings are other pictures.
    assert found["enforced - plain"] > 1e-3 and found["enforced - prefix on both"] > 1e-3, found


def test_a_negative_that_is_the_only_prompt_carries_it_too(found: dict[str, float]) -> None:
    assert found["cfg 0: enforced - prefix on both"] == 0.0, found
    assert found["cfg 0: enforced - name in a plain negative"] > 1e-3, found


def test_the_self_test_passes_outside_a_server(found: dict[str, float]) -> None:
    assert found["status"] == 200
