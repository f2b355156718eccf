"""The page in a real browser: from nothing to a trained, used and published prefix on the miniature, reloads included.

    APL_UI_PYTHON=<interpreter with gradio> APL_TRAIN_PYTHON=<interpreter with the trainer> pytest tests/ui

Both default to the one that runs the tests. Skips visibly without gradio, playwright or Chromium. Pictures of every
screen go to APL_UI_PICTURES, to be looked at.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from apl_core.prefix import load_prefix

ROOT = Path(__file__).resolve().parents[2]
PAGE_PYTHON = os.environ.get("APL_UI_PYTHON", sys.executable)
TRAIN_PYTHON = os.environ.get("APL_TRAIN_PYTHON", sys.executable)
CHROMIUM = os.environ.get("APL_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE = 1500.0
"""Seconds for what a busy machine may take; nothing here measures speed."""
STEPS = 10

pytestmark = [pytest.mark.slow, pytest.mark.world, pytest.mark.timeout(3600)]


def gradio_version() -> str:
    """Of the page's interpreter; "" where it has none."""
    ask = [PAGE_PYTHON, "-c", "from importlib import metadata; print(metadata.version('gradio'))"]
    return subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip()


class Server:
    """`apl ui` as a user starts it, on a free port that stays the same over restarts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        host = folder / "host" / "embeddings"
        host.mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        host = str(self.folder / "host" / "embeddings")
        argv = [PAGE_PYTHON, "-m", "apl_train", "ui", "--runs", str(self.folder / "runs"), "--embeddings",
                str(self.folder / "embeddings"), "--host-embeddings", host, "--port", str(self.port), "--python",
                TRAIN_PYTHON, "--no-browser"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "GRADIO_ANALYTICS_ENABLED": "False"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(argv, stdout=log, stderr=log, env=environment, start_new_session=True)
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            with contextlib.suppress(OSError), urllib.request.urlopen(self.address, timeout=20) as answer:
                assert answer.status == 200
                return
            time.sleep(0.5)
        raise AssertionError("the page did not come up: " + (self.folder / "server.log").read_text())

    def kill(self) -> None:
        """As a power cut would: no goodbye."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    if not gradio_version():
        pytest.skip(f"{PAGE_PYTHON} has no gradio: pip install '.[ui]'")
    found = Server(tmp_path)
    found.start()
    yield found
    found.kill()
    for file in tmp_path.glob("runs/*/jobs/*/job.json"):  # a test that failed must not leave a training behind
        if not (file.parent / "exit.json").exists():
            (file.parent / "control").write_text("kill")


@pytest.fixture
def page() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt install chromium, or name one in APL_CHROMIUM")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        opened = browser.new_page(viewport={"width": 1280, "height": 1000})
        opened.set_default_timeout(PATIENCE * 1000)
        yield opened
        browser.close()


def picture(page: Any, name: str) -> None:
    if folder := os.environ.get("APL_UI_PICTURES"):
        page.wait_for_timeout(1500)
        page.screenshot(path=str(Path(folder) / f"gradio{gradio_version().split('.')[0]}-{name}.png"), full_page=True)


def text(page: Any, name: str) -> str:
    return page.locator(f"#apl-{name}").inner_text()


def wait_for(page: Any, name: str, words: str) -> None:
    page.wait_for_function("([id, words]) => document.getElementById(id)?.innerText.includes(words)",
                           arg=[f"apl-{name}", words])


def fill(page: Any, name: str, value: str) -> None:
    box = page.locator(f"#apl-{name}").locator("input, textarea").first
    box.fill(value)
    box.press("Tab")


def open_tab(page: Any, name: str) -> None:
    """By its words: gradio 3 gives tabs no role."""
    page.locator("#apl-root").get_by_role("tab", name=name, exact=True).or_(
        page.locator("#apl-root .tab-nav button", has_text=name)).first.click()


def done_steps(page: Any) -> int:
    """"7 / 10" of the tile, 0 before there is one."""
    tiles = page.locator("#apl-status .apl-tile b").all_inner_texts()
    return int(tiles[0].split("/")[0].replace(",", "")) if tiles and "/" in tiles[0] else 0


