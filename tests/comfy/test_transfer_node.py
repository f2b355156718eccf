"""The transfer node inside a real ComfyUI (`transfer_in_host.py`); skipped where there is no host."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from comfy_host import host_folder, run_in_host

SCRIPT = Path(__file__).with_name("transfer_in_host.py")
CHECKS = [node.name for node in ast.parse(SCRIPT.read_text("utf-8")).body
          if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")]


@pytest.mark.skipif(host_folder() is None, reason="no ComfyUI: set COMFYUI_DIR (tests/comfy/README.md)")
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("check", CHECKS)
def test_in_the_host(check: str) -> None:
    problem = run_in_host(SCRIPT.name)[check]
    assert not problem, problem
