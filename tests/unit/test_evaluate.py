"""The whole evaluation on a fake model, against numbers worked out with numpy from the pictures it made.

A fake picture says in its first pixels whether it shows a face, where the face points (a 2-D embedding) and what
attribute it has; the fake recogniser and the fake attribute reader read that back.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from apl_core.errors import ScoreError
from apl_core.identity import Face
from apl_train.scoring.evaluate import best_phrase, evaluate
from apl_train.scoring.observe import Shot
from apl_train.scoring.persons import EvaluationSet, NeutralPrompt, PersonRecord

SEEDS = 5
NORM = 3.0
VECTORS = {"emb_params": NORM * torch.nn.functional.normalize(torch.arange(1.0, 13).reshape(2, 6), dim=1)}


def picture(face: bool, angle: float, attribute: int, noise: int) -> np.ndarray:
    image = np.random.default_rng(noise).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    fine = round(angle % 1 * 0xFFFF)  # two bytes: with one, similarities would tie with the threshold
    image[0, 0] = (255 if face else 0, fine >> 8, attribute)
    image[0, 1, 0] = fine & 255
    return image


def angle_of(image: np.ndarray) -> float:
    return (int(image[0, 0, 1]) * 256 + int(image[0, 1, 0])) / 0xFFFF * 2 * math.pi


def person_angle(name: str) -> float:
    return int(hashlib.sha256(name.encode()).hexdigest()[:4], 16) / 0xFFFF


def unit(image: np.ndarray) -> np.ndarray:
    return np.array([math.cos(angle_of(image)), math.sin(angle_of(image))])


@dataclass
class FakeEmbedder:
    name: str = "fake"
    sha256: str = "r" * 64

    def faces(self, image: np.ndarray) -> list[Face]:
        if image[0, 0, 0] < 128:
            return []
        return [Face((0, 0, 4, 4), 0.9, unit(image).astype(np.float32))]

    def faces_of(self, images: list[np.ndarray]) -> list[list[Face]]:
        return [self.faces(image) for image in images]


class FakeReader:
    sha256 = "a" * 64

    def read(self, images: np.ndarray) -> list[dict[str, str]]:
        return [{"gender": ("female", "male")[image[0, 0, 2] % 2], "hair": "long"} for image in images]


class FakeBackend:
    """A name gives that person's face; the prefix turns it away, random vectors hardly; some pictures have no face."""

    name, sha256 = "fake", "m" * 64

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.log: dict[str, list[tuple[str, int, np.ndarray]]] = {}
        self.calls = 0

    def draw(self, prompt: str, seed: int, kind: str) -> np.ndarray:
        r = np.random.default_rng([seed, len(kind), *prompt.encode()])
        named = [n for n in self.names if n in prompt]
        noise = int(np.random.default_rng([seed, len(prompt)]).integers(2**31)) + (1 if kind == "learned" else 0)
        if not named and "bus" in prompt:
            return picture(kind == "learned" and seed % 3 == 0, r.random(), 0, noise)
        where = person_angle(named[0]) if named else r.random()
        where += r.normal() * 0.02 + {"learned": 0.25, "random": 0.02, "": 0}[kind] + (0.15 if "fan" in prompt else 0)
        return picture(r.random() > 0.15, where, int(r.integers(2)), noise)

    def sample(self, prompts, seeds, *, vectors: Mapping | None = None, steps, guidance, progress=None, **_):
        self.calls += 1
        assert (steps, guidance) == (20, 3.0)
        kind = ""
        if vectors is not None:
            kind = "learned" if torch.equal(vectors["emb_params"], VECTORS["emb_params"]) else "random"
            assert vectors["emb_params"].norm(dim=1).numpy() == pytest.approx([NORM, NORM], rel=1e-5)
        images = np.stack([self.draw(p, s, kind) for p, s in zip(prompts, seeds, strict=True)])
        self.log.setdefault(kind, []).extend(zip(prompts, seeds, images, strict=True))
        if progress is not None:
            progress(len(prompts), len(prompts))
        latents = torch.from_numpy(images.astype(np.float32) / 127.5 - 1).reshape(-1, 4, 3, 4)
        return SimpleNamespace(images=images, latents=latents)

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        return ((latents.numpy() + 1) * 127.5).round().astype(np.uint8).reshape(-1, 4, 4, 3)

    def made(self, kind: str, contains: str) -> np.ndarray:
        """Pictures of one kind whose prompt is `contains`, in the order of seeds."""
        return np.stack([image for prompt, _, image in self.log[kind] if prompt == contains])


