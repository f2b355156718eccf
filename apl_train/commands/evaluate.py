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
                   help='"miniature", or a .yaml file that says models, persons, measuring models and sizes; "sd15" is '
                        "one to copy and to write your own paths into (docs/evaluate.md)")
    p.add_argument("--only", type=str, default="",
                   help="some, such as table1,fig6: table1 (models), table2 (side effects, rivals), table3 (m), "
                        "table4 (alpha), fig5 (DreamBooth), fig6 (levels), fig7 (no S_Reg), fig8 (persons), loss "
                        "(equation 5 against the released code's); all by default")
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
