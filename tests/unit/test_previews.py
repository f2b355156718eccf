"""Faces drawn while a training runs: who is drawn, the scores by hand, and that the training does not notice."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from apl_core.errors import ConfigError, ScoreError
from apl_core.identity import Face
from apl_core.metadata import PrefixMetadata
from apl_core.prefix import AnonymizationPrompt, save_prefix
from apl_train.datasets.dataset import read_dataset
from apl_train.scoring.observe import Shot
from apl_train.training import previews
from apl_train.training.config import TrainConfig
from apl_train.training.previews import Previews, Sitter, beside, sitters


class PaintBackend:
    """Paints every picture in one grey: 100 without a prefix, else 10 * the prefix's first number; notes the seeds."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], list[int], bool]] = []

    def sample(self, prompts: list[str], seeds: list[int], *, vectors: Any = None) -> Any:
        self.calls.append((list(prompts), list(seeds), vectors is not None))
        grey = 100 if vectors is None else int(10 * vectors.tensors["emb_params"][0, 0])
        return SimpleNamespace(images=np.full((len(prompts), 16, 16, 3), grey, np.uint8))


class GreyEmbedder:
    """A face's embedding is (cos, sin) of its grey in degrees; a black picture shows no face."""

    def faces_of(self, images: list[np.ndarray]) -> list[list[Face]]:
        found = []
        for image in images:
            angle = np.deg2rad(float(image.mean()))
            face = Face((0.0, 0.0, 16.0, 16.0), 1.0, np.array([np.cos(angle), np.sin(angle)], np.float32))
            found.append([face] if image.mean() > 0 else [])
        return found


def prefix(value: float) -> AnonymizationPrompt:
    tensors = {"emb_params": torch.full((2, 768), value)}
    return AnonymizationPrompt("sd1", tensors, PrefixMetadata(title="p", family="sd1", num_tokens=2))


def grey(value: int) -> np.ndarray:
    return np.full((16, 16, 3), value, np.uint8)


def people() -> list[Sitter]:
    return [Sitter("ab", "train", "photo of ab", [grey(90), grey(110)]),
            Sitter("cd", "test", "photo of cd", [grey(40), grey(40), grey(0)])]


def test_scores_are_cosines_to_the_mean_of_the_references(tmp_path: Path) -> None:
    backend = PaintBackend()
    drawn = Previews(backend, TrainConfig(), tmp_path, people(), GreyEmbedder(), lambda: prefix(4.0))
    drawn({"event": "start", "step": 0, "steps": 9})
    found = json.loads((tmp_path / "previews" / "step-0000000.json").read_text())
    assert found["step"] == 0 and [p["name"] for p in found["persons"]] == ["ab", "cd"]
    # references stand at 100 and 40 degrees (the black one has no face); pictures at 100 without and 40 with the prefix
    wanted = [(np.cos(0), np.cos(np.deg2rad(60))), (np.cos(np.deg2rad(60)), np.cos(0))]
    for person, (off, on) in zip(found["persons"], wanted, strict=True):
        assert person["off_score"] == pytest.approx(off, abs=1e-6) and person["on_score"] == pytest.approx(on, abs=1e-6)
        assert Image.open(tmp_path / "previews" / person["off"]).getpixel((3, 3)) == (100, 100, 100)
        assert Image.open(tmp_path / "previews" / person["on"]).getpixel((3, 3)) == (40, 40, 40)


def test_levels_draw_again_with_equal_seeds_and_the_pictures_without_prefix_once(tmp_path: Path) -> None:
    backend = PaintBackend()
    drawn = Previews(backend, TrainConfig(), tmp_path, people(), GreyEmbedder(), lambda: prefix(4.0))
    save_prefix(prefix(9.0), tmp_path / "prefix" / "p.step-3.safetensors")
    drawn({"event": "start", "step": 0})
    drawn({"event": "step", "step": 1})
    drawn({"event": "level", "step": 3, "path": "prefix/p.step-3.safetensors"})
    seeds = [Shot("ab", "photo of ab", 0).seed, Shot("cd", "photo of cd", 0).seed]
    assert [(seed, on) for _, seed, on in backend.calls] == [(seeds, False), (seeds, True), (seeds, True)]
    level = json.loads((tmp_path / "previews" / "step-0000003.json").read_text())
    assert Image.open(tmp_path / "previews" / level["persons"][0]["on"]).getpixel((0, 0)) == (90, 90, 90)


def test_a_picture_without_a_face_has_no_score(tmp_path: Path) -> None:
    drawn = Previews(PaintBackend(), TrainConfig(), tmp_path, people(), GreyEmbedder(), lambda: prefix(0.0))
    drawn.draw(0, prefix(0.0))
    found = json.loads((tmp_path / "previews" / "step-0000000.json").read_text())
    assert [p["on_score"] for p in found["persons"]] == [None, None]
    assert found["persons"][0]["off_score"] is not None


def test_a_resumed_run_does_not_draw_step_0_again(tmp_path: Path) -> None:
    backend = PaintBackend()
    Previews(backend, TrainConfig(), tmp_path, people(), None, lambda: prefix(1.0))({"event": "start", "step": 7})
    assert backend.calls == [] and not (tmp_path / "previews").exists()


