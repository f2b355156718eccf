"""scores.json as a plain-text table for the terminal, and the wording that the page shares with it.

A value that is null, absent or not finite reads "not measured" (short: "n/m"); it is never shown as 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from apl_train.report import paper_figures

MISSING = "not measured"
SPLITS = {"test": "Unseen persons", "final": "Unseen persons kept for last", "train": "Persons it was learned on"}
CONDITIONS = {
    "off": "name, prefix off",
    "on": "name, prefix on",
    "random": "name, random prefix",
    "phrase": "name, hand-written phrase",
    "description": "description alone",
}
DRIFT = {"unnamed_faces": "Prompts for unnamed persons", "nonfaces": "Prompts without persons"}
DRIFT_CONDITIONS = {
    "on": "prefix on",
    "random": "random prefix",
    "phrase": "hand-written phrase",
    "two_seeds": "two seeds",
}

CONSTANTS = {
    "threshold": "recognised from",
    "impostor_mean": "two different persons",
    "impostor_floor": "another person of the same description",
    "ceiling": "same person",
}
UNINVITED = {
    "named_in_unnamed_faces": "a named person in prompts for unnamed persons",
    "named_in_nonfaces": "a named person in prompts without persons",
    "faces_in_nonfaces": "a face in prompts without persons",
}
_SUFFIXES = {"off": "prefix off", "on": "prefix on", "excess": "difference"}


def measured(value: Any) -> float | None:
    """`value` as a float, or None when it is null, not a number or not finite."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        return None
    return float(value)


def number(value: Any, digits: int = 3, missing: str = MISSING) -> str:
    """A value with `digits` decimals; -0.000 is written 0.000."""
    found = measured(value)
    if found is None:
        return missing
    text = f"{found:.{digits}f}"
    return text.lstrip("-") if not text.strip("-0.") else text


def percent(value: Any, missing: str = MISSING) -> str:
    """A share in 0..1 as a percentage with one decimal."""
    found = measured(value)
    return missing if found is None else f"{number(100 * found, 1)}%"


def interval(value: Any, digits: int = 3) -> str:
    """A pair [lo, hi] as "[0.123, 0.456]"; empty when either end is missing."""
    if (
        not isinstance(value, Sequence)
        or isinstance(value, str)
        or len(value) != 2
        or any(measured(v) is None for v in value)
    ):
        return ""
    return f"[{number(value[0], digits)}, {number(value[1], digits)}]"


def get(values: Any, *path: str) -> Any:
    """The value at `path` in nested dicts, or None."""
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def constant(scores: Mapping[str, Any], name: str) -> float | None:
    """One of `CONSTANTS` in scores.json (beside the splits), or None."""
    found = measured(get(scores, "persons", name))
    return found if found is not None else measured(scores.get(name))


def conditions_of(rows: Any) -> list[str]:
    """The conditions of one split in reading order; unknown ones follow the known ones."""
    present = [key for key, value in rows.items() if isinstance(value, Mapping)] if isinstance(rows, Mapping) else []
    return [key for key in CONDITIONS if key in present] + sorted(key for key in present if key not in CONDITIONS)


def unseen(scores: Mapping[str, Any]) -> str:
    """The split whose persons the prefix was not learned on: "test", or "final" where only that one was scored."""
    return "final" if get(scores, "persons", "final") and not get(scores, "persons", "test") else "test"


def way_to_description(scores: Mapping[str, Any], split: str | None = None, condition: str = "on") -> float | None:
    """How far ID-ACC went from the name (0) to the bare description (1), the floor APL aims at; None if unknown.

    Args:
        split: "test", "train" or "final"; the unseen persons when not given.
    """
    split = split or unseen(scores)
    off, on, floor = (
        measured(get(scores, "persons", split, key, "id_acc_mean")) for key in ("off", condition, "description")
    )
    if off is None or on is None or floor is None or off - floor <= 1e-6:
        return None
    return (off - on) / (off - floor)


def rates(values: Any, missing: str = MISSING) -> list[tuple[str, str]]:
    """uninvited_rate as (label, percentage), in words where the key is known; empty when there is none."""
    found: list[tuple[str, str]] = []
    for key, value in values.items() if isinstance(values, Mapping) else ():
        kind, _, condition = str(key).rpartition("_")
        known = kind in UNINVITED and condition in _SUFFIXES
        found.append((f"{UNINVITED[kind]}, {_SUFFIXES[condition]}" if known else str(key), percent(value, missing)))
    return found


