"""Results of an evaluation: one JSON a table, written by the command, the paper's figures beside ours in every row.

`benchmarks/results/<table>.json` holds those of the miniature; other presets add their name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apl_core.atomic import write_json
from apl_core.errors import ScoreError
from apl_core.id_scores import Interval
from apl_train import claims
from apl_train.report.table import interval, measured, number

PAPER = "paper, real weights"
NOT_RUN = "not run"


@dataclass(frozen=True)
class Column:
    """`key` in a row's values; `paper` says whether the paper has such a column."""

    key: str
    label: str
    digits: int = 3


@dataclass(frozen=True)
class Row:
    """One line: values by column, each a number, an Interval, or None where it cannot be had; the paper's by column."""

    name: str
    values: Mapping[str, float | Interval | None]
    paper: Mapping[str, float | None] = field(default_factory=dict)
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "values": {k: _value(v) for k, v in self.values.items()},
                "paper": {k: v for k, v in self.paper.items() if v is not None}, "note": self.note}


@dataclass(frozen=True)
class Table:
    """A finished table or figure.

    Attributes:
        key: of `settings.TABLES`.
        place: where it stands in the paper.
        conventions: what the figures have to be read with; n among them.
        notes: sentences for whoever reads it; figures: files beside the document.
    """

    key: str
    title: str
    place: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    conventions: Mapping[str, Any]
    notes: Sequence[str] = ()
    figures: Sequence[str] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self, preset: str, command: str) -> dict[str, Any]:
        return {"table": self.key, "title": self.title, "place": self.place, "preset": preset, "command": command,
                "columns": [{"key": c.key, "label": c.label, "digits": c.digits} for c in self.columns],
                "rows": [row.to_dict() for row in self.rows], "notes": list(self.notes),
                "figures": list(self.figures), "conventions": dict(self.conventions), "extra": _plain(self.extra)}


def _value(value: float | Interval | None) -> dict[str, float | None]:
    if isinstance(value, Interval):
        return {"value": _finite(value.value), "lo": _finite(value.lo), "hi": _finite(value.hi)}
    return {"value": _finite(value), "lo": None, "hi": None}


def _finite(value: float | None) -> float | None:
    return round(float(value), 6) if value is not None and math.isfinite(value) else None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return _finite(value) if isinstance(value, float) else value


def command(preset: str, table: str) -> str:
    """What makes the table again."""
    return f"apl evaluate --preset {preset} --only {table}"


def folder(run: Path) -> Path:
    """Where results go: `benchmarks/results` of the checkout; a folder of the run where there is no checkout."""
    return claims.FILE.parent / "results" if claims.FILE.parent.is_dir() else run / "results"


def file_of(where: Path, table: str, preset: str) -> Path:
    return where / (f"{table}.json" if preset == "miniature" else f"{table}-{preset}.json")


def write(table: Table, where: Path, preset: str) -> Path:
    """Writes a table's JSON; returns the file. Raises StorageError."""
    path = file_of(where, table.key, preset)
    write_json(path, table.to_dict(preset, command(preset, table.key)))
    return path


def read_all(where: Path) -> list[dict[str, Any]]:
    """Every table in the folder, in the order of the paper, the miniature's ahead of others.

    Raises:
        ScoreError: a file is not one of ours.
    """
    from apl_train.tables.settings import TABLES

    found = []
    for path in sorted(where.glob("*.json")):
        if path.stem.partition("-")[0] not in TABLES:
            continue  # other commands keep their results here too
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            place = TABLES.index(table["table"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ScoreError(f"{path.name} holds no results: {error}", "Delete it, or run its command again.",
                             field=path.name) from error
        found.append((place, table["preset"] != "miniature", table["preset"], table))
    return [table for *_, table in sorted(found, key=lambda row: row[:3])]


def cell_text(value: Mapping[str, Any], digits: int) -> str:
    """A value with its interval: "0.123 [0.100, 0.150]"; "" where there is none."""
    if measured(value.get("value")) is None:
        return ""
    ends = interval([value.get("lo"), value.get("hi")], digits)
    return number(value["value"], digits) + (f" {ends}" if ends else "")


def text(table: Mapping[str, Any]) -> str:
    """A table for the terminal; the paper's figure stands under ours."""
    columns = table["columns"]
    lines = [["", *(c["label"] for c in columns)]]
    for row in table["rows"]:
        lines.append([row["name"], *(cell_text(row["values"].get(c["key"], {}), c["digits"]) for c in columns)])
        if row["note"]:
            lines[-1][0] += f"  ({row['note']})"
        if row["paper"]:
            lines.append([f"  {PAPER}",
                          *(number(row["paper"].get(c["key"]), c["digits"], missing="") for c in columns)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    body = ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w)
                      for i, (cell, w) in enumerate(zip(line, widths, strict=True))).rstrip() for line in lines]
    head = f"{table['title']} ({table['place']}); preset {table['preset']}; {table['command']}"
    return "\n".join([head, *body, *(f"  {note}" for note in table["notes"])])
