"""`apl ui` as a user starts it, and what a person does on its page: look, type, press, wait."""

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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE_PYTHON = os.environ.get("APL_UI_PYTHON", sys.executable)
TRAIN_PYTHON = os.environ.get("APL_TRAIN_PYTHON", sys.executable)
CHROMIUM = os.environ.get("APL_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE = 1500.0
"""Seconds for what a busy machine may take; nothing here measures speed."""


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


def picture(page: Any, name: str) -> None:
    """The whole page as it is now, on a wide and on a narrow screen, where somebody wants to look at it."""
    if folder := os.environ.get("APL_UI_PICTURES"):
        size = page.viewport_size
        for width in (1280, 800):
            page.set_viewport_size({"width": width, "height": size["height"]})
            page.wait_for_timeout(1500)
            file = f"gradio{gradio_version().split('.')[0]}-{name}-{width}.png"
            page.screenshot(path=str(Path(folder) / file), full_page=True)
        page.set_viewport_size(size)


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


def choose(page: Any, name: str, value: str) -> None:
    """Chooses in a dropdown as a person does who types."""
    box = page.locator(f"#apl-{name} input").first
    box.click()
    box.fill(value)
    box.press("Enter")


def press(page: Any, name: str, word: str = "") -> None:
    """Presses a button once it may be pressed and says `word`."""
    page.wait_for_function("([id, word]) => { const e = document.getElementById(id); const b = e?.closest('button') || "
                           "e?.querySelector('button'); return b && !b.disabled && b.innerText.includes(word); }",
                           arg=[f"apl-{name}", word])
    page.locator(f"#apl-{name}").click()


def start(page: Any, name: str, steps: int, faces: int = 0) -> None:
    """Starts a training on the shipped pictures."""
    open_tab(page, "New prefix")
    fill(page, "name", name)
    fill(page, "steps", str(steps))
    number = page.locator("#apl-faces input[type=number]").first
    number.fill(str(faces))
    number.press("Tab")
    page.wait_for_function("([name, steps]) => [...document.querySelectorAll('.apl-command textarea')].some(e => "
                           "e.value.includes(`--name ${name} `) && e.value.includes(`--steps ${steps} `) && "
                           "e.value.startsWith('apl train'))", arg=[name, steps])
    press(page, "start")
    wait_for(page, "status", f"{name}-01")


def order(page: Any) -> list[str]:
    """Names of the list of runs, in its order."""
    return page.locator("#apl-runs .apl-list td:first-child").all_inner_texts()


def visit(page: Any, address: str) -> None:
    """Opens the page; a server that is only just up may drop the first connections."""
    from playwright.sync_api import Error

    for _ in range(5):
        try:
            page.goto(address)
        except Error as error:
            if "ERR_CONNECTION" not in str(error):
                raise
            time.sleep(2)
        else:
            return
    page.goto(address)