@dataclass(frozen=True)
class FakeSet(EvaluationSet):
    def references(self, person: PersonRecord) -> list[np.ndarray]:
        return [picture(True, person_angle(person.name) + d, 0, 0) for d in (-0.01, 0.02, 0)]


NAMES = [f"Person{c}{k}" for c in "ab" for k in range(8)]
PERSONS = tuple(
    PersonRecord(n, "train" if i < 8 else "test", f"description of {i}",
                 {"gender": ("female", "male")[i % 2], "hair": "long"}, ("x", "y"))
    for i, n in enumerate(NAMES))
KINDS = (("unnamed_faces", [f"a woman {i}" for i in range(4)]), ("nonfaces", [f"a bus {i}" for i in range(5)]))
NEUTRAL = tuple(NeutralPrompt(f"a woman {i}", "unnamed_face") for i in range(4)) + tuple(
    NeutralPrompt(f"a bus {i}", "nonface") for i in range(5))
SET = FakeSet(Path(), PERSONS, NEUTRAL, "s" * 64)


def run(backend: FakeBackend | None = None, **changes: object) -> tuple[FakeBackend, dict]:
    backend = backend or FakeBackend(NAMES)
    settings = {"seeds": SEEDS} | changes
    return backend, evaluate(backend, settings.pop("vectors", VECTORS), settings.pop("set", SET), FakeEmbedder(),
                             settings.pop("reader", FakeReader()), **settings)


@pytest.fixture(scope="module")
def full() -> tuple[FakeBackend, dict]:
    return run(phrase="a fan of {}")


def reference(name: str) -> np.ndarray:
    total = sum(unit(image) for image in SET.references(next(p for p in PERSONS if p.name == name)))
    return total / np.linalg.norm(total)


def prompt_of(condition: str, i: int) -> str:
    name = NAMES[i]
    return {"description": f"description of {i}", "phrase": f"A close-up portrait of a fan of {name}"}.get(
        condition, f"A close-up portrait of {name}")


KIND = {"off": "", "on": "learned", "random": "random", "description": "", "phrase": ""}


