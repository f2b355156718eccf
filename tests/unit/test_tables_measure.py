"""Tables 1 and 2 on fake models, against numbers worked out with numpy from the pictures they made."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from apl_core.errors import ModelError
from apl_core.id_scores import Interval, PersonScores
from apl_core.identity import Face
from apl_core.metadata import PrefixMetadata
from apl_core.prefix import AnonymizationPrompt
from apl_train.report import paper_figures
from apl_train.scoring.observe import Shot
from apl_train.scoring.persons import EvaluationSet, NeutralPrompt, PersonRecord
from apl_train.tables import evaluation, frechet, table1, table2
from apl_train.tables.evaluation import Evaluation
from apl_train.tables.methods import Method
from apl_train.tables.results import Row
from apl_train.tables.settings import EvaluateSettings, ModelEntry, Size

HAS_CLEANFID = all(importlib.util.find_spec(m) for m in ("cleanfid", "scipy"))
NAMES = {"train": ["ada", "bo", "cy"], "test": ["dee", "eli", "fay", "gus"]}
SIZES = {"table1": Size(persons=9, seeds=3), "table2": Size(persons=9, seeds=4, prompts=5, prompt_seeds=2)}


def noise(*what: object) -> np.ndarray:
    digest = hashlib.sha256(repr(what).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big")).random(6)


def picture(values: Sequence[float]) -> np.ndarray:
    """Six numbers in [0, 1] as a picture of 2 x 1 pixels; the last says whether a face is in it."""
    return np.round(255 * np.clip(values, 0, 1)).astype(np.uint8).reshape(2, 1, 3)


class FakeModel:
    """A name gives near-constant pictures of that person; a prefix mixes in noise; some pictures have no face."""

    dtype, name = torch.float32, "fake"

    def __init__(self, sha: str, blur: float) -> None:
        self.sha256, self._blur, self.asked = sha * 64, blur, 0

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], *, vectors: Any = None, **_: Any) -> Any:
        self.asked += len(prompts)
        images = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            named = [n for group in NAMES.values() for n in group if prompt.endswith(" " + n)]
            own, other = noise(named[0] if named else prompt), noise(self.sha256, prompt, seed, vectors is not None)
            share = self._blur if vectors is None else 0.8
            values = (1 - share) * own + share * other
            values[5] = 0.0 if named and seed % 5 == 0 else 1.0
            images.append(picture(values))
        return SimpleNamespace(images=np.stack(images), latents=torch.zeros(len(prompts), 1))


def embedding(image: np.ndarray) -> np.ndarray:
    flat = image.reshape(-1).astype(np.float64) - 127.5
    return flat[:5] / np.linalg.norm(flat[:5])


class FakeEmbedder:
    name, sha256, settings = "fake", "r" * 64, {}

    def faces_of(self, images: Sequence[np.ndarray]) -> list[list[Face]]:
        return [[Face((0, 0, 1, 1), 0.9, embedding(i).astype(np.float32))] if i.reshape(-1)[5] > 127 else []
                for i in images]


class Colours:
    """Features and attribute features: the picture's own numbers."""

    name, sha256, convention = "colours", "c" * 64, "the picture's numbers"

    def features(self, images: Any) -> np.ndarray:
        return np.stack([i.reshape(-1)[:4] for i in images]).astype(np.float32)


class Words:
    name, sha256, convention = "words", "w" * 64, "length of the prompt"

    def scores(self, images: Any, prompts: Sequence[str]) -> np.ndarray:
        return np.array([len(p) / 100 for p in prompts])


class Classes:
    sha256 = "k" * 64

    def read(self, images: Any) -> list[dict[str, str]]:
        return [{"side": "light" if i.reshape(-1)[0] > 127 else "dark"} for i in images]


class People(EvaluationSet):
    def references(self, person: PersonRecord) -> list[np.ndarray]:
        return [picture([*(0.9 * noise(person.name)[:5] + 0.1 * noise(person.name, k)[:5]), 1.0]) for k in range(3)]


def people() -> People:
    persons = tuple(PersonRecord(n, split, f"a {n}", {"side": "light"}, ("a", "b", "c"))
                    for split, group in NAMES.items() for n in group)
    neutral = tuple(NeutralPrompt(f"a photo of thing {i}", "nonface") for i in range(6))
    return People(Path(), persons, neutral, "e" * 64)


