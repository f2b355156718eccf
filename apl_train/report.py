"""One HTML file that shows what a prefix does: pictures, curves, figures with intervals, and what it does not show.

The page holds everything (pictures as data URIs, charts as SVG, no scripts) and opens offline. Jinja2 escapes every
text in it; a Content-Security-Policy forbids scripts and addresses besides: a hostile name or prompt stays text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from apl_core import atomic
from apl_core.errors import ScoreError

from . import charts, grids, paper_figures, svg
from .table import (
    CONDITIONS,
    CONSTANTS,
    DRIFT,
    DRIFT_CONDITIONS,
    MISSING,
    SPLITS,
    conditions_of,
    constant,
    durations,
    get,
    interval,
    measured,
    number,
    percent,
    rates,
    unseen,
    way_to_description,
)

TEMPLATES = Path(__file__).with_name("templates")
NONE = "\u2013"
"""Stands where there is nothing to measure; what could have been measured reads "not measured"."""
LARGEST = 256
"""Longest edge in pixels of an embedded picture; larger ones are reduced."""
SHOWN = 128
"""Edge in CSS pixels at which square pictures are shown, on screens wide enough."""


@dataclass(frozen=True)
class PersonRow:
    """One person's pictures at k equal seeds; off, on, described: uint8 [k, H, W, 3]."""

    name: str
    description: str
    off: np.ndarray
    on: np.ndarray
    described: np.ndarray

    def __post_init__(self) -> None:
        for key in ("off", "on", "described"):
            _check(f"{key} of {self.name}", getattr(self, key), 4)
            if len(getattr(self, key)) != len(self.off):
                raise ScoreError(
                    f"{key} of {self.name} has {len(getattr(self, key))} pictures, off has {len(self.off)}.",
                    "Sample the same seeds for all three.",
                    field=key,
                )


@dataclass(frozen=True)
class LevelsRow:
    """One person at one seed over the levels; images: uint8 [levels, H, W, 3], labels in `Report.level_labels`."""

    name: str
    images: np.ndarray

    def __post_init__(self) -> None:
        _check(f"levels of {self.name}", self.images, 4)


@dataclass(frozen=True)
class Pair:
    """A prompt that names nobody, without and with the prefix at one seed; off, on: uint8 [H, W, 3]."""

    prompt: str
    off: np.ndarray
    on: np.ndarray

    def __post_init__(self) -> None:
        for key in ("off", "on"):
            _check(f"{key} of {self.prompt}", getattr(self, key), 3)


@dataclass(frozen=True)
class Report:
    """All that the page shows.

    Args:
        title: heading of the page.
        prefix_path, prefix_hash: the prefix file as the user would type it, and its content hash.
        model_name: the model the pictures were made with.
        scores: scores.json.
        events: training events; "step" events (step, l_id, l_reg) make the curves, others are ignored.
        level_scores: dicts with step, id_acc_mean, lo, hi of unseen persons.
        persons, levels, neutral, nonfaces: the pictures.
        level_labels: one label per picture of a LevelsRow.
        seconds: what took how long, in order.
        commands: (what it does, command) for what to do next.
        miniature: the pictures come from the shipped miniature world; False leaves its limits out.

    Raises:
        ScoreError: level labels and level pictures do not match in number.
    """

    title: str
    prefix_path: str
    prefix_hash: str
    model_name: str
    scores: Mapping[str, Any]
    events: list[dict[str, Any]] = field(default_factory=list)
    level_scores: list[dict[str, Any]] = field(default_factory=list)
    persons: list[PersonRow] = field(default_factory=list)
    levels: list[LevelsRow] = field(default_factory=list)
    level_labels: list[str] = field(default_factory=list)
    neutral: list[Pair] = field(default_factory=list)
    nonfaces: list[Pair] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    commands: list[tuple[str, str]] = field(default_factory=list)
    miniature: bool = True

    def __post_init__(self) -> None:
        for row in self.levels:
            if len(row.images) != len(self.level_labels):
                raise ScoreError(
                    f"{row.name} has {len(row.images)} levels for {len(self.level_labels)} labels.",
                    'Give one label per level, "off" included.',
                    field="level_labels",
                )


