"""`apl baselines`: rival methods on the miniature model, tuned, measured, drawn.

`cli.py` parses and tells, this file only asks and calls.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

Tell = Callable[[Namespace, dict[str, Any], str], None]


def add_options(parsers: dict[str, ArgumentParser]) -> None:
    """The options of this command."""
    p = parsers["baselines"]
    p.add_argument("--method", type=str, nargs="+", default=["all"],
                   help='one or more of: negative-prompt, esd, uce, ca, fmn, speed, semantic-surgery, sld; or "all"')
    p.add_argument("--persons", type=int, default=12, help="listed persons to picture, and as many unseen ones")
    p.add_argument("--seeds", type=int, default=2, help="pictures of each person")
    p.add_argument("--tune-only", action="store_true", help="stop after the grid of settings")
    p.add_argument("--cache", type=Path, default=Path("runs/cache"), help="keeps what the model's own pictures show")
    p.add_argument("--work", type=Path, default=Path("runs/baselines"), help="folder for rows of the picture")
    p.add_argument("--results", type=Path, default=None,
                   help="results to go on with; benchmarks/results/baselines.json by default")


def baselines(args: Namespace, tell: Tell) -> None:
    """`apl baselines`. Claims and picture are written when every method was measured with the project's own results."""
    from apl_train import claims
    from apl_train.baselines import BASELINES
    from apl_train.baselines.comparison import RESULTS, Comparison, Plan, settle, table
    from apl_train.baselines.strips import Strips

    names = list(BASELINES) if args.method == ["all"] else [n for n in args.method if BASELINES[n]]
    results = args.results or RESULTS
    comparison = Comparison(Plan(args.persons, args.seeds), cache=args.cache, results=results,
                            say=lambda text: print(text, file=sys.stderr, flush=True))
    if args.tune_only:
        found = {name: dict(comparison.tune(name)[0]) for name in names}
        tell(args, found, "\n".join(f"{name}: {settings}" for name, settings in found.items()))
        return
    strips = Strips(comparison, args.work)
    for name in names:
        comparison.method(name, strips.take)
    for name in ("base", "apl"):
        comparison.reference(name, strips.take)
    every = ["base", *BASELINES, "apl"]
    methods = {n: comparison.state["methods"][n] for n in every if n in comparison.state["methods"]}
    text = table({**comparison.state, "methods": methods})
    if results == RESULTS and len(methods) == len(every):
        claims.record(settle(methods))
        if not strips.missing(every):
            path = strips.picture(methods, claims.FILE.parent.parent / "docs" / "figures" / "baselines.png")
            text += f"\n\nwrote {path}"
    tell(args, {**comparison.state, "methods": methods}, f"{text}\n\nwrote {results}")
