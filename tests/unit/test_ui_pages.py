"""What the page shows: curves that are where numpy puts them, and nothing from a file that becomes markup."""

from __future__ import annotations

import re
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from apl_train.ui import comparison, curves, pages, thumbs
from apl_train.ui.desk import Said
from apl_train.ui.jobs import FAILED, LOST, RUNNING, Job
from apl_train.ui.place import Place
from apl_train.ui.runs import Preview, Run

HOSTILE = "<img src=x onerror=alert(1)>\"'&</textarea>"


def job(folder: Path, state: str, code: int | None = None, log: str = "") -> Job:
    path = folder / "jobs" / "0001-train"
    path.mkdir(parents=True, exist_ok=True)
    (path / "log.txt").write_text(log)
    return Job(path, "train", folder.name, ("python", "-m", "apl_train", "train"), 1.0, state, code, None)


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def test_the_curve_is_where_a_logarithmic_axis_puts_it() -> None:
    points = [(1, 0.01), (50, 1.0), (100, 0.1)]
    lines = [e for e in parsed(curves.loss_chart("L", [("L", points)], 100)) if e.tag == "polyline"]
    raw = np.array([[float(v) for v in pair.split(",")] for pair in lines[0].get("points").split()])
    x = curves.LEFT + (curves.WIDTH - curves.LEFT - curves.RIGHT) * np.array([0.01, 0.5, 1.0])
    assert np.allclose(raw[:, 0], x, atol=0.06)
    # between the extremes, 0.1 lies half way in logarithms
    assert raw[2, 1] == pytest.approx((raw[0, 1] + raw[1, 1]) / 2, abs=0.11)
    assert raw[1, 1] < raw[2, 1] < raw[0, 1] and raw[:, 1].min() >= curves.TOP


def test_the_strong_line_is_the_running_geometric_mean() -> None:
    values = np.exp(np.random.default_rng(0).normal(size=200))
    found = np.array(curves.smooth(list(enumerate(values))))
    half = 200 // 30
    wanted = [np.exp(np.log(values[max(0, i - half) : i + half + 1]).mean()) for i in range(200)]
    assert np.allclose(found[:, 1], wanted) and np.array_equal(found[:, 0], np.arange(200))


@pytest.mark.parametrize("points", [[], [(1, 0.0)], [(1, float("nan")), (2, float("inf")), (3, -1.0)]])
def test_a_chart_without_anything_to_show_says_so(points: list[tuple[int, float]]) -> None:
    assert "nothing yet" in "".join(parsed(curves.loss_chart("L", [("L", points)], 10)).itertext())


@pytest.mark.parametrize("points", [[(1, 0.5)], [(i, 0.5) for i in range(9)], [(i, 10.0**i) for i in range(-9, 9)]])
def test_odd_curves_stay_inside_the_chart(points: list[tuple[int, float]]) -> None:
    svg = parsed(curves.loss_chart("L", [("L", points)], 0))
    numbers = [float(v) for e in svg if e.tag == "polyline" for v in re.split("[ ,]", e.get("points"))]
    assert all(np.isfinite(numbers)) and max(numbers[1::2]) <= curves.HEIGHT and min(numbers[1::2]) >= 0


def test_a_long_run_makes_no_long_page() -> None:
    assert len(curves.loss_chart("L", [("L", [(i, 1 + i % 7) for i in range(200_000)])], 200_000)) < 20_000


@pytest.mark.parametrize(("low", "high"), [(0.011, 0.019), (1e-7, 1e3), (0.02, 0.6)])
def test_ticks_lie_inside_and_are_few(low: float, high: float) -> None:
    found = curves.ticks(low, high)
    assert 1 <= len(found) <= 7 and all(low <= tick <= high for tick in found)


def hostile_run(folder: Path, state: str = FAILED) -> Run:
    folder.mkdir()
    person = Preview(HOSTILE, HOSTILE, "../../secret.png", "on.png", 0.5, 0.25)
    return Run(folder, (job(folder, state, 9, HOSTILE),), state, 3, 10, config={"base_model": HOSTILE, HOSTILE: "x"},
               previews={0: (person,), 4: (person,)}, error=HOSTILE, losses=((1, 0.5, 0.25),))


