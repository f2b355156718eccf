"""Pseudo-identities that a training makes for itself: once, again after a cut, and with no other setting changed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from fakes import tiny_models as tiny

from apl_core.errors import DatasetError, TrainingStopped
from apl_core.prefix import load_prefix

pytest.importorskip("diffusers")

from apl_train.datasets.dataset import TABLE
from apl_train.model.backend import Backend
from apl_train.model.files import read_parts
from apl_train.training import config as configs
from apl_train.training.command import load_training_set, train
from apl_train.training.config import TrainConfig
from apl_train.training.pseudo_cache import pseudo_folder
from apl_train.training.pseudo_identity import read_words

PSEUDO = {"pseudo", "pseudo_count", "pseudo_steps", "pseudo_share"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Backend]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("world")
    tiny.write_set(root / "id", [("ab cd", "photo of ab cd", "a man", "id"), ("ef gh", "ef gh", "a boy", "id")])
    tiny.write_set(root / "reg", [("", "a tree", "", "nonface"), ("", "a man with hats", "", "face"),
                                  ("", "a lady", "", "face")])
    tiny.write_set(root / "things", [("", "a tree", "", "nonface")])
    return root, Backend(read_parts(tiny.write_checkpoint(root)))


def settings(root: Path, **changes: object) -> TrainConfig:
    """The preset on the tiny model, a few steps long."""
    return configs.from_dict(configs.preset("miniature-pseudo") | {
        "s_id": str(root / "id"), "s_reg": str(root / "reg"), "steps": 2, "batch_size": 4, "num_tokens": 3,
        "levels_every": 0, "pseudo_count": 2, "pseudo_steps": 2, "init_text": "ab", **changes})


@pytest.mark.parametrize(("name", "plain", "changed"), [("miniature-pseudo", "fast", {"alpha", "reg_weight"}),
                                                        ("sd15-pseudo", "sd15-fast", set())])
def test_the_presets_are_the_plain_ones_with_pseudo_identities(name: str, plain: str, changed: set[str]) -> None:
    found, without = (dataclasses.asdict(configs.from_dict(configs.preset(n))) for n in (name, plain))
    assert changed <= {k for k, v in found.items() if v != without[k]} <= PSEUDO | changed
    assert found["pseudo"] == "auto" and found["pseudo_count"] == 16


def test_a_training_makes_them_once(world: tuple[Path, Backend], tmp_path: Path) -> None:
    root, backend = world
    made = train(tmp_path / "run", settings(root), backend=backend, cache=tmp_path / "cache")
    assert load_prefix(tmp_path / "run" / "prefix" / "anonymize.safetensors").content_hash == made.content_hash
    (folder,) = (tmp_path / "cache" / "identities").iterdir()
    assert len(read_words(folder)) == 2
    written = (folder / TABLE).stat().st_mtime_ns
    assert pseudo_folder(backend, settings(root, steps=9), tmp_path / "cache") == folder, "any training of this model"
    assert (folder / TABLE).stat().st_mtime_ns == written
    assert pseudo_folder(backend, settings(root, pseudo_steps=1), tmp_path / "cache") != folder
    plain = train(tmp_path / "plain", settings(root, pseudo=""), backend=backend, cache=tmp_path / "cache")
    assert plain.content_hash != made.content_hash
    given = train(tmp_path / "given", settings(root, pseudo=str(folder)), backend=backend, cache=tmp_path / "cache")
    assert given.content_hash == made.content_hash, "as if the folder had been named"


def test_what_was_cut_off_is_made_again(world: tuple[Path, Backend], tmp_path: Path) -> None:
    root, backend = world
    told = []
    with pytest.raises(TrainingStopped, match="pseudo-identities"):
        pseudo_folder(backend, settings(root), tmp_path, stop=lambda: True, progress=lambda *p: told.append(p))
    assert told == [(1, 2)]
    folder = pseudo_folder(backend, settings(root), tmp_path)
    assert folder is not None and len(read_words(folder)) == 2
    (folder / TABLE).unlink()
    again = pseudo_folder(backend, settings(root), tmp_path)
    assert again == folder and (folder / TABLE).exists()


def test_without_faces_there_are_none(world: tuple[Path, Backend], tmp_path: Path) -> None:
    root, backend = world
    assert pseudo_folder(backend, settings(root, pseudo=""), tmp_path) is None
    assert pseudo_folder(backend, settings(root, pseudo=str(root)), tmp_path) == root
    with pytest.raises(DatasetError, match="no face"):
        pseudo_folder(backend, settings(root, s_reg=str(root / "things")), tmp_path)


def test_ids_of_words_are_not_kept_for_other_processes(world: tuple[Path, Backend], tmp_path: Path) -> None:
    """A word's ids depend on what was learned before it; a cache that another process wrote must not bring its own."""
    root, _ = world
    folder = pseudo_folder(world[1], settings(root), tmp_path / "cache")
    first, second = (Backend(read_parts(tiny.write_checkpoint(tmp_path / name))) for name in ("first", "second"))
    first.text.learn({"<earlier>": torch.zeros(3, 32)})
    sets = [load_training_set(backend, settings(root), tmp_path / "kept", pseudo_from=folder)
            for backend in (first, second)]
    words = read_words(folder)
    for backend, data in zip((first, second), sets, strict=True):
        table = backend.text.embedding_table()
        for row in data.pseudo_rows.tolist():
            (word,) = (w for w in words if w in data.c1[row])
            ids = torch.tensor(backend.text.tokenize(data.c1[row]))
            assert any(torch.equal(table[pair], words[word]) for pair in ids.unfold(0, 2, 1)), data.c1[row]
    assert first.text.tokenize(sets[0].c1[0]) == second.text.tokenize(sets[0].c1[0]), "texts without such a word"
