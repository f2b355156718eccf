"""The page in a real browser: from nothing to a trained, used and published prefix on the miniature, reloads included.

    APL_UI_PYTHON=<interpreter with gradio> APL_TRAIN_PYTHON=<interpreter with the trainer> pytest tests/ui

Both default to the one that runs the tests. Skips visibly without gradio, playwright or Chromium. Pictures of every
screen go to APL_UI_PICTURES, to be looked at.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
from page_driver import PATIENCE, Server, done_steps, fill, open_tab, picture, visit, wait_for

from apl_core.prefix import load_prefix

STEPS = 10

pytestmark = [pytest.mark.slow, pytest.mark.world, pytest.mark.timeout(3600)]


def test_from_nothing_to_a_prefix_in_use(server: Server, page: Any) -> None:
    visit(page, server.address)
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
    visit(page, server.address)
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
    visit(page, server.address)
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