@pytest.fixture
def ev(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluation:
    models = {"base": FakeModel("b", 0.2), "other": FakeModel("o", 0.4)}

    def load(self: Evaluation, checkpoint: str) -> FakeModel:
        if checkpoint not in models:
            raise ModelError(f"there is no {checkpoint}", "Put it there.")
        return models[checkpoint]

    monkeypatch.setattr(Evaluation, "_load", load)
    prompt = AnonymizationPrompt("sd1", {"emb_params": torch.ones(2, 768)},
                                 PrefixMetadata(title="p", family="sd1", num_tokens=2))
    monkeypatch.setattr(Evaluation, "prompt", prompt)
    monkeypatch.setattr(table1, "prefix_method", lambda backend, _prefix, name="APL": prefixed(backend, prompt, name))
    tools = evaluation.Instruments(EvaluateSettings())
    for key, value in {"people": people(), "embedder": FakeEmbedder(), "reader": Classes(), "attributes": Colours(),
                       "clip": Words(), "extractors": {"colours": Colours()}}.items():
        tools.__dict__[key] = value
    settings = EvaluateSettings(name="test", checkpoint="base", sizes=SIZES, steps=2, models=(
        ModelEntry("base", "base", paper="SD v1.5"), ModelEntry("gone", "gone", paper="SDXL"),
        ModelEntry("other", "other")))
    made = Evaluation(settings, tmp_path, quiet=True)
    made.__dict__["tools"] = tools
    return made


def prefixed(backend: Any, prompt: AnonymizationPrompt, name: str) -> Method:
    from apl_train.tables.methods import prefix_method

    return prefix_method(backend, prompt, name)


def similarities(model: FakeModel, names: Sequence[str], seeds: Sequence[int], vectors: Any = None) -> list[np.ndarray]:
    """By hand: cosine of each picture's face with the mean of the references' directions."""
    world, rows = people(), []
    for name in names:
        person = next(p for p in world.persons if p.name == name)
        reference = np.mean([embedding(r) for r in world.references(person)], axis=0)
        reference /= np.linalg.norm(reference)
        prompt = f"A close-up portrait of {name}"
        images = [model.sample([prompt], [Shot(name, prompt, k).seed], vectors=vectors).images[0] for k in seeds]
        rows.append(np.array([embedding(i) @ reference for i in images if i.reshape(-1)[5] > 127]))
    return rows


def value(row: Row, key: str) -> float:
    found = row.values[key]
    return found.value if isinstance(found, Interval) else found


def test_table1_is_what_numpy_says(ev: Evaluation) -> None:
    table = table1.measure(ev)
    rows = {row.name: row for row in table.rows}
    assert list(rows) == ["base", "base + APL", "gone", "gone + APL", "other", "other + APL"]
    for name, model, vectors in (("base", FakeModel("b", 0.2), None), ("base + APL", FakeModel("b", 0.2), 1),
                                 ("other", FakeModel("o", 0.4), None)):
        for split, group in NAMES.items():
            own = similarities(model, group, range(3), vectors)
            with_face = [s for s in own if len(s)]
            assert value(rows[name], f"{split}_mean") == pytest.approx(np.mean([s.mean() for s in with_face]), abs=1e-6)
            assert value(rows[name], f"{split}_max") == pytest.approx(np.mean([s.max() for s in with_face]), abs=1e-6)
            assert value(rows[name], f"{split}_faces") == pytest.approx(sum(map(len, own)) / (3 * len(group)))
    mean = rows["base"].values["test_mean"]
    assert mean.lo < mean.value < mean.hi


def test_table1_has_the_papers_figures_and_says_what_did_not_run(ev: Evaluation) -> None:
    rows = {row.name: row for row in table1.measure(ev).rows}
    first = paper_figures.TABLE_1[0]
    assert rows["base + APL"].paper == {"train_mean": first.on["train"].mean, "train_max": first.on["train"].max,
                                        "test_mean": first.on["test"].mean, "test_max": first.on["test"].max}
    assert rows["other"].paper == {}
    assert rows["gone"].note == "not run: there is no gone" and not rows["gone"].values
    assert rows["gone"].paper["test_mean"] == paper_figures.TABLE_1[3].off["test"].mean


def test_nothing_is_sampled_twice(ev: Evaluation) -> None:
    table1.measure(ev)
    asked = ev.base.asked
    again = Evaluation(ev.settings, ev.run, quiet=True)
    again.__dict__["tools"] = ev.tools
    table = table1.measure(again)
    assert again.base.asked == asked and again.runner.done == 0
    assert next(row.name for row in table.rows) == "base"


@pytest.mark.skipif(not HAS_CLEANFID, reason="clean-fid is not installed")
def test_table2_is_what_numpy_says(ev: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Method("Broken", {"m": 1}, lambda: (_ for _ in ()).throw(ModelError("it broke", "Mend it.")), True)
    harmless = Method("Harmless", {"m": 2}, lambda: FakeModel("b", 0.2), True)
    monkeypatch.setattr(table2, "_baselines", lambda ev, size: [harmless, failing])
    table = table2.measure(ev)
    rows = {row.name: row for row in table.rows}
    model, names = FakeModel("b", 0.2), NAMES["test"]

    def take(seeds: Sequence[int], vectors: Any = None) -> np.ndarray:
        return np.concatenate([model.sample([p], [Shot(n, p, k).seed], vectors=vectors).images
                               for n in names for p in [f"A close-up portrait of {n}"] for k in seeds])

    def features(images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1)[:, :4].astype(np.float32)

    off, on, floor = features(take(range(4))), features(take(range(4), 1)), features(take(range(4, 8)))
    assert value(rows["APL"], "fid_id") == pytest.approx(frechet.fid(on, off), rel=1e-6)
    assert value(rows["APL"], "fid_id_other_seeds") == pytest.approx(frechet.fid(on, floor), rel=1e-6)
    assert value(rows["base"], "fid_id_other_seeds") == pytest.approx(frechet.fid(off, floor), rel=1e-6)
    last = next(r for n, r in rows.items() if n.startswith("floor"))
    assert value(last, "fid_id_other_seeds") == value(rows["base"], "fid_id_other_seeds")
    assert value(rows["Harmless"], "fid_id") < 1e-6 < value(rows["APL"], "fid_id")
    own = similarities(model, names, range(4), 1)
    assert value(rows["APL"], "id_acc") == pytest.approx(np.mean([s.mean() for s in own if len(s)]), abs=1e-6)
    assert value(rows["APL"], "clip") == pytest.approx(np.mean([len(f"a photo of thing {i}") / 100 for i in range(5)]))
    images, has = take(range(4)), take(range(4)).reshape(16, -1)[:, 5] > 127
    per_person = []
    for i, name in enumerate(names):
        person = next(p for p in people().persons if p.name == name)
        refs = np.stack([r.reshape(-1)[:4].astype(float) for r in people().references(person)])
        ref = (refs / np.linalg.norm(refs, axis=1, keepdims=True)).mean(0)
        rows_of = features(images)[4 * i : 4 * i + 4][has[4 * i : 4 * i + 4]].astype(float)
        if len(rows_of):
            per_person.append(np.mean(rows_of @ ref / np.linalg.norm(rows_of, axis=1) / np.linalg.norm(ref)))
    assert value(rows["base"], "attr_acc") == pytest.approx(np.mean(per_person), abs=1e-6)
    light = images.reshape(16, -1)[:, 0] > 127
    assert value(rows["base"], "classes") == pytest.approx(light[has].mean())
    assert rows["Broken"].note == "not run: it broke"
    assert rows["APL"].paper["fid_id"] == 20.01 and rows["base"].paper["clip"] == 0.3078


def scored(*means: float) -> list[PersonScores]:
    return [PersonScores(str(i), np.array([m]), 1) for i, m in enumerate(means)]


def claim_rows(**attr: float) -> tuple[list[Row], dict]:
    """base .5; APL .1; "same" removes as much and is worse; "idle" does nothing and has the best quality."""
    means = {"base": 0.5, "APL": 0.1, "same": 0.1, "idle": 0.49}
    fids = {"base": None, "APL": 2.0, "same": attr.get("same", 4.0), "idle": 0.1}
    rows = [Row(n, {"id_acc": Interval(m, m - 0.01, m + 0.01), "fid_id": fids[n], "fid_other": fids[n],
                    "attr_acc": Interval(0.9 if n == "idle" else 0.6, 0, 1)}) for n, m in means.items()]
    scores = {n: {"test": scored(m, m + 0.02, m + 0.04)} for n, m in means.items()}
    return rows, scores


def test_rivals_are_those_that_take_as_much_identity() -> None:
    rows, scores = claim_rows()
    found = table2.claims_of(rows, scores, "test")
    assert found["table2-fid-id"] == {"value": pytest.approx(0.5), "n": 1, "rivals": ["same"]}
    assert found["table2-attr-acc"]["value"] == pytest.approx(1.0)
    assert found["table2-id-acc"]["value"] == pytest.approx(0.12 / 0.52)
    drop = {"same": 1 - 0.12 / 0.52, "idle": 1 - 0.51 / 0.52}
    assert found["unseen_list_methods"]["best"] == "same"
    assert found["unseen_list_methods"]["value"] == pytest.approx(1.0)
    assert found["unseen_list_methods"]["drops"] == pytest.approx(drop)
    assert table2.claims_of(*claim_rows(same=1.0), "test")["table2-fid-id"]["value"] == pytest.approx(2.0)


def test_without_a_rival_the_order_is_not_claimed() -> None:
    rows, scores = claim_rows()
    found = table2.claims_of([r for r in rows if r.name != "same"], scores, "test")
    assert found["table2-fid-id"]["value"] is None and found["table2-fid-id"]["n"] == 0
    assert table2.claims_of([r for r in rows if r.name == "base"], scores, "test") == {}


@pytest.mark.parametrize(("name", "row"), [
    ("base", "SD v1.5"), ("APL", "APL"), ("UCE", "UCE"), ("ESD", "ESD"), ("Forget-Me-Not", "FMN"),
    ("Concept Ablation", "CA"), ("Negative prompt", None), ("Semantic Surgery", None)])
def test_the_papers_row_of_a_method(name: str, row: str | None) -> None:
    found: Mapping[str, Any] = table2.paper_row(name)
    want = next((r for r in paper_figures.TABLE_2 if r.method == row), None)
    assert found == ({} if want is None else {"fid_id": want.fid_id, "id_acc": want.id_acc, "attr_acc": want.attr_acc,
                                              "fid_other": want.fid_other, "clip": want.clip})


def test_sizes_are_as_the_settings_say(ev: Evaluation) -> None:
    small = dataclasses.replace(ev.settings, sizes={"table1": Size(persons=2, splits=("test",))})
    groups = Evaluation(small, ev.run, quiet=True)
    groups.__dict__["tools"] = ev.tools
    assert {s: [p.name for p in g] for s, g in groups.groups(small.size("table1")).items()} == {"test": ["dee", "eli"]}


def test_settings_come_from_a_grid_that_was_tried_whole(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from apl_train.baselines import BASELINES
    from apl_train.tables.methods import tuned_settings

    file, grid = tmp_path / "baselines.json", BASELINES["uce"].grid
    rows = [{"settings": dict(s), "objective": 0.1 * i, "id_acc_mean": 0.5} for i, s in enumerate(grid)]
    assert tuned_settings("uce", file) is None
    file.write_text(json.dumps({"tuning": {"uce": rows[:-1]}}))
    assert tuned_settings("uce", file) is None, "half a grid says nothing"
    file.write_text(json.dumps({"tuning": {"uce": rows}}))
    assert tuned_settings("uce", file) == dict(grid[-1]) and tuned_settings("esd", file) is None
    file.write_text("{")
    assert tuned_settings("uce", file) is None


@pytest.mark.skipif(not HAS_CLEANFID, reason="extra [eval] is not installed")
@pytest.mark.parametrize(("count", "n"), [(48, 48), (0, 48), (43, 48), (1, 3)])
def test_a_share_has_wilsons_interval(count: int, n: int) -> None:
    found = table2.share_interval(np.arange(n) < count)
    z, share = 1.959963984540054, count / n  # Wilson 1927, written out
    middle, half = share + z * z / (2 * n), z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    ends = (np.array([middle - half, middle + half]) / (1 + z * z / n)).clip(0, 1)
    assert found.value == pytest.approx(share) and (found.lo, found.hi) == pytest.approx(tuple(ends), abs=1e-12)
    assert found.lo < found.hi, "bootstrap would give none"