def test_from_nothing_to_a_prefix_in_use(server: Server, page: Any) -> None:
    page.goto(server.address)
    wait_for(page, "strip", "Nothing is running")
    page.locator("#apl-look").click()
    page.locator("#apl-sheet figure img").nth(20).wait_for()
    picture(page, "1-new")
    assert page.locator("#apl-sheet figure img").count() == 36

    fill(page, "name", "first")
    fill(page, "steps", str(STEPS))
    page.wait_for_function("() => [...document.querySelectorAll('.apl-command textarea')]"
                           f".some(e => e.value.includes('--name first') && e.value.includes('--steps {STEPS}'))")
    page.locator("#apl-start").click()
    wait_for(page, "status", "first-01")
    page.wait_for_function("() => /[1-9][0-9]* \\/ 10/.test(document.getElementById('apl-status').innerText)")
    picture(page, "2-running")

    before = done_steps(page)
    page.reload()  # in the middle of the run
    open_tab(page, "Runs")
    wait_for(page, "status", "first-01")
    assert before <= done_steps(page) <= STEPS
    page.locator("#apl-previews img").first.wait_for()

    server.kill()  # and the server with it; the training does not notice
    run = server.folder / "runs" / "first-01"
    assert not (run / "jobs" / "0001-train" / "exit.json").exists(), "the run was over before the server was ended"
    server.start()
    page.goto(server.address)
    open_tab(page, "Runs")
    wait_for(page, "status", "first-01")
    wait_for(page, "status", "done")
    wait_for(page, "previews", f"step {STEPS}")
    assert done_steps(page) == STEPS
    assert (run / "prefix" / "first.safetensors").exists()
    picture(page, "3-done")

    open_tab(page, "Use and share")
    page.wait_for_function("() => document.querySelector('#apl-use-name :is(input, textarea)').value == 'first'")
    page.wait_for_timeout(3000)  # gradio 5 tells of one change twice: the second answer would overtake what is typed
    fill(page, "use-name", "everyone")
    page.locator("#apl-use").click()
    wait_for(page, "used", "everyone.safetensors")
    fill(page, "title", "For everyone")
    fill(page, "author", "A. Author")
    page.locator("#apl-publish").click()
    wait_for(page, "published", "For-everyone.safetensors")
    picture(page, "4-share")

    trained = load_prefix(run / "prefix" / "first.safetensors", enforce=True)
    for folder in ("embeddings", "host/embeddings"):
        copied = load_prefix(server.folder / folder / "everyone.safetensors", enforce=True)
        assert copied.content_hash == trained.content_hash and copied.meta.title == "everyone"
    told = load_prefix(run / "published" / "For-everyone.safetensors", enforce=True)
    assert (told.meta.title, told.meta.author, told.content_hash) == ("For everyone", "A. Author", trained.content_hash)


def test_everything_with_one_button(server: Server, page: Any) -> None:
    """No picture is there yet: the checkpoint draws them, and at the end the prefix is scored and installed."""
    page.goto(server.address)
    wait_for(page, "strip", "Nothing is running")
    page.get_by_label("Let the checkpoint draw them").check()
    page.locator("#apl-limit input").wait_for()
    for name, value in (("limit", 2), ("each", 2), ("neutral", 6), ("steps", 4), ("score", 2)):
        fill(page, name, str(value))
    fill(page, "name", "whole")
    page.wait_for_function("() => [...document.querySelectorAll('.apl-command textarea')]"
                           ".some(e => e.value.includes('apl make') && e.value.includes('--name whole') && "
                           "e.value.includes('--limit 2') && e.value.includes('--score_persons 2'))")
    picture(page, "5-draw")
    page.locator("#apl-make").click()
    wait_for(page, "status", "whole-01")
    page.locator("#apl-status .apl-stages .now").first.wait_for()
    picture(page, "6-make-running")
    run = server.folder / "runs" / "whole-01"
    until = time.monotonic() + 2 * PATIENCE
    while not list(run.glob("jobs/*/exit.json")) and time.monotonic() < until:
        time.sleep(2)
    open_tab(page, "Runs")
    wait_for(page, "status", "done")
    page.locator("#apl-previews img").nth(6).wait_for()
    picture(page, "7-make-done")
    log = next(run.glob("jobs/*/log.txt")).read_text()
    assert (run / "report.html").exists() and (run / "scores.json").exists(), log
    trained = load_prefix(run / "train" / "prefix" / "whole.safetensors", enforce=True)
    for folder in ("embeddings", "host/embeddings"):
        assert load_prefix(server.folder / folder / "whole.safetensors").content_hash == trained.content_hash
