"""The page: well-formed, self-contained, hostile text stays text, missing values are named, bytes always the same."""

from __future__ import annotations

import base64
import io
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from apl_core.errors import ScoreError

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from apl_train.report import charts, svg
from apl_train.report.page import LevelsRow, Pair, PersonRow, Report, render, write_report

HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)> & {{ 7 * 7 }} $x_1$"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """All start tags with attributes, all text; fails where tags are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.text))


def pictures(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 255, (*shape, 16, 16, 3), dtype=np.uint8)


def condition(mean: float) -> dict:
    return {
        "id_acc_mean": mean,
        "id_acc_max": mean + 0.1,
        "ci95": [mean - 0.05, mean + 0.05],
        "face_rate": 0.99,
        "attr_acc": None,
        "joint_success": 0.5,
        "n_persons": 24,
        "n_images": 192,
    }


SCORES = {
    "persons": {
        split: {"off": condition(0.612), "on": condition(0.154), "description": condition(0.098)}
        for split in ("train", "test")
    }
    | {"impostor_floor": 0.03, "threshold": 0.32, "ceiling": 0.87},
    "drift": {"nonfaces": {"on": 0.25, "random": 0.33, "two_seeds": 0.5, "pixel_on": 0.05, "n_images": 64}},
    "uninvited_rate": {"faces_in_nonfaces_off": 0.0, "faces_in_nonfaces_on": 0.016},
    "hashes": {"prefix": "ab", "model": "cd"},
    "settings": {"steps": 20},
}
REPORT = Report(
    title="A demo",
    prefix_path="runs/demo/anonymize.safetensors",
    prefix_hash="9f" * 32,
    model_name="miniature",
    scores=SCORES,
    events=[{"event": "step", "step": i, "l_id": 0.01 / i, "l_reg": None if i % 2 else 0.002} for i in range(1, 40)]
    + [{"event": "level"}],
    level_scores=[
        {"step": i * 10, "id_acc_mean": 0.6 / (i + 1), "lo": 0.5 / (i + 1), "hi": None if i else 0.7} for i in range(4)
    ],
    persons=[PersonRow(f"Person {i}", "A female singer", pictures(3), pictures(3), pictures(3)) for i in range(8)],
    levels=[LevelsRow("Person 1", pictures(4))],
    level_labels=["off", "level 1", "level 2", "level 3"],
    neutral=[Pair("a man", pictures(), pictures())],
    nonfaces=[Pair("an apple", pictures(), pictures())],
    seconds={"training": 161.0},
    commands=[("Try it", "apl sample --prefix x")],
)
EMPTY = Report("Nothing yet", "p.safetensors", "00", "m", {})


@pytest.fixture(scope="module")
def text() -> str:
    return render(REPORT)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_it_shows_every_picture_and_says_which(page: Page) -> None:
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 8 * 9 + 4 + 4
    assert all(image["alt"] for image in images)
    assert images[0]["alt"] == "Person 0, prefix off, seed 1"


def test_pictures_are_embedded_without_loss_at_their_own_size(page: Page) -> None:
    first = next(attrs for tag, attrs in page.tags if tag == "img")
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(first["src"].partition(",")[2]))).convert("RGB"))
    assert np.array_equal(shown, REPORT.persons[0].off[0])
    assert (first["width"], first["height"]) == ("16", "16")


def test_large_pictures_are_embedded_smaller(page: Page) -> None:
    big = np.zeros((512, 512, 3), np.uint8)
    found = Page(render(replace(EMPTY, nonfaces=[Pair("x", big, big)])))
    first = next(attrs for tag, attrs in found.tags if tag == "img")
    assert first["width"] == "128"
    assert Image.open(io.BytesIO(base64.b64decode(first["src"].partition(",")[2]))).size == (256, 256)


