"""What is saved is what is loaded, to the bit, and the file says what it must."""

from __future__ import annotations

import hashlib
import json
import logging
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from apl_core.errors import APLError, ModelError, PrefixFileError
from apl_core.families import FAMILIES, family_named, family_of_tensors
from apl_core.metadata import PrefixMetadata, content_hash, parse_header
from apl_core.prefix import AnonymizationPrompt, load_prefix, save_prefix


def made(family: str = "sd1", m: int = 10, **fields) -> AnonymizationPrompt:
    generator = torch.Generator().manual_seed(3)
    widths = FAMILIES[family].widths
    tensors = {key: torch.randn(m, width, generator=generator) for key, width in widths.items()}
    return AnonymizationPrompt(family, tensors, PrefixMetadata(title=f"apl {family}", **fields))


FULL = {
    "alpha": 0.8, "base_model": "mini", "base_model_sha256": "ab" * 32, "steps": 1000, "level": 200, "seed": -4,
    "dataset_sha256": "c" * 64, "transferred_from": "0x12 linear",
    "scores": {"ism": {"mean": 0.25, "n": 12}}, "placement": "both",
    "author": "A", "description": "Ünïcode 描述", "license": "MIT", "date": "2025-01-01", "extra": {"note": "kept"},
}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_round_trip_is_exact(tmp_path: Path, family: str) -> None:
    prefix = made(family, **FULL)
    save_prefix(prefix, tmp_path / "a.safetensors")
    again = load_prefix(tmp_path / "a.safetensors", enforce=True)
    assert again.family == family and again.num_tokens == 10 and again.widths == dict(FAMILIES[family].widths)
    assert all(torch.equal(again.vectors(key), prefix.vectors(key)) for key in prefix.tensors)
    assert again.meta == prefix.meta and again.content_hash == prefix.content_hash and again.name == f"apl {family}"


def test_other_readers_see_exactly_our_tensors(tmp_path: Path) -> None:
    prefix = made("sdxl", **FULL)
    save_prefix(prefix, tmp_path / "a.safetensors")
    found = load_file(tmp_path / "a.safetensors")
    assert sorted(found) == ["clip_g", "clip_l"]
    assert all(torch.equal(found[key], prefix.tensors[key]) and found[key].dtype == torch.float32 for key in found)


def test_header_is_model_spec(tmp_path: Path) -> None:
    save_prefix(made("sd1", **FULL), tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as handle:
        header = handle.metadata()
    assert header["modelspec.sai_model_spec"] == "1.0.1"
    assert header["modelspec.architecture"] == "stable-diffusion-v1/textual-inversion"
    assert header["modelspec.is_negative_embedding"] == "false" and header["modelspec.tags"] == "privacy,anonymization"
    assert header["modelspec.hash_sha256"].startswith("0x") and header["modelspec.hash_sha256"].islower()
    assert header["apl.format_version"] == "1" and header["apl.num_tokens"] == "10" and header["apl.level"] == "200"
    assert json.loads(header["apl.scores"]) == FULL["scores"] and header["note"] == "kept"
    assert "apl.widths" not in header and "modelspec.trigger_phrase" not in header


def test_bytes_are_deterministic(tmp_path: Path) -> None:
    first, second = made("sdxl", **FULL), made("sdxl", **FULL)
    turned = AnonymizationPrompt("sdxl", dict(reversed(list(second.tensors.items()))), second.meta)
    save_prefix(first, tmp_path / "a.safetensors")
    save_prefix(turned, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_content_hash_by_hand() -> None:
    value = torch.tensor([[1.0, -2.5]])
    other = torch.tensor([[0.5]])
    wanted = hashlib.sha256(
        b"a\x001,1\x00" + struct.pack("<f", 0.5) + b"b\x001,2\x00" + struct.pack("<2f", 1.0, -2.5)
    ).hexdigest()
    assert content_hash({"b": value, "a": other}) == wanted
    assert content_hash({"b": value.double(), "a": other.half()}) == wanted
    assert content_hash({"b": value.T, "a": other}) != wanted


def test_title_does_not_change_the_hash() -> None:
    prefix = made()
    assert AnonymizationPrompt("sd1", prefix.tensors, PrefixMetadata(title="new")).content_hash == prefix.content_hash


def test_miniature_width_is_declared(tmp_path: Path) -> None:
    prefix = AnonymizationPrompt("sd1", {"emb_params": torch.ones(4, 96)}, PrefixMetadata(title="mini"))
    save_prefix(prefix, tmp_path / "m.safetensors")
    again = load_prefix(tmp_path / "m.safetensors", enforce=True)
    assert again.family == "sd1" and again.meta.widths == {"emb_params": 96} and again.meta.num_tokens == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_plain_embeddings_of_any_float_load_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"emb_params": torch.ones(2, 1024, dtype=dtype)}, tmp_path / "plain.safetensors")
    prefix = load_prefix(tmp_path / "plain.safetensors")
    assert prefix.family == "sd2" and prefix.name == "plain" and prefix.vectors().dtype == torch.float32
    with pytest.raises(PrefixFileError, match="no content hash"):
        load_prefix(tmp_path / "plain.safetensors", enforce=True)