def test_a_damaged_level_is_told_and_the_training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "prefix").mkdir()
    (tmp_path / "prefix" / "p.step-3.safetensors").write_bytes(b"no prefix")
    drawn = Previews(PaintBackend(), TrainConfig(), tmp_path, people(), None, lambda: prefix(1.0))
    drawn({"event": "level", "step": 3, "path": "prefix/p.step-3.safetensors"})
    assert "no pictures at step 3" in caplog.text


def write_set(folder: Path) -> Path:
    folder.mkdir()
    lines = ["image,name,prompt,description,kind"]
    for i, name in enumerate(("ab", "ab", "cd", "ef")):
        Image.fromarray(grey(10 + i)).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{name},photo of {name},somebody,id")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_persons_of_an_own_set_come_with_their_own_pictures(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "s_id")
    found = sitters(TrainConfig("m.safetensors", s_id=str(folder), previews=2), read_dataset(folder, expect="id"))
    assert [(p.name, p.split, p.prompt, len(p.pictures)) for p in found] == [
        ("ab", "train", "photo of ab", 2), ("cd", "train", "photo of cd", 1)]
    assert found[0].pictures[1].mean() == 11


def test_without_previews_the_listener_stays_as_it_is(tmp_path: Path) -> None:
    def listener(event: dict[str, Any]) -> None: ...

    assert beside(listener, None, TrainConfig(), tmp_path, lambda: prefix(1.0)) is listener


def test_a_model_without_an_installed_recogniser_draws_without_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ScoreError(f"{name} is not installed.")

    monkeypatch.setattr(previews, "load_embedder", missing)
    assert previews.find_embedder(TrainConfig(base_model="some.safetensors")) is None


def test_too_many_previews_are_refused() -> None:
    with pytest.raises(ConfigError, match="previews is 65"):
        TrainConfig(previews=65)


@pytest.fixture(scope="module")
def tiny_backend(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("diffusers")
    import yaml
    from fakes import tiny_models as tiny
    from safetensors.torch import save_file

    from apl_train.model.backend import Backend
    from apl_train.model.files import read_parts
    from apl_train.model.single_file import ldm_config, to_ldm

    root = tmp_path_factory.mktemp("model")
    models = tiny.unet(), tiny.vae(), tiny.text_encoder()
    tiny.write_tokenizer(root / "tokenizer")
    save_file({k: v.contiguous() for k, v in to_ldm(*models).items()}, root / "tiny.safetensors")
    (root / "tiny.yaml").write_text(yaml.safe_dump(ldm_config(*models)))
    return Backend(read_parts(root / "tiny.safetensors"))


def test_the_training_does_not_notice_that_it_is_drawn(tmp_path: Path, tiny_backend: Any,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit the same prefix with and without pictures, also where a job's folder is listened to."""
    from apl_train.training.command import train

    for name in ("s_id", "s_reg"):
        folder = tmp_path / name
        folder.mkdir()
        rng = np.random.default_rng(0)
        lines = ["image,name,prompt,description,kind"]
        rows = [("ab", "photo of ab", "a man", "id"), ("cd", "photo of cd", "a lady", "id")] if name == "s_id" else \
            [("", "a tree", "", "nonface"), ("", "a man", "", "face")]
        for i, row in enumerate(rows):
            Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(folder / f"{i}.png")
            lines.append(f"{i}.png," + ",".join(row))
        (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(previews, "find_embedder", lambda _: None)
    found = {}
    for drawn in (0, 2):
        config = TrainConfig("tiny.safetensors", s_id=str(tmp_path / "s_id"), s_reg=str(tmp_path / "s_reg"), steps=4,
                             batch_size=2, levels_every=2, save_every=2, previews=drawn)
        run = tmp_path / f"run-{drawn}"
        if drawn:
            monkeypatch.setenv("APL_JOB", str(tmp_path))
        found[drawn] = train(run, config, backend=tiny_backend, cache=tmp_path / "cache")
        steps = sorted(int(p.stem.rpartition("-")[2]) for p in (run / "previews").glob("step-*.json"))
        assert steps == ([0, 2, 4] if drawn else [])
    assert found[0].content_hash == found[2].content_hash


def test_an_order_to_stop_saves_and_ends_a_real_training(tmp_path: Path, tiny_backend: Any,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    from apl_core.errors import TrainingStopped
    from apl_train.training.command import train
    from apl_train.training.state import has_state

    folder = write_set(tmp_path / "s_id")
    for file in folder.glob("*.png"):
        Image.fromarray(np.full((64, 64, 3), int(file.stem) * 9, np.uint8)).save(file)
    monkeypatch.setenv("APL_JOB", str(tmp_path))
    (tmp_path / "control").write_text("stop")
    config = TrainConfig("tiny.safetensors", s_id=str(folder), no_reg=True, id_share=1.0, steps=50, levels_every=0)
    with pytest.raises(TrainingStopped, match="step 1 of 50"):
        train(tmp_path / "run", config, backend=tiny_backend, cache=tmp_path / "cache")
    assert has_state(tmp_path / "run")