def _check(what: str, images: Any, dimensions: int) -> None:
    good = (
        isinstance(images, np.ndarray)
        and images.dtype == np.uint8
        and images.ndim == dimensions
        and images.shape[-1] == 3
    )
    if not good or 0 in images.shape:
        found = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
        shape = "[k, H, W, 3]" if dimensions == 4 else "[H, W, 3]"
        raise ScoreError(
            f"{what} is {found}, not uint8 {shape}.", "Give RGB pictures as the sampler returns them.", field="images"
        )


def _picture(image: np.ndarray, alt: str) -> dict[str, Any]:
    """What the template needs for one `<img>`: at most `LARGEST` pixels embedded, at most `SHOWN` shown."""
    small = grids.fit(image, LARGEST)
    height, width = small.shape[:2]
    scale = min(1.0, SHOWN / max(height, width))
    return {"src": grids.data_uri(small), "alt": alt, "width": round(width * scale), "height": round(height * scale)}


def _person(row: PersonRow) -> dict[str, Any]:
    parts = (
        ("off", "prefix off", row.off),
        ("on", "prefix on", row.on),
        ("description", "description alone", row.described),
    )
    strips = [
        {
            "key": key,
            "label": label,
            "images": [_picture(image, f"{row.name}, {label}, seed {i + 1}") for i, image in enumerate(images)],
        }
        for key, label, images in parts
    ]
    return {"name": row.name, "description": row.description, "strips": strips, "k": len(row.off)}


def _pair(pair: Pair) -> dict[str, Any]:
    return {
        "prompt": pair.prompt,
        "off": _picture(pair.off, f"{pair.prompt}, prefix off"),
        "on": _picture(pair.on, f"{pair.prompt}, prefix on"),
    }


def _split_table(scores: Mapping[str, Any], split: str) -> dict[str, Any] | None:
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


def _drift_table(scores: Mapping[str, Any]) -> list[dict[str, Any]]:
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


def _tiles(scores: Mapping[str, Any]) -> list[dict[str, str]]:
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


def _facts(scores: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The single figures below the tables: marks of ID-ACC, persons recognised at least once, uninvited persons."""
    found = [(f"ID-ACC, {label}", number(constant(scores, key))) for key, label in CONSTANTS.items()]
    for key in ("off", "on"):
        value = get(scores, "persons", unseen(scores), key, "recognised_persons")
        if value is not None:
            found.append((f"Unseen persons recognised in at least one picture, prefix {key}", percent(value)))
    return found + [(f"Pictures showing {label}", value) for label, value in rates(scores.get("uninvited_rate"))]


def _context(report: Report) -> dict[str, Any]:
    """All that the template uses, as text that Jinja2 will escape; only the charts are markup."""
    from markupsafe import Markup

    scores = report.scores
    chart = {
        "loss": Markup(charts.loss_curves(report.events)),
        "levels": Markup(charts.id_acc_levels(report.level_scores, scores)),
        "conditions": Markup(charts.conditions(scores)),
        "drift": Markup(charts.drift(scores)),
    }
    settings = scores.get("settings")
    return {
        "report": report,
        "chart": chart,
        "palette": svg.PALETTE,
        "missing": MISSING,
        "dash": NONE,
        "paper_label": paper_figures.LABEL,
        "tiles": _tiles(scores),
        "persons": [_person(row) for row in report.persons],
        "levels": [
            {
                "name": row.name,
                "images": [
                    _picture(image, f"{row.name}, {label}")
                    for image, label in zip(row.images, report.level_labels, strict=True)
                ],
            }
            for row in report.levels
        ],
        "pairs": [
            (title, [_pair(pair) for pair in pairs])
            for title, pairs in (("Persons without a name", report.neutral), ("No person at all", report.nonfaces))
            if pairs
        ],
        "tables": [table for table in (_split_table(scores, split) for split in SPLITS) if table],
        "drift": _drift_table(scores),
        "facts": _facts(scores),
        "seconds": durations(report.seconds),
        "paper": paper_figures,
        "number": number,
        "hashes": [(str(k), str(v)) for k, v in (scores.get("hashes") or {}).items() if v],
        "settings": [(str(k), str(v)) for k, v in settings.items()] if isinstance(settings, Mapping) else [],
    }


def render(report: Report) -> str:
    """The page as text; the same report gives the same text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(TEMPLATES)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template("report.html").render(_context(report))
    return text.encode("utf-8", "replace").decode("utf-8")  # a path that is not UTF-8 must not spoil the page


def write_report(path: Path, report: Report) -> None:
    """Write the page as one self-contained HTML file, atomically. Raises `StorageError`."""
    atomic.write_text(path, render(report))
