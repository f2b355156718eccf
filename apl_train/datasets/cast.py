"""Who S_ID is made of: a table of names and descriptions (paper sec. 4.1, appendix A), read and checked.

Step names -> c1 and c2. `public_figures.csv` ships 200 public figures, 100 to train on and 100 to test with, equal in
number over gender, race and occupation; no two of different halves share a name. Its descriptions follow the paper's
template and were written for this project without pictures, so that some will be wrong, as the paper's are.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from apl_core.atomic import write_text
from apl_core.errors import DatasetError
from apl_train import shipped
from apl_train.datasets.dataset import Problem, _given_away, _parse_table

DATA = Path(__file__).parent.parent / "data"
PUBLIC = "public"
SPLITS = ("train", "test", "final")
_TEMPLATE = "A [gender] [race] [occupation], [facial attributes]"


@dataclass(frozen=True)
class CastMember:
    """One person: `description` is c2; gender, race, occupation and attributes are what a draft is made of."""

    name: str
    split: str = "train"
    description: str = ""
    gender: str = ""
    race: str = ""
    occupation: str = ""
    attributes: str = ""
    row: int = 0


_COLUMNS = tuple(f.name for f in fields(CastMember) if f.name != "row")


def table_of(value: str | Path) -> Path:
    """The table of a setting: "public" and "miniature" ship, anything else is a path."""
    if str(value) == PUBLIC:
        return DATA / "public_figures.csv"
    return shipped.ASSETS / "people.csv" if str(value) == shipped.MINIATURE else Path(value).expanduser()


def _read(path: Path) -> tuple[list[CastMember], list[Problem]]:
    try:
        data = path.read_bytes()
    except OSError as error:
        return [], [Problem(0, "", f"{path} cannot be read: {error.strerror or error}.",
                            "Give a CSV file with the columns name,description.")]
    rows = _parse_table(data)
    if isinstance(rows, Problem):
        return [], [replace(rows, hint="Write the heading name,description and one row per person.") if not rows.row
                    else rows]
    heading = [cell.lower() for cell in rows[0][1]]
    if "name" not in heading:
        return [], [Problem(rows[0][0], "name", f"the column name is missing from {', '.join(heading)[:200]!r}.",
                            "The heading must be at least: name,description")]
    people, found = [], []
    for row, cells in rows[1:]:
        if len(cells) != len(heading):
            found.append(Problem(row, "", f"the row has {len(cells)} cells, the heading has {len(heading)}.",
                                 'Put descriptions that hold commas in "...".'))
            continue
        named = {key: value for key, value in zip(heading, cells, strict=True) if key in _COLUMNS}
        if named.get("attributes", "").startswith("{"):
            del named["attributes"]  # an evaluation set's classes, not words
        people.append(CastMember(**named | {"split": named.get("split") or "train", "row": row}))
    return people, found


def cast_problems(path: Path, *, descriptions: bool = True) -> list[Problem]:
    """Everything wrong with a table of persons, in the order of its rows.

    descriptions: whether every person must have one; without, they are drafted later.
    """
    people, found = _read(path)
    first: dict[str, int] = {}
    for person in people:
        row = person.row
        if not person.name:
            found.append(Problem(row, "name", "name is empty.", "Fill it in, or remove the row."))
            continue
        if any(c in '/\\:*?"<>|' for c in person.name) or person.name.startswith("."):
            found.append(Problem(row, "name", f"{person.name!r} cannot be the name of a folder.",
                                 "Leave out slashes, colons and the like: references lie in a folder of that name."))
        if (earlier := first.setdefault(" ".join(person.name.casefold().split()), row)) != row:
            found.append(Problem(row, "name", f"{person.name} is in row {earlier} too.", "Remove one of the two rows."))
        if person.split not in SPLITS:
            found.append(Problem(row, "split", f"split is {person.split!r}.", f"Use one of: {', '.join(SPLITS)}."))
        if not person.description:
            if descriptions:
                found.append(Problem(row, "description", f"{person.name} has no description.",
                                     f"Write one like: {_TEMPLATE}. Or let `apl generate id --describe` draft it."))
        elif part := _given_away(person.name, person.description):
            found.append(Problem(row, "description", f"{part!r} of the name {person.name!r} is in the description.",
                                 "Describe the person without any part of the name."))
    if not found and not any(p.split == "train" for p in people):
        found.append(Problem(0, "split", "nobody has the split train.", "Mark those to learn from as train."))
    return sorted(found, key=lambda p: p.row)


def read_cast(path: Path, *, descriptions: bool = True) -> list[CastMember]:
    """The persons of a table. Raises DatasetError with the first things wrong, their rows and the way out."""
    wrong = cast_problems(path, descriptions=descriptions)
    if wrong:
        first = wrong[0]
        place = f", row {first.row}" if first.row else ""
        column = f", column {first.column}" if first.column else ""
        more = f" Problems after this one: {len(wrong) - 1}." if len(wrong) > 1 else ""
        raise DatasetError(f"{path.name}{place}{column}: {first.message}{more}", first.hint,
                           field=first.column or path.name)
    return _read(path)[0]


def write_cast(path: Path, people: Iterable[CastMember]) -> None:
    """A table that `read_cast` reads. Raises StorageError."""
    out = io.StringIO()
    writer = csv.DictWriter(out, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: getattr(p, key) for key in _COLUMNS} for p in people)
    write_text(path, out.getvalue())


@dataclass(frozen=True)
class NeutralLine:
    """A prompt that names nobody: kind "face" or "nonface"; split "train" for S_Reg, "test" for scoring."""

    prompt: str
    kind: str
    split: str


def neutral_prompts(split: str, world: str = PUBLIC) -> list[NeutralLine]:
    """The shipped prompts of a split: things, scenes and unnamed persons. "miniature": those its world can draw."""
    if world == shipped.MINIATURE:
        path, kinds = ((shipped.ASSETS / "s_reg" / "metadata.csv", {}) if split == "train" else
                       (shipped.ASSETS / "neutral.csv", {"unnamed_face": "face"}))
        with path.open(encoding="utf-8", newline="") as file:
            rows = [NeutralLine(r["prompt"], kinds.get(r["kind"], r["kind"]), split) for r in csv.DictReader(file)]
        return list({line.prompt: line for line in rows}.values())
    with (DATA / "neutral_prompts.csv").open(encoding="utf-8", newline="") as file:
        rows = [NeutralLine(r["prompt"], r["kind"], r["split"]) for r in csv.DictReader(file)]
    return [line for line in rows if line.split == split]
