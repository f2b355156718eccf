"""A live page and a browser for every test; skipped visibly without gradio, playwright or Chromium."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_driver import CHROMIUM, PAGE_PYTHON, PATIENCE, Server, gradio_version


@pytest.fixture
def server(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if not gradio_version():
        pytest.skip(f"{PAGE_PYTHON} has no gradio: pip install '.[ui]'")
    found = Server(tmp_path)
    # latents and captions, which are found by content: made once for all tests, as for all runs of a person
    kept = Path(os.environ.get("APL_UI_CACHE") or tmp_path_factory.getbasetemp() / "cache")
    kept.mkdir(parents=True, exist_ok=True)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "cache").symlink_to(kept, target_is_directory=True)
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
