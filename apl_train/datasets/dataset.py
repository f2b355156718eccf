"""Training sets as folders: S_ID, pictures of named persons with c1 and c2, and S_Reg, neutral pictures (sec. 3.5).

Step pictures -> records. A folder holds `metadata.csv` with the columns image, name, prompt, description, kind, and the
pictures beside it or in one `images.zip`. A set comes from other people and goes through a trainer for hours, so
everything wrong with it is found before, and said at once, with its row and the way out.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apl_core.errors import ConfigError, DatasetError
from apl_train.datasets.pictures import PictureFolder, decode

TABLE = "metadata.csv"
COLUMNS = ("image", "name", "prompt", "description", "kind")
KINDS = {"id": ("id",), "reg": ("face", "nonface")}
SETS = {"id": "S_ID", "reg": "S_Reg"}
MAX_TABLE_BYTES = 64 * 2**20
MAX_TEXT = 2000
MULTIPLE = 8  # a latent stands for 8 x 8 pixels
_ONE_ROW = "Remove one of the two rows."
_ONE_SIZE = "Crop or resize all pictures to one size, such as the model's 512 x 512."


@dataclass(frozen=True)
class Record:
    """One row: `image` is a path relative to the folder or in images.zip, `kind` one of "id", "face" and "nonface".

    c1 names the person, c2 describes the same person without the name (paper sec. 3.3); c2 = c1 in S_Reg.
    """

    image: str
    name: str
    c1: str
    c2: str
    kind: str


@dataclass(frozen=True)
class Problem:
    """One thing wrong. `row` as a spreadsheet counts: the heading is 1, 0 is the set as a whole; `column` may be ""."""

    row: int
    column: str
    message: str
    hint: str

    def __str__(self) -> str:
        row = f"row {self.row}" if self.row else TABLE
        return f"{row}{f', column {self.column}' if self.column else ''}: {self.message} {self.hint}"


@dataclass(frozen=True)
class Dataset:
    """A checked set. `sha256` is that of metadata.csv's bytes, lowercase hex."""

    folder: Path
    records: tuple[Record, ...]
    sha256: str

    @cached_property
    def _pictures(self) -> PictureFolder:
        return PictureFolder(self.folder)

    @cached_property
    def content_sha256(self) -> str:
        """Of the table and every picture's bytes, lowercase hex: cached latents and resumed trainings depend on it."""
        digest = hashlib.sha256(self.sha256.encode())
        for picture in self.picture_sha256:
            digest.update(bytes.fromhex(picture))
        return digest.hexdigest()

    @cached_property
    def picture_sha256(self) -> tuple[str, ...]:
        """Of every record's picture file, lowercase hex. Raises DatasetError for one that cannot be read."""
        return tuple(hashlib.sha256(self._pictures.read(record.image)).hexdigest() for record in self.records)

    def images(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """The pictures of some records, uint8 [n, H, W, 3] RGB.

        Raises:
            DatasetError: a picture is missing, damaged, too large, or of another size than the first one.
        """
        names = [self.records[index].image for index in indices]
        pictures = [self._pictures.pixels(name) for name in names]
        for name, picture in zip(names, pictures, strict=True):
            if picture.shape != pictures[0].shape:
                raise DatasetError(f"{name} is {_size(picture)}, {names[0]} is {_size(pictures[0])}.", _ONE_SIZE,
                                   field="image")
        return np.stack(pictures) if pictures else np.empty((0, 0, 0, 3), np.uint8)


def _size(pixels: NDArray[np.uint8]) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]}"


