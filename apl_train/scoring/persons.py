"""What a prefix is scored on: named persons with references, and neutral prompts that name nobody.

A folder with `people.csv` (name,split,description,attributes), the persons' reference pictures in `references.zip` or
in a folder `references/` (both: NAME/FILE), and `neutral.csv` (prompt,kind). References stand for photographs of the
person; they never come from the model that is scored.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apl_core.errors import DatasetError
from apl_core.onnx_models import file_hash
from apl_train.datasets.pictures import PictureFolder, decode

SPLITS = ("train", "test", "final")
KINDS = ("unnamed_face", "nonface")
PICTURES = frozenset({".webp", ".png", ".jpg", ".jpeg", ".bmp"})
_PEOPLE = ("name", "split", "description", "attributes")


@dataclass(frozen=True)
class PersonRecord:
    """One named person: `description` is c2, `attributes` head to class, `references` paths in the reference store."""

    name: str
    split: str
    description: str
    attributes: Mapping[str, str]
    references: tuple[str, ...]


@dataclass(frozen=True)
class NeutralPrompt:
    """A prompt that names nobody: kind "unnamed_face" or "nonface"."""

    prompt: str
    kind: str


@dataclass(frozen=True)
class EvaluationSet:
    """Persons and neutral prompts of one folder; `sha256` covers the tables and every reference."""

    folder: Path
    persons: tuple[PersonRecord, ...]
    neutral: tuple[NeutralPrompt, ...]
    sha256: str

    def of_split(self, split: str, limit: int | None = None) -> tuple[PersonRecord, ...]:
        """The first `limit` persons of "train", "test" or "final", in the table's order."""
        return tuple(p for p in self.persons if p.split == split)[:limit]

    def of_kind(self, kind: str, limit: int | None = None) -> tuple[NeutralPrompt, ...]:
        """The first `limit` prompts of "unnamed_face" or "nonface", in the table's order."""
        return tuple(p for p in self.neutral if p.kind == kind)[:limit]

    def references(self, person: PersonRecord) -> list[NDArray[np.uint8]]:
        """The person's reference pictures, uint8 [H, W, 3] RGB each. Raises `DatasetError` for a damaged one."""
        with _Store(self.folder) as store:
            return [store.pixels(name) for name in person.references]


class _Store:
    """Reference pictures by NAME/FILE, from references.zip or the folder references/."""

    def __init__(self, folder: Path) -> None:
        archive, loose = (folder / "references.zip").resolve(), folder / "references"
        if not archive.is_file() and not loose.is_dir():
            raise DatasetError(f"{folder} has neither references.zip nor a folder references.",
                               "Put two or more pictures of each person under references/NAME/.", field="references")
        self._pictures = PictureFolder(loose, archive)

    def __enter__(self) -> _Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._pictures.close()

    def names(self) -> dict[str, tuple[str, ...]]:
        """Person to sorted paths NAME/FILE of pictures."""
        found: dict[str, list[str]] = {}
        for name in self._pictures.names():
            path = PurePosixPath(name)
            if len(path.parts) == 2 and ".." not in path.parts and path.suffix.lower() in PICTURES:
                found.setdefault(path.parts[0], []).append(name)
        return {person: tuple(sorted(names)) for person, names in found.items()}

    def read(self, name: str) -> bytes:
        """Bytes of one picture. Raises `DatasetError` when it is missing, damaged or larger than 64 MiB."""
        try:
            return self._pictures.read(name)
        except DatasetError as error:
            raise DatasetError(f"A reference: {error.message}", error.hint, field=name) from error

    def pixels(self, name: str) -> NDArray[np.uint8]:
        """The picture, uint8 [H, W, 3] RGB, upright. Raises `DatasetError` when it is no sound picture."""
        data = self.read(name)
        try:
            return decode(data, name)
        except DatasetError as error:
            raise DatasetError(f"The reference {name} is not a sound picture: {error.message}", error.hint,
                               field=name) from error


