"""A table of datasets, and writes, that must be refused with a message, a place and a way out, leaving no trace.

Prefix files, names of prefixes and pickles have their own tables: test_bad_files.py, test_library.py, test_convert.py.
"""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from apl_core.errors import APLError, ConfigError, DatasetError, PrefixFileError, StorageError
from apl_core.metadata import PrefixMetadata
from apl_core.prefix import AnonymizationPrompt, save_prefix
from apl_train.datasets import dataset, pictures
from apl_train.datasets.dataset import problems, read_dataset
from apl_train.training.config import read_yaml

HEADING = "image,name,prompt,description,kind\n"
GOOD = "a.png,Ada Brown,a photo of Ada Brown,A female painter,id\n"
REG = "a.png,,a red apple,,nonface\n"


def tree(folder: Path) -> dict[str, bytes | str | None]:
    """Everything below a folder: bytes of files, targets of links."""
    return {
        path.relative_to(folder).as_posix():
            str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def noise(seed: int = 0, size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def png(width: int, height: int) -> bytes:
    """A PNG whose header claims this size, with hardly any data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


Build = Callable[[Path], None]


def text(body: str, heading: str = HEADING, encoding: str = "utf-8") -> Build:
    """A folder with one good picture and this table."""

    def build(folder: Path) -> None:
        noise().save(folder / "a.png")
        (folder / "metadata.csv").write_bytes((heading + body).encode(encoding))

    return build


def row(image: str = "a.png", name: str = "Ada Brown", prompt: str = "a photo of Ada Brown",
        description: str = "A female painter", kind: str = "id") -> Build:
    return text(",".join(f'"{cell}"' for cell in (image, name, prompt, description, kind)) + "\n")


def second(make: Callable[[Path], object]) -> Build:
    """A good first row and b.png, made by `make(path)`, in the second."""

    def build(folder: Path) -> None:
        text(GOOD + GOOD.replace("a.png", "b.png"))(folder)
        make(folder / "b.png")

    return build


def packed(make: Callable[[zipfile.ZipFile], object], spoil: Callable[[bytes], bytes] = lambda data: data) -> Build:
    """A good first row and b.png, put into images.zip by `make(archive)`."""

    def build(folder: Path) -> None:
        text(GOOD + GOOD.replace("a.png", "b.png"))(folder)
        path = folder / "images.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            make(archive)
        path.write_bytes(spoil(path.read_bytes()))

    return build


def link(target: str) -> Build:
    def build(folder: Path) -> None:
        second(lambda path: path.symlink_to(target))(folder)
        noise(1).save(folder.parent / "outside.png")

    return build


def encrypted(data: bytes) -> bytes:
    """Set the encryption bit of the only member, in its own header and in the archive's list."""
    spoiled = bytearray(data)
    spoiled[6] |= 1
    spoiled[data.index(b"PK\x01\x02") + 8] |= 1
    return bytes(spoiled)


def flipped(data: bytes) -> bytes:
    """Change one byte of the only member's data, so that its checksum is wrong."""
    spoiled = bytearray(data)
    spoiled[60] ^= 0xFF
    return bytes(spoiled)


def lying(data: bytes) -> bytes:
    """State 9 bytes for the only member's unpacked size, in both places."""
    spoiled = bytearray(data)
    for offset in (22, data.index(b"PK\x01\x02") + 24):
        spoiled[offset : offset + 4] = struct.pack("<I", 9)
    return bytes(spoiled)


# what: (make, row, column, part of the message, part of the hint)
TABLES: dict[str, tuple[Build, int, str, str, str]] = {
    "no table": (lambda folder: None, 0, "", "metadata.csv cannot be read: No such file", "Name a folder"),
    "a folder as table": (lambda f: (f / "metadata.csv").mkdir(), 0, "", "cannot be read", "Name a folder"),
    "empty file": (text("", heading=""), 0, "", "the set is empty", "Write the heading image,name"),
    "empty dataset": (text(""), 0, "", "the set is empty", "one row per picture"),
    "only blank rows": (text("\n,,,,\n"), 0, "", "the set is empty", "one row per picture"),
    "missing column": (text("a.png,Ada,Ada,id\n", "image,name,prompt,kind\n"), 1, "description",
                       "the column description is missing from 'image, name, prompt, kind'", "Add it"),
    "column twice": (text(GOOD.strip() + ",x\n", HEADING.strip() + ",name\n"), 1, "name", "there twice", "Remove one"),
    "latin-1": (text(GOOD + "b.png,Zoë,Zoë,A woman,id\n", encoding="latin-1"), 3, "", "0xeb is not UTF-8", "CSV UTF-8"),
    "UTF-16": (text(GOOD, encoding="utf-16"), 1, "", "is not UTF-8", "CSV UTF-8"),
    "open quote": (text(GOOD + '"b.png,Ada,Ada,A woman,id\n'), 3, "", "not CSV", "write quotes inside them twice"),
    "text behind a quote": (text('a.png,"Ada" Brown,x,y,id\n'), 2, "", "not CSV", "quotes"),
    "endless cell": (text(f"a.png,Ada,{'x' * 200_000},y,id\n"), 2, "", "field larger than", "quotes"),
    "comma without quotes": (text("a.png,Ada,Ada,a woman, smiling,id\n"), 2, "", "6 cells, the heading has 5", '"..."'),
    "cells missing": (text("a.png,Ada,Ada\n"), 2, "", "3 cells, the heading has 5", "commas"),
    "line break in a cell": (row(prompt="Ada Brown\nsmiling"), 2, "prompt", "a line break or another", "Remove it"),
    "bell in a cell": (row(description="A \a painter"), 2, "description", "control character", "Remove it"),
    "prompt of a novel": (row(prompt="Ada Brown " * 300), 2, "prompt", "2999 characters; 2000 are", "Shorten"),
    "no name": (row(name=""), 2, "name", "name is empty", "Fill it in"),
    "no prompt": (row(prompt=" "), 2, "prompt", "prompt is empty", "Fill it in"),
    "no description": (row(description=""), 2, "description", "description is empty", "Fill it in"),
    "no image": (row(image=""), 2, "image", "image is empty", "Fill it in"),
    "unknown kind": (row(kind="person"), 2, "kind", "kind is 'person', unknown in S_ID", "one of: id"),
    "kind of the other set": (row(kind="face"), 2, "kind", "kind is 'face'", "Rows of kind face belong in S_Reg"),
    "name not in its prompt": (row(prompt="a photo of a painter"), 2, "prompt",
                               "the name 'Ada Brown' is not in its prompt 'a photo of a painter'", "as in the column"),
    "name in its description": (row(description="A painter called ada brown"), 2, "description",
                                "'Ada Brown' of the name", "without any part of the name"),
    "surname in its description": (row(description="A woman of the Brown family"), 2, "description",
                                   "'Brown' of the name 'Ada Brown'", "without any part of the name"),
    "description equals prompt": (row(description="A photo of  Ada Brown"), 2, "description", "equals the prompt",
                                  "without the name"),
    "missing picture": (row(image="b.png"), 2, "image", "there is no picture b.png", "put the picture there"),
    "a folder as picture": (row(image="sub"), 2, "image", "no picture sub", "put the picture there"),
    "picture twice": (text(GOOD + GOOD), 3, "image", "a.png is the picture of row 2 too", "one of the two"),
    "parent folder": (row(image="../outside.png"), 2, "image", "'../outside.png' holds '..'", "relative to the folder"),
    "parent folder inside": (row(image="sub/../a.png"), 2, "image", "holds '..'", "relative to the folder"),
    "absolute path": (row(image="/etc/hostname"), 2, "image", "is absolute", "relative to the folder"),
    "drive": (row(image="C:/a.png"), 2, "image", "is absolute", "relative to the folder"),
    "backslash": (row(image="..\\\\outside.png"), 2, "image", "holds a backslash", "'/' between folders"),
    "endless name": (row(image="a" * 400 + ".png"), 2, "image", "aaa", "picture there"),
    "link out": (link("../outside.png"), 3, "image", "b.png leads out of the folder", "instead of linking"),
    "loop of links": (link("b.png"), 3, "image", "b.png", "picture there"),
    "archive that is none": (lambda f: (text(GOOD)(f), (f / "images.zip").write_bytes(b"PK\x03\x04 cut off")), 0,
                             "image", "images.zip cannot be read", "Pack it again"),
    "not in the archive": (packed(lambda z: z.writestr("c.png", b"x")), 3, "image", "b.png in images.zip or beside it",
                           "picture there"),
}
PICTURES: dict[str, tuple[Build, int, str, str, str]] = {
    "text as picture": (second(lambda p: p.write_text("no picture")), 3, "image", "cannot be read as PNG", "Save it"),
    "empty picture": (second(lambda p: p.write_bytes(b"")), 3, "image", "b.png cannot be read", "Save it again"),
    "GIF": (second(lambda p: noise(1).save(p, "GIF")), 3, "image", "b.png cannot be read as PNG", "one of PNG, JPEG"),
    "cut-off PNG": (second(lambda p: (noise(1).save(p), p.write_bytes(p.read_bytes()[:300]))), 3, "image",
                    "b.png cannot be read", "Save it again"),
    "spoiled PNG": (second(lambda p: (noise(1).save(p), p.write_bytes(p.read_bytes()[:60] + bytes(700)))), 3, "image",
                    "b.png cannot be read", "Save it again"),
    "16-bit PNG": (second(lambda p: Image.fromarray(np.full((16, 16), 40_000, np.uint16)).save(p)), 3, "image",
                   "b.png has the colour mode I;16", "8 bits per channel"),
    "pixel bomb": (second(lambda p: p.write_bytes(png(5000, 5000))), 3, "image", "b.png has 5000 x 5000 pixels",
                   "Make it smaller"),
    "larger pixel bomb": (second(lambda p: p.write_bytes(png(60_000, 60_000))), 3, "image", "too many pixels",
                          "Make it smaller"),
    "two sizes": (second(lambda p: noise(1, (24, 16)).save(p)), 3, "image", "b.png is 24 x 16, a.png is 16 x 16",
                  "to one size"),
    "zip bomb": (packed(lambda z: z.writestr("b.png", bytes(100_000))), 3, "image", "b.png is larger than", "Save it"),
    "spoiled archive": (packed(lambda z: z.writestr("b.png", bytes(999), zipfile.ZIP_STORED), flipped), 3, "image",
                        "Bad CRC-32", "Copy the picture there again"),
    "archive that lies on sizes": (packed(lambda z: z.writestr("b.png", bytes(999)), lying), 3, "image", "b.png cannot",
                                   "Copy the picture there again"),
    "encrypted archive": (packed(lambda z: z.writestr("b.png", b"x" * 99), encrypted), 3, "image", "encrypted",
                          "Copy the picture there again"),
    "archive of an unusual method": (packed(lambda z: z.writestr("b.png", b"x" * 99, zipfile.ZIP_LZMA)), 3, "image",
                                     "unusual method", "Copy the picture there again"),
}
ONLY_CHECKED: dict[str, tuple[Build, int, str, str, str]] = {
    "size without latents": (lambda f: (text(GOOD)(f), noise(1, (12, 16)).save(f / "a.png")), 2, "image",
                             "a.png is 12 x 16, not in multiples of 8", "such as the model's"),
    "same picture, other name": (second(lambda p: noise(0).save(p)), 3, "image", "the same picture as row 2's",
                                 "one of the two"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pictures, "MAX_BYTES", 50_000)
    (tmp_path / "set" / "sub").mkdir(parents=True)
    return tmp_path / "set"


@pytest.mark.parametrize("what", [*TABLES, *PICTURES, *ONLY_CHECKED])
def test_bad_dataset(folder: Path, what: str) -> None:
    make, line, column, message, hint = (TABLES | PICTURES | ONLY_CHECKED)[what]
    make(folder)
    before = tree(folder.parent)
    found = problems(folder, "id")
    assert [(problem.row, problem.column) for problem in found] == [(line, column)], found
    assert message in found[0].message and hint in found[0].hint
    if what in TABLES:
        with pytest.raises(DatasetError) as caught:
            read_dataset(folder, expect="id")
        assert str(folder) in caught.value.message and caught.value.field == (column or "metadata.csv")
        assert (f"row {line}" in caught.value.message) == (line > 0)
    elif what in PICTURES:
        records = read_dataset(folder, expect="id")
        with pytest.raises(DatasetError) as caught:
            records.images([0, 1])
        assert caught.value.field == "image"
    if what not in ONLY_CHECKED:
        assert message in caught.value.message and hint in caught.value.hint and caught.value.exit_code == 5
    assert tree(folder.parent) == before


def test_the_good_dataset_of_these_tables_is_good(folder: Path) -> None:
    second(lambda path: noise(1).save(path))(folder)
    assert problems(folder, "id") == [] and read_dataset(folder, expect="id").images([0, 1]).shape == (2, 16, 16, 3)


def test_columns_separated_by_another_character(folder: Path) -> None:
    text(GOOD.replace(",", ";"), HEADING.replace(",", ";"))(folder)
    found = problems(folder, "id")
    assert [problem.column for problem in found] == list(dataset.COLUMNS) and "by commas" in found[0].hint


def test_a_nul_byte_in_the_table(folder: Path) -> None:
    """Refused by the csv module before Python 3.11, by us since."""
    text(GOOD.replace("painter", "pain\0ter"))(folder)
    (problem,) = problems(folder, "id")
    assert problem.row == 2 and problem.hint


def test_a_description_in_s_reg(folder: Path) -> None:
    text(REG.replace(",,nonface", ",A fruit,nonface"))(folder)
    (problem,) = problems(folder, "reg")
    assert (problem.row, problem.column) == (2, "description") and "'A fruit'" in problem.message and problem.hint


def test_a_table_without_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "MAX_TABLE_BYTES", 50)
    text(GOOD)(folder)
    (problem,) = problems(folder, "id")
    assert "larger than" in problem.message and problem.hint


def test_prompts_that_do_not_fit_beside_the_prefix(folder: Path) -> None:
    text(GOOD)(folder)
    found = problems(folder, "id", encoder_room=lambda words: 4 - len(words.split()))
    assert [(p.column, "1 tokens too long" in p.message) for p in found] == [("prompt", True)] and found[0].hint


# -- writing ---------------------------------------------------------------------------------------------------


def prefix(value: float = 1.0) -> AnonymizationPrompt:
    return AnonymizationPrompt("sd1", {"emb_params": torch.full((10, 768), value)}, PrefixMetadata(title="t"))


def full_at_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)


def full_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Path.write_bytes

    def half(self: Path, data: bytes) -> int:
        whole(self, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", half)


def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pass


@pytest.mark.parametrize(
    ("spoil", "name", "error", "message", "hint"),
    [
        (full_at_sync, "old.safetensors", StorageError, "No space left", "disk is full"),
        (full_half_way, "old.safetensors", StorageError, "No space left", "disk is full"),
        (full_half_way, "new.safetensors", StorageError, "No space left", "disk is full"),
        (nothing, "file/new.safetensors", StorageError, "file/new.safetensors", "Check that the folder exists"),
        (nothing, "new.pt", PrefixFileError, "new.pt does not end in .safetensors", "Name it new.safetensors"),
        (nothing, "a" * 300 + ".safetensors", StorageError, "too long", "shorter"),
    ],
)
def test_a_prefix_that_cannot_be_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable, name: str, error: type[APLError], message: str,
    hint: str,
) -> None:
    save_prefix(prefix(), tmp_path / "old.safetensors")
    (tmp_path / "file").write_text("not a folder")
    before = tree(tmp_path)
    with monkeypatch.context() as patch:
        spoil(patch)
        with pytest.raises(error) as caught:
            save_prefix(prefix(2.0), tmp_path / name)
    assert message in caught.value.message and hint in caught.value.hint and caught.value.field
    assert tree(tmp_path) == before


@pytest.mark.skipif(os.name == "nt", reason="needs setrlimit")
def test_a_limit_of_the_operating_system(tmp_path: Path) -> None:
    """A write that the system itself stops after 4 kB, nothing patched."""
    save_prefix(prefix(), tmp_path / "old.safetensors")
    before = tree(tmp_path)
    script = (
        "import resource, sys, torch; from apl_core.errors import StorageError\n"
        "from apl_core.prefix import load_prefix, save_prefix\n"
        "prefix = load_prefix(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: save_prefix(prefix, sys.argv[1])\n"
        "except StorageError as error: sys.exit(f'{error.message}|{error.hint}')\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "old.safetensors")], capture_output=True,
                          text=True, check=False, cwd=Path(dataset.__file__).parents[2])
    assert done.returncode == 1 and "File too large" in done.stderr and done.stderr.strip().split("|")[1]
    assert tree(tmp_path) == before


def test_settings_run_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "a.yaml").write_text(f"steps: !!python/object/apply:os.mkdir ['{marker.as_posix()}']\n")
    with pytest.raises(ConfigError) as caught:
        read_yaml(tmp_path / "a.yaml")
    assert "a.yaml is not YAML" in caught.value.message and caught.value.hint and not marker.exists()