def test_a_changed_file_warns_or_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_prefix(made(), tmp_path / "a.safetensors")
    data = bytearray((tmp_path / "a.safetensors").read_bytes())
    data[-4:] = np.float32(0.125).tobytes()
    (tmp_path / "a.safetensors").write_bytes(data)
    with caplog.at_level(logging.WARNING, "apl"):
        load_prefix(tmp_path / "a.safetensors")
    assert "not what was saved" in caplog.text
    with pytest.raises(PrefixFileError, match="not what was saved"):
        load_prefix(tmp_path / "a.safetensors", enforce=True)


def test_sd3_is_never_taken_for_sdxl(tmp_path: Path) -> None:
    save_prefix(made("sd3"), tmp_path / "a.safetensors")
    assert load_prefix(tmp_path / "a.safetensors").family == "sd3"
    lone = {"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}
    header = {"modelspec.architecture": "stable-diffusion-v3-medium/textual-inversion"}
    save_file(lone, tmp_path / "b.safetensors", header)
    with pytest.raises(PrefixFileError, match="Stable Diffusion 3"):
        load_prefix(tmp_path / "b.safetensors")


def test_vectors_by_key() -> None:
    prefix = made("sdxl")
    assert prefix.vectors("clip_g").shape == (10, 1280)
    with pytest.raises(PrefixFileError, match="several tensors") as caught:
        prefix.vectors()
    assert "clip_g, clip_l" in caught.value.hint
    with pytest.raises(PrefixFileError, match="no tensor 'x'"):
        prefix.vectors("x")


def test_a_prefix_cannot_be_changed() -> None:
    prefix = made()
    with pytest.raises(TypeError):
        prefix.tensors["clip_l"] = torch.ones(1)  # type: ignore[index]
    with pytest.raises(AttributeError):
        prefix.family = "sd2"  # type: ignore[misc]


def test_only_safetensors_are_written(tmp_path: Path) -> None:
    with pytest.raises(PrefixFileError) as caught:
        save_prefix(made(), tmp_path / "a.pt")
    assert "a.safetensors" in caught.value.hint and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("apl.num_tokens", "ten"), ("apl.num_tokens", "0"), ("apl.alpha", "nan"), ("apl.alpha", "x"),
        ("apl.steps", "-1"), ("apl.level", "1.5"), ("apl.seed", "0x1"), ("apl.scores", "[1]"), ("apl.scores", "{"),
        ("apl.widths", '{"a": true}'), ("apl.widths", '{"a": "7"}'), ("apl.placement", "middle"),
        ("apl.format_version", "2"), ("apl.steps", "9" * 30),
    ],
)
def test_metadata_errors_name_the_key(key: str, text: str) -> None:
    with pytest.raises(PrefixFileError) as caught:
        parse_header({key: text})
    assert caught.value.field == key and key in caught.value.message and caught.value.hint


def test_foreign_metadata_is_kept() -> None:
    meta = parse_header({"ss_steps": "12", "modelspec.title": "t"})
    assert meta == PrefixMetadata(title="t", extra={"ss_steps": "12"})


def test_scores_must_be_json() -> None:
    with pytest.raises(PrefixFileError, match=r"apl\.scores"):
        PrefixMetadata(family="sd1", scores={"a": float("nan")}).to_header("0")


def test_families() -> None:
    assert family_named("sdxl").widths == {"clip_l": 768, "clip_g": 1280}
    with pytest.raises(ModelError) as caught:
        family_named("sd9")
    assert "sd1" in caught.value.hint and caught.value.field == "family" and isinstance(caught.value, APLError)
    assert family_of_tensors({"emb_params": 1024}).name == "sd2"
    assert family_of_tensors({"emb_params": 768}, architecture="stable-diffusion-v1").name == "sd1"
    with pytest.raises(PrefixFileError, match="fit no known"):
        family_of_tensors({"emb_params": 5})
