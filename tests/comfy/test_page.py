"""The pack in ComfyUI's own page, by a browser: examples from the template browser, help pages, pictures, tooltips.

Needs comfyui-frontend-package in the host's environment, a chromium, and playwright in this one or in the interpreter
that `APL_PLAYWRIGHT_PYTHON` names. Pictures of the page go to `APL_PICTURES`, or a temporary folder.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import workflow_files
from comfy_host import host_folder, host_python

PYTHON = os.environ.get("APL_PLAYWRIGHT_PYTHON") or (
    sys.executable if importlib.util.find_spec("playwright") else "")
CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
# SDXL's 1024 pixels take this model minutes a picture on one core; a training of 300 steps too.
SMALLER: dict[str, dict[str, Any]] = {
    "anonymize-sdxl": {"width": 256, "height": 256},
    "transfer-to-sdxl": {"width": 256, "height": 256},
    "train-then-use": {"steps": 12, "levels_every": 6, "previews": 1},
}


def _frontend() -> str:
    """The folder of the installed page, "" where the host has none."""
    host = host_folder()
    if host is None:
        return ""
    code = "import comfyui_frontend_package as p; print(list(p.__path__)[0] + '/static')"
    done = subprocess.run([host_python(host), "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip()


pytestmark = [
    pytest.mark.world,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not PYTHON or not CHROMIUM.is_file(), reason="no playwright or no chromium"),
    pytest.mark.skipif(not _frontend(), reason="no ComfyUI, or none with comfyui-frontend-package"),
]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    os.environ.setdefault("APL_TRAIN_PYTHON", sys.executable)  # the host has no trainer
    from enforced_server import serving
    from miniature_server import make_base

    base = make_base(tmp_path_factory.mktemp("page"))
    folder = Path(os.environ.get("APL_PICTURES", "")) if "APL_PICTURES" in os.environ else base.parent / "pictures"
    with serving(base.parent, base, None, ["--front-end-root", _frontend()]) as server:
        # APL_EXAMPLES: only these, with commas between
        only = [name for name in os.environ.get("APL_EXAMPLES", "").split(",") if name]
        names = [path.stem for path in workflow_files.paths() if not only or path.stem in only]
        examples = json.dumps({name: SMALLER.get(name, {}) for name in names})
        script = Path(__file__).with_name("look_at_page.py")
        done = subprocess.run([PYTHON, str(script), f"http://127.0.0.1:{server.port}", str(folder), examples],
                              capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_examples_come_from_the_template_browser_and_run(seen: dict[str, Any]) -> None:
    for name, found in seen["workflows"].items():
        assert found["state"] == "success", name
        assert not [node for node in found["nodes"] if node["missing"]], name
        shown = [node["images"] for node in found["nodes"] if node["type"] in ("SaveImage", "PreviewImage")]
        assert shown and all(shown), f"{name} shows no picture: {found['nodes']}"


def test_every_node_has_its_help_its_picture_and_tooltips(seen: dict[str, Any]) -> None:
    assert len(seen["help"]) >= 8
    for name, page in seen["help"].items():
        assert page["length"] > 300, name
        assert page["pictures"] and all(width > 100 for _, width in page["pictures"]), (name, page["pictures"])
        assert not page["without_tooltip"], (name, page["without_tooltip"])


def test_the_page_reports_no_error(seen: dict[str, Any]) -> None:
    assert not seen["errors"], seen["errors"]