def test_it_opens_offline(text: str, page: Page) -> None:
    assert not re.search(r"https?:|//[a-z]", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    ids = {attrs["id"] for _, attrs in page.tags if attrs.get("id")}
    for tag, attrs in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base")
        for key in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            value = attrs.get(key)
            assert value is None or value.startswith("data:image/") or value.removeprefix("#") in ids
        assert not [key for key in attrs if key.startswith("on")]
    assert "@import" not in text
    assert all(target in ids for target in re.findall(r"url\(#([^)]+)\)", text))
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_ids_are_unique(page: Page) -> None:
    ids = [attrs["id"] for _, attrs in page.tags if attrs.get("id")]
    assert len(ids) == len(set(ids))


def test_hostile_text_stays_text() -> None:
    row = PersonRow(HOSTILE, HOSTILE, pictures(1), pictures(1), pictures(1))
    scores = {
        "persons": {"test": {"off": condition(0.5), HOSTILE: condition(0.4)}},
        "uninvited_rate": {HOSTILE: 0.1},
        "hashes": {HOSTILE: HOSTILE},
        "settings": {HOSTILE: HOSTILE},
    }
    found = Page(
        render(
            Report(
                HOSTILE,
                HOSTILE,
                HOSTILE,
                HOSTILE,
                scores,
                persons=[row],
                levels=[LevelsRow(HOSTILE, pictures(1))],
                level_labels=[HOSTILE],
                neutral=[Pair(HOSTILE, pictures(), pictures())],
                seconds={HOSTILE: 1.0},
                commands=[(HOSTILE, HOSTILE)],
                events=[{"event": "step", "step": HOSTILE, "l_id": HOSTILE}],
                level_scores=[{"step": HOSTILE, "id_acc_mean": HOSTILE}],
            )
        )
    )
    assert "script" not in {tag for tag, _ in found.tags}
    assert not [attrs for _, attrs in found.tags if "onerror" in attrs]
    assert all(attrs["src"].startswith("data:image/") for tag, attrs in found.tags if tag == "img")
    assert found.words.count(HOSTILE) >= 16


def test_the_newcomer_is_told_in_three_sentences_and_what_to_do_next(page: Page, text: str) -> None:
    summary = re.search(r'id="summary">(.*?)</p>', text, re.S).group(1)
    assert len(re.findall(r"\.(?:\s|$)", summary.strip())) == 3
    for told in ("runs/demo/anonymize.safetensors", "9f" * 32, "apl sample --prefix x", "2 min 41 s"):
        assert told in page.words


def test_figures_stand_beside_the_papers_labelled_as_such(page: Page) -> None:
    assert "paper, real weights (SD1.5)" in page.words
    for figure in ("0.154 [0.104, 0.204]", "0.303", "0.040", "0.602", "50.0%", "89.1%"):
        assert figure in page.words


def test_limits_are_stated_and_those_of_the_miniature_only_there(page: Page) -> None:
    assert "What this does not show" in page.words
    assert "miniature world of drawn faces, not Stable Diffusion" in page.words
    assert "can leave the prefix out" in page.words
    real = Page(render(replace(REPORT, miniature=False))).words
    assert "miniature world" not in real
    assert "can leave the prefix out" in real
    assert "prevent" not in page.words.lower()


def test_missing_values_are_named(page: Page) -> None:
    assert "not measured" in page.words  # Attr-ACC above
    nothing = Page(render(EMPTY)).words
    assert nothing.count("not measured") >= 10
    assert "nan" not in re.findall(r"[a-z]+", nothing.lower())
    assert "None" not in page.words + nothing.replace("None given.", "")


def test_the_same_report_gives_the_same_bytes(tmp_path: Path, text: str) -> None:
    write_report(tmp_path / "a" / "report.html", REPORT)
    assert (tmp_path / "a" / "report.html").read_bytes() == text.encode("utf-8") == render(REPORT).encode("utf-8")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["report.html"]


def test_a_path_that_is_not_utf8_does_not_spoil_the_page(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", replace(EMPTY, prefix_path="runs/\udce4.safetensors"))
    assert "runs/?.safetensors" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 4, 4, 3)), np.zeros((4, 4, 3), np.uint8), np.zeros((0, 4, 4, 3), np.uint8), None]
)
def test_pictures_of_a_wrong_kind_are_refused(bad) -> None:
    with pytest.raises(ScoreError, match="not uint8"):
        PersonRow("A", "B", bad, pictures(2), pictures(2))


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ScoreError, match="on of A has 1 pictures, off has 2"):
        PersonRow("A", "B", pictures(2), pictures(1), pictures(2))
    with pytest.raises(ScoreError, match="2 levels for 1 labels"):
        replace(EMPTY, levels=[LevelsRow("A", pictures(2))], level_labels=["off"])


def test_smoothing_against_a_loop() -> None:
    values = np.random.default_rng(0).random(100)
    half = max(2, 100 // 30)
    expected = [values[max(0, i - half) : i + half + 1].mean() for i in range(100)]
    assert charts._smooth(values) == pytest.approx(expected)


def chart_texts(text: str) -> list[str]:
    return [node.text for node in ET.fromstring(svg.standalone(text)).iter("{http://www.w3.org/2000/svg}text")]


def test_charts_are_well_formed_and_carry_no_date_or_foreign_font() -> None:
    for chart in (
        charts.loss_curves(REPORT.events),
        charts.id_acc_levels(REPORT.level_scores, SCORES),
        charts.conditions(SCORES),
        charts.drift(SCORES),
    ):
        ET.fromstring(chart)
        assert "currentColor" in chart
        assert not re.search(r"http|<metadata|<style|DejaVu|#010203", chart)
    assert "prefix off" in chart_texts(charts.id_acc_levels(REPORT.level_scores, SCORES))
    assert chart_texts(charts.drift({})) == ["not measured"]


def test_sweep_keeps_labels_as_they_are_and_drops_what_a_log_axis_cannot_show() -> None:
    points = [
        {"x": x, "id_acc_mean": 0.1, "lo": 0.05, "hi": 0.2, "series": s}
        for x in (0, 1, 10)
        for s in ("on", "a <b> $c$")
    ]
    texts = chart_texts(charts.sweep_plot(points, "alpha & m", log=True))
    assert {"alpha & m", "a <b> $c$", "prefix on", "1", "10"} <= set(texts)
    assert "0" not in texts
    assert "0" in chart_texts(charts.sweep_plot(points, "alpha"))
    assert charts.sweep_plot(points, "m") == charts.sweep_plot(points, "m")
