"""Measuring and tuning baselines on a fake model whose pictures say what they show, against numbers worked out by hand.

A fake picture's first pixel says whether there is a face, its second where the face points (a 2-D embedding). A listed
person's face is turned away by the fake methods, an unseen one's is not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from apl_core.errors import ConfigError, ScoreError
from apl_core.identity import Face
from apl_train.baselines import comparison, strips
from apl_train.baselines.measure import Instruments, ground, measure, score
from apl_train.baselines.protocol import Baseline, Prepared
from apl_train.baselines.tuning import chosen, objective, tune
from apl_train.scoring.persons import EvaluationSet, NeutralPrompt, PersonRecord

PERSONS = tuple(PersonRecord(f"person{i:02}", "train" if i < 8 else "test", f"c2 of {i}", {"gender": "female"},
                             ("x", "y")) for i in range(16))
LISTED, UNSEEN = PERSONS[:8], PERSONS[8:]
NEUTRAL = (*(NeutralPrompt(f"a woman {i}", "unnamed_face") for i in range(3)),
           NeutralPrompt("a bus", "nonface"), NeutralPrompt("a jar", "nonface"))


def angle(name: str) -> float:
    """Persons stand evenly on a circle, 22.5 degrees apart."""
    return int(name[-2:]) / 16


class FakeEmbedder:
    name, sha256 = "fake", "r" * 64

    def faces_of(self, images: Sequence[np.ndarray]) -> list[list[Face]]:
        found = []
        for image in images:
            turn = (int(image[0, 1, 0]) * 256 + int(image[0, 1, 1])) / 65536 * 2 * math.pi
            unit = np.array([math.cos(turn), math.sin(turn)], np.float32)
            found.append([Face((0, 0, 4, 4), 0.9, unit)] if image[0, 0, 0] else [])
        return found


class FakeReader:
    sha256 = "a" * 64

    def read(self, images: np.ndarray) -> list[dict[str, str]]:
        return [{"gender": "female" if image[0, 0, 1] else "male"} for image in images]


def picture(face: bool, turn: float, shade: int = 0) -> np.ndarray:
    image = np.full((4, 4, 3), shade, np.uint8)
    fine = round(turn % 1 * 65535)
    image[0, 0], image[0, 1] = (255 * face, 255, 0), (fine >> 8, fine & 255, 0)
    return image


@dataclass
class FakeModel:
    """`turns`: how far a method turns the faces of the first `listed` persons; `moved`: how much brighter neutral
    pictures become."""

    turns: float = 0.0
    moved: int = 0
    faceless: bool = False
    listed: int = 8
    sha256: str = "m" * 64
    family: str = "sd1"

    def draw(self, prompt: str, seed: int) -> np.ndarray:
        named = next((p for p in PERSONS if p.name in prompt), None)
        if named is None:
            return picture(False, 0.0, seed % 97 + self.moved)
        listed = int(named.name[-2:]) < self.listed
        return picture(not (listed and self.faceless), angle(named.name) + (self.turns if listed else 0.0))

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], **_: Any) -> SimpleNamespace:
        images = np.stack([self.draw(p, s) for p, s in zip(prompts, seeds, strict=True)])
        return SimpleNamespace(images=images, latents=torch.from_numpy(images.astype(np.float32)).reshape(-1, 4, 3, 4))


@dataclass(frozen=True)
class FakeSet(EvaluationSet):
    def references(self, person: PersonRecord) -> list[np.ndarray]:
        return [picture(True, angle(person.name))] * 2


TOOLS = Instruments(FakeSet(Path(), PERSONS, NEUTRAL, "s" * 64), FakeEmbedder(), FakeReader())


def prepared(model: FakeModel, name: str = "fake") -> Prepared:
    return Prepared(name, 1.5, {"settings": {}}, "f" * 64, model)


@pytest.fixture(scope="module")
def base() -> Any:
    return ground(FakeModel(), TOOLS, LISTED, UNSEEN, NEUTRAL, seeds=5, neutral_seeds=2)


def test_the_ground_is_the_models_own(base: Any) -> None:
    assert set(base.groups) == {"listed", "unseen"} and set(base.neutral) == {"unnamed_faces", "nonfaces"}
    # the nearest other person is 22.5 degrees away; 16 x 15 x 5 impostors support one in a thousand
    assert base.threshold.impostors == 1200 and base.threshold.far == 1e-3
    assert base.threshold.value == pytest.approx(math.cos(math.pi / 8), abs=1e-3)
    row = score(FakeModel(), "off", TOOLS, base)
    for group in ("listed", "unseen"):
        assert row[group]["id_acc_mean"] == pytest.approx(1, abs=1e-6)
        assert row[group]["ratio_to_base"] == pytest.approx(1) and row[group]["joint_success"] == 0
    assert row["drift"]["nonfaces"]["value"] == 0


def test_figures_of_a_method_by_hand(base: Any) -> None:
    found = measure(FakeModel(), prepared(FakeModel(turns=0.25, moved=20)), LISTED, UNSEEN, 5, instruments=TOOLS,
                    on_list=LISTED, base=base)
    listed, unseen = found["listed"], found["unseen"]
    assert listed["id_acc_mean"] == pytest.approx(0, abs=1e-3) and listed["joint_success"] == 1
    assert listed["ratio_to_base"] == pytest.approx(0, abs=1e-3)
    assert unseen["id_acc_mean"] == pytest.approx(1, abs=1e-6) and unseen["joint_success"] == 0
    assert unseen["ci95"][0] <= unseen["id_acc_mean"] + 1e-9 and (unseen["n_persons"], unseen["n_images"]) == (8, 40)
    assert listed["face_rate"] == unseen["face_rate"] == 1 and listed["attr_acc"] == 1
    # every value of a neutral picture but the six that say what it shows is 20 brighter
    share = math.sqrt(20**2 * 42 / 48)
    assert found["drift"]["nonfaces"]["value"] == pytest.approx(share)
    assert found["drift"]["unnamed_faces"]["n_images"] == 6 and found["drift"]["nonfaces"]["face_rate"] == 0
    assert found["seconds"]["prepare"] == 1.5 and found["method"] == "fake"
    assert json.loads(json.dumps(found)) == found


def test_nobodys_face_is_no_success(base: Any) -> None:
    found = measure(FakeModel(), prepared(FakeModel(faceless=True)), LISTED, UNSEEN, 5, instruments=TOOLS,
                    on_list=LISTED, base=base)
    assert found["listed"]["id_acc_mean"] is None and found["listed"]["ci95"] is None
    assert found["listed"]["face_rate"] == 0 and found["listed"]["joint_success"] == 0
    assert found["listed"]["attr_acc"] is None


def test_an_unseen_person_on_the_list_is_refused(base: Any) -> None:
    with pytest.raises(ScoreError, match="person08 is on the list"):
        measure(FakeModel(), prepared(FakeModel()), LISTED, UNSEEN, 5, instruments=TOOLS, on_list=PERSONS, base=base)
    with pytest.raises(ScoreError, match="too few"):
        ground(FakeModel(), TOOLS, LISTED[:2], (), (), seeds=1)


class FakeMethod(Baseline):
    """Turns faces by `turn` of a circle and moves everything by `moved`."""

    name, title, paper, changes = "fake", "Fake", "arXiv", "weights"
    defaults: Mapping[str, Any] = {"turn": 0.0, "moved": 0}
    grid = ({"turn": 0.01, "moved": 0}, {"turn": 0.2, "moved": 10}, {"turn": 0.25, "moved": 10},
            {"turn": 0.25, "moved": 60})

    def __init__(self) -> None:
        self.made: list[Prepared] = []

    def edit(self, backend: Any, persons: Any, settings: Mapping[str, Any], *, keep: Any, seed: int) -> Any:
        return FakeModel(settings["turn"], settings["moved"], listed=len(persons)), {}

    def prepare(self, *args: Any, **options: Any) -> Prepared:
        self.made.append(super().prepare(*args, **options))
        return self.made[-1]


def test_tuning_takes_the_best_of_the_grid_and_closes_the_rest(base: Any) -> None:
    method, told = FakeMethod(), []
    tuned = tune(FakeModel(), method, LISTED, TOOLS, base, done=lambda rows: told.append(len(rows)))
    assert [r["joint_success"] for r in tuned.rows] == [0, 1, 1, 1] and told == [1, 2, 3, 4]
    assert tuned.rows[1]["objective"] == tuned.rows[2]["objective"] > tuned.rows[3]["objective"]
    assert tuned.settings == {"turn": 0.25, "moved": 10}  # of two equal ones the lower ID-ACC
    assert tuned.prepared is method.made[2] and tuned.prepared.backend.moved == 10
    for other in (0, 1, 3):
        with pytest.raises(ConfigError, match="was closed"):
            _ = method.made[other].backend
    again = FakeMethod()
    known = tune(FakeModel(), again, LISTED, TOOLS, base, known=tuned.rows[:3])
    assert known.settings == tuned.settings and known.prepared is None and len(again.made) == 1


def test_the_objective_is_joint_success_and_the_mean_drift() -> None:
    found = {"listed": {"joint_success": 0.9}, "drift": {"a": {"ratio_to_two_seeds": 0.1},
                                                         "b": {"ratio_to_two_seeds": 0.3}}}
    assert objective(found) == (0.9, pytest.approx(0.2))
    found["drift"]["b"]["ratio_to_two_seeds"] = None  # diverged
    assert objective(found) == (0.9, pytest.approx(0.55))
    rows = [{"objective": 0.5, "id_acc_mean": None}, {"objective": 0.5, "id_acc_mean": 0.4}]
    assert chosen(rows) is rows[1]


def test_what_a_comparison_settles() -> None:
    def row(ratio: float | None, joint: float) -> dict[str, Any]:
        return {"unseen": {"ratio_to_base": ratio, "ratio_ci95": [0.1, 0.9], "n_persons": 8, "n_images": 40,
                           "joint_success": joint}}

    methods = {"base": row(1.0, 0.4), "esd": row(0.7, 0.6), "uce": row(0.9, 0.8), "sld": row(None, 0.0),
               "apl": row(0.2, 0.95)}
    found = comparison.settle(methods)
    assert found["baselines-unseen"] == (0.7, [0.1, 0.9], 8)
    assert found["baselines-joint"] == (pytest.approx(0.15), None, 40)


@pytest.fixture
def compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A comparison on the fake model: 12 listed persons of whom 4 are for tuning."""
    people = FakeSet(Path(), tuple(PersonRecord(p.name, "train" if i < 12 else "test", p.description, p.attributes,
                                                p.references) for i, p in enumerate(PERSONS)), NEUTRAL, "s" * 64)
    monkeypatch.setattr(comparison, "read_evaluation_set", lambda _: people)
    monkeypatch.setattr(comparison, "load_embedder", lambda _: FakeEmbedder())
    monkeypatch.setattr(comparison, "attribute_reader", lambda _: FakeReader())
    monkeypatch.setattr(comparison, "load_prefix", lambda _: SimpleNamespace(content_hash="p" * 64))
    method = FakeMethod()
    monkeypatch.setattr(comparison, "BASELINES", {"fake": method})
    said: list[str] = []

    def make(**changes: Any) -> Any:
        plan = comparison.Plan(**{"persons": 4, "seeds": 12, "prompts": 2, "tuning_persons": 4, "tuning_seeds": 4,
                                  "tuning_prompts": 2} | changes)
        return comparison.Comparison(plan, cache=None, results=tmp_path / "results" / "baselines.json",
                                     say=said.append, backend=FakeModel())

    return SimpleNamespace(make=make, method=method, said=said, folder=tmp_path)


