"""A prefix into hosts' folders and into a file for others: checked first, named safely, the vectors never touched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from apl_core.errors import LibraryError, PrefixFileError
from apl_core.metadata import PrefixMetadata
from apl_core.prefix import AnonymizationPrompt, load_prefix, save_prefix
from apl_core.sharing import publish, use


def write(path: Path, seed: int = 0, **meta: object) -> AnonymizationPrompt:
    tensors = {"emb_params": torch.randn(3, 768, generator=torch.Generator().manual_seed(seed))}
    prompt = AnonymizationPrompt("sd1", tensors, PrefixMetadata(title="old", family="sd1", num_tokens=3, **meta))
    save_prefix(prompt, path)
    return prompt


def test_a_level_is_copied_into_every_folder_under_its_new_name(tmp_path: Path) -> None:
    prompt = write(tmp_path / "old.step-40.safetensors", level=40)
    files = use(tmp_path / "old.step-40.safetensors", [tmp_path / "embeddings", tmp_path / "host"], "anyone")
    assert files == [tmp_path / "embeddings" / "anyone.safetensors", tmp_path / "host" / "anyone.safetensors"]
    for file in files:
        found = load_prefix(file, enforce=True)
        assert torch.equal(found.tensors["emb_params"], prompt.tensors["emb_params"])
        assert (found.name, found.meta.level) == ("anyone", 40)


def test_another_prefix_of_that_name_is_not_overwritten_unasked(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", seed=1)
    theirs = write(tmp_path / "host" / "anyone.safetensors", seed=2)
    with pytest.raises(LibraryError, match="another prefix"):
        use(tmp_path / "a.safetensors", [tmp_path / "embeddings", tmp_path / "host"], "anyone")
    assert not (tmp_path / "embeddings").exists()
    assert load_prefix(tmp_path / "host" / "anyone.safetensors").content_hash == theirs.content_hash
    use(tmp_path / "a.safetensors", [tmp_path / "host"], "anyone", replace=True)
    assert load_prefix(tmp_path / "host" / "anyone.safetensors").content_hash != theirs.content_hash


def test_the_same_prefix_again_is_no_clash(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors")
    for _ in range(2):
        use(tmp_path / "a.safetensors", [tmp_path / "host"], "anyone")


@pytest.mark.parametrize("name", ["../anyone", "", "a/b", "con", "x\x00y"])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a.safetensors")
    with pytest.raises(LibraryError):
        use(tmp_path / "a.safetensors", [tmp_path / "host"], name)


def test_a_file_whose_content_was_changed_is_not_spread(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors")
    data = bytearray((tmp_path / "a.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "a.safetensors").write_bytes(data)
    for action in (lambda: use(tmp_path / "a.safetensors", [tmp_path / "host"], "b"),
                   lambda: publish(tmp_path / "a.safetensors", tmp_path / "b.safetensors", title="B")):
        with pytest.raises(PrefixFileError):
            action()
    assert not (tmp_path / "host").exists() and not (tmp_path / "b.safetensors").exists()


def test_publishing_fills_in_what_modelspec_asks_for_and_keeps_the_rest(tmp_path: Path) -> None:
    prompt = write(tmp_path / "a.safetensors", steps=700, alpha=1.0, scores={"n": 32}, description="first words")
    out = publish(tmp_path / "a.safetensors", tmp_path / "out" / "b.safetensors", title="Anyone ",
                  author="A. Author", license="CC0-1.0")
    with safe_open(str(out), "pt") as opened:  # as any other tool reads it
        header = opened.metadata()
        assert torch.equal(opened.get_tensor("emb_params"), prompt.tensors["emb_params"])
    assert [header[f"modelspec.{key}"] for key in ("title", "author", "license", "description")] == [
        "Anyone", "A. Author", "CC0-1.0", "first words"]
    found = load_prefix(out, enforce=True)
    assert (found.meta.steps, found.meta.scores, found.content_hash) == (700, {"n": 32}, prompt.content_hash)


@pytest.mark.parametrize(("field", "text"), [("title", "  "), ("author", "x" * 2001), ("license", "a\x1b[2J")])
def test_texts_that_nobody_could_read_are_refused(tmp_path: Path, field: str, text: str) -> None:
    write(tmp_path / "a.safetensors")
    with pytest.raises(PrefixFileError, match=field):
        publish(tmp_path / "a.safetensors", tmp_path / "b.safetensors", **{"title": "t", field: text})
    assert not (tmp_path / "b.safetensors").exists()
