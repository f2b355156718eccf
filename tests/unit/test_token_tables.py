"""Token tables out of model files, against the libraries that write such files, and hashes made by hand."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from apl_core.errors import ModelError
from apl_core.token_tables import TokenTable, check_same_vocabulary, read_table, read_tables

CLIP = "text_model.embeddings.token_embedding.weight"
SINGLE = {
    "SD1": {"emb_params": f"cond_stage_model.transformer.{CLIP}"},
    "SD1 of older merges": {"emb_params": "cond_stage_model.transformer.embeddings.token_embedding.weight"},
    "SD2": {"emb_params": "cond_stage_model.model.token_embedding.weight"},
    "SDXL": {"clip_l": f"conditioner.embedders.0.transformer.{CLIP}",
             "clip_g": "conditioner.embedders.1.model.token_embedding.weight"},
    "SDXL under transformers' names": {"clip_l": f"conditioner.embedders.0.transformer.{CLIP}",
                                       "clip_g": f"conditioner.embedders.1.transformer.{CLIP}"},
}


def table_of(rows: int = 30, width: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layout", SINGLE)
def test_single_files(layout: str, tmp_path: Path) -> None:
    names = SINGLE[layout]
    tensors = {name: table_of(width=4 + i, seed=i) for i, name in enumerate(names.values())}
    path = tmp_path / "model.safetensors"
    save_file({**tensors, "model.diffusion_model.out.0.weight": torch.zeros(3)}, str(path))
    found = read_tables(path)
    assert set(found) == set(names)
    for key, name in names.items():
        assert torch.equal(found[key].vectors, tensors[name])


def text_encoder(width: int, projecting: bool = False) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(width)
    config = CLIPTextConfig(vocab_size=40, hidden_size=width, intermediate_size=8, num_hidden_layers=1,
                            num_attention_heads=2, projection_dim=4)
    return (CLIPTextModelWithProjection if projecting else CLIPTextModel)(config)


def test_folders_as_transformers_and_diffusers_write_them(tmp_path: Path) -> None:
    """The table is the encoder's own, whatever name the installed version of transformers gives it."""
    one, two = text_encoder(8), text_encoder(12, projecting=True)
    one.save_pretrained(tmp_path / "xl" / "text_encoder")
    two.save_pretrained(tmp_path / "xl" / "text_encoder_2")
    found = read_tables(tmp_path / "xl")
    assert torch.equal(found["clip_l"].vectors, one.get_input_embeddings().weight)
    assert torch.equal(found["clip_g"].vectors, two.get_input_embeddings().weight)
    assert torch.equal(read_table(tmp_path / "xl").vectors, one.get_input_embeddings().weight)
    one.save_pretrained(tmp_path / "sd1" / "text_encoder")
    assert set(read_tables(tmp_path / "sd1")) == {"emb_params"}
    bare = read_tables(tmp_path / "xl" / "text_encoder_2")
    assert torch.equal(bare["emb_params"].vectors, two.get_input_embeddings().weight)
    assert torch.equal(read_table(tmp_path / "xl" / "text_encoder_2" / "model.safetensors").vectors,
                       two.get_input_embeddings().weight)


def test_open_clip_s_own_file_and_full_precision_first(tmp_path: Path) -> None:
    value = table_of()
    tensors = {"token_embedding.weight": value, "positional_embedding": table_of(seed=5)}
    save_file(tensors, str(tmp_path / "g.safetensors"))
    assert torch.equal(read_table(tmp_path / "g.safetensors").vectors, value)
    folder = tmp_path / "m" / "text_encoder"
    folder.mkdir(parents=True)
    save_file({CLIP: value.half()}, str(folder / "model.fp16.safetensors"))
    assert read_table(tmp_path / "m").stored == torch.float16
    save_file({CLIP: value}, str(folder / "model.safetensors"))
    assert torch.equal(read_table(tmp_path / "m").vectors, value)


def test_the_shipped_miniature_against_diffusers_reader() -> None:
    from apl_train import shipped
    from apl_train.model.files import read_parts

    path = shipped.locate("base_model", "miniature")
    wanted = read_parts(path).text_encoder.get_input_embeddings().weight
    assert torch.equal(read_table(path).vectors, wanted.float())


def test_the_hash_is_that_of_shape_and_float32_numbers() -> None:
    value = table_of(3, 2).half()
    by_hand = hashlib.sha256(b"3,2\0")
    for number in value.flatten().tolist():
        by_hand.update(struct.pack("<f", number))
    table = TokenTable(value, stored=torch.float16)
    assert table.sha256 == by_hand.hexdigest()
    assert table.sha256 != TokenTable(value.reshape(2, 3)).sha256
    assert table.vectors.numpy().dtype == np.float32


def test_one_table_in_two_precisions_agrees() -> None:
    value = table_of()
    full = TokenTable(value)
    for half in (torch.float16, torch.bfloat16):
        rounded = TokenTable(value.to(half), stored=half)
        assert full.agrees_with(rounded) and rounded.agrees_with(full)
    tuned = value.clone()
    tuned[7, 1] += 0.01
    assert not TokenTable(tuned).agrees_with(full)
    assert not TokenTable(tuned.half(), stored=torch.float16).agrees_with(full)
    # nobody said that the second one was rounded: it is another table
    assert not full.agrees_with(TokenTable(value.half().float()))
    assert not full.agrees_with(TokenTable(value[:, :2]))


def test_what_is_refused(tmp_path: Path) -> None:
    def refused(path: Path, words: str) -> None:
        with pytest.raises(ModelError) as caught:
            read_tables(path)
        assert words in str(caught.value)
        assert caught.value.hint

    refused(tmp_path / "none.safetensors", "does not exist")
    pickle = tmp_path / "model.ckpt"
    pickle.write_bytes(b"\x80\x02")
    refused(pickle, "apl convert")
    cut = tmp_path / "cut.safetensors"
    save_file({SINGLE["SD1"]["emb_params"]: table_of()}, str(cut))
    cut.write_bytes(cut.read_bytes()[:-8])
    refused(cut, "damaged")
    for name, key, words in (
        ("refiner", "conditioner.embedders.0.model.token_embedding.weight", "refiner"),
        ("half", SINGLE["SDXL"]["clip_l"], "one of Stable Diffusion XL's two"),
        ("unet", "model.diffusion_model.out.0.weight", "no token table"),
    ):
        path = tmp_path / f"{name}.safetensors"
        save_file({key: table_of()}, str(path))
        refused(path, words)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no text encoder")
    broken = table_of()
    broken[2, 2] = float("nan")
    opposed = table_of()
    opposed[2, 2], opposed[3, 3] = float("inf"), float("-inf")
    for value in (broken, opposed, torch.zeros(3), torch.zeros(3, 3, dtype=torch.int64)):
        with pytest.raises(ModelError):
            TokenTable(value)


def test_numbers_whose_sum_overflows_are_finite_all_the_same() -> None:
    table = TokenTable(torch.full((30, 4), 3e38))
    assert not bool(torch.isfinite(table.vectors.sum()))


def test_tables_of_other_vocabularies_do_not_go_together() -> None:
    with pytest.raises(ModelError, match="different numbers of tokens"):
        check_same_vocabulary({"a": TokenTable(table_of(30)), "b": TokenTable(table_of(31))})
