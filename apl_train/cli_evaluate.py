"""`apl evaluate`: the paper's tables and figures as commands; `cli.py` parses and tells, this file only asks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

Tell = Callable[[Namespace, dict[str, Any], str], None]


def add_options(p: ArgumentParser) -> None:
    """The options of `apl evaluate`."""
    p.add_argument("--preset", type=str, default="miniature",
                   help='"miniature", "sd15", or a .yaml file of that form: models, persons, measuring models, sizes')
    p.add_argument("--only", type=str, default="",
                   help="tables, such as table1,fig6 (table1 to table4, fig5 to fig8, loss); all by default")
    p.add_argument("--run", type=Path, default=None,
                   help="folder of what is done already; the same command goes on there (runs/evaluate/PRESET)")
    p.add_argument("--docs", action="store_true",
                   help="write docs/results.md; without --only from the results that are there, measuring nothing")


def run(args: Namespace, tell: Tell) -> None:
    """Measures, writes benchmarks/results/TABLE.json, and tells as it goes."""
    from apl_train.tables import command

    speaks = os.environ.get("RANK", "0") == "0"

    def say(text: str) -> None:
        if speaks:  # tables appear as they are done, beside the one JSON object where that was asked for
            print(text, file=sys.stderr if args.json else sys.stdout, flush=True)

    found = command.run(args.preset, args.only, args.run, docs=args.docs, say=say)
    where = found.get("document")
    tell(args, found, f"wrote {where}" if where else "the document: apl evaluate --docs")
