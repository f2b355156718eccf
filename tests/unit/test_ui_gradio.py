"""One code base builds and answers under gradio 3.41, 4.40, 5 and 6, alone and as a tab of a host's page.

The four cannot be installed side by side: each is looked for in the interpreter that runs the tests, and in the one
that APL_GRADIO3_PYTHON, APL_GRADIO4_PYTHON, ... name. A major that is nowhere is skipped visibly.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
UI = ROOT / "apl_train" / "ui"
IDS = {"apl-root", "apl-strip", "apl-checkpoint", "apl-source", "apl-look", "apl-check", "apl-draw", "apl-preset",
       "apl-make", "apl-start", "apl-picker", "apl-runs", "apl-status", "apl-pause", "apl-stop", "apl-resume",
       "apl-previews", "apl-log", "apl-first", "apl-second", "apl-prefix", "apl-use", "apl-publish", "apl-title",
       "apl-author", "apl-licence"}
_TRAINER = ("diffusers", "transformers", "accelerate", "insightface", "onnxruntime", "jsonargparse", "tqdm")
_SCRIPT = """
import importlib.util, json, sys, urllib.request, warnings

class Nothing:
    def find_spec(self, module, path=None, target=None):
        if module.split(".")[0] in blocked:
            raise ImportError(module + " is not installed in this host")

root, runs, mode, blocked = sys.argv[1], sys.argv[2], sys.argv[3], set(sys.argv[4:])
blocked -= {m.split(".")[0] for m in sys.modules}
import gradio as gr
blocked -= {m.split(".")[0] for m in sys.modules}  # what this gradio itself has loaded
sys.meta_path.insert(0, Nothing())
if mode == "alone":
    sys.path.insert(0, root)
    from apl_train.ui import app, compat, place, core
else:
    # as a host loads the repository: one package under a name of its own, nothing of ours on the path
    sys.path[:] = [p for p in sys.path if p not in ("", root)]
    spec = importlib.util.spec_from_file_location("_apl_pack", root + "/__init__.py", submodule_search_locations=[root])
    pack = importlib.util.module_from_spec(spec)
    sys.modules["_apl_pack"] = pack
    spec.loader.exec_module(pack)
    from _apl_pack.apl_train.ui import app, compat, place, core
    assert core.core("library").__name__ == "_apl_pack.apl_core.library"
page = app.build(place.Place(runs=runs, host="" if mode == "alone" else "AUTOMATIC1111", may_start=mode != "closed"))
if mode != "alone":
    tab = page
    with gr.Blocks(analytics_enabled=False) as page:
        with gr.Tabs():
            with gr.Tab("Text"):
                gr.Textbox()
            with gr.Tab("Anonymization"):
                tab.render()
_, local, _ = compat.launch(page, address="127.0.0.1", port=None, open_browser=False, auth=None, quiet=True)
with urllib.request.urlopen(local + "config", timeout=60) as answer:
    config = json.load(answer)
parts = [c.get("props", {}) for c in config["components"]]
print(json.dumps({
    "major": int(gr.__version__.split(".")[0]),
    "ids": [p["elem_id"] for p in parts if p.get("elem_id")],
    "values": [str(p.get("value")) for p in parts if p.get("value")],
    "start": [p.get("interactive") for p in parts if p.get("elem_id") == "apl-start"],
    "trainer": sorted(set(sys.argv[4:]) & set(sys.modules) & blocked),
    "listeners": len(config["dependencies"]),
    "named": [d.get("api_name") for d in config["dependencies"]],
    "visible": [d.get("api_visibility", d.get("show_api")) for d in config["dependencies"]],
}), flush=True)
import os; os._exit(0)
"""


def interpreter(major: int) -> str | None:
    """One with that gradio, or None."""
    for python in (os.environ.get(f"APL_GRADIO{major}_PYTHON", ""), sys.executable):
        if python:
            ask = [python, "-c", "from importlib import metadata; print(metadata.version('gradio'))"]
            found = subprocess.run(ask, capture_output=True, text=True, check=False).stdout
            if found.split(".")[0] == str(major):
                return python
    return None


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", ["alone", "tab", "closed"])
@pytest.mark.parametrize("major", [3, 4, 5, 6])
def test_the_page_is_built_and_served(major: int, mode: str, tmp_path: Path) -> None:
    python = interpreter(major)
    if python is None:
        pytest.skip(f"gradio {major} is not installed here; name an interpreter in APL_GRADIO{major}_PYTHON")
    environment = os.environ | {"GRADIO_ANALYTICS_ENABLED": "False", "no_proxy": "127.0.0.1,localhost"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([python, "-c", _SCRIPT, str(ROOT), str(tmp_path / "runs"), mode, *_TRAINER], timeout=1700,
                          capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["major"] == major and set(found["ids"]) >= IDS and found["listeners"] > 20
    assert found["trainer"] == []
    assert found["start"] == [mode != "closed"]
    assert any("apl train --preset fast" in value for value in found["values"]) is (mode != "closed")
    assert any("listens beyond" in value for value in found["values"]) is (mode == "closed")


def test_the_page_needs_the_standard_library_and_gradio_alone() -> None:
    """What is imported with the files; apl_core comes through `core`, Pillow and YAML when they are needed."""
    allowed = set(sys.stdlib_module_names)
    for path in sorted(UI.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                roots = {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level < 2, f"{path.name} imports the trainer"
                roots = set() if node.level else {node.module.split(".")[0]}
            else:
                continue
            gradio = {"gradio"} if path.name in ("app.py", "compat.py") or path.name.startswith("view_") else set()
            assert roots <= allowed | gradio, f"{path.name} imports {roots - allowed}"


def test_only_one_file_looks_at_the_version_of_gradio() -> None:
    for path in UI.glob("*.py"):
        if path.name != "compat.py":
            assert "__version__" not in path.read_text(encoding="utf-8"), path.name