def threshold(backend: FakeBackend) -> float:
    """The smallest double above which at most 1 in 1000 of others' similarities lie."""
    values = [unit(image).astype(np.float32).astype(float) @ reference(NAMES[j])
              for i in range(16) for image in backend.made("", prompt_of("off", i)) if image[0, 0, 0] > 128
              for j in range(16) if j != i]
    return sorted(values, reverse=True)[len(values) // 1000]


def test_person_scores_equal_loops(full: tuple[FakeBackend, dict]) -> None:
    backend, scores = full
    limit = threshold(backend)
    assert scores["persons"]["threshold"] == pytest.approx(limit, abs=1e-6)
    assert scores["persons"]["far"] == 1e-3
    for split, start in (("train", 0), ("test", 8)):
        assert set(scores["persons"][split]) == {"off", "on", "random", "description", "phrase"}
        for condition, kind in KIND.items():
            means, maxima, shares, good, faces = [], [], [], 0, 0
            for i in range(start, start + 8):
                images = backend.made(kind, prompt_of(condition, i))
                assert len(images) == SEEDS
                shown = [image for image in images if image[0, 0, 0] > 128]
                values = [unit(image) @ reference(NAMES[i]) for image in shown]
                faces += len(shown)
                good += sum(v < limit - 1e-9 for v in values)
                if values:
                    means.append(np.mean(values))
                    maxima.append(max(values))
                shares += [1.0 if image[0, 0, 2] % 2 == i % 2 else 0.5 for image in shown]
            row = scores["persons"][split][condition]
            assert row["id_acc_mean"] == pytest.approx(np.mean(means), abs=1e-6), (split, condition)
            assert row["id_acc_max"] == pytest.approx(np.mean(maxima), abs=1e-6)
            assert row["face_rate"] == pytest.approx(faces / 40)
            assert row["attr_acc"] == pytest.approx(np.mean(shares))
            assert row["joint_success"] == pytest.approx(good / 40)
            assert (row["n_persons"], row["n_images"]) == (8, 40)
            assert row["ci95"][0] <= row["id_acc_mean"] <= row["ci95"][1]
        assert "ratio_to_off" not in scores["persons"][split]["off"]
    assert 0 < scores["persons"]["test"]["off"]["face_rate"] < 1


def test_floor_and_ceiling_equal_loops(full: tuple[FakeBackend, dict]) -> None:
    backend, scores = full
    per_person = []
    for i in range(16):
        values = [unit(image) @ reference(NAMES[i]) for j in range(16) if j != i and j % 2 == i % 2  # of one gender
                  for image in backend.made("", prompt_of("off", j)) if image[0, 0, 0] > 128]
        per_person.append(np.mean(values))
    assert scores["persons"]["impostor_floor"] == pytest.approx(np.mean(per_person), abs=1e-6)
    ceilings = []
    for person in PERSONS:
        units = [unit(image) for image in SET.references(person)]
        for k in range(3):
            rest = sum(u for j, u in enumerate(units) if j != k)
            ceilings.append(units[k] @ rest / np.linalg.norm(rest))
    assert scores["persons"]["ceiling"] == pytest.approx(np.mean(ceilings), abs=1e-6)


def test_drift_equals_loops(full: tuple[FakeBackend, dict]) -> None:
    backend, scores = full
    for kind, prompts in KINDS:
        row = scores["drift"][kind]
        for condition in ("on", "random"):
            pairs = [(a, b) for p in prompts
                     for a, b in zip(backend.made("", p), backend.made(KIND[condition], p), strict=True)]
            pixel = np.mean([math.sqrt((((a.astype(float) - b) / 255) ** 2).mean()) for a, b in pairs])
            assert row[f"pixel_{condition}"] == pytest.approx(pixel, abs=1e-6)
            assert row[condition] == pytest.approx(2 * pixel, abs=1e-5)  # the fake's latents are pixels in [-1, 1]
        pairs2 = [backend.made("", p) for p in prompts]
        yardstick = np.mean([math.sqrt((((a.astype(float) - b) / 255) ** 2).mean()) for a, b in pairs2])
        assert row["pixel_two_seeds"] == pytest.approx(yardstick, abs=1e-6)
        assert row["two_seeds"] == pytest.approx(2 * yardstick, abs=1e-5)
        assert row["ratio_to_two_seeds"]["on"]["value"] == pytest.approx(row["on"] / row["two_seeds"])
        assert row["phrase"] is None  # "a fan of {}" has no place in a prompt that names nobody
        for condition, key in (("off", ""), ("on", "learned")):
            shown = [image[0, 0, 0] > 128 for p in prompts for image in backend.made(key, p)]
            assert row[f"face_rate_{condition}"] == pytest.approx(np.mean(shown))
        assert row["n_images"] == 2 * len(prompts)


def test_uninvited_persons_equal_loops(full: tuple[FakeBackend, dict]) -> None:
    backend, scores = full
    limit, found = threshold(backend), scores["uninvited_rate"]
    references = np.stack([reference(n) for n in NAMES])
    for kind, prompts in KINDS:
        rates = {}
        for condition, key in (("off", ""), ("on", "learned")):
            images = [image for p in prompts for image in backend.made(key, p)]
            rates[condition] = np.mean([
                image[0, 0, 0] > 128 and (references @ unit(image) > limit).any() for image in images])
            assert found[f"named_in_{kind}_{condition}"] == pytest.approx(rates[condition])
        assert found[f"named_in_{kind}_excess"] == pytest.approx(rates["on"] - rates["off"])
    assert found["faces_in_nonfaces_off"] == 0
    assert found["faces_in_nonfaces_on"] == scores["drift"]["nonfaces"]["face_rate_on"] > 0


def test_seeds_are_those_of_the_subject_alone(full: tuple[FakeBackend, dict]) -> None:
    backend, _ = full
    used = {kind: {p: [s for q, s, _ in log if q == p] for p, _, _ in log} for kind, log in backend.log.items()}
    prompt = prompt_of("off", 11)
    digests = [hashlib.sha256(f"{NAMES[11]}\0{k}".encode()).digest() for k in range(SEEDS)]
    expected = [int.from_bytes(digest[:4], "big") % 2**31 for digest in digests]
    assert used[""][prompt] == used["learned"][prompt] == used["random"][prompt] == expected
    assert used[""][prompt_of("description", 11)] == used[""][prompt_of("phrase", 11)] == expected
    fewer = FakeBackend(NAMES)
    run(fewer, set=FakeSet(Path(), PERSONS[11:], (), ""), conditions=("off",), splits=("test",))
    assert [s for p, s, _ in fewer.log[""] if p == prompt] == expected
    assert Shot("x", "p", 0).seed != Shot("x", "p", 1).seed


def test_persons_of_s_id_can_have_pictures_of_their_own_number() -> None:
    _, scores = run(seeds=3, train_seeds=2)
    rows, alike = scores["persons"], run(seeds=2)[1]["persons"]
    for condition, row in rows["train"].items():
        assert row["n_images"] == 2 * row["n_persons"] and rows["test"][condition]["n_images"] == 3 * row["n_persons"]
        assert row["by_person"] == alike["train"][condition]["by_person"]
    assert scores["settings"]["train_seeds"] == 2


def test_the_result_is_json_without_nan(full: tuple[FakeBackend, dict]) -> None:
    _, scores = full
    again = json.loads(json.dumps(scores, allow_nan=False))
    assert again == scores
    assert {"persons", "drift", "uninvited_rate", "seconds", "hashes", "settings"} <= set(scores)
    assert {"prefix", "model", "recogniser"} <= set(scores["hashes"])
    assert not any(name in json.dumps(scores) for name in NAMES)  # names of persons are nobody else's business


def test_without_any_face_scores_are_null_and_face_rate_zero() -> None:
    class Faceless(FakeBackend):
        def draw(self, prompt: str, seed: int, kind: str) -> np.ndarray:
            image = super().draw(prompt, seed, kind)
            if kind == "learned":
                image[0, 0, 0] = 0
            return image

    _, scores = run(Faceless(NAMES))
    row = scores["persons"]["test"]["on"]
    assert (row["id_acc_mean"], row["id_acc_max"], row["attr_acc"], row["ci95"]) == (None, None, None, [None, None])
    assert (row["face_rate"], row["joint_success"]) == (0, 0)  # destroying faces is no anonymization
    json.dumps(scores, allow_nan=False)


def test_too_few_impostors_give_no_threshold() -> None:
    _, scores = run(persons_limit=1, seeds=2, neutral_limit=1)
    assert scores["persons"]["threshold"] is None
    assert scores["persons"]["test"]["on"]["joint_success"] is None
    assert scores["uninvited_rate"]["named_in_nonfaces_on"] is None
    assert scores["persons"]["test"]["on"]["n_images"] == 2
    _, scores = run(persons_limit=4, seeds=4)
    assert scores["persons"]["far"] == 1e-2


def test_the_model_alone_and_no_reader() -> None:
    _, scores = run(vectors=None, reader=None)
    assert set(scores["persons"]["test"]) == {"off", "description"}
    assert scores["hashes"]["prefix"] is None
    assert scores["persons"]["test"]["off"]["attr_acc"] is None
    assert scores["drift"]["nonfaces"]["on"] is None
    assert scores["drift"]["nonfaces"]["two_seeds"] > 0


def test_a_phrase_ahead_of_everything_has_drift() -> None:
    backend, scores = run(phrase="a fan,")
    assert len(backend.made("", f"a fan, {prompt_of('off', 3)}")) == SEEDS
    pairs = [(a, b) for i in range(5) for a, b in
             zip(backend.made("", f"a bus {i}"), backend.made("", f"a fan, a bus {i}"), strict=True)]
    expected = np.mean([math.sqrt((((a.astype(float) - b) / 255) ** 2).mean()) for a, b in pairs])
    assert scores["drift"]["nonfaces"]["pixel_phrase"] == pytest.approx(expected, abs=1e-6)


def test_an_empty_split_is_left_out() -> None:
    _, scores = run(set=FakeSet(Path(), PERSONS[:8], NEUTRAL[:1], ""))
    assert "test" not in scores["persons"]
    assert set(scores["drift"]) == {"unnamed_faces"}
    with pytest.raises(ScoreError, match="nobody"):
        run(splits=("final",))


def test_the_cache_spares_what_the_prefix_cannot_change(tmp_path: Path) -> None:
    _, first = run(cache=tmp_path, phrase="a fan of {}")
    second, again = run(cache=tmp_path, phrase="a fan of {}")
    assert set(second.log) == {"learned", "random"}
    assert set(again["cached"]) == {f"{s}/{c}" for s in ("train", "test") for c in ("off", "description", "phrase")} | {
        "unnamed_faces/off", "nonfaces/off"}
    for part in ("persons", "drift", "uninvited_rate", "hashes"):
        assert again[part] == first[part]


@pytest.mark.parametrize("change", ["sha256", "recogniser", "seeds", "steps"])
def test_the_cache_is_not_used_for_anything_else(tmp_path: Path, change: str) -> None:
    run(cache=tmp_path)
    backend, embedder, settings = FakeBackend(NAMES), FakeEmbedder(), {"seeds": SEEDS}
    if change == "sha256":
        backend.sha256 = "n" * 64
    elif change == "recogniser":
        embedder.sha256 = "q" * 64
    elif change == "seeds":
        settings["seeds"] = SEEDS + 1
    else:
        embedder.settings = {"threshold": 0.4}
    evaluate(backend, VECTORS, SET, embedder, FakeReader(), cache=tmp_path, **settings)
    assert prompt_of("off", 0) in {p for p, _, _ in backend.log[""]}


@pytest.mark.parametrize("damage", ["cut", "swap", "garbage", "flip"])
def test_a_damaged_cache_is_computed_again(tmp_path: Path, damage: str) -> None:
    _, first = run(cache=tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    path = next(f for f in files if f.name.startswith("test-off"))
    data = path.read_bytes()
    if damage == "swap":
        data = next(f for f in files if f.name.startswith("train-off")).read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "garbage": b"x" * 100, "swap": data,
                      "flip": data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]}[damage])
    again = run(cache=tmp_path)[1]
    assert "test/off" not in again["cached"]
    assert "train/off" in again["cached"]
    assert again["persons"] == first["persons"]
    assert run(cache=tmp_path)[1]["cached"].count("test/off") == 1  # and it is sound now