def test_a_comparison_goes_on_where_it_ended(compared: Any) -> None:
    first = compared.make()
    tuned_on = {p.name for p in first.on_list[-4:]}
    assert len(first.on_list) == 12 and not tuned_on & {p.name for p in (*first.listed, *first.unseen)}
    assert not {n.prompt for n in first.tuning_neutral} & set(first.keep)
    row = first.method("fake")
    assert row["settings"] == {"turn": 0.25, "moved": 10} and len(compared.said) == 4
    assert row["listed"]["joint_success"] == 1 and row["unseen"]["joint_success"] == 0
    made = len(compared.method.made)
    second = compared.make()
    assert second.method("fake") == row and len(compared.method.made) == made  # nothing is measured twice
    third = compared.make(persons=3)
    assert third.state["methods"] == {} and len(third.state["tuning"]["fake"]) == 4  # tuning holds
    assert third.method("fake")["listed"]["n_persons"] == 3 and len(compared.method.made) == made + 1
    assert compared.make(tuning_seeds=3).state["tuning"] == {}
    with pytest.raises(ConfigError, match="persons is 9; 8 are left"):
        compared.make(persons=9)
    (compared.folder / "results" / "baselines.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="not JSON"):
        compared.make()


def test_the_table_and_the_picture_have_a_row_for_every_method(compared: Any, tmp_path: Path) -> None:
    found = compared.make()
    rows = strips.Strips(found, tmp_path / "work")
    assert rows.missing(["base", "fake"]) == ["base", "fake"]
    found.reference("base", rows.take)
    found.method("fake", rows.take)
    assert rows.missing(["base", "fake"]) == []
    lines = comparison.table(found.state).splitlines()
    assert lines[2].startswith("No method") and lines[3].startswith("Fake") and "turn 0.25" in lines[4]
    from PIL import Image

    prompts, labels = strips.columns(found)
    assert len(prompts) == len(labels) == 8 and labels[-1] == "a thing"
    with Image.open(rows.picture(found.state["methods"], tmp_path / "out.png")) as picture:
        assert picture.width > 8 * 4 and picture.height > 2 * 4