def test_nothing_from_a_file_becomes_markup(tmp_path: Path) -> None:
    run = hostile_run(tmp_path / "a&b")
    other = Run(tmp_path / "b", (), "done", config={"base_model": "y"})
    card = thumbs.Card("", HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    for text in (pages.status(run), pages.previews(run), pages.log(run), pages.strip(run, 1), pages.said(Said(HOSTILE)),
                 pages.run_list([run], [], ""), comparison.compared(run, other), pages.sheet([card], 1, HOSTILE),
                 pages.heading(HOSTILE, HOSTILE), pages.top(Place(host=HOSTILE))):
        assert "onerror" not in re.sub(r"&lt;img src=x onerror=alert\(1\)&gt;", "", text)
        assert "<textarea" not in text and "</textarea" not in text


def test_pictures_come_from_the_run_folder_only(tmp_path: Path) -> None:
    Image.new("RGB", (300, 200), (10, 20, 30)).save(tmp_path / "secret.png")
    folder = tmp_path / "run" / "previews"
    folder.mkdir(parents=True)
    Image.new("RGB", (300, 200), (10, 20, 30)).save(folder / "good.png")
    assert thumbs.of_file(folder, "good.png").startswith("data:image/jpeg;base64,")
    for name in ("../../secret.png", str(tmp_path / "secret.png"), "", "..", "none.png", "a\\b"):
        assert thumbs.of_file(folder, name) == ""
    (folder / "text.png").write_text("no picture")
    assert thumbs.of_file(folder, "text.png") == ""


def write_table(folder: Path, images: list[str]) -> None:
    rows = "".join(f"{name},ab,photo of ab,a man,id\n" for name in images)
    (folder / "metadata.csv").write_text("image,name,prompt,description,kind\n" + rows)


def test_a_set_is_looked_at_across_its_whole_table_and_never_outside(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "secret.png")
    for i in range(10):
        Image.new("RGB", (64, 64), (i, i, i)).save(folder / f"{i}.png")
    write_table(folder, [f"{i}.png" for i in range(10)])
    found, total = thumbs.cards(folder, 0, 5)
    assert total == 10 and len({card.uri for card in found}) == 5 and found[0].description == "a man"
    write_table(folder, ["../secret.png", str(tmp_path / "secret.png"), "missing.png"])
    assert [card.uri for card in thumbs.cards(folder, 0, 9)[0]] == ["", "", ""]


def test_a_crash_is_explained_with_the_last_lines(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    log = "\n".join(f"line {i}" for i in range(50))
    text = pages.crash(Run(folder, (job(folder, FAILED, -9, log),), FAILED, 7, 10))
    assert "memory ran out" in text and "line 49" in text and "line 30" not in text and "exit code -9" in text
    assert "interrupted" in pages.crash(Run(folder, (job(folder, LOST),), LOST, 7, 10))
    assert pages.crash(Run(folder, (job(folder, RUNNING),), RUNNING)) == ""


def test_measured_scores_are_shown_and_nothing_else_passes_for_one(tmp_path: Path) -> None:
    scores = {"persons": {"test": {"off": {"id_acc_mean": 0.547}, "on": {"id_acc_mean": 0.239}}}}
    run = Run(tmp_path, (), "done", scores=scores)
    assert "0.55 → <b>0.24</b>" in pages.status(run) and "ID-ACC" in pages.status(run)
    assert "0.55 → <b>0.24</b>" in comparison.compared(run, run)
    for odd in ({}, {"persons": []}, {"persons": {"test": {"off": {"id_acc_mean": "<b>"}, "on": {}}}}):
        assert pages.id_acc(Run(tmp_path, (), "done", scores=odd), "test") == ""


def test_where_others_look_no_log_is_shown(tmp_path: Path) -> None:
    run = hostile_run(tmp_path / "a")
    for text in (pages.status(run, tell=False), pages.strip(run, 0, tell=False), pages.crash(run, tell=False)):
        assert "alert(1)" not in text.replace("checkpoint &lt;img src=x onerror=alert(1)", "")
    assert "Last pictures" not in comparison.compared(run, run, tell=False)
    assert "Last pictures" in comparison.compared(run, run)


def test_faces_carry_their_scores_and_many_levels_are_thinned(tmp_path: Path) -> None:
    levels = {step: (Preview("ab", "test", "off.png", "on.png", 0.71, 0.1 + step / 1000),) for step in range(0, 100, 5)}
    text = pages.previews(Run(tmp_path, (), "done", 95, 95, previews=levels))
    assert "0.71" in text and "never seen in training" in text
    shown = [int(n) for n in re.findall(r"step (\d+)", text)]
    assert shown[0] == 0 and shown[-1] == 95 and len(shown) == pages.SHOWN_LEVELS


def test_runs_that_wait_stand_in_their_order_before_the_others(tmp_path: Path) -> None:
    made = {name: Run(tmp_path / name, (), "done", changed=when) for name, when in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
    waiting = [job(tmp_path / name, "queued") for name in ("b", "a")]
    text = pages.run_list(list(made.values()), waiting, "c")
    assert re.findall(r"<b title=\"\w\">(\w)</b>", text) == ["b", "a", "c"] and text.count('class="on"') == 1


@pytest.mark.parametrize(("seconds", "words"), [(0.2, "1 s"), (89, "89 s"), (600, "10 min"), (7200, "2.0 h"),
                                                (400_000, "4.6 days")])
def test_durations_for_people(seconds: float, words: str) -> None:
    assert pages.duration(seconds) == words


def test_ago() -> None:
    assert pages.ago(time.time()) == "just now" and pages.ago(time.time() - 60) == "60 s ago"
