"""A table of files and names that must be refused, each with a message that says what and a hint that says how on."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from apl_core.errors import APLError, LibraryError, PrefixFileError
from apl_core.library import PrefixLibrary
from apl_core.metadata import PrefixMetadata
from apl_core.prefix import AnonymizationPrompt, load_prefix, to_bytes

SD1 = {"modelspec.architecture": "stable-diffusion-v1/textual-inversion"}
SDXL = {"modelspec.architecture": "stable-diffusion-xl-v1-base/textual-inversion"}
OURS = SD1 | {"apl.format_version": "1"}


def good() -> bytes:
    prefix = AnonymizationPrompt("sd1", {"emb_params": torch.ones(10, 768)}, PrefixMetadata(title="good"))
    return to_bytes(prefix.tensors, prefix.meta.to_header(prefix.content_hash))


def one(value: torch.Tensor, key: str = "emb_params", header: dict[str, str] | None = None) -> bytes:
    return save({key: value}, header)


def two(first: torch.Tensor, second: torch.Tensor, header: dict[str, str] | None = None) -> bytes:
    return save({"clip_l": first, "clip_g": second}, header)


def headed(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(shape: list, end: int, dtype: str = "F32", start: int = 0) -> dict:
    return {"emb_params": {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}}


def pickled(old_format: bool) -> bytes:
    import io

    stream = io.BytesIO()
    torch.save({"*": torch.ones(10, 768)}, stream, _use_new_zipfile_serialization=not old_format)
    return stream.getvalue()


def spoiled() -> bytes:
    data = bytearray(good())
    data[-2] ^= 1
    return bytes(data)


def filled(value: float) -> torch.Tensor:
    tensor = torch.ones(10, 768)
    tensor[3, 5] = value
    return tensor


AGAIN, CONVERT = "again", "apl convert"
TABLE: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "empty": (lambda: b"", "is empty", AGAIN),
    "seven bytes": (lambda: b"1234567", "cut off: 7 bytes", AGAIN),
    "truncated header": (lambda: good()[:100], "cut off inside its header", AGAIN),
    "truncated tensor": (lambda: good()[:-1], "tensors are incomplete", AGAIN),
    "trailing bytes": (lambda: good() + b"x" * 9, "not a sound safetensors", AGAIN),
    "huge header claimed": (lambda: struct.pack("<Q", 2**62) + b"{}" * 10, "claims a header", "trust"),
    "huge header": (lambda: headed({"__metadata__": {"x": "y" * 2**20}}), "claims a header", "trust"),
    "oversized file": (lambda: bytes(16 * 2**20 + 1), "larger than 16 MiB", "checkpoint or a LoRA"),
    "no JSON": (lambda: headed(b"{nonsense"), "not safetensors", AGAIN),
    "JSON list": (lambda: headed(b"[1, 2]"), "not safetensors", AGAIN),
    "deep JSON": (lambda: headed(b"{\"a\":" + b"[" * 200_000), "not safetensors", AGAIN),
    "metadata not text": (lambda: headed({"__metadata__": {"a": 1}}), "not safetensors", AGAIN),
    "shape not numbers": (lambda: headed(entry(["a", "b"], 8), bytes(8)), "not safetensors", AGAIN),
    "offsets overlap": (lambda: headed(entry([1, 768], 8, start=4), bytes(8)), "not a sound safetensors", AGAIN),
    "shape lies": (lambda: headed(entry([10, 768], 8), bytes(8)), "not a sound safetensors", AGAIN),
    "renamed zip pickle": (lambda: pickled(False), "is a pickle", CONVERT),
    "renamed old pickle": (lambda: pickled(True), "is a pickle", CONVERT),
    "renamed image": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(99), "is an image", CONVERT),
    "no tensor": (lambda: headed({"__metadata__": {}}), "holds no tensor", "Supported"),
    "NaN": (lambda: one(filled(float("nan"))), "NaN or infinity", "earlier level"),
    "infinity": (lambda: one(filled(float("-inf"))), "NaN or infinity", "earlier level"),
    "half infinity": (lambda: one(filled(float("inf")).half()), "NaN or infinity", "earlier level"),
    "wrong width": (lambda: one(torch.ones(10, 512)), "fit no known model family", "Supported"),
    "width of another family": (lambda: one(torch.ones(10, 1024), header=SD1), "widths emb_params: 1024", "family"),
    "undeclared miniature": (lambda: one(torch.ones(10, 96), header=SD1), "widths emb_params: 96", "apl.widths"),
    "declared widths lie": (
        lambda: one(torch.ones(10, 96), header=OURS | {"apl.widths": '{"emb_params": 64}'}), "apl.widths says", AGAIN
    ),
    "family mismatch": (
        lambda: two(torch.ones(2, 768), torch.ones(2, 1280), SD1), "says it is for Stable Diffusion 1.x", "disagree"
    ),
    "unknown architecture": (
        lambda: one(torch.ones(2, 768), header={"modelspec.architecture": "pixart"}), "'pixart'", "Supported"
    ),
    "extra tensor": (
        lambda: save({"emb_params": torch.ones(2, 768), "extra": torch.ones(1)}), "'extra' has no place", "no other"
    ),
    "OneTrainer": (lambda: one(torch.ones(2, 768), "emp_params"), "another trainer", CONVERT),
    "token as key": (lambda: one(torch.ones(2, 768), "<apl>"), "'<apl>' has no place", CONVERT),
    "1-D": (lambda: one(torch.ones(768)), "shape [768]", "2-D"),
    "3-D": (lambda: one(torch.ones(1, 10, 768)), "shape [1, 10, 768]", "2-D"),
    "integers": (lambda: one(torch.ones(10, 768, dtype=torch.int32)), "holds I32", "float32"),
    "m = 0": (lambda: one(torch.ones(0, 768)), "has 0 vectors", "1 to 64"),
    "m = 65": (lambda: one(torch.ones(65, 768)), "has 65 vectors", "1 to 64"),
    "unequal m": (lambda: two(torch.ones(2, 768), torch.ones(3, 1280), SDXL), "different numbers", "same number"),
    "m lies": (
        lambda: one(torch.ones(2, 768), header=OURS | {"apl.num_tokens": "3"}), "apl.num_tokens is 3", AGAIN
    ),
    "future version": (
        lambda: one(torch.ones(2, 768), header=OURS | {"apl.format_version": "2"}), "format_version is '2'", "Update"
    ),
    "hash mismatch": (spoiled, "not what was saved", "trust"),
    "hash missing": (lambda: one(torch.ones(2, 768), header=OURS), "no content hash", CONVERT),
}


@pytest.mark.parametrize("kind", TABLE)
def test_bad_file(tmp_path: Path, kind: str) -> None:
    make, message, hint = TABLE[kind]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(make())
    with pytest.raises(PrefixFileError) as caught:
        load_prefix(path, enforce=True)
    assert message in caught.value.message and hint in caught.value.hint
    assert caught.value.field and caught.value.exit_code == 3 and str(caught.value).endswith(caught.value.hint)


def test_the_good_file_of_this_table_is_good(tmp_path: Path) -> None:
    (tmp_path / "good.safetensors").write_bytes(good())
    assert load_prefix(tmp_path / "good.safetensors", enforce=True).num_tokens == 10


def test_missing_and_folder_and_nul(tmp_path: Path) -> None:
    for path, message, hint in (
        (tmp_path / "none.safetensors", "does not exist", "Check the name"),
        (tmp_path, "is a folder", "Name a .safetensors file"),
        (tmp_path / "a\0b", "cannot be read", "name"),
        (tmp_path / ("a" * 400), "cannot be read", "name"),
    ):
        with pytest.raises(PrefixFileError) as caught:
            load_prefix(path)
        assert message in caught.value.message and hint in caught.value.hint and caught.value.field == "path"


@pytest.mark.parametrize(
    "name", ["../good", "..\\good", "/etc/passwd", "a/../good", "good\0", "~/good", "\uff0fgood", "nul"]
)
def test_path_tricks_in_names(tmp_path: Path, name: str) -> None:
    (tmp_path / "good.safetensors").write_bytes(good())
    (tmp_path / "in").mkdir()
    with pytest.raises(LibraryError) as caught:
        PrefixLibrary([tmp_path / "in"]).load(name)
    assert "prefix name" in caught.value.message and caught.value.hint


@pytest.mark.parametrize("position", range(0, 600, 7))
def test_any_flipped_byte_is_refused_or_harmless(tmp_path: Path, position: int) -> None:
    """A damaged header ends in an error of ours or in the very same vectors, never in another exception."""
    data = bytearray(good())
    data[position] ^= 0x15
    (tmp_path / "a.safetensors").write_bytes(data)
    try:
        prefix = load_prefix(tmp_path / "a.safetensors", enforce=True)
    except APLError as error:
        assert error.hint
    else:
        assert torch.equal(prefix.vectors(), torch.ones(10, 768))
