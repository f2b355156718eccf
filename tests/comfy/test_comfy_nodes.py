"""The ComfyUI nodes inside a real ComfyUI, each check of `in_host.py` one test; skipped where there is no host."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from comfy_host import host_folder, run_in_host

SCRIPT = Path(__file__).with_name("in_host.py")
CHECKS = [
    node.name
    for node in ast.parse(SCRIPT.read_text("utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]
needs_host = pytest.mark.skipif(
    host_folder() is None, reason="no ComfyUI: set COMFYUI_DIR and COMFYUI_PYTHON (tests/comfy/README.md)"
)


@needs_host
@pytest.mark.timeout(1000)  # the first one starts the host: seconds, or minutes on a busy machine
@pytest.mark.parametrize("check", CHECKS)
def test_in_the_host(check: str) -> None:
    result = run_in_host(SCRIPT.name)[check]
    assert not result["problem"], result["problem"]
