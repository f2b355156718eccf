"""The page of a check: well-formed, self-contained, hostile names stay text, the faces are those that were compared."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("jinja2")

from fakes.colour_faces import ColourFaces, picture

from apl_train.folder_score.files import FolderSettings
from apl_train.folder_score.page import FACE, crop, render, write_all
from apl_train.folder_score.score import check_folder

HOSTILE = "<script>alert(1)<x>&\"'{{ 7 * 7 }}"
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Tags with attributes and the text; fails where tags are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


@pytest.fixture
def result(tmp_path: Path):
    for side, colours in (("refs", [(200, 0, 9), (190, 20, 9)]), ("off", [(200, 10, 9), None]), ("on", [(0, 200, 9)])):
        for person in ("anna", HOSTILE.replace("/", "")):
            (tmp_path / side / person).mkdir(parents=True)
            for i, colour in enumerate(colours):
                picture(colour).save(tmp_path / side / person / f"{i}{HOSTILE[:8]}.png")
    (tmp_path / "off" / "anna" / "broken.png").write_bytes(b"x")
    settings = FolderSettings(tmp_path / "off", tmp_path / "refs", tmp_path / "on", threshold=0.9)
    return check_folder(settings, [ColourFaces(), ColourFaces("second", "c1")])


def test_well_formed_and_self_contained(result) -> None:
    text = render(result)
    page = Page(text)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object", "form")]
    for _, attrs in page.tags:
        assert not any(key.startswith("on") for key in attrs)
        assert not attrs.get("src") or attrs["src"].startswith("data:image/")
        assert not attrs.get("href") or attrs["href"].startswith("#")
    ids = {attrs["id"] for _, attrs in page.tags if attrs.get("id")}
    assert {attrs["href"][1:] for _, attrs in page.tags if attrs.get("href")} <= ids
    assert HOSTILE in page.words
    assert render(result) == text


def test_it_shows_what_was_compared(result) -> None:
    page = Page(render(result))
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 2 * (2 + 2 + 1)
    first = np.array(Image.open(io.BytesIO(base64.b64decode(images[0]["src"].partition(",")[2]))).convert("RGB"))
    assert max(first.shape[:2]) <= FACE
    assert sum(attrs["alt"].endswith("no face") for attrs in images) == 2
    verdicts = [attrs["class"].split()[-1] for tag, attrs in page.tags if tag == "figure"]
    assert verdicts.count("known") == 2 and verdicts.count("other") == 2 and verdicts.count("none") == 6
    for wanted in ("a face AND not recognised", "equal verdicts", "broken, or none of", "Identity check", "as given",
                   "no face is no success", "0.9"):
        assert wanted in page.words, wanted
    assert re.search(r"without prefix\s*with prefix", page.words)


def test_three_files_are_written(result, tmp_path: Path) -> None:
    written = write_all(tmp_path / "out" / "check.json", result)
    assert [path.name for path in written] == ["check.json", "check.md", "check.html"]
    assert json.loads(written[0].read_text(encoding="utf-8")) == result.scores
    assert "# Identity check" in written[1].read_text(encoding="utf-8")


def test_crops_reach_beyond_the_picture_without_stretching() -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    image[10:20, 30:40] = 255
    found = crop(image, (30, 10, 40, 20), margin=0)
    assert (found == 255).all() and found.shape[0] == found.shape[1]
    beyond = crop(image, (50, -10, 70, 10), margin=0)
    height, width = beyond.shape[:2]
    assert (beyond[: height // 2 - 1] == 128).all() and (beyond[:, width // 2 + 1 :] == 128).all()
    assert (beyond[height // 2 + 1 :, : width // 2 - 1] == 0).all()
    assert crop(image, (500, 500, 510, 510)).shape[2] == 3  # a box elsewhere is grey
