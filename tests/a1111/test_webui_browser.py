"""Both WebUIs in a real browser: toggle on, generate, infotext, paste, token counter, before/after, tabs, a training.

Needs a host (see README.md), the Python package playwright and a Chromium (`CHROMIUM`, else the one on the PATH).
`APL_SHOTS=FOLDER` keeps screenshots; `panel.png` among them is docs/figures/webui-panel.png.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_forge import wide_prefix
from webui_host import Server, forge_folder, host_folder, running, why_no_forge

from apl_core.prefix import load_prefix

sys.path.append(str(Path(__file__).resolve().parents[1] / "ui"))
from page_driver import fill, open_tab, wait_for

pytest.importorskip("playwright.sync_api", reason="no playwright")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or ""


def why_not(folder: Path | None) -> str:
    """Why a host's page cannot be tried, in a line; "" where it can."""
    if folder is None:
        return "no such host (tests/a1111/README.md)"
    if any(part.startswith(".") for part in folder.parts):
        return "gradio serves no scripts from below a folder that begins with a dot"
    return ""


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium"),
    pytest.mark.timeout(1500),
]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
LONG = int(os.environ.get("APL_PATIENCE", "180")) * 1000


@pytest.fixture(scope="module", params=["a1111", "forge"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    is_forge = request.param == "forge"
    if reason := (why_no_forge() or why_not(forge_folder())) if is_forge else why_not(host_folder()):
        pytest.skip(reason)
    own = tmp_path_factory.mktemp("own")
    if is_forge:
        wide_prefix(own)
    with running("--apl-dir", str(own), ui=True, wait=900, forge=is_forge,
                 environ={"APL_TRAIN_PYTHON": os.environ.get("APL_TRAIN_PYTHON", sys.executable)}) as host:
        yield host


@pytest.fixture(scope="module")
def page(server: Server) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        opened = browser.new_page(viewport={"width": 1400, "height": 1500})
        opened.set_default_timeout(LONG)
        opened.goto(server.url)
        opened.wait_for_selector("#txt2img_prompt textarea")
        yield opened
        browser.close()


def shot(page: Any, name: str, of: str = "") -> None:
    """A picture of the page, or of one element, where somebody wants to look at it."""
    if where := os.environ.get("APL_SHOTS"):
        folder = Path(where) / ("gradio4" if page.evaluate("() => !!window.gradio_config.version.match(/^4/)") else
                                "gradio3")
        folder.mkdir(parents=True, exist_ok=True)
        (page.locator(of).first if of else page).screenshot(path=str(folder / f"{name}.png"))


def expect_text(page: Any, selector: str, part: str) -> str:
    try:
        page.wait_for_function("([s, t]) => (document.querySelector(s)?.innerText || '').includes(t)",
                               arg=[selector, part])
    except Exception:
        shot(page, "failed")
        raise
    return page.inner_text(selector)


def generate(page: Any, tab: str = "txt2img") -> str:
    before = page.inner_text(f"#html_info_{tab}") if page.query_selector(f"#html_info_{tab}") else ""
    page.click(f"#{tab}_generate")
    page.wait_for_function("([s, t]) => { const n = document.querySelector(s);"
                           " return n && n.innerText.includes('Steps:') && n.innerText !== t }",
                           arg=[f"#html_info_{tab}", before])
    return page.inner_text(f"#html_info_{tab}")


def number(page: Any, tab_id: str, value: int) -> None:
    page.fill(f"#{tab_id} input[type=number]", str(value))
    page.press(f"#{tab_id} input[type=number]", "Tab")


def test_toggle_generate_infotext_paste(page: Any, server: Server) -> None:
    page.fill("#txt2img_prompt textarea", "a photo of a man")
    for name, value in (("txt2img_steps", 8), ("txt2img_width", 128), ("txt2img_height", 128)):
        number(page, name, value)
    page.fill("#txt2img_seed input", "3")
    page.press("#txt2img_seed input", "Tab")
    page.click("#apl_txt2img >> text=Anonymize")
    expect_text(page, "#apl_txt2img_state", "off")
    shot(page, "1-off")
    assert "APL" not in generate(page)
    # The host counts when the prompt changes; with the accordion, when the toggle does.
    expect_text(page, "#txt2img_token_counter", "/75")

    page.check("#apl_txt2img_enabled input[type=checkbox]")
    line = expect_text(page, "#apl_txt2img_state", "active:")
    assert "of 75 tokens per chunk" in line
    expect_text(page, "#txt2img_token_counter", "5/65")
    info = generate(page)
    assert "APL: anonymize-miniature [" in info
    shot(page, "2-on")

    page.uncheck("#apl_txt2img_enabled input[type=checkbox]")
    expect_text(page, "#txt2img_token_counter", "5/75")
    page.check("#apl_txt2img_enabled input[type=checkbox]")
    expect_text(page, "#txt2img_token_counter", "5/65")
    page.fill("#txt2img_prompt textarea", "a photo of a man in a hat")
    expect_text(page, "#txt2img_token_counter", "8/65")

    # Before and after of the same seed, side by side; the documents show a person by name.
    if not server.is_forge:
        page.fill("#txt2img_prompt textarea", "a close-up portrait of ida valbury")
        number(page, "txt2img_steps", 20)
        number(page, "txt2img_cfg_scale", 3)
        generate(page)
    page.click("#apl_txt2img_both")
    page.wait_for_selector("#apl_txt2img_pair img >> nth=1")
    page.wait_for_timeout(500)
    shot(page, "3-pair")
    if not server.is_forge:
        shot(page, "panel", "#apl_txt2img")

    # Pasting an infotext without the key leaves it on; one with the key sets prefix and level.
    page.fill("#txt2img_prompt textarea", "a dog\nSteps: 8, Sampler: Euler, CFG scale: 7, Seed: 3, Size: 128x128")
    page.click("#paste")
    page.wait_for_function("document.querySelector('#txt2img_prompt textarea').value === 'a dog'")
    page.wait_for_timeout(1000)
    assert page.is_checked("#apl_txt2img_enabled input[type=checkbox]")
    page.uncheck("#apl_txt2img_enabled input[type=checkbox]")
    expect_text(page, "#apl_txt2img_state", "off")
    page.fill("#txt2img_prompt textarea", "a cat\nSteps: 8, Sampler: Euler, CFG scale: 7, Seed: 3, Size: 128x128, "
              + ("APL: anonymize-miniature [00000000]" if server.is_forge  # its file of this name has no levels
                 else "APL: \"anonymize-miniature [00000000], level 400\""))
    page.click("#paste")
    expect_text(page, "#apl_txt2img_state", "whole training" if server.is_forge else "step 400")
    assert page.is_checked("#apl_txt2img_enabled input[type=checkbox]")
    assert ("level 400" in generate(page)) != server.is_forge
    shot(page, "4-pasted")


def test_the_identity_tab_says_what_is_missing(page: Any, server: Server, tmp_path: Path) -> None:
    page.click("text=Identity check")
    page.wait_for_selector("#apl_check")
    page.click("#apl_check")
    expect_text(page, "#apl_check_result", "no reference picture")
    if not server.has("insightface"):  # pictures were drawn before; the photo is there; a recogniser is not
        photo = tmp_path / "photo.png"
        Image.new("RGB", (96, 96), (150, 120, 100)).save(photo)
        page.set_input_files("#apl_reference_1 input[type=file]", str(photo))
        page.wait_for_selector("#apl_reference_1 img")
        page.click("#apl_check")
        expect_text(page, "#apl_check_result", "is not installed; it is needed to recognise faces")
        assert "Install it: pip install" in page.inner_text("#apl_check_result")
    shot(page, "5-identity")


def test_a_training_from_the_hosts_tab(page: Any, server: Server) -> None:
    """Started, watched and put to use in the host's own page; the prefix is in the accordion's list afterwards."""
    page.click("button:has-text('APL Trainer')")
    page.wait_for_selector("#apl-root", state="visible")
    page.wait_for_timeout(2000)
    shot(page, "6-trainer")
    if server.is_forge:
        return  # the page is the same; one host trains
    name = f"in-host-{os.getpid()}"
    runs = server.folder / "apl-runs"
    fill(page, "name", name)
    fill(page, "steps", "6")
    page.wait_for_function("name => [...document.querySelectorAll('.apl-command textarea')].some(e => "
                           "e.value.includes(`--name ${name}`) && e.value.includes('--steps 6'))", arg=name)
    try:
        page.locator("#apl-start").click()
        wait_for(page, "status", f"{name}-01")
        shot(page, "7-training")
        page.set_default_timeout(4 * LONG)  # every one of these few steps is a level with pictures of its own
        wait_for(page, "status", "done")
        shot(page, "8-trained")
        trained = load_prefix(runs / f"{name}-01" / "prefix" / f"{name}.safetensors", enforce=True)
        open_tab(page, "Use and share")
        page.wait_for_function("name => document.querySelector('#apl-use-name :is(input, textarea)').value == name",
                               arg=name)
        page.locator("#apl-use").click()
        wait_for(page, "used", f"{name}.safetensors")
    finally:
        page.set_default_timeout(LONG)
        for run in runs.glob(f"{name}-*"):
            for job in run.glob("jobs/*/job.json"):  # a test that failed must not leave a training behind
                if not (job.parent / "exit.json").exists():
                    (job.parent / "control").write_text("kill", "utf-8")
                    time.sleep(5)
            shutil.rmtree(run, ignore_errors=True)
    page.click("button:has-text('txt2img')")
    page.click("#apl_txt2img_refresh")
    listed = server.call("/apl/v1/prefixes")[1]
    found = next(each for each in listed if each["name"] == name)
    assert found["fits"] and found["sha256"] == trained.content_hash
    answer = server.txt2img(prompt="a man", alwayson_scripts={"anonymize": {"args": [True, name]}})[1]
    assert f"APL: {name} [" in answer["info"]


def test_reload_ui_keeps_it_working(page: Any, server: Server) -> None:
    hooks = set(server.call("/apl/v1/status")[1]["hooks"])
    page.goto(server.url)
    page.wait_for_selector("#settings_restart_gradio", state="attached")
    page.evaluate("document.querySelector('#settings_restart_gradio').click()")
    down = False
    for _ in range(300):  # it goes down for some seconds, and comes up again
        try:
            up = server.call("/apl/v1/status", timeout=5)[0] == 200
        except OSError:
            up, down = False, True
        if up and down:
            break
        page.wait_for_timeout(500)
    page.goto(server.url)
    page.wait_for_selector("#txt2img_prompt textarea")
    assert hooks <= set(server.call("/apl/v1/status")[1]["hooks"])
    page.fill("#txt2img_prompt textarea", "a photo of a man")
    for name, value in (("txt2img_steps", 2), ("txt2img_width", 64), ("txt2img_height", 64)):
        number(page, name, value)
    page.click("#apl_txt2img >> text=Anonymize")
    page.check("#apl_txt2img_enabled input[type=checkbox]")
    expect_text(page, "#apl_txt2img_state", "active:")
    assert "APL: anonymize-miniature [" in generate(page)
