"""Names never lead out of their folder, levels resolve, and broken files are listed instead of raising."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from apl_core import library
from apl_core.errors import LibraryError, PrefixFileError
from apl_core.library import PrefixLibrary, resolve_within, safe_name, shipped_folder
from apl_core.metadata import PrefixMetadata
from apl_core.prefix import AnonymizationPrompt, save_prefix


def put(path: Path, value: float = 1.0, m: int = 4, title: str = "t") -> None:
    vectors = {"emb_params": torch.full((m, 96), value)}
    save_prefix(AnonymizationPrompt("sd1", vectors, PrefixMetadata(title=title)), path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "embeddings"
    put(root / "apl-mini.safetensors", 1.0, title="Mini")
    put(root / "apl-mini.step-00200.safetensors", 2.0)
    put(root / "apl-mini.step-01000.safetensors", 3.0)
    put(root / "only-levels.step-00005.safetensors", 4.0)
    put(root / "only-levels.step-00010.safetensors", 5.0)
    return root


BAD_NAMES = {
    "": "empty", "a" * 121: "longer", "漢" * 100: "longer", "a/b": "separator", "a\\b": "separator",
    "/etc": "separator", "..": "'..'", "a..b": "'..'", ".hidden": "begins with a dot", " a": "begins", "a.": "ends",
    "a ": "ends", "a\0b": "control",
    "a\nb": "control", "a\u202eb": "invisible", "CON": "device", "con.safetensors": "device",
    "Lpt1": "device", "nul .x": "device", "COM¹": "device", "a\u2215b": "separator", "a\uff0fb": "separator",
    "a\u2044b": "separator", "a\uff3cb": "separator", "\u2024\u2024": "separator", "e\u0301": "NFC", "a:b": "Windows",
    "a?": "Windows", "a|b": "Windows", "C:x": "Windows", "\ud800": "control",
}


@pytest.mark.parametrize(("name", "reason"), BAD_NAMES.items())
def test_bad_names_are_refused_with_a_reason(name: str, reason: str) -> None:
    with pytest.raises(LibraryError) as caught:
        safe_name(name)
    assert reason in caught.value.message and "Use letters" in caught.value.hint and caught.value.field == "name"


@pytest.mark.parametrize(
    "name", ["apl-mini", "a", "v1.5_x", "apl-mini.step-00200", "名前", "é", "a b", "a" * 120, "console"]
)
def test_good_names_pass_unchanged(name: str) -> None:
    assert safe_name(name) == name


def test_a_name_is_text() -> None:
    with pytest.raises(LibraryError, match="not text"):
        safe_name(None)  # type: ignore[arg-type]


hostile = st.text(
    st.one_of(st.sampled_from("./\\\0: ~\u2215\uff0f\u2024\u202e"), st.characters()), max_size=130
) | st.lists(st.sampled_from(["..", ".", "/", "\\", "a", "C:", "\0", "nul", "%2e", "\uff0e"]), max_size=8).map("".join)


@given(hostile)
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_name_leaves_the_folder(tmp_path: Path, name: str) -> None:
    try:
        path = resolve_within(tmp_path, name)
    except LibraryError as error:
        assert error.hint
        return
    assert path.parent == tmp_path.resolve() and path.name == name
    assert os.path.normpath(path) == str(path)
    # Compatibility forms must not turn it into something else on a system that folds them.
    assert "/" not in unicodedata.normalize("NFKC", name) or not any(c in name for c in "/\\\u2215\uff0f")


@given(hostile)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_resolve_never_reads_outside(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    (tmp_path / "in").mkdir(exist_ok=True)
    with pytest.raises(LibraryError):
        PrefixLibrary([tmp_path / "in"]).resolve(name)


def test_links_out_of_the_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    put(tmp_path / "outside.safetensors")
    (folder / "leak.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    (folder / "inside.safetensors").symlink_to(folder / "apl-mini.safetensors")
    shelf = PrefixLibrary([folder])
    with pytest.raises(LibraryError, match="leads out"):
        shelf.resolve("leak")
    problems = {entry.name: entry.problem for entry in shelf.entries()}
    assert "leads out" in problems["leak"] and problems["loop"] and problems["inside"] is None


def test_entries(folder: Path) -> None:
    mini, levels = PrefixLibrary([folder]).entries()
    assert (mini.name, mini.family, mini.num_tokens, mini.levels) == ("apl-mini", "sd1", 4, (200, 1000))
    assert mini.title == "Mini" and mini.problem is None and len(mini.content_hash) == 64
    assert (levels.name, levels.levels) == ("only-levels", (5, 10)) and levels.path.name.endswith("00010.safetensors")


def test_broken_files_are_listed_with_their_problem(folder: Path) -> None:
    (folder / "cut.safetensors").write_bytes((folder / "apl-mini.safetensors").read_bytes()[:200])
    (folder / "renamed.safetensors").write_bytes(b"PK\x03\x04" + b"x" * 50)
    (folder / "text.txt").write_text("not one")
    (folder / "dir.safetensors").mkdir()
    found = {entry.name: entry for entry in PrefixLibrary([folder]).entries()}
    assert set(found) == {"apl-mini", "only-levels", "cut", "renamed"}
    assert "cut off" in found["cut"].problem and "apl convert" in found["renamed"].problem
    assert found["cut"].family == "" and found["cut"].num_tokens == 0


def test_plain_embeddings_are_listed_only_when_asked_for(folder: Path) -> None:
    save_file({"emb_params": torch.ones(2, 768)}, folder / "style.safetensors")
    assert "style" not in [entry.name for entry in PrefixLibrary([folder]).entries()]
    assert "style" in [entry.name for entry in PrefixLibrary([folder], plain=True).entries()]


@pytest.mark.parametrize(
    ("name", "level", "value"),
    [("apl-mini", None, 1.0), ("apl-mini.safetensors", None, 1.0), ("apl-mini", 200, 2.0), ("apl-mini", 1000, 3.0),
     ("apl-mini.step-00200", None, 2.0), ("only-levels", None, 5.0), ("only-levels", 5, 4.0)],
)
def test_resolve_and_load(folder: Path, name: str, level: int | None, value: float) -> None:
    prefix = PrefixLibrary([folder]).load(name, level, enforce=True)
    assert torch.equal(prefix.vectors(), torch.full((4, 96), value))


def test_missing_names_and_levels_say_what_there_is(folder: Path) -> None:
    with pytest.raises(LibraryError, match="no prefix named 'x'") as caught:
        PrefixLibrary([folder]).resolve("x")
    assert "apl-mini, only-levels" in caught.value.hint
    with pytest.raises(LibraryError, match="no level 7") as caught:
        PrefixLibrary([folder]).resolve("apl-mini", 7)
    assert "200, 1000" in caught.value.hint
    with pytest.raises(LibraryError, match="no prefix named") as caught:
        PrefixLibrary([]).resolve("x", 7)
    assert "no folder" in caught.value.hint


def test_first_folder_wins_and_missing_ones_are_skipped(folder: Path, tmp_path: Path) -> None:
    put(tmp_path / "mine" / "apl-mini.safetensors", 9.0)
    shelf = PrefixLibrary([tmp_path / "nowhere", tmp_path / "mine", folder])
    assert float(shelf.load("apl-mini").vectors()[0, 0]) == 9.0
    assert [entry.name for entry in shelf.entries()] == ["apl-mini", "only-levels"]


def test_a_broken_file_raises_when_loaded(folder: Path) -> None:
    (folder / "cut.safetensors").write_bytes(b"\x10")
    with pytest.raises(PrefixFileError):
        PrefixLibrary([folder]).load("cut")


def test_shipped_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = Path(library.__file__).resolve().parent
    assert shipped_folder() in (root.parent / "embeddings", root / "_embeddings")
    (tmp_path / "apl_core" / "_embeddings").mkdir(parents=True)
    monkeypatch.setattr(library, "__file__", str(tmp_path / "apl_core" / "library.py"))
    assert shipped_folder() == tmp_path / "apl_core" / "_embeddings"
