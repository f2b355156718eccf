"""What holds on a real WebUI where a request says nothing: the settings page, `default_on` and `default_off`; and the
axes of its X/Y/Z plot. By the conditioning that the host samples with, beside the reference.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from prompt_cases import BOUND, MODEL, PREFIX, text
from reference import Reference
from safetensors.torch import load_file
from webui_host import Server, host_folder, running

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(host_folder() is None, reason="no WebUI: set WEBUI_DIR (tests/a1111/README.md)"),
    pytest.mark.timeout(1200),
]
PROMPT = "a photo of a man"
LEVEL = PREFIX.with_name(f"{PREFIX.stem}.step-400{PREFIX.suffix}")
OFF = {"alwayson_scripts": {"anonymize": {"args": [False]}}}


def known() -> dict[str, torch.Tensor]:
    """What the prompt's conditioning can be, by transformers: off, on, and at a level."""
    found = {}
    for name, path in (("on", PREFIX), ("step 400", LEVEL)):
        reference = Reference.of(MODEL, load_file(path)["emb_params"])
        found[name] = reference.encode([text(PROMPT)], on=True)[0]
        found["off"] = reference.encode([text(PROMPT)], on=False)[0]
    return found


@pytest.fixture(scope="module")
def encoded() -> dict[str, torch.Tensor]:
    return known()


def seen(server: Server, encoded: dict[str, torch.Tensor], **payload: Any) -> list[str]:
    """Each job's conditioning, in the words of `known`."""
    server.clear()
    status, answer = server.txt2img(**{"prompt": PROMPT, **payload})
    assert status == 200, answer
    names = []
    for held in server.conds():
        near = [name for name, want in encoded.items() if float((held["c.0.0.0"] - want).abs().max()) <= BOUND]
        names += near or ["something else"]
    return names


@contextlib.contextmanager
def by_policy(folder: Path, mode: str) -> Iterator[Server]:
    policy = folder / "policy.json"
    policy.write_text(json.dumps({"mode": mode}), "utf-8")
    with running("--apl-policy", str(policy)) as host:
        yield host


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    # With its page: with --nowebui the host builds no settings, and its plot's list before any extension is asked.
    with running(options={"apl_default_enabled": True, "apl_default_prefix": PREFIX.stem}, ui=True) as host:
        yield host


def test_the_settings_page_decides_where_a_request_says_nothing(server: Server, encoded: dict) -> None:
    assert seen(server, encoded) == ["on"]
    assert seen(server, encoded, **OFF) == ["off"]
    options = server.call("/sdapi/v1/options")[1]
    assert options["apl_default_enabled"] is True and options["apl_default_prefix"] == PREFIX.stem
    assert options["apl_recogniser"] and options["apl_threshold"] == 0.32
    # A level alone keeps what the settings say of the rest.
    level = {"alwayson_scripts": {"anonymize": {"args": [{"level": 400}]}}}
    assert seen(server, encoded, **level) == ["step 400"]
    # It holds from the start on: the host's API keeps the values that the accordion was built with.
    try:
        assert server.call("/sdapi/v1/options", {"apl_default_enabled": False})[0] == 200
        assert server.call("/sdapi/v1/options")[1]["apl_default_enabled"] is False
        assert seen(server, encoded) == ["on"]
    finally:
        server.call("/sdapi/v1/options", {"apl_default_enabled": True})


def test_a_requests_own_infotext(server: Server, encoded: dict) -> None:
    """The host reads script arguments out of it: the key chooses, and without the key nothing is switched off."""
    line = f"{PROMPT}\nSteps: 1, Sampler: Euler, CFG scale: 7, Seed: 7, Size: 64x64"
    assert seen(server, encoded, infotext=line) == ["on"]
    assert seen(server, encoded, infotext=f'{line}, APL: "{PREFIX.stem} [00000000], level 400"') == ["step 400"]


def axes(server: Server) -> dict[str, int]:
    """The plot's axes: label to the number by which a request names it."""
    status, found = server.call("/sdapi/v1/script-info")
    assert status == 200
    plot = next(each for each in found if each["name"] == "x/y/z plot" and not each["is_img2img"])
    return {label: at for at, label in enumerate(plot["args"][0]["choices"])}


def plotted(server: Server, encoded: dict, x: tuple[str, str], y: tuple[str, str] = ("Nothing", "")) -> list[str]:
    known_axes = axes(server)
    chosen: list[Any] = []
    for label, values in (x, y, ("Nothing", "")):
        chosen += [known_axes[label], values, []]
    # no legend: some forks cannot draw it with their own Pillow; csv_mode: values are in the texts
    return seen(server, encoded, script_name="x/y/z plot",
                script_args=[*chosen, False, False, False, False, False, False, False, 0, True])


def test_axes_of_the_plot(server: Server, encoded: dict) -> None:
    assert {"[APL] Enabled", "[APL] Prefix", "[APL] Level"} <= set(axes(server))
    assert plotted(server, encoded, ("[APL] Enabled", "True, False")) == ["on", "off"]
    # A level switches it on, cell by cell, and nothing of it is left for the next request.
    found = plotted(server, encoded, ("[APL] Level", "whole training, step 400"), ("[APL] Enabled", "False, True"))
    assert found == ["off", "off", "on", "step 400"] or found == ["off", "on", "off", "step 400"], found
    assert plotted(server, encoded, ("[APL] Prefix", PREFIX.stem), ("Steps", "1, 2")) == ["on", "on"]
    assert seen(server, encoded) == ["on"]


def test_without_a_recogniser_a_score_says_what_to_install(server: Server) -> None:
    if server.has("insightface"):
        pytest.skip("this host has insightface")
    held = io.BytesIO()
    Image.new("RGB", (64, 64), (120, 90, 80)).save(held, "PNG")
    picture = base64.b64encode(held.getvalue()).decode()
    status, answer = server.call("/apl/v1/score", {"images": [picture], "references": [picture]})
    assert status == 422 and "insightface" in answer["error"] + answer["hint"], answer
    assert "install" in answer["hint"] and "\n" not in answer["error"] + answer["hint"], answer
    assert str(server.folder) not in json.dumps(answer)


@pytest.mark.parametrize("mode", ["default_on", "default_off"])
def test_a_policy_that_leaves_the_choice_to_users(mode: str, tmp_path: Path, encoded: dict) -> None:
    with by_policy(tmp_path, mode) as host:
        status = host.call("/apl/v1/status")
        assert status[0] == 200 and status[1]["mode"] == mode
        assert seen(host, encoded) == ["on" if mode == "default_on" else "off"]
        assert seen(host, encoded, **OFF) == ["off"]
        on = {"alwayson_scripts": {"anonymize": {"args": [True, PREFIX.stem]}}}
        assert seen(host, encoded, **on) == ["on"]
