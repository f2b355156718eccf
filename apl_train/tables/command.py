"""`apl evaluate`: the paper's tables and figures, one by one, on the miniature world or on real weights.

Every table is made of cells that are stored as they are done, so that the same command goes on where it was
interrupted; `accelerate launch -m apl_train evaluate ...` divides them among processes.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from apl_core.errors import ConfigError, ScoreError
from apl_train import claims
from apl_train.tables import document, results
from apl_train.tables.evaluation import Evaluation
from apl_train.tables.results import Table
from apl_train.tables.settings import TABLES, EvaluateSettings, check_there, read_settings
from apl_train.training.command import ctrl_c

Measure = Callable[[Evaluation], Table]
_WHERE = {"table1": ("table1", "measure"), "table2": ("table2", "measure"), "fig5": ("newcomers", "measure"),
          "fig6": ("levels", "measure"), "fig7": ("regularisation", "measure"),
          "loss": ("regularisation", "measure_loss")}


def measure_of(table: str) -> Measure:
    """The function that makes a table. Raises ConfigError for an unknown one."""
    from apl_train.tables import sweeps

    if table in sweeps.SWEEPS:
        return sweeps.measurer(table)
    if table not in _WHERE:
        raise ConfigError(f"only has {table!r}.", f"Use some of: {', '.join(TABLES)}.", field="only")
    module, name = _WHERE[table]
    return getattr(importlib.import_module(f"apl_train.tables.{module}"), name)


def chosen_tables(only: str) -> list[str]:
    """The tables of a list such as "table1,fig6", in the order of the paper; all for "". Raises ConfigError."""
    wanted = [word.strip() for word in only.split(",") if word.strip()]
    for word in wanted:
        if word not in TABLES:
            raise ConfigError(f"only has {word!r}.", f"Use some of: {', '.join(TABLES)}.", field="only")
    return [table for table in TABLES if table in wanted or not wanted]


def evaluate_tables(settings: EvaluateSettings, run: Path, only: Sequence[str], *, say: Callable[[str], None],
                    quiet: bool = False, stop: Callable[[], bool] | None = None) -> dict[str, Any]:
    """Makes the tables, writes their JSON, and records the claims that they settle; returns file and JSON by table.

    Raises:
        TrainingStopped: `stop()` said so; what is done is kept. Else what a table raises.
    """
    ev = Evaluation(settings, run, stop=stop, quiet=quiet)
    where = results.folder(run)
    found: dict[str, Any] = {}
    for key in only:
        began = time.monotonic()
        table = measure_of(key)(ev)
        as_json = table.to_dict(settings.name, results.command(settings.name, key))
        path = results.file_of(where, key, settings.name)
        if ev.processes.main:
            results.write(table, where, settings.name)
            if settings.name == "miniature":
                record(table.extra.get("claims", {}))
        found[key] = {"file": str(path), **as_json}
        say(f"{results.text(as_json)}\n  wrote {path} after {time.monotonic() - began:.0f} s; "
            f"{ev.runner.skipped} cells were there, {ev.runner.done} were done\n")
    return found


def record(found: Mapping[str, Mapping[str, Any]]) -> None:
    """The claims of a table that are known to the project and were measured."""
    if not claims.FILE.parent.is_dir():
        return
    known = {key: (row["value"], row.get("ci95"), row.get("n")) for key, row in found.items()
             if key in claims.TARGETS and row.get("value") is not None}
    if known:
        claims.record(known)


def run(preset: str, only: str, folder: Path | None, *, docs: bool, say: Callable[[str], None],
        quiet: bool = False) -> dict[str, Any]:
    """The command. Settings are checked before a model is loaded.

    Raises:
        ConfigError: an unknown preset or table, or files that are not here. ScoreError: --docs where there are no
            results.
    """
    tables = chosen_tables(only)
    settings = read_settings(preset)
    folder = folder or Path("runs/evaluate") / settings.name
    if docs and not only:
        where = results.folder(folder)
        if not where.is_dir() or not list(where.glob("*.json")):
            raise ScoreError(f"{where} holds no results.", f"Run `apl evaluate --preset {preset}` first.",
                             field="docs")
        return {"document": str(document.write(where))}
    check_there(settings, tables)
    with ctrl_c(patient=True) as asked:
        found = evaluate_tables(settings, folder, tables, say=say, quiet=quiet, stop=asked.is_set)
    if docs:
        found["document"] = str(document.write(results.folder(folder)))
    return found
