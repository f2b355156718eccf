"""The figures of the report page as text: tiles, one table a split, drift, single figures. From scores.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apl_train.report import paper_figures
from apl_train.report.table import (
    CONDITIONS,
    CONSTANTS,
    DRIFT,
    DRIFT_CONDITIONS,
    MISSING,
    SPLITS,
    conditions_of,
    constant,
    get,
    interval,
    measured,
    number,
    percent,
    rates,
    unseen,
    way_to_description,
)

NONE = "\u2013"
"""Stands where there is nothing to measure; what could have been measured reads "not measured"."""


def split_table(scores: Mapping[str, Any], split: str) -> dict[str, Any] | None:
    """The rows of one split with ours and, where the paper has the same row, the paper's figures."""
    rows = get(scores, "persons", split)
    keys = conditions_of(rows)
    if not keys:
        return None
    table = []
    for key in keys:
        row, paper = rows[key], paper_figures.beside(split, key)
        table.append(
            {
                "key": key,
                "label": CONDITIONS.get(key, key),
                "mean": number(row.get("id_acc_mean")),
                "interval": interval(row.get("ci95")),
                "max": number(row.get("id_acc_max")),
                "faces": percent(row.get("face_rate")),
                "attr": number(row.get("attr_acc")),
                "joint": percent(row.get("joint_success")),
                "paper": [number(paper.get(name), missing=NONE) for name in ("id_acc_mean", "id_acc_max", "attr_acc")]
                if paper
                else None,
            }
        )
    first = rows[keys[0]]
    counts = [first.get("n_persons"), first.get("n_images")]
    note = "{:.0f} persons, {:.0f} pictures per row".format(*counts) if None not in map(measured, counts) else ""
    return {"title": SPLITS[split], "note": note, "rows": table}


def drift_table(scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    blocks = []
    for kind, title in DRIFT.items():
        row = get(scores, "drift", kind)
        if not isinstance(row, Mapping):
            continue
        base = measured(row.get("two_seeds"))
        rows = []
        for key, label in DRIFT_CONDITIONS.items():
            if key == "phrase" and row.get(key) is None:
                continue
            value = measured(row.get(key))
            share = percent(value / base) if value is not None and base else MISSING
            pixels = number(row.get(f"pixel_{key}"))
            rows.append({"key": key, "label": label, "latents": number(value), "pixels": pixels, "share": share})
        faces = [
            f"{percent(row[f'face_rate_{key}'])} with prefix {key}"
            for key in ("off", "on")
            if f"face_rate_{key}" in row
        ]
        count = measured(row.get("n_images"))
        note = f"{count:.0f} pictures" if count is not None else ""
        blocks.append({"title": title, "note": note, "rows": rows, "faces": ", ".join(faces)})
    return blocks


def tiles(scores: Mapping[str, Any]) -> list[dict[str, str]]:
    """The four figures at the top: likeness, share of the way, faces kept, drift."""
    test = get(scores, "persons", unseen(scores)) or {}
    on = get(test, "on") or {}
    bounds = interval(on.get("ci95"))
    tiles = [
        {
            "value": number(on.get("id_acc_mean")),
            "before": number(get(test, "off", "id_acc_mean")),
            "label": "likeness of unseen persons (ID-ACC), before and after",
            "note": f"95% interval {bounds}; lower is less recognisable" if bounds else "lower is less recognisable",
        },
        {
            "value": percent(way_to_description(scores)),
            "label": "of the way from name to bare description",
            "note": f"the description alone gives {number(get(test, 'description', 'id_acc_mean'))}",
        },
        {
            "value": percent(on.get("face_rate")),
            "before": percent(get(test, "off", "face_rate")),
            "label": "pictures that still show a face",
            "note": "a prefix that destroys faces would not count as success",
        },
    ]
    shares = []
    for kind, word in (("unnamed_faces", "unnamed persons"), ("nonfaces", "things")):
        moved, base = (measured(get(scores, "drift", kind, key)) for key in ("on", "two_seeds"))
        shares.append((word, percent(moved / base) if moved is not None and base else MISSING))
    tiles.append(
        {
            "value": shares[1][1],
            "label": "drift of pictures without persons, where two seeds are 100%",
            "note": f"{shares[0][1]} for {shares[0][0]}",
        }
    )
    return tiles


def facts(scores: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The single figures below the tables: marks of ID-ACC, persons recognised at least once, uninvited persons."""
    found = [(f"ID-ACC, {label}", number(constant(scores, key))) for key, label in CONSTANTS.items()]
    for key in ("off", "on"):
        value = get(scores, "persons", unseen(scores), key, "recognised_persons")
        if value is not None:
            found.append((f"Unseen persons recognised in at least one picture, prefix {key}", percent(value)))
    return found + [(f"Pictures showing {label}", value) for label, value in rates(scores.get("uninvited_rate"))]