def _words(text: str) -> str:
    """For comparing: one Unicode form, one space between words, no difference of case."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _has(text: str, words: str) -> bool:
    """Whether `words` stand in `text` as whole words, where the script has spaces between words."""
    before = "" if unicodedata.east_asian_width(words[0]) in "WF" else r"(?<!\w)"
    after = "" if unicodedata.east_asian_width(words[-1]) in "WF" else r"(?!\w)"
    return re.search(before + re.escape(words) + after, text) is not None


def _given_away(name: str, description: str) -> str:
    """The part of a name that a description holds: the whole name, or the surname written as in the name; "" for none.

    The surname's case counts, or a Brown could not be described as a man with brown hair.
    """
    if _has(_words(description), _words(name)):
        return name
    surname = unicodedata.normalize("NFKC", name).split()[-1]
    return surname if _has(unicodedata.normalize("NFKC", description), surname) else ""


def _parse_table(data: bytes) -> list[tuple[int, list[str]]] | Problem:
    """The rows that are not blank, heading first, each with its row number; or what keeps the table from being read."""
    if len(data) > MAX_TABLE_BYTES:
        return Problem(0, "", f"the table is larger than {MAX_TABLE_BYTES // 2**20} MiB.", "Split the set.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Problem(data[: error.start].count(b"\n") + 1, "", f"the byte 0x{data[error.start]:02x} is not UTF-8.",
                       "Save the table as UTF-8 (in a spreadsheet: 'CSV UTF-8').")
    rows, row = [], 0
    try:
        for row, cells in enumerate(csv.reader(io.StringIO(text, newline=""), strict=True), start=1):
            if any(cell.strip() for cell in cells):
                rows.append((row, [cell.strip() for cell in cells]))
    except csv.Error as error:
        return Problem(row + 1, "", f"this is not CSV: {error}.",
                       'Put texts that hold commas or quotes in "...", and write quotes inside them twice.')
    if len(rows) < 2:
        return Problem(0, "", "the set is empty: the table has no row below a heading.",
                       f"Write the heading {','.join(COLUMNS)} and one row per picture.")
    return rows


def _heading_problems(row: int, heading: list[str]) -> Iterator[Problem]:
    for column in COLUMNS:
        if column not in heading:
            separated = " Separate the columns by commas." if len(heading) == 1 else ""
            yield Problem(row, column, f"the column {column} is missing from {', '.join(heading)[:200]!r}.",
                          f"Add it to the heading.{separated}")
        elif heading.count(column) > 1:
            yield Problem(row, column, f"the column {column} is there twice.", "Remove one of them.")


def _cell_problems(row: int, cells: dict[str, str], expect: str) -> Iterator[Problem]:
    """What is wrong with the texts of one row, whatever the set."""
    for column, text in cells.items():
        if any(unicodedata.category(character) == "Cc" for character in text):
            yield Problem(row, column, f"{column} holds a line break or another control character: {text[:80]!r}.",
                          "Remove it.")
        elif len(text) > MAX_TEXT:
            yield Problem(row, column, f"{column} has {len(text)} characters; {MAX_TEXT} are allowed.", "Shorten it.")
        elif not text and (column in ("image", "prompt") or (expect == "id" and column != "kind")):
            yield Problem(row, column, f"{column} is empty.", "Fill it in, or remove the row.")
    kind = cells["kind"]
    if kind not in KINDS[expect]:
        elsewhere = [f" Rows of kind {kind} belong in {SETS[other]}." for other in KINDS if kind in KINDS[other]]
        yield Problem(row, "kind", f"kind is {kind!r}, unknown in {SETS[expect]}.",
                      f"Write one of: {', '.join(KINDS[expect])}.{''.join(elsewhere)}")


def _text_problems(row: int, cells: dict[str, str], expect: str) -> Iterator[Problem]:
    """What is wrong between name, prompt and description of one row."""
    name, prompt, description = cells["name"], cells["prompt"], cells["description"]
    if expect == "reg":
        if description:
            yield Problem(row, "description", f"description is {description!r}, but S_Reg has none.",
                          "Leave it empty: here the prompt is learned as it is.")
        return
    if name and prompt and not _has(_words(prompt), _words(name)):
        yield Problem(row, "prompt", f"the name {name!r} is not in its prompt {prompt!r}.",
                      "Write the name in the prompt as in the column name.")
    if prompt and _words(description) == _words(prompt):
        yield Problem(row, "description", f"description equals the prompt {prompt!r}.",
                      "Describe the person without the name: that is what the prefix aims at.")
    elif name and description and (part := _given_away(name, description)):
        yield Problem(row, "description", f"{part!r} of the name {name!r} is in the description {description!r}.",
                      "Describe the person without any part of the name.")


def _room_problems(row: int, record: Record, encoder_room: Callable[[str], int]) -> Iterator[Problem]:
    texts = {"prompt": record.c1} if record.c2 == record.c1 else {"prompt": record.c1, "description": record.c2}
    for column, text in texts.items():
        if text and (room := encoder_room(text)) < 0:
            yield Problem(row, column, f"{column} is {-room} tokens too long: {text[:80]!r}.",
                          "Shorten it, or train fewer vectors: what does not fit beside them would be cut off.")


class _ImageCheck:
    """What is wrong with the pictures, row by row: whether they are there and, if asked for, what is in them."""

    def __init__(self, pictures: PictureFolder, look_inside: bool) -> None:
        self._pictures, self._look_inside = pictures, look_inside
        self._row_of_name: dict[str, int] = {}
        self._row_of_bytes: dict[bytes, int] = {}
        self._first: tuple[str, NDArray[np.uint8]] | None = None

    def problems(self, row: int, name: str) -> Iterator[Problem]:
        try:
            self._pictures.check(name)
            if (earlier := self._row_of_name.setdefault(name, row)) != row:
                yield Problem(row, "image", f"{name} is the picture of row {earlier} too.", _ONE_ROW)
            elif self._look_inside:
                yield from self._inside(row, name)
        except DatasetError as error:
            yield Problem(row, "image", error.message, error.hint)

    def _inside(self, row: int, name: str) -> Iterator[Problem]:
        data = self._pictures.read(name)
        if (earlier := self._row_of_bytes.setdefault(hashlib.sha256(data).digest(), row)) != row:
            yield Problem(row, "image", f"{name} is the same picture as row {earlier}'s.", _ONE_ROW)
            return
        picture = decode(data, name)
        if self._first is None:
            self._first = (name, picture)
            if picture.shape[0] % MULTIPLE or picture.shape[1] % MULTIPLE:
                yield Problem(row, "image", f"{name} is {_size(picture)}, not in multiples of {MULTIPLE}.", _ONE_SIZE)
        elif picture.shape != self._first[1].shape:
            yield Problem(row, "image", f"{name} is {_size(picture)}, {self._first[0]} is {_size(self._first[1])}.",
                          _ONE_SIZE)


def _examine(
    folder: Path, expect: str, encoder_room: Callable[[str], int] | None, check_images: bool
) -> tuple[list[Problem], list[Record], str]:
    """Everything wrong, the records, and the table's hash."""
    if expect not in KINDS:
        raise ConfigError(f"expect is {expect!r}.", f"Use one of: {', '.join(KINDS)}.", field="expect")
    try:
        with (folder / TABLE).open("rb") as handle:
            data = handle.read(MAX_TABLE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        return [Problem(0, "", f"{TABLE} cannot be read: {getattr(error, 'strerror', None) or error}.",
                        f"Name a folder that holds a {TABLE}.")], [], ""
    rows = _parse_table(data)
    if isinstance(rows, Problem):
        return [rows], [], ""
    heading, found = rows[0][1], list(_heading_problems(*rows[0]))
    try:
        images = _ImageCheck(PictureFolder(folder), check_images)
    except DatasetError as error:
        found.append(Problem(0, "image", error.message, error.hint))
    if found:
        return found, [], ""
    records = []
    for row, cells in rows[1:]:
        if len(cells) != len(heading):
            found.append(Problem(row, "", f"the row has {len(cells)} cells, the heading has {len(heading)}.",
                                 'Put texts that hold commas in "...".'))
            continue
        named = {column: cells[heading.index(column)] for column in COLUMNS}
        c2 = named["description"] if expect == "id" else named["prompt"]
        records.append(Record(named["image"], named["name"], named["prompt"], c2, named["kind"]))
        found += [*_cell_problems(row, named, expect), *_text_problems(row, named, expect)]
        if encoder_room is not None:
            found += _room_problems(row, records[-1], encoder_room)
        if named["image"]:
            found += images.problems(row, named["image"])
    return found, records, hashlib.sha256(data).hexdigest()


def problems(
    folder: str | Path,
    expect: str,
    *,
    encoder_room: Callable[[str], int] | None = None,
    check_images: bool = True,
) -> list[Problem]:
    """Everything wrong with a set, in the order of its rows; empty for a good one.

    Args:
        folder: holds metadata.csv and the pictures.
        expect: "id" for S_ID, "reg" for S_Reg.
        encoder_room: tokens left over when a text stands beside the prefix; negative = so many too long.
        check_images: open every picture (damage, size, duplicates) instead of only looking whether it is there.

    Raises:
        ConfigError: `expect` is neither.
    """
    return _examine(Path(folder), expect, encoder_room, check_images)[0]


def read_dataset(folder: str | Path, *, expect: str) -> Dataset:
    """Read a set. Pictures are looked for, but opened only by `Dataset.images`; `problems` opens them all.

    Args:
        folder: holds metadata.csv and the pictures.
        expect: "id" for S_ID, "reg" for S_Reg.

    Raises:
        DatasetError: the first thing wrong, with its row, column and way out, and how many more there are.
        ConfigError: `expect` is neither.
    """
    folder = Path(folder)
    found, records, sha256 = _examine(folder, expect, None, check_images=False)
    if found:
        first = found[0]
        place = f", row {first.row}" if first.row else ""
        column = f", column {first.column}" if first.column else ""
        more = f" Problems after this one: {len(found) - 1}." if len(found) > 1 else ""
        raise DatasetError(f"{folder / TABLE}{place}{column}: {first.message}{more}", first.hint,
                           field=first.column or TABLE)
    return Dataset(folder, tuple(records), sha256)
