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
from apl_train.report import charts, grids, paper_figures, svg
from apl_train.report.figures import NONE, drift_table, facts, split_table, tiles
from apl_train.report.table import MISSING, SPLITS, durations, number

TEMPLATES = Path(__file__).parent.parent / "templates"
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
        "tiles": tiles(scores),
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
        "tables": [table for table in (split_table(scores, split) for split in SPLITS) if table],
        "drift": drift_table(scores),
        "facts": facts(scores),
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
