"""The WebUI in a real browser: toggle on, generate, infotext, paste, token counter, before/after, settings and tabs.

Needs a host (see README.md), the Python package playwright and a Chromium (`CHROMIUM`, else the one on the PATH).
`APL_SHOTS=FOLDER` keeps screenshots.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from webui_host import Server, host_folder, running

pytest.importorskip("playwright.sync_api", reason="no playwright")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or ""
FOLDER = host_folder()
HIDDEN = FOLDER is not None and any(part.startswith(".") for part in FOLDER.parts)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FOLDER is None, reason="no WebUI: set WEBUI_DIR (tests/a1111/README.md)"),
    pytest.mark.skipif(HIDDEN, reason="gradio 3 serves no scripts from below a folder that begins with a dot"),
    pytest.mark.skipif(not CHROMIUM, reason="no chromium"),
    pytest.mark.timeout(1500),
]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
LONG = 180_000


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(ui=True, wait=600) as host:
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


def shot(page: Any, name: str) -> None:
    if where := os.environ.get("APL_SHOTS"):
        Path(where).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(where) / f"{name}.png"), full_page=False)


def expect_text(page: Any, selector: str, part: str) -> str:
    page.wait_for_function("([s, t]) => (document.querySelector(s)?.innerText || '').includes(t)", arg=[selector, part])
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


def test_toggle_generate_infotext_paste(page: Any) -> None:
    page.fill("#txt2img_prompt textarea", "a photo of a man")
    for name, value in (("txt2img_steps", 8), ("txt2img_width", 128), ("txt2img_height", 128)):
        number(page, name, value)
    page.fill("#txt2img_seed input", "3")
    page.press("#txt2img_seed input", "Tab")
    page.click("#apl_txt2img >> text=Anonymize")
    expect_text(page, "#apl_txt2img_state", "off")
    shot(page, "1-off")
    assert "APL" not in generate(page)

    page.check("#apl_txt2img_enabled input[type=checkbox]")
    line = expect_text(page, "#apl_txt2img_state", "active:")
    assert "of 75 tokens per chunk" in line
    info = generate(page)
    assert "APL: anonymize-miniature [" in info
    shot(page, "2-on")

    # The host counts against the room that is left.
    page.fill("#txt2img_prompt textarea", "a photo of a man in a hat")
    expect_text(page, "#txt2img_token_counter", "/65")

    # Before and after of the same seed, side by side.
    page.click("#apl_txt2img_both")
    page.wait_for_selector("#apl_txt2img_pair img >> nth=1")
    page.wait_for_timeout(500)
    shot(page, "3-pair")

    # Pasting an infotext without the key leaves it on; one with the key sets prefix and level.
    page.fill("#txt2img_prompt textarea", "a dog\nSteps: 8, Sampler: Euler, CFG scale: 7, Seed: 3, Size: 128x128")
    page.click("#paste")
    page.wait_for_function("document.querySelector('#txt2img_prompt textarea').value === 'a dog'")
    page.wait_for_timeout(1000)
    assert page.is_checked("#apl_txt2img_enabled input[type=checkbox]")
    page.uncheck("#apl_txt2img_enabled input[type=checkbox]")
    expect_text(page, "#apl_txt2img_state", "off")
    page.fill("#txt2img_prompt textarea", "a cat\nSteps: 8, Sampler: Euler, CFG scale: 7, Seed: 3, Size: 128x128, "
              "APL: \"anonymize-miniature [00000000], level 400\"")
    page.click("#paste")
    expect_text(page, "#apl_txt2img_state", "step 400")
    assert page.is_checked("#apl_txt2img_enabled input[type=checkbox]")
    assert "level 400" in generate(page)
    shot(page, "4-pasted")


def test_the_identity_tab_says_what_is_missing(page: Any) -> None:
    page.click("text=Identity check")
    page.wait_for_selector("#apl_check")
    page.click("#apl_check")
    expect_text(page, "#apl_check_result", "no reference picture")
    shot(page, "5-identity")


def test_the_trainers_page_is_mounted(page: Any) -> None:
    page.click("button:has-text('APL Trainer')")
    page.wait_for_selector("#apl-root", state="visible")
    page.wait_for_timeout(2000)
    shot(page, "6-trainer")


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
