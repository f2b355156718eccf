"""Every button of the page in a real browser: check, draw only, pause, go on, stop, resume, run next, compare.

Interpreters, skips and pictures as in test_browser.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from page_driver import (
    PATIENCE,
    Server,
    choose,
    done_steps,
    fill,
    open_tab,
    order,
    picture,
    press,
    start,
    visit,
    wait_for,
)

from apl_train.training.state import load_state

pytestmark = [pytest.mark.slow, pytest.mark.world, pytest.mark.timeout(3600)]


def events(run: Path) -> list[str]:
    rows = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [row["event"] for row in rows if row["event"] != "step"]


def parent(run: Path) -> int:
    """What watches the newest job of a run."""
    process = json.loads((sorted(run.glob("jobs/*"))[-1] / "process.json").read_text())["pid"]
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def until(condition: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def test_pause_stop_resume_order_and_compare(server: Server, page: Any) -> None:
    visit(page, server.address)
    wait_for(page, "strip", "Nothing is running")
    open_tab(page, "Runs")
    wait_for(page, "runs", "No run yet")
    wait_for(page, "status", "New prefix")  # what to do next
    picture(page, "a-runs-empty")
    open_tab(page, "Compare")
    wait_for(page, "compared", "Choose two runs")
    open_tab(page, "Use and share")
    press(page, "use")
    wait_for(page, "used", "There is no prefix yet")
    picture(page, "b-share-empty")

    start(page, "one", 40)
    one = server.folder / "runs" / "one-01"
    page.wait_for_function("() => /[1-9][0-9]* \\/ 40/.test(document.getElementById('apl-status').innerText)")
    press(page, "pause", "Pause")
    wait_for(page, "status", "paused")
    until(lambda: events(one)[-1] == "paused")
    page.wait_for_timeout(3000)
    held = done_steps(page)
    picture(page, "c-paused")
    page.reload()  # a pause outlives the page
    open_tab(page, "Runs")
    wait_for(page, "status", "paused")
    page.wait_for_timeout(3000)
    assert done_steps(page) == held > 0

    for name in ("two", "three"):  # they wait behind it
        start(page, name, 4)
        wait_for(page, "status", "waiting")
    assert order(page) == ["one-01", "two-01", "three-01"]
    press(page, "next", "Run next")
    wait_for(page, "run-answer", "three-01 is next")
    page.wait_for_function("() => document.getElementById('apl-runs').innerText.replace(/\\s+/g, ' ')"
                           ".match(/one-01.*three-01.*two-01/)")
    picture(page, "d-queue")
    choose(page, "picker", "two-01")
    wait_for(page, "status", "two-01")
    press(page, "stop", "Take out of the queue")
    wait_for(page, "run-answer", "taken out")
    wait_for(page, "status", "stopped")

    choose(page, "picker", "one-01")
    wait_for(page, "status", "one-01")
    press(page, "pause", "Go on")
    page.wait_for_function(f"() => parseInt(document.querySelector('#apl-status .apl-tile b').innerText) > {held}")
    assert events(one)[-2:] == ["paused", "continued"]
    os.kill(parent(one), signal.SIGKILL)  # what watches the training ends; the training does not, and is watched again
    press(page, "stop", "Stop and save")
    wait_for(page, "run-answer", "saves and stops")
    wait_for(page, "status", "stopped, saved")
    saved = load_state(one).step
    assert held < saved < 40
    picture(page, "e-stopped")

    choose(page, "picker", "three-01")  # its turn came by itself
    wait_for(page, "status", "three-01")
    wait_for(page, "status", "done")
    choose(page, "picker", "one-01")
    wait_for(page, "status", "one-01")
    press(page, "resume")
    wait_for(page, "status", "running")
    page.wait_for_function(f"() => parseInt(document.querySelector('#apl-status .apl-tile b').innerText) > {saved}")
    press(page, "stop", "Stop and save")
    wait_for(page, "status", "stopped, saved")

    open_tab(page, "Compare")
    choose(page, "first", "one-01")
    choose(page, "second", "three-01")
    page.wait_for_function("() => { const t = document.getElementById('apl-compared').innerText; return "
                           "t.includes('one-01') && t.includes('three-01') && t.includes('steps'); }")
    page.wait_for_timeout(2000)
    assert page.locator("#apl-compared .apl-chart polyline").count() == 4
    picture(page, "f-compare")
    visit(page, f"{server.address}/?__theme=dark")
    open_tab(page, "Runs")
    wait_for(page, "status", "one-01")
    picture(page, "g-dark")


def test_check_look_and_draw_only(server: Server, page: Any) -> None:
    visit(page, server.address)
    wait_for(page, "strip", "Nothing is running")
    press(page, "check")
    wait_for(page, "checked", "288")
    page.get_by_label("Folders that I have").check()
    page.locator("#apl-s-id input, #apl-s-id textarea").first.wait_for()
    press(page, "start")
    wait_for(page, "answer", "Name both folders")

    broken = server.folder / "mine"
    broken.mkdir()
    with (broken / "metadata.csv").open("w", newline="") as out:
        csv.writer(out).writerows([("image", "name", "prompt", "description", "kind"),
                                   ("none.png", "a b", "A photo of a b", "A tall man", "id")])
    fill(page, "s-id", str(broken))
    fill(page, "s-reg", str(server.folder / "nowhere"))
    press(page, "check")
    wait_for(page, "checked", "none.png")
    wait_for(page, "checked", "nowhere")
    press(page, "look")
    wait_for(page, "sheet", "no picture")
    picture(page, "h-broken")

    page.get_by_label("Let the checkpoint draw them").check()
    page.locator("#apl-limit input").wait_for()
    for name, value in (("limit", 1), ("each", 2), ("neutral", 2)):
        fill(page, name, str(value))
    fill(page, "name", "look")
    page.wait_for_function("() => [...document.querySelectorAll('.apl-command textarea')]"
                           ".some(e => e.value.includes('apl generate id') && e.value.includes('look') && "
                           "e.value.includes('--each 2') && e.value.includes('--count 2'))")
    press(page, "draw")
    wait_for(page, "status", "look-pictures-01")
    run = server.folder / "runs" / "look-pictures-01"
    until(lambda: len(list(run.glob("jobs/*/exit.json"))) == 2)
    wait_for(page, "status", "done")
    picture(page, "i-drawn")
    open_tab(page, "New prefix")
    page.wait_for_function("folder => document.querySelector('#apl-s-id :is(input, textarea)')?.value === folder",
                           arg=str(run / "s_id"))
    press(page, "look")
    page.wait_for_function("() => document.querySelectorAll('#apl-sheet figure img').length === 4")
    press(page, "check")
    wait_for(page, "checked", "2 id")
    picture(page, "j-looked-at")
