"""Fig. 6: ID-ACC at the saved levels of one prefix, between the model alone and the finished prefix (sec. 4.5)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apl_core import id_scores
from apl_core.atomic import write_text
from apl_core.errors import ScoreError
from apl_core.id_scores import Interval
from apl_train import shipped
from apl_train.report.charts import sweep_plot
from apl_train.report.svg import standalone
from apl_train.tables.document import figure_folder
from apl_train.tables.evaluation import Evaluation
from apl_train.tables.looks import scores_of
from apl_train.tables.methods import Method, base_method, prefix_method
from apl_train.tables.results import Column, Row, Table
from apl_train.tables.sweeps import SERIES, point
from apl_train.tables.table1 import SPLITS

FIGURE = "levels.svg"


def level_files(prefix: Path) -> dict[int, Path]:
    """Step -> file of the levels beside a prefix, "NAME.step-400.safetensors", without the finished one."""
    found = {}
    for path in prefix.parent.glob(f"{prefix.stem}.step-*.safetensors"):
        step = path.stem.rpartition("-")[2]
        if step.isdigit():
            found[int(step)] = path
    return dict(sorted(found.items()))


def measure(ev: Evaluation) -> Table:
    """Unseen persons at every level. Raises ScoreError where the prefix has no levels beside it."""
    size = ev.settings.size("fig6")
    groups = {s: g for s, g in ev.groups(size).items() if s != "train"} or ev.groups(size)
    file = shipped.prefix_file(ev.settings.prefix)
    levels = level_files(file)
    if not levels:
        raise ScoreError(f"{file.name} has no levels beside it.", "Train with levels_every.", field="prefix")
    methods: dict[int, Method] = {0: base_method(ev.base, "no prefix")}
    methods |= {step: prefix_method(ev.base, str(path), f"step {step}") for step, path in levels.items()}
    methods[max(ev.prompt.meta.steps or 0, max(levels) + 1)] = prefix_method(ev.base, ev.prompt, "finished")
    gallery = ev.tools.gallery([p for g in groups.values() for p in g])
    wanted = [(f"{m.name} {s}", m, ev.camera.subjects(g), range(size.seeds))
              for m in methods.values() for s, g in groups.items()]
    seen = iter(ev.camera.see("fig6", wanted))
    rows, points = [], []
    curves: dict[str, list[Interval]] = {s: [] for s in groups}
    for step in methods:
        values: dict[str, Any] = {}
        for split, group in groups.items():
            scores = scores_of(group, next(seen), gallery)
            mean = id_scores.cluster_bootstrap(scores)
            curves[split].append(mean)
            values |= {f"{split}_mean": mean, f"{split}_max": id_scores.cluster_bootstrap(
                scores, id_scores.person_maxima), f"{split}_faces": id_scores.face_rate(scores)}
            points.append(point(step, mean, SERIES[split]))
        rows.append(Row(f"{step} steps" if step else "no prefix", values))
    path = figure_folder(ev.run, ev.settings.name) / FIGURE
    if ev.processes.main:
        write_text(path, standalone(sweep_plot(points, "optimizer steps")))
    columns = [c for s in groups for c in (Column(f"{s}_mean", f"{SPLITS[s]}: ID-ACC mean"),
                                           Column(f"{s}_max", f"{SPLITS[s]}: max"),
                                           Column(f"{s}_faces", f"{SPLITS[s]}: with a face", 2))]
    return Table("fig6", "Levels of one prefix", "paper Fig. 6", columns, rows,
                 ev.conventions(size, groups, prefix=ev.prefix_words), figures=[path.name],
                 extra={"claims": {"levels-fall": {"value": largest_rise(curves), "n": len(rows)}}})


def largest_rise(curves: Mapping[str, Sequence[Interval]]) -> float:
    """By how much any curve rises from one level to the next, beyond both intervals; 0 where none does."""
    return max((max(0.0, b.lo - a.hi) for curve in curves.values() for a, b in itertools.pairwise(curve)), default=0.0)
