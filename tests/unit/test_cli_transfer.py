"""`apl transfer` from files on disk to files on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from apl_core.metadata import PrefixMetadata
from apl_core.prefix import AnonymizationPrompt, load_prefix, save_prefix
from apl_core.transfer import RECORD
from apl_train.commands.cli import main

VOCABULARY = 49408
SD1 = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
L = "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight"
G = "conditioner.embedders.1.model.token_embedding.weight"
WORDS = ("photo", "person", "with", "dog", "cat", "house", "tree", "river", "car", "city", "bridge", "mountain", "lake",
         "table", "chair", "lamp", "book", "street", "window")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that are token tables and nothing else: only the words of WORDS are alike in both."""
    from apl_train.model.files import TOKENIZER, read_tokenizer

    made = tmp_path_factory.mktemp("models")
    g = torch.Generator().manual_seed(1)
    source, target = torch.randn(VOCABULARY, 6, generator=g), torch.randn(VOCABULARY, 9, generator=g)
    words = [f"{w}{e}" for w in WORDS for e in ("", "s", "ed")] + [chr(97 + i) * 2 for i in range(26)]
    tokens = read_tokenizer(TOKENIZER)(words, add_special_tokens=False).input_ids
    ids = torch.tensor(sorted({i for each in tokens for i in each if i >= 512}))
    target[ids] = source[ids] @ torch.randn(6, 9, generator=g) / 6**0.5
    save_file({SD1: source}, str(made / "sd1.safetensors"))
    save_file({L: source, G: target}, str(made / "sdxl.safetensors"))
    (made / "captions.txt").write_text("\n".join(words), encoding="utf-8")
    (made / "captions.csv").write_text("id,caption\n" + "\n".join(f"1,{w}" for w in words), encoding="utf-8")
    meta = PrefixMetadata(title="x", widths={"emb_params": 6})
    prompt = AnonymizationPrompt("sd1", {"emb_params": source[ids[:4]]}, meta)
    save_prefix(prompt, made / "x.safetensors")
    save_prefix(AnonymizationPrompt("sd1", {"emb_params": source[ids[4:8]]}, prompt.meta.with_fields(level=10)),
                made / "x.step-10.safetensors")
    save_file({"ids": ids, "target": target}, str(made / "truth.bin"))
    return made


def run(folder: Path, *words: str) -> int:
    return main(["transfer", "--prefix", str(folder / "x.safetensors"), "--from", str(folder / "sd1.safetensors"),
                 "--to", str(folder / "sdxl.safetensors"), *words])


@pytest.mark.parametrize("captions", ["captions.txt", "captions.csv"])
def test_a_prefix_and_its_level_with_captions(captions: str, folder: Path, tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "xl.safetensors"
    assert run(folder, "--out", str(out), "--levels", "--captions", str(folder / captions), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told["files"]) == {str(out), str(tmp_path / "xl.step-10.safetensors")}
    assert told["tensors"]["clip_l"]["copied"] and not told["tensors"]["clip_g"]["copied"]
    truth = {}
    from safetensors import safe_open

    with safe_open(str(folder / "truth.bin"), framework="pt") as file:
        truth = {key: file.get_tensor(key) for key in ("ids", "target")}
    for path, rows in ((out, slice(0, 4)), (tmp_path / "xl.step-10.safetensors", slice(4, 8))):
        made = load_prefix(path, enforce=True)
        wanted = truth["target"][truth["ids"][rows]]
        assert float(torch.cosine_similarity(made.vectors("clip_g"), wanted).min()) > 0.95
        assert json.loads(made.meta.extra[RECORD])["clip_g"]["holdout_cosine"] > 0.8
    assert load_prefix(tmp_path / "xl.step-10.safetensors").meta.level == 10


def test_words_for_people(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--out", str(tmp_path / "y.safetensors"), "--method", "ridge", "--rho", "0.01", "--centre", "no",
               "--captions", str(folder / "captions.txt")) == 0
    text = capsys.readouterr().out
    assert "clip_l: copied" in text and "ridge, raw, rho 0.01" in text and f"wrote {tmp_path / 'y.safetensors'}" in text


@pytest.mark.parametrize(("words", "code", "says"), [
    (["--out", "x.pt"], 2, ".safetensors"),
    (["--out", "x.safetensors", "--method", "search"], 2, "method"),
    (["--out", "x.safetensors", "--captions", "/nowhere/captions.txt"], 5, "captions"),
    (["--out", "x.safetensors", "--refine", "5"], 2, "captions"),
])
def test_wrong_settings(words: list[str], code: int, says: str, folder: Path,
                        capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, *words) == code
    told = capsys.readouterr()
    assert says in told.err and not told.out