def test_pictures_are_kept_fresh_or_cached(tmp_path: Path) -> None:
    for folder in ("fresh", "cached"):
        backend = run(cache=tmp_path / "cache", keep_images=tmp_path / folder, keep_limit=2)[0]
        if folder == "fresh":
            made = backend.made("", prompt_of("off", 8))
        for k in range(SEEDS):
            with Image.open(tmp_path / folder / "test/off" / NAMES[8] / f"{k}.png") as image:
                assert np.array_equal(np.asarray(image), made[k])
        assert len(list((tmp_path / folder / "test/off").iterdir())) == 2
    got: list[tuple] = []
    run(keep_images=lambda *a: got.append(a[:3]), keep_limit=1)
    assert got[:SEEDS] == [("train/off", NAMES[0], k) for k in range(SEEDS)]
    assert ("nonfaces/on", "a bus 0", 1) in got


def test_progress_ends_every_stage() -> None:
    told: dict[str, tuple[int, int]] = {}
    _, scores = run(progress=lambda stage, done, total: told.update({stage: (done, total)}))
    assert all(done == total for done, total in told.values())
    assert told["test/on"] == (40, 40)
    assert told["references"] == (16, 16)
    assert set(told) <= set(scores["seconds"])


def test_large_stages_go_in_parts() -> None:
    backend, scores = run(seeds=20)
    assert scores["persons"]["test"]["off"]["n_images"] == 160
    assert max(len(v) for v in backend.log.values()) > 160
    assert backend.calls > 20


