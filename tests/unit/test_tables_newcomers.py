"""Fig. 5 on a tiny model: every condition at every mark, as a loop by hand draws them; the claim is the last one's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import tiny_models as tiny
from PIL import Image

from apl_core.errors import ConfigError, DatasetError
from apl_core.identity import Face
from apl_core.metadata import PrefixMetadata
from apl_core.prefix import AnonymizationPrompt

pytest.importorskip("diffusers")

from apl_train.model.backend import Backend
from apl_train.model.files import read_parts
from apl_train.scoring.observe import Shot
from apl_train.tables import newcomers
from apl_train.tables.evaluation import Evaluation, Instruments
from apl_train.tables.settings import EvaluateSettings, Size, from_dict, read_settings
from apl_train.training.dreambooth import DreamBooth, Teaching, prior_latents

TAUGHT = {"token": "v", "template": "a {}", "learning_rate": 2e-3, "batch_size": 2, "prior_weight": 0.0}
SIZE = Size(persons=2, seeds=2, iterations=3, every=2)


def embedding(image: np.ndarray) -> np.ndarray:
    flat = image[::16, ::16].reshape(-1).astype(np.float64) - 100
    return (flat / np.linalg.norm(flat)).astype(np.float32)


class FakeEmbedder:
    name, sha256, settings = "fake", "r" * 64, {}

    def faces_of(self, images: list) -> list[list[Face]]:
        return [[Face((0, 0, 1, 1), 0.9, embedding(np.asarray(i)))] for i in images]


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("newcomers"), np.random.default_rng(0)
    rows = ["name,split,description,attributes"]
    for name, gender in (("ada", "female"), ("bo", "male"), ("cy", "")):
        attributes = json.dumps({"gender": gender}).replace('"', '""')
        rows.append(f'{name},test,a person,"{attributes}"')
        for kind, count in (("teaching", 3), ("references", 2)):
            (folder / kind / name).mkdir(parents=True)
            for k in range(count):
                Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / kind / name / f"{k}.png")
    (folder / "people.csv").write_text("\n".join(rows) + "\n", "utf-8")
    (folder / "neutral.csv").write_text("prompt,kind\na thing,nonface\n", "utf-8")
    return folder


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Backend:
    torch.set_num_threads(1)
    return Backend(read_parts(tiny.write_checkpoint(tmp_path_factory.mktemp("tiny"))))


def prefix(seed: int) -> AnonymizationPrompt:
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(seed))
    return AnonymizationPrompt("sd1", {"emb_params": vectors}, PrefixMetadata(
        title="p", family="sd1", num_tokens=2, widths={"emb_params": 32}))


def evaluation(people: Path, backend: Backend, run: Path, monkeypatch: pytest.MonkeyPatch, **changes) -> Evaluation:
    settings = EvaluateSettings(name="test", checkpoint="tiny", newcomers=str(people), sizes={"fig5": SIZE}, steps=2,
                                attributes="none", features="none", clip="none", persons=str(people),
                                template="photo of {}", dreambooth=TAUGHT, **changes)
    monkeypatch.setattr(Evaluation, "prompt", prefix(1))
    made = Evaluation(settings, run, quiet=True, base=backend)
    tools = Instruments(settings)
    tools.__dict__["embedder"] = FakeEmbedder()
    made.__dict__["tools"] = tools
    return made


def test_every_condition_is_what_a_loop_by_hand_draws(
    people: Path, backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(newcomers, "trained", lambda ev, size, preset: asked.append((size, preset)) or prefix(2))
    table = newcomers.measure(evaluation(people, backend, tmp_path, monkeypatch, pseudo_preset="miniature-pseudo"))
    assert asked == [(SIZE, "miniature-pseudo")]
    assert [c.key for c in table.columns] == ["off", "on", "ratio", "pseudo", "pseudo_ratio", "description",
                                              "faces_off", "faces_on", "faces_pseudo"]
    assert [row.name for row in table.rows] == [
        f"whole UNet, {n} iterations" for n in (0, 2, 3)]
    means: dict[tuple[int, str], list[float]] = {}
    for name, noun in (("ada", "woman"), ("bo", "man")):
        pictures = np.stack([np.asarray(Image.open(people / "teaching" / name / f"{k}.png")) for k in range(3)])
        reference = np.mean([embedding(np.asarray(Image.open(people / "references" / name / f"{k}.png")))
                             for k in range(2)], axis=0)
        teaching, prompt = Teaching(backend, pictures, noun, DreamBooth(**TAUGHT)), f"photo of v {noun}"
        for mark in (0, 2, 3):
            teaching.teach(mark - teaching.step)
            for key, text, vectors in (("off", prompt, None), ("on", prompt, prefix(1)), ("pseudo", prompt, prefix(2)),
                                       ("description", "a person", None)):
                seeds = [Shot(name, prompt, k).seed for k in range(2)]
                drawn = teaching.backend.sample([text] * 2, seeds, vectors=vectors, steps=2, guidance=3.0).images
                means.setdefault((mark, key), []).append(float(np.mean(
                    [embedding(i) @ reference / np.linalg.norm(reference) for i in drawn])))
    for row, mark in zip(table.rows, (0, 2, 3), strict=True):
        for key in ("off", "on", "pseudo", "description"):
            assert row.values[key].value == pytest.approx(np.mean(means[mark, key]), abs=1e-5)
        assert row.values["faces_pseudo"] == 1.0
        assert row.values["pseudo_ratio"].value == pytest.approx(row.values["pseudo"].value / row.values["off"].value,
                                                                 rel=1e-6)
    at = newcomers.as_in_the_paper([row.values["off"].value for row in table.rows])
    claim = table.extra["claims"]["dreambooth-drop"]
    assert claim["value"] == pytest.approx(1 - table.rows[at].values["pseudo_ratio"].value) and claim["n"] == 2
    assert "pseudo" in table.conventions and [row.paper.get("on") for row in table.rows] == [
        0.43 if i == at else None for i in range(3)]


def test_the_claim_is_made_where_the_word_draws_its_person_as_in_the_paper() -> None:
    assert newcomers.as_in_the_paper([0.0, 0.2, 0.53, 0.8]) == 2
    assert newcomers.as_in_the_paper([0.0, 0.9, 0.1]) == 1
    assert newcomers.as_in_the_paper([0.0, 0.2, 0.4]) == 2  # never: the last
    assert newcomers.as_in_the_paper([float("nan"), float("nan")]) == 1


def test_lora_is_a_curve_and_a_claim_of_its_own(
    people: Path, backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    lora = {"token": "v", "template": "a {}", "learning_rate": 0.5, "prior_pictures": 2, "rank": 2}
    drawn = []
    monkeypatch.setattr(newcomers, "prior_latents", lambda *a: drawn.append(a[1:]) or prior_latents(*a))
    table = newcomers.measure(evaluation(people, backend, tmp_path, monkeypatch, dreambooth_lora=lora))
    assert [row.name for row in table.rows] == [
        f"{way}, {n} iterations" for way in ("whole UNet", "LoRA") for n in (0, 2, 3)]
    full, by_lora = (table.rows[i].values["off"].value for i in (2, 5))
    assert full != by_lora and table.rows[0].values["off"] == table.rows[3].values["off"]  # before: the same model
    assert set(table.extra["claims"]) == {"dreambooth-drop", "dreambooth-lora-drop"}
    assert table.figures == ["newcomers.svg", "newcomers-lora.svg"]
    assert all((newcomers.figure_folder(tmp_path, "test") / name).exists() for name in table.figures)
    assert sorted(drawn) == [("man", "a {}", 2, 0), ("woman", "a {}", 2, 0)]  # once a noun, and none without a weight


def test_without_a_second_prefix_the_claim_is_the_first_ones(
    people: Path, backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(newcomers, "trained", lambda *_, **__: pytest.fail("nothing is to be trained"))
    table = newcomers.measure(evaluation(people, backend, tmp_path, monkeypatch))
    assert [c.key for c in table.columns] == ["off", "on", "ratio", "description", "faces_off", "faces_on"]
    at = newcomers.as_in_the_paper([row.values["off"].value for row in table.rows])
    assert table.extra["claims"]["dreambooth-drop"]["value"] == pytest.approx(1 - table.rows[at].values["ratio"].value)


def test_a_newcomer_without_pictures_and_an_unknown_setting(
    people: Path, backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DatasetError, match="0 pictures to learn from"):
        newcomers.teaching_pictures(people, "nobody")
    ev = evaluation(people, backend, tmp_path, monkeypatch)
    object.__setattr__(ev.settings, "dreambooth", {"rate": 1})
    with pytest.raises(ConfigError, match="dreambooth has"):
        newcomers.measure(ev)


@pytest.mark.parametrize("name", ["miniature", "sd15"])
def test_the_presets_measure_the_pseudo_identity_preset(name: str) -> None:
    settings = read_settings(name)
    assert settings.pseudo_preset == f"{name}-pseudo" and from_dict(settings.to_dict(), name) == settings
    assert DreamBooth(**settings.dreambooth) and DreamBooth(method="lora", **settings.dreambooth_lora)
