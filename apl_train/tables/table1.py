"""Table 1: ID-ACC, mean and max, of several models without and with one prefix, on seen and unseen persons (sec. 4.2).

Any number of models: a line each in the preset. A model whose file is missing leaves a row that says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apl_core import id_scores
from apl_core.errors import APLError, TrainingStopped
from apl_core.id_scores import Interval
from apl_train.model.backend import Backend
from apl_train.report import paper_figures
from apl_train.tables.evaluation import Evaluation
from apl_train.tables.looks import scores_of
from apl_train.tables.methods import Method, base_method, prefix_method
from apl_train.tables.results import Column, Row, Table
from apl_train.tables.settings import ModelEntry

SPLITS = {"train": "S_ID", "test": "S_test", "final": "kept for last"}


def columns(splits: tuple[str, ...]) -> list[Column]:
    """ID-ACC mean and max and the face rate by split."""
    return [column for split in splits for column in (
        Column(f"{split}_mean", f"{SPLITS[split]}: ID-ACC mean"), Column(f"{split}_max", f"{SPLITS[split]}: max"),
        Column(f"{split}_faces", f"{SPLITS[split]}: with a face", 2))]


def paper_values(entry: ModelEntry, condition: str) -> dict[str, float]:
    """The paper's row of the model that an entry stands for; nothing where it stands for none."""
    row = next((r for r in paper_figures.TABLE_1 if r.model == entry.paper), None)
    if row is None:
        return {}
    cells = row.off if condition == "off" else row.on
    return {f"{split}_{what}": getattr(cell, what) for split, cell in cells.items() for what in ("mean", "max")}


def measure(ev: Evaluation) -> Table:
    """Samples, recognises and aggregates: within a person first, then over persons."""
    size = ev.settings.size("table1")
    groups = ev.groups(size)
    people = [person for group in groups.values() for person in group]
    gallery = ev.tools.gallery(people)
    rows: list[Row] = []
    ratios: dict[str, dict[str, Interval]] = {}
    for entry in ev.settings.models or (ModelEntry(ev.settings.checkpoint, ev.settings.checkpoint),):
        try:
            pair = _pair(ev, entry, ev.backend(entry.checkpoint))
            wanted = [(f"{entry.name} {condition} {split}", method, ev.camera.subjects(group), range(size.seeds))
                      for condition, method in pair.items() for split, group in groups.items()]
            seen = iter(ev.camera.see(f"table1 {entry.name}", wanted))
        except TrainingStopped:
            raise
        except APLError as error:  # this model only: the others' rows are worth having
            rows += [Row(f"{entry.name}{end}", {}, paper_values(entry, condition), f"not run: {error.message}")
                     for condition, end in (("off", ""), ("on", " + APL"))]
            continue
        scores = {(condition, split): scores_of(group, next(seen), gallery)
                  for condition in pair for split, group in groups.items()}
        for condition, end in (("off", ""), ("on", " + APL")):
            values: dict[str, Any] = {}
            for split in groups:
                own = scores[condition, split]
                values[f"{split}_mean"] = id_scores.cluster_bootstrap(own)
                values[f"{split}_max"] = id_scores.cluster_bootstrap(own, id_scores.person_maxima)
                values[f"{split}_faces"] = id_scores.face_rate(own)
            rows.append(Row(f"{entry.name}{end}", values, paper_values(entry, condition)))
        ratios[entry.name] = {split: id_scores.paired_bootstrap(scores["off", split], scores["on", split]).ratio
                              for split in groups}
    return Table(
        "table1", "Identity accuracy by model", "paper Table 1", columns(tuple(groups)), rows,
        ev.conventions(size, groups) | {"prefix": ev.prefix_words}, _notes(ratios),
        extra={"ratio_on_to_off": {name: {split: [r.value, r.lo, r.hi] for split, r in by.items()}
                                   for name, by in ratios.items()}})


def _pair(ev: Evaluation, entry: ModelEntry, backend: Backend) -> Mapping[str, Method]:
    return {"off": base_method(backend), "on": prefix_method(backend, entry.prefix or ev.settings.prefix)}


def _notes(ratios: Mapping[str, Mapping[str, Interval]]) -> list[str]:
    return [f"{name}: with the prefix ID-ACC is {r.value:.3f} of the model's own on {SPLITS[split]} "
            f"(95% interval {r.lo:.3f} to {r.hi:.3f} over persons)."
            for name, by in ratios.items() for split, r in by.items()]