def durations(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Seconds by stage as (stage, "48.3 s" or "2 min 41 s")."""
    rows = []
    for key, value in values.items():
        s = measured(value)
        text = MISSING if s is None else f"{s:.1f} s" if s < 100 else f"{int(s) // 60} min {int(s) % 60:02d} s"
        rows.append((str(key), text))
    return rows


def _align(rows: list[list[str]]) -> list[str]:
    """Rows of equal length as lines, first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _persons_block(split: str, rows: Mapping[str, Any]) -> list[str]:
    table = [["", "ID-ACC mean", "[95%]", "max", "faces", "Attr-ACC", "joint success"]]
    short = "n/m"
    for key in conditions_of(rows):
        row = rows[key]
        table.append(
            [
                f"  {CONDITIONS.get(key, key)}",
                number(row.get("id_acc_mean"), missing=short),
                interval(row.get("ci95")),
                number(row.get("id_acc_max"), missing=short),
                percent(row.get("face_rate"), short),
                number(row.get("attr_acc"), missing=short),
                percent(row.get("joint_success"), short),
            ]
        )
    for key in ("off", "on"):
        paper = paper_figures.beside(split, key) or {}
        table.append(
            [
                f"  {paper_figures.LABEL}, {key}",
                number(paper.get("id_acc_mean")),
                "",
                number(paper.get("id_acc_max")),
                "",
                number(paper.get("attr_acc"), missing=""),
                "",
            ]
        )
    first = next((rows[key] for key in conditions_of(rows)), {})
    persons, images = first.get("n_persons"), first.get("n_images")
    count = f" ({persons} persons, {images} pictures per row)" if measured(persons) and measured(images) else ""
    return [f"{SPLITS.get(split, split)}{count}", *_align(table), ""]


def _drift_block(drift: Mapping[str, Any]) -> list[str]:
    table = [["", "latents", "pixels", "of two seeds"]]
    for kind, title in DRIFT.items():
        row = drift.get(kind)
        if not isinstance(row, Mapping):
            continue
        base = measured(row.get("two_seeds"))
        table.append([f"  {title}", "", "", ""])
        for key, label in DRIFT_CONDITIONS.items():
            if key == "phrase" and row.get(key) is None:
                continue
            value = measured(row.get(key))
            share = percent(value / base, "") if value is not None and base else "n/m"
            table.append(
                [f"    {label}", number(value, missing="n/m"), number(row.get(f"pixel_{key}"), missing="n/m"), share]
            )
        rates = [
            f"{percent(row[f'face_rate_{key}'], 'n/m')} {key}" for key in ("off", "on") if f"face_rate_{key}" in row
        ]
        if rates:
            table.append([f"    pictures with a face: {', '.join(rates)}", "", "", ""])
    if len(table) == 1:
        return []
    return ["Drift: how far pictures move that should not", *_align(table), ""]


def score_table(scores: Mapping[str, Any]) -> str:
    """scores.json as an aligned table: persons by split and condition, the paper's SD v1.5 rows, drift.

    Missing blocks are left out, missing values read "n/m" (not measured).
    """
    persons = scores.get("persons")
    lines: list[str] = []
    for split in SPLITS:
        rows = get(persons, split)
        if conditions_of(rows):
            lines += _persons_block(split, rows)
    named = [(label, constant(scores, key)) for key, label in CONSTANTS.items()]
    marks = [f"{label} {number(value)}" for label, value in named if value is not None]
    way = way_to_description(scores)
    if way is not None:
        marks.append(f"unseen persons went {percent(way)} of the way from name to description")
    if marks:
        lines += ["ID-ACC: lower is less recognisable", *(f"  {mark}" for mark in marks), ""]
    drift = scores.get("drift")
    if isinstance(drift, Mapping):
        lines += _drift_block(drift)
    uninvited = rates(scores.get("uninvited_rate"), "n/m")
    if uninvited:
        table = [["", "share"], *([f"  {label}", value] for label, value in uninvited)]
        lines += ["Pictures that show somebody nobody asked for", *_align(table), ""]
    if not lines:
        return f"Scores: {MISSING}.\n"
    if any("n/m" in line for line in lines):
        lines.append(f"n/m = {MISSING}")
    return "\n".join(lines).rstrip() + "\n"
