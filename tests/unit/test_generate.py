"""Sets drawn by a model: wrong pictures are drawn again, an interrupted folder is gone on with, never mixed."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from apl_core.errors import ConfigError, DatasetError, TrainingStopped
from apl_train.datasets import generate
from apl_train.datasets.cast import CastMember, NeutralLine
from apl_train.datasets.contact_sheet import Frame, write_sheets
from apl_train.datasets.dataset import problems, read_dataset
from apl_train.datasets.generate import Drawing, Studio, wanted_of_cast, wanted_of_prompts
from apl_train.processes import Processes

PEOPLE = [CastMember("Ada Hill", "train", "A woman, dark hair"), CastMember("Bo Lake", "train", "A man, beard"),
          CastMember("Cy Wood", "test", "A man, glasses")]


class Painter:
    """A model whose pictures depend on the seed alone, and which counts what it draws."""

    sha256, size = "0" * 64, 16

    def __init__(self) -> None:
        self.drawn: list[tuple[str, int]] = []

    def sample(self, prompts: list[str], seeds: list[int], **_: object) -> SimpleNamespace:
        self.drawn += zip(prompts, seeds, strict=True)
        return SimpleNamespace(images=np.stack([
            np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8) for seed in seeds]))


class Eye:
    """Sees as many faces as `answers` says, one after another, then always `then`."""

    sha256 = "1" * 64

    def __init__(self, answers: list[int], then: int = 1) -> None:
        self._answers, self._then = list(answers), then

    def faces_of(self, images: list[np.ndarray]) -> list[list[str]]:
        return [["face"] * (self._answers.pop(0) if self._answers else self._then) for _ in images]


def test_c1_comes_from_templates_and_nobody_for_testing_is_drawn() -> None:
    wanted = wanted_of_cast(PEOPLE, 5)
    assert len(wanted) == 10 and len({w.key for w in wanted}) == 10
    assert [w.prompt for w in wanted[:5]] == [
        "A photo of Ada Hill", "A portrait of Ada Hill", "A close-up photo of Ada Hill",
        "A close-up portrait of Ada Hill", "A photo of Ada Hill"]
    assert {(w.name, w.description, w.kind) for w in wanted[5:]} == {("Bo Lake", "A man, beard", "id")}


def test_neutral_pictures_are_of_both_kinds_in_equal_parts() -> None:
    lines = [NeutralLine(f"thing {i}", "nonface", "train") for i in range(9)] + [NeutralLine("a man", "face", "train")]
    wanted = wanted_of_prompts(lines[:3] + lines[9:] + [NeutralLine("a woman", "face", "train")], 4)
    assert [w.kind for w in wanted] == ["face", "nonface", "face", "nonface"]
    assert len(wanted_of_prompts(lines, 25)) == 25
    with pytest.raises(DatasetError, match="no neutral prompt"):
        wanted_of_prompts([], 2)


def test_a_set_is_a_dataset_with_a_sheet_to_look_at(tmp_path: Path) -> None:
    painter = Painter()
    told: list[tuple[int, int]] = []
    outcome = Studio(painter, tmp_path, Drawing(batch=3), embedder=Eye([]), progress=lambda *a: told.append(a)).fill(
        wanted_of_cast(PEOPLE, 2))
    assert (outcome.drawn, outcome.redrawn, outcome.given_up, outcome.unchecked) == (4, {}, (), False)
    assert problems(tmp_path, "id") == []
    records = read_dataset(tmp_path, expect="id").records
    assert [(r.name, r.c1, r.c2) for r in records][:2] == [
        ("Ada Hill", "A photo of Ada Hill", "A woman, dark hair"),
        ("Ada Hill", "A portrait of Ada Hill", "A woman, dark hair")]
    assert told[-1] == (4, 4) and len({seed for _, seed in painter.drawn}) == 4
    with Image.open(tmp_path / "contact-sheet-1.jpg") as sheet:
        assert sheet.width > 4 * 100


def test_pictures_with_no_face_or_several_are_drawn_again_and_given_up_in_the_end(tmp_path: Path) -> None:
    painter = Painter()
    # the first pass: fine, no face, three faces, fine; then the two bad ones: fine, none; then none for ever
    outcome = Studio(painter, tmp_path, Drawing(redraws=2, batch=4), embedder=Eye([1, 0, 3, 1, 1, 0], then=0)).fill(
        wanted_of_cast(PEOPLE, 2))
    assert len(painter.drawn) == 4 + 2 + 1 and len({seed for _, seed in painter.drawn}) == 7
    assert outcome.drawn == 3 and outcome.redrawn == {"no face": 3, "several faces": 1}
    assert outcome.given_up == (("Bo Lake", "no face"),)
    assert "left out: 'Bo Lake' (no face)" in outcome.text("S_ID")
    assert len(read_dataset(tmp_path, expect="id").records) == 3


def test_things_must_show_no_face_and_crowds_may_show_many(tmp_path: Path) -> None:
    lines = [NeutralLine("a crowd", "face", "train"), NeutralLine("an apple", "nonface", "train")]
    outcome = Studio(Painter(), tmp_path, Drawing(batch=2), embedder=Eye([5, 1, 0])).fill(wanted_of_prompts(lines, 2))
    assert outcome.redrawn == {"a face": 1} and outcome.drawn == 2
    assert problems(tmp_path, "reg") == []


def test_an_interrupted_folder_is_gone_on_with(tmp_path: Path) -> None:
    wanted, whole = wanted_of_cast(PEOPLE, 2), Painter()
    Studio(whole, tmp_path / "whole", Drawing(batch=1), embedder=Eye([0, 1, 1, 0])).fill(wanted)
    first, calls = Painter(), iter([False, False, True])
    with pytest.raises(TrainingStopped, match="1 of 4") as caught:
        Studio(first, tmp_path / "cut", Drawing(batch=1), embedder=Eye([0, 1]), stop=lambda: next(calls)).fill(wanted)
    assert "same command" in caught.value.hint and not (tmp_path / "cut" / "metadata.csv").exists()
    second = Painter()
    Studio(second, tmp_path / "cut", Drawing(batch=1), embedder=Eye([1, 0])).fill(wanted)
    assert sorted(first.drawn + second.drawn) == sorted(whole.drawn)
    for path in (tmp_path / "whole").glob("*.png"):
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes()
    third = Painter()
    again = Studio(third, tmp_path / "cut", Drawing(batch=1), embedder=Eye([])).fill(wanted)
    assert not third.drawn and again.drawn == 4 and again.redrawn == {"no face": 2}


class Half(Processes):
    """One of two processes that run one after the other; the second one in the list comes first."""

    count = 2

    def __init__(self, index: int) -> None:
        self.index = index

    def once(self, work: Callable[[], object]) -> object:
        return work() if self.main else None


def test_two_processes_divide_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, painters = wanted_of_cast(PEOPLE, 3), []
    for index in (1, 0):
        monkeypatch.setattr(generate, "this_process", lambda index=index: Half(index))
        painters.append(Painter())
        outcome = Studio(painters[-1], tmp_path / "two", Drawing(), embedder=Eye([0] if index else [])).fill(wanted)
    monkeypatch.undo()
    seen = [{prompt for prompt, _ in painter.drawn} for painter in painters]
    assert not seen[0] & seen[1] and seen[0] | seen[1] == {w.prompt for w in wanted}
    assert outcome.drawn == 6 and outcome.redrawn == {"no face": 1}
    Studio(Painter(), tmp_path / "one", Drawing(), embedder=Eye([])).fill(wanted)
    assert (tmp_path / "one" / "metadata.csv").read_bytes() == (tmp_path / "two" / "metadata.csv").read_bytes()


@pytest.mark.parametrize("change", ["people", "steps", "model", "recogniser"])
def test_a_folder_is_never_filled_from_two_plans(tmp_path: Path, change: str) -> None:
    wanted, painter, drawing, eye = wanted_of_cast(PEOPLE, 1), Painter(), Drawing(), Eye([])
    Studio(painter, tmp_path, drawing, embedder=eye).fill(wanted)
    if change == "people":
        wanted = wanted_of_cast(PEOPLE, 2)
    if change == "steps":
        drawing = Drawing(steps=7)
    if change == "model":
        painter.sha256 = "2" * 64
    with pytest.raises(ConfigError, match="was begun with another") as caught:
        Studio(painter, tmp_path, drawing, embedder=None if change == "recogniser" else eye).fill(wanted)
    assert "another folder" in caught.value.hint


def test_somebody_elses_dataset_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("mine")
    with pytest.raises(ConfigError, match="not made by this command"):
        Studio(Painter(), tmp_path, Drawing()).fill(wanted_of_cast(PEOPLE, 1))
    assert [p.name for p in tmp_path.iterdir()] == ["metadata.csv"]


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="None of the 2 pictures"):
        Studio(Painter(), tmp_path, Drawing(redraws=0), embedder=Eye([], then=0)).fill(wanted_of_cast(PEOPLE, 1))


def test_without_a_recogniser_it_is_said_that_nobody_looked(tmp_path: Path) -> None:
    outcome = Studio(Painter(), tmp_path, Drawing()).fill(wanted_of_cast(PEOPLE, 1))
    assert outcome.unchecked and "not checked" in outcome.text("S_ID")


def test_sheets_have_pages_and_captions_in_any_script(tmp_path: Path) -> None:
    Image.new("RGB", (40, 20), "red").save(tmp_path / "a.png")
    frames = [Frame(tmp_path / "a.png", "刘德华 Ödön " * 9)] * 101
    assert [p.name for p in write_sheets(tmp_path, frames)] == ["contact-sheet-1.jpg", "contact-sheet-2.jpg"]
    write_sheets(tmp_path, frames[:2])
    assert sorted(p.name for p in tmp_path.glob("*.jpg")) == ["contact-sheet-1.jpg"]


def test_the_table_is_csv_as_it_should_be(tmp_path: Path) -> None:
    people = [CastMember('Ann "Bo" Kis', "train", 'A "tall", quiet woman')]
    Studio(Painter(), tmp_path, Drawing()).fill(wanted_of_cast([*people, PEOPLE[0]], 1))
    with (tmp_path / "metadata.csv").open(encoding="utf-8", newline="") as file:
        assert next(csv.DictReader(file))["description"] == 'A "tall", quiet woman'
