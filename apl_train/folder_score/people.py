"""Whose picture a file is: by a table, by its sub-folder, by its name, or because there is one person only.

Step folder -> persons, for people's own pictures. Names are compared without regard to case, accents kept, with every
separator as a space, so that `Anna_Berg/`, `anna berg 03.png` and `anna-berg__seed7.webp` are one person's.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from apl_core.errors import DatasetError

NOBODY = "belongs to nobody in the references"


@dataclass(frozen=True)
class Assigned:
    """Person to files (sorted), and the files that are nobody's with the reason."""

    persons: Mapping[str, tuple[str, ...]]
    left: tuple[tuple[str, str], ...] = field(default=())


def plain(text: str) -> str:
    """A name for comparing: lower case, every run of separators one space."""
    return re.sub(r"[\W_]+", " ", text.casefold()).strip()


def persons_of_references(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Reference files by person: the first sub-folder, or the file's name without its number.

    Raises:
        DatasetError: there is no file.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        path = PurePosixPath(name)
        person = path.parts[0] if len(path.parts) > 1 else re.sub(r"[\s_().-]*\d*[\s_().-]*$", "", path.stem)
        found.setdefault(person or "person", []).append(name)
    if not found:
        raise DatasetError("There is no reference picture.", "Put pictures under FOLDER/NAME/, or FOLDER/NAME_1.jpg.",
                           field="references")
    return {person: tuple(files) for person, files in found.items()}


def persons_of_pictures(names: Sequence[str], known: Sequence[str], table: Mapping[str, str] | None = None) -> Assigned:
    """Files by person of the references: the table's word, else a folder's name, else the beginning of the file's name.

    With one person in the references, every file is that person's.

    Args:
        names: relative paths; known: the persons of the references; table: file to person, see `read_table`.
    """
    by_plain = {plain(person): person for person in known}
    longest = sorted(by_plain, key=len, reverse=True)  # "anna berg" before "anna"
    found: dict[str, list[str]] = {person: [] for person in known}
    left = []
    for name in sorted(names):
        person = _table_person(name, table, by_plain) if table is not None else _told_by_path(name, by_plain, longest)
        if person is None and table is None and len(known) == 1:
            person = known[0]
        if person is None:
            left.append((name, "is not in the table" if table is not None and name not in table else NOBODY))
        else:
            found[person].append(name)
    return Assigned({person: tuple(files) for person, files in found.items()}, tuple(left))


def _table_person(name: str, table: Mapping[str, str], by_plain: Mapping[str, str]) -> str | None:
    return by_plain.get(plain(table[name])) if name in table else None


def _told_by_path(name: str, by_plain: Mapping[str, str], longest: Sequence[str]) -> str | None:
    path = PurePosixPath(name)
    for folder in path.parts[:-1]:
        if (person := by_plain.get(plain(folder))) is not None:
            return person
    stem = plain(path.stem)
    # "ann" must not take "anna 01"; a number may follow at once
    match = next((key for key in longest if key and re.match(rf"{re.escape(key)}(?:\d|\b)", stem)), None)
    return None if match is None else by_plain[match]


def _rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    try:
        reader = csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""), strict=True)
        rows = list(reader)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror or error}.", "Check the path.",
                           field=path.name) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path.name} is not a UTF-8 CSV table: {error}", "Save it as CSV in UTF-8.",
                           field=path.name) from error
    for column in columns:
        if column not in (reader.fieldnames or ()):
            raise DatasetError(f"{path.name} has no column {column}.", f"Its first row must hold {','.join(columns)}.",
                               field=column)
    return [{k: v.strip() for k, v in row.items() if k is not None and isinstance(v, str)} for row in rows]


def read_table(path: Path) -> dict[str, str]:
    """File to person from a CSV with the columns file and person. Raises `DatasetError`."""
    return {row["file"].replace("\\", "/"): row["person"] for row in _rows(path, ("file", "person"))
            if row.get("file") and row.get("person")}


def read_groups(path: Path, known: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Column to class to persons, from a CSV with the column name and one column a grouping, such as gender.

    Raises:
        DatasetError: the table cannot be read, or none of its names is in the references.
    """
    by_plain = {plain(person): person for person in known}
    found: dict[str, dict[str, list[str]]] = {}
    for row in _rows(path, ("name",)):
        person = by_plain.get(plain(row.get("name", "")))
        for column, value in row.items():
            if person is not None and column != "name" and value:
                members = found.setdefault(column, {}).setdefault(value, [])
                if person not in members:
                    members.append(person)
    if not found:
        raise DatasetError(f"{path.name} puts nobody of the references in a group.",
                           "Write name,gender (or another grouping), with the names of the references.", field="groups")
    return found
