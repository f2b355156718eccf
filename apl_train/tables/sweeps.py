"""Tables 3 and 4 and Fig. 8: ID-ACC over the prompt length m, the weight alpha, and the number of persons learned from.

All trainings of a sweep share one target bank, so a point costs the prefixed prediction only (equation 5's target does
not depend on the prefix). One setting changes at a time; everything else is the training preset's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from apl_core import id_scores
from apl_core.atomic import write_text
from apl_core.errors import ConfigError
from apl_core.id_scores import Interval
from apl_train.report import paper_figures
from apl_train.report.charts import sweep_plot
from apl_train.report.svg import standalone
from apl_train.tables.document import figure_folder
from apl_train.tables.evaluation import Evaluation
from apl_train.tables.looks import scores_of
from apl_train.tables.methods import prefix_method
from apl_train.tables.results import Column, Row, Table
from apl_train.tables.table1 import SPLITS
from apl_train.tables.trained import trained

SERIES = {"train": "persons trained on", "test": "unseen persons", "final": "persons kept for last"}


@dataclass(frozen=True)
class Sweep:
    """One setting of a training, swept."""

    key: str
    title: str
    place: str
    field: str
    label: str
    figure: str
    paper: tuple[paper_figures.SweepRow, ...] = ()
    whole: bool = True


SWEEPS = {
    "table3": Sweep("table3", "Prompt length", "paper Table 3", "num_tokens", "m, vectors of the prefix",
                    "num_tokens.svg", paper_figures.TABLE_3),
    "table4": Sweep("table4", "Weight alpha of equation 5", "paper Table 4", "alpha", "alpha", "alpha.svg",
                    paper_figures.TABLE_4, whole=False),
    "fig8": Sweep("fig8", "Number of persons trained on", "paper Fig. 8", "persons", "persons trained on",
                  "persons.svg"),
}


def measurer(key: str) -> Callable[[Evaluation], Table]:
    """The table's function."""
    return lambda ev: measure(ev, SWEEPS[key])


def measure(ev: Evaluation, sweep: Sweep) -> Table:
    """Trains what is missing, point by point, and scores it.

    Raises:
        ConfigError: the preset names no values, or one that the training refuses.
    """
    size = ev.settings.size(sweep.key)
    if not size.values:
        raise ConfigError(f"{sweep.key} has no values to sweep.", f"Give sizes.{sweep.key}.values.", field="values")
    groups = ev.groups(size)
    gallery = ev.tools.gallery([p for g in groups.values() for p in g])
    everybody = len(ev.tools.people.of_split("train"))
    rows, points = [], []
    for value in size.values:
        setting: Any = int(value) if sweep.whole and float(value).is_integer() else float(value)
        changed = None if sweep.field == "persons" and setting == everybody else setting
        method = prefix_method(ev.base, trained(ev, size, **{sweep.field: changed}), f"{sweep.field} {value:g}")
        seen = ev.camera.see(f"{sweep.key} {value:g}", [
            (f"{method.name} {split}", method, ev.camera.subjects(group), range(size.seeds))
            for split, group in groups.items()])
        values: dict[str, Any] = {}
        for (split, group), one in zip(groups.items(), seen, strict=True):
            scores = scores_of(group, one, gallery)
            mean = id_scores.cluster_bootstrap(scores)
            values |= {f"{split}_mean": mean, f"{split}_max": id_scores.cluster_bootstrap(
                scores, id_scores.person_maxima), f"{split}_faces": id_scores.face_rate(scores)}
            points.append(point(float(value), mean, SERIES[split]))
        rows.append(Row(f"{value:g}", values, _paper(sweep, float(value))))
    path = figure_folder(ev.run, ev.settings.name) / sweep.figure
    if ev.processes.main:
        write_text(path, standalone(sweep_plot(points, sweep.label)))
    columns = [c for s in groups for c in (Column(f"{s}_mean", f"{SPLITS[s]}: ID-ACC mean"),
                                           Column(f"{s}_max", f"{SPLITS[s]}: max"),
                                           Column(f"{s}_faces", f"{SPLITS[s]}: with a face", 2))]
    training = f"preset {ev.settings.preset}, {size.steps} steps, bank {size.bank}"
    return Table(sweep.key, sweep.title, sweep.place, columns, rows,
                 ev.conventions(size, groups, training=training, swept=sweep.field), figures=[path.name])


def point(x: float, mean: Interval, series: str) -> dict[str, Any]:
    """A point of a plot, as `charts.sweep_plot` takes it."""
    return {"x": x, "id_acc_mean": mean.value, "lo": mean.lo, "hi": mean.hi, "series": series}


def _paper(sweep: Sweep, value: float) -> dict[str, float]:
    row = next((r for r in sweep.paper if r.value == value), None)
    if row is None:
        return {}
    return {"train_mean": row.train.mean, "train_max": row.train.max, "test_mean": row.test.mean,
            "test_max": row.test.max}
