"""Every example workflow over HTTP in a whole ComfyUI with the miniature, and what people do to it while it runs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import workflow_files
from comfy_host import host_folder
from miniature_server import SD1, SDXL, Socket, make_base
from PIL import Image

from apl_core.library import PrefixLibrary, shipped_folder
from apl_core.prefix import load_prefix

pytestmark = [
    pytest.mark.world,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(host_folder() is None, reason="no ComfyUI: set COMFYUI_DIR (tests/comfy/README.md)"),
]
PACK = "anonymization-prompt"
# SDXL's 1024 pixels take this model minutes a picture on one core; a training of 300 steps too.
SMALLER: dict[str, dict[str, Any]] = {
    "anonymize-sdxl": {"width": 256, "height": 256},
    "transfer-to-sdxl": {"width": 256, "height": 256},
    "train-then-use": {"steps": 20, "levels_every": 10, "previews": 2},
}
SHIPPED = {"anonymize-sd1": "anonymize-miniature", "anonymize-sdxl": "anonymize-miniature-sdxl"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("live"))


@pytest.fixture(scope="module")
def server(base: Path) -> Iterator[Any]:
    import sys

    from enforced_server import serving

    before = os.environ.get("APL_TRAIN_PYTHON")
    os.environ["APL_TRAIN_PYTHON"] = before or sys.executable
    with serving(base.parent, base, None) as running:
        yield running


def _saved(base: Path, outputs: dict[str, Any]) -> list[Path]:
    return [base / "output" / each["subfolder"] / each["filename"] for out in outputs.values()
            for each in out.get("images", []) if each["type"] == "output"]


def _texts(outputs: dict[str, Any]) -> str:
    return "\n".join(str(text) for out in outputs.values() for text in out.get("text", []))


@pytest.mark.parametrize("path", workflow_files.paths(), ids=lambda path: path.stem)
def test_every_example_runs(server: Any, base: Path, path: Path) -> None:
    state, outputs = server.run(workflow_files.prompt_of(path, **SMALLER.get(path.stem, {})))
    assert state == "ok", outputs
    pictures = _saved(base, outputs)
    assert pictures
    for picture in pictures:
        with Image.open(picture) as image:
            assert np.asarray(image).std() > 10, "an empty picture"
            said = json.loads(image.info["anonymization_prompt"])
        assert all(len(facts["content_hash"]) == 64 for facts in said.values()) and said
    if path.stem == "anonymize-compare":
        assert _texts(outputs).count("ID-ACC mean") == 2
    if path.stem in SHIPPED:
        shipped = load_prefix(PrefixLibrary([shipped_folder()]).resolve(SHIPPED[path.stem]))
        assert [facts["content_hash"] for facts in said.values()] == [shipped.content_hash]
        assert "10 prefix vectors in each" in _texts(outputs) and "/65 tokens" in _texts(outputs)


def test_a_cached_node_still_says_what_it_applied(server: Any, base: Path) -> None:
    path = workflow_files.FOLDER / "anonymize-sd1.json"
    for seed in (5, 6):
        state, outputs = server.run(workflow_files.prompt_of(path, seed=seed, width=128, height=128))
        assert state == "ok", outputs
        with Image.open(_saved(base, outputs)[0]) as image:
            assert "content_hash" in image.info["anonymization_prompt"], f"seed {seed}"
    state, outputs = server.run(workflow_files.prompt_of(path, seed=7, width=128, height=128, enabled=False))
    with Image.open(_saved(base, outputs)[0]) as image:
        assert json.loads(image.info.get("anonymization_prompt", "{}")) == {}


def test_bad_wiring_and_bad_files_are_one_line_and_the_server_goes_on(server: Any, base: Path) -> None:
    path = workflow_files.FOLDER / "anonymize-sd1.json"
    state, said = server.run(workflow_files.prompt_of(path, ckpt_name=SDXL, width=128, height=128))
    assert state == "error" and "clip_g" in said and "\n" not in said, said
    (base / "models/anonymization_prompts/broken.safetensors").write_bytes(b"\x80\x02not this")
    state, said = server.run(workflow_files.prompt_of(path, prompt_name="broken"))
    assert state == "refused" and "not a safetensors file" in said, said
    state, said = server.run(workflow_files.prompt_of(path, ckpt_name=SD1, width=128, height=128, seed=9))
    assert state == "ok", said


def _training_processes(base: Path) -> list[str]:
    found = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = each.read_bytes().split(b"\0")
        except OSError:
            continue
        if {b"--run", b"resume"} & set(words) and any(str(base).encode() in word for word in words):
            found.append(each.parent.name)
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for orphans in /proc")
def test_training_shows_progress_is_interrupted_and_goes_on(server: Any, base: Path) -> None:
    path = workflow_files.FOLDER / "train-then-use.json"
    graph = workflow_files.prompt_of(path, steps=60, levels_every=10, previews=2, name="interrupted")
    train = next(key for key, node in graph.items() if node["class_type"] == "APL_TrainAnonymizationPrompt")
    listener = Socket(server)
    try:
        code, answer = server.queue(graph)
        assert code == 200, answer
        steps: list[int] = []
        while len(set(steps)) < 15:
            message = listener.frame()
            if message and message["type"] == "progress" and message["data"]["node"] == train:
                steps.append(message["data"]["value"])
        assert steps == sorted(steps) and _training_processes(base)
        assert listener.pictures >= 1, "no preview came"
        asked = time.monotonic()
        server.post("/interrupt", {})
        listener.until(answer["prompt_id"], "execution_interrupted")
        seconds = time.monotonic() - asked
        assert not _training_processes(base), "the training was left behind"
        if os.environ.get("APL_RECORD_CLAIMS"):
            from apl_train import claims

            claims.record({"comfy-interrupt": (seconds, None, 1)})
        code, answer = server.queue(graph)
        seen = listener.until(answer["prompt_id"], "execution_success", "execution_error")
        assert seen[-1]["type"] == "execution_success", seen[-1]
        again = [m["data"]["value"] for m in seen if m["type"] == "progress" and m["data"]["node"] == train]
        assert min(again) >= 10 and max(again) == 60, "it began anew"
    finally:
        listener.close()
    outputs = server.result(answer["prompt_id"])["outputs"]
    with Image.open(_saved(base, outputs)[0]) as image:
        said = json.loads(image.info["anonymization_prompt"])
    runs = list((base / "output/anonymization_prompts").glob("interrupted-*"))
    assert len(runs) == 1, runs
    learned = load_prefix(runs[0] / "prefix" / "interrupted.safetensors")
    assert [facts["content_hash"] for facts in said.values()] == [learned.content_hash]
    assert (base / "models/anonymization_prompts/my-anonymization-prompt.safetensors").is_file()


def test_help_pages_templates_and_texts_are_served(server: Any) -> None:
    templates = server.get("/api/workflow_templates")
    assert sorted(templates[PACK]) == sorted(path.stem for path in workflow_files.paths())
    texts = server.get("/api/i18n")["en"]["nodeDefs"]
    nodes = [name for name in server.get("/object_info") if name.startswith("APL_")]
    assert set(nodes) <= set(texts)
    import urllib.request

    for name in nodes:
        for ending in ("md", "png"):
            address = f"http://127.0.0.1:{server.port}/extensions/{PACK}/docs/{name}.{ending}"
            with urllib.request.urlopen(address, timeout=30) as answer:
                assert len(answer.read()) > 400, address