@pytest.mark.parametrize(("changes", "field"), [
    ({"conditions": ("on",)}, "conditions"), ({"conditions": ("off", "of")}, "conditions"),
    ({"conditions": ("off", "phrase")}, "phrase"), ({"splits": ("tests",)}, "splits"), ({"splits": ()}, "splits"),
    ({"template": "a portrait"}, "template"), ({"seeds": 0}, "seeds"), ({"neutral_seeds": 1}, "neutral_seeds"),
    ({"train_seeds": 0}, "train_seeds"), ({"persons_limit": 0}, "persons_limit"),
    ({"face_choice": "first"}, "face_choice"),
])
def test_wrong_settings_are_named(changes: dict, field: str) -> None:
    with pytest.raises(ScoreError) as caught:
        run(**changes)
    assert caught.value.field == field


def test_references_with_no_or_several_faces_are_left_out() -> None:
    class Picky(FakeEmbedder):
        def faces_of(self, images: list[np.ndarray]) -> list[list[Face]]:
            found = super().faces_of(images)
            return [found[0], [], found[2] * 2] if len(images) == 3 else found

    with pytest.raises(ScoreError, match="exactly one face"):
        evaluate(FakeBackend(NAMES), VECTORS, SET, Picky(), None, seeds=2)


def test_best_match_takes_the_nearest_face() -> None:
    class Two(FakeEmbedder):
        def faces(self, image: np.ndarray) -> list[Face]:
            found = super().faces(image)
            return found + [Face((0, 0, 1, 1), 0.9, -f.embedding) for f in found]

        def faces_of(self, images: list[np.ndarray]) -> list[list[Face]]:
            return [super(Two, self).faces(i) for i in images] if len(images) == 3 else [self.faces(i) for i in images]

    backend = FakeBackend(NAMES)
    scores = evaluate(backend, VECTORS, SET, Two(), None, seeds=SEEDS, face_choice="best")
    values = [[abs(unit(image) @ reference(NAMES[i])) for image in backend.made("learned", prompt_of("on", i))
               if image[0, 0, 0] > 128] for i in range(8, 16)]
    expected = np.mean([np.mean(v) for v in values])
    assert scores["persons"]["test"]["on"]["id_acc_mean"] == pytest.approx(expected, abs=1e-6)


def test_best_phrase_is_chosen_on_train_alone() -> None:
    backend = FakeBackend(NAMES)
    choice = best_phrase(backend, ["somebody,", "a fan of {}"], SET, FakeEmbedder(), persons=6, seeds=4)
    assert choice.phrase == "a fan of {}"
    prompts = {p for p, _, _ in backend.log[""]}
    assert not any(NAMES[i] in p for p in prompts for i in range(8, 16))
    assert not any(NAMES[i] in p for p in prompts for i in (6, 7))
    images = [(i, image) for i in range(6) for image in backend.made("", f"A close-up portrait of a fan of {NAMES[i]}")]
    good = [image[0, 0, 0] > 128 and unit(image) @ reference(NAMES[i]) < choice.threshold.value for i, image in images]
    assert choice.joint_success["a fan of {}"] == pytest.approx(np.mean(good))
    with pytest.raises(ScoreError):
        best_phrase(backend, [], SET, FakeEmbedder())
    with pytest.raises(ScoreError, match="too few"):
        best_phrase(backend, ["x"], SET, FakeEmbedder(), persons=1, seeds=1)
    assert best_phrase(backend, ["x {}"], SET, FakeEmbedder(), persons=1, seeds=1, threshold=0.9).phrase == "x {}"
