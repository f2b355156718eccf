"""`apl make` on the miniature: from nothing to an installed prefix, in every form that a checkpoint comes in."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from apl_core.errors import ConfigError, DatasetError
from apl_core.library import PrefixLibrary
from apl_core.prefix import load_prefix
from apl_train import shipped
from apl_train.datasets.cast import read_cast, table_of, write_cast
from apl_train.make import run as making
from apl_train.make.settings import MakeSettings
from apl_train.training.events import read_events

pytest.importorskip("diffusers")
pytest.importorskip("insightface")
pytestmark = [pytest.mark.world, pytest.mark.slow, pytest.mark.timeout(900)]
SOURCE = shipped.locate("base_model", "miniature")


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The miniature as a single file, as a diffusers folder without a tokenizer, and as a hub id in a cache."""
    from diffusers import DDIMScheduler
    from huggingface_hub import constants

    from apl_train.model.files import read_parts

    home = tmp_path_factory.mktemp("forms")
    single = home / "model.safetensors"
    shutil.copyfile(SOURCE, single)
    shutil.copyfile(SOURCE.with_suffix(".yaml"), single.with_suffix(".yaml"))
    parts, folder = read_parts(SOURCE), home / "folder"
    for name in ("unet", "vae", "text_encoder"):
        getattr(parts, name).save_pretrained(folder / name)
    DDIMScheduler(**parts.schedule).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    repo = home / "cache" / "models--someone--miniature"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repo / "snapshots" / ("0" * 40))
    patch = pytest.MonkeyPatch()
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "cache"))
    yield {"single": str(single), "folder": str(folder), "hub id": "someone/miniature"}
    patch.undo()


def part_of(kind: str, folder: Path, rows: list[int]) -> Path:
    """A few rows of a shipped set, with all of its pictures."""
    shipped_set = shipped.locate(kind, "miniature")
    folder.mkdir()
    shutil.copyfile(shipped_set / "images.zip", folder / "images.zip")
    lines = (shipped_set / "metadata.csv").read_text(encoding="utf-8").splitlines()
    (folder / "metadata.csv").write_text("\n".join(lines[i] for i in [0, *rows]) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two threads add up in an order of their own: vectors then differ by some 1e-8 from run to run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_every_form_gives_what_the_demo_gives(forms: dict[str, str], tmp_path: Path) -> None:
    """Sets, steps and preset as the demo's training has them, on a few rows: vectors equal to the last bit."""
    from apl_train.model.backend import Backend
    from apl_train.training import config as configs
    from apl_train.training.command import train

    s_id = part_of("s_id", tmp_path / "id", [1, 2, 9, 10])
    kinds = [line.rpartition(",")[2] for line in
             (shipped.locate("s_reg", "miniature") / "metadata.csv").read_text(encoding="utf-8").splitlines()]
    s_reg = part_of("s_reg", tmp_path / "reg", [kinds.index("face"), kinds.index("nonface")])
    values = configs.preset("fast") | {"name": "demo", "steps": 3, "s_id": str(s_id), "s_reg": str(s_reg)}
    demo = train(tmp_path / "demo", configs.from_dict(values), backend=Backend.load(SOURCE))
    for form, checkpoint in forms.items():
        settings = MakeSettings(checkpoint=checkpoint, s_id=str(s_id), s_reg=str(s_reg), steps=3, previews=0,
                                embeddings=str(tmp_path / "prefixes"))
        made = making.Making(tmp_path / form.replace(" ", "-"), settings, lambda _text: None)
        assert (made.settings.people, made.settings.preset, made.settings.recogniser) == ("miniature", "fast",
                                                                                         "miniature"), form
        made.plan()
        made.validate()
        assert torch.equal(made.train().vectors("emb_params"), demo.vectors("emb_params")), form


def test_from_nothing_to_an_installed_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a user's own list, without references: the model's own pictures stand for the persons."""
    comfy, people = tmp_path / "ComfyUI", tmp_path / "people.csv"
    (comfy / "models" / "embeddings").mkdir(parents=True)
    every = read_cast(table_of("miniature"))
    write_cast(people, [p for split in ("train", "test") for p in [p for p in every if p.split == split][:2]])
    settings = MakeSettings(people=str(people), persons="", each=1, neutral=4, draw_steps=3, steps=2, score_persons=2,
                            score_seeds=1, previews=0, name="mine", embeddings=str(tmp_path / "prefixes"),
                            host=(str(comfy),))
    run, said = tmp_path / "run", []

    def crash(*_args: object, **_options: object) -> None:
        raise DatasetError("a pulled plug", "plug it in")

    with monkeypatch.context() as patch:
        patch.setattr(making, "train", crash)
        with pytest.raises(DatasetError, match="pulled plug"):
            making.Making(run, settings, said.append).everything()
    drawn = {p: p.stat().st_mtime_ns for p in run.rglob("*.png")}
    assert len(drawn) == 6 and read_events(run)[-1]["event"] == "error"

    result, words = making.Making(run, None, said.append).everything()  # goes on, from the folder alone
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*.png") if not {"train", "persons"} & {*p.parts}} == drawn
    references = list((run / "persons" / "references").glob("*/*.png"))
    assert len({p.parent.name for p in references}) == 4 and len(references) <= 16
    for folder in (tmp_path / "prefixes", comfy / "models" / "embeddings"):
        found = load_prefix(folder / "mine.safetensors", enforce=True)
        assert found.content_hash == result["content_hash"] and found.meta.base_model == SOURCE.stem
        assert next(e for e in PrefixLibrary([folder]).entries() if e.name == "mine").levels
    assert result["scores"]["persons"]["test"]["on"]["n_persons"] == 2
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "data:image" in page and "own pictures of each person" in page
    assert "installed" in words and "in all, about" in "\n".join(said)
    events = read_events(run)
    assert [e["stage"] for e in events if e["event"] == "stage"][-6:] == [
        "generate", "validate", "cache", "train", "score", "install"]
    assert events[-1]["event"] == "done"

    with pytest.raises(ConfigError, match="begun with another steps") as caught:
        making.Making(run, dataclasses.replace(settings, steps=3), said.append)
    assert "--go-on" in caught.value.hint
    with pytest.raises(ConfigError, match="has a prefix of that name"):
        making.Making(tmp_path / "other", settings, said.append).plan()
    assert not (tmp_path / "other").exists()


def test_without_a_recogniser_pictures_are_made_and_nothing_is_claimed(tmp_path: Path) -> None:
    settings = MakeSettings(limit=1, each=1, neutral=2, draw_steps=2, steps=1, recogniser="none", previews=0,
                            embeddings=str(tmp_path / "prefixes"))
    said: list[str] = []
    result, _ = making.Making(tmp_path / "run", settings, said.append).everything()
    assert result["scores"] is None and result["report"] is None
    assert len(list((tmp_path / "run" / "pictures").glob("*.png"))) == 4
    assert any("not scored" in line for line in said) and any("faces were not checked" in line for line in said)