def read_evaluation_set(folder: str | Path) -> EvaluationSet:
    """Read people.csv, the list of references and neutral.csv (which may be missing: no drift is scored then).

    Raises:
        DatasetError: a file, column, cell or reference is missing or wrong, naming row (the header is 1) and column.
    """
    folder = Path(folder)
    rows, digest = _table(folder / "people.csv", _PEOPLE)
    with _Store(folder) as store:
        listed = store.names()
        persons = tuple(_person(row, number, listed) for number, row in rows)
        _unique([(p.name, number) for p, (number, _) in zip(persons, rows, strict=True)], "people.csv", "name")
        if not persons:
            raise DatasetError(f"{folder / 'people.csv'} lists nobody.", "Add a row for every person.", field="name")
        for name in (name for p in persons for name in p.references):
            digest.update(name.encode() + b"\0" + hashlib.sha256(store.read(name)).digest())
    neutral: tuple[NeutralPrompt, ...] = ()
    if (folder / "neutral.csv").exists():
        rows, _ = _table(folder / "neutral.csv", ("prompt", "kind"))
        neutral = tuple(_neutral(row, number) for number, row in rows)
        _unique([(p.prompt, number) for p, (number, _) in zip(neutral, rows, strict=True)], "neutral.csv", "prompt")
        digest.update(file_hash(folder / "neutral.csv").encode())
    return EvaluationSet(folder, persons, neutral, digest.hexdigest())


def _table(path: Path, columns: tuple[str, ...]) -> tuple[list[tuple[int, dict[str, str]]], Any]:
    """Rows with their line in the table (the header is 1), and a running SHA-256 of the file."""
    try:
        data = path.read_bytes()
        reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        rows = [(number, row) for number, row in enumerate(reader, start=2)]
        header = reader.fieldnames or []
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror or error}.", "Check the folder.",
                           field=path.name) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path.name} is not a UTF-8 CSV table: {error}", "Save it as CSV in UTF-8.",
                           field=path.name) from error
    for column in columns:
        if column not in header:
            raise DatasetError(f"{path.name} has no column {column}; it has {', '.join(header) or 'none'}.",
                               f"Its first row must be {','.join(columns)}.", field=column)
    for number, row in rows:
        if None in row or any(value is None for value in row.values()):
            raise DatasetError(f"{path.name}, row {number}: {'more' if None in row else 'fewer'} cells than columns.",
                               "Put cells that hold a comma in double quotes.", field=path.name)
    return [(number, {k: v.strip() for k, v in row.items()}) for number, row in rows], hashlib.sha256(data)


def _cell(table: str, row: Mapping[str, str], number: int, column: str, allowed: tuple[str, ...] = ()) -> str:
    value = row[column]
    if not value or (allowed and value not in allowed):
        raise DatasetError(f"{table}, row {number}: {column} is {value!r}.",
                           f"Use one of: {', '.join(allowed)}." if allowed else f"Fill in {column}.", field=column)
    return value


def _person(row: Mapping[str, str], number: int, listed: Mapping[str, tuple[str, ...]]) -> PersonRecord:
    name = _cell("people.csv", row, number, "name")
    split = _cell("people.csv", row, number, "split", SPLITS)
    description = _cell("people.csv", row, number, "description")
    try:
        attributes = json.loads(row["attributes"] or "{}")
    except ValueError:
        attributes = None
    if not isinstance(attributes, dict) or not all(isinstance(v, str) for v in attributes.values()):
        raise DatasetError(f"people.csv, row {number}: attributes is {row['attributes']!r}, not a JSON object.",
                           'Write {"gender": "female", ...} or leave it empty.', field="attributes")
    references = listed.get(name, ())
    if len(references) < 2:
        raise DatasetError(f"people.csv, row {number}: {name} has {len(references)} reference pictures.",
                           f"Put two or more under references/{name}/.", field="references")
    return PersonRecord(name, split, description, attributes, references)


def _neutral(row: Mapping[str, str], number: int) -> NeutralPrompt:
    return NeutralPrompt(_cell("neutral.csv", row, number, "prompt"), _cell("neutral.csv", row, number, "kind", KINDS))


def _unique(values: list[tuple[str, int]], table: str, column: str) -> None:
    seen: dict[str, int] = {}
    for value, number in values:
        if value in seen:
            raise DatasetError(f"{table}, row {number}: {column} {value!r} is also in row {seen[value]}.",
                               "Keep one of the two rows.", field=column)
        seen[value] = number
