"""Likeness against drift, the trade that a prefix makes: `python benchmarks/drift_trade.py [--only NAME ...]`

Trains the miniature with the preset `fast`, one setting changed a row, and judges each prefix on S_test and on prompts
that name nobody; the shipped prefix, random vectors of its norms and hand-written words stand beside them. Four minutes
a row on one core; rows are added to benchmarks/results/drift_trade.json, trainings in --runs are reused. --docs writes
the table and the figure of docs/miniworld.md from there.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from apl_core.atomic import write_json, write_text
from apl_core.prefix import AnonymizationPrompt, load_prefix
from apl_train import shipped
from apl_train.miniworld.card import Bench
from apl_train.report import svg
from apl_train.training import config
from apl_train.training.command import train

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "benchmarks" / "results" / "drift_trade.json"
DOCS = ROOT / "docs" / "miniworld.md"
FIGURE = ROOT / "docs" / "figures" / "drift-trade.svg"
MARKED = re.compile(r"(<!-- drift trade -->)\n.*?(<!-- end -->)", re.S)
PHRASE = "anyone but"
"""The best hand-written words (`apl miniworld prefix` chooses them on S_ID)."""
SETTINGS: dict[str, dict[str, Any]] = {
    "reg_weight 1": {"reg_weight": 1.0},
    "reg_weight 2 (preset)": {},
    "reg_weight 4": {"reg_weight": 4.0},
    "reg_weight 8": {"reg_weight": 8.0},
    "reg_weight 3, two thirds faces": {"reg_weight": 3.0, "face_share": 0.67},
    "reg_weight 4, half of the names written otherwise": {"reg_weight": 4.0, "name_noise": 0.5},
    "reg_weight 3, from neutral words": {"reg_weight": 3.0, "init_text": "in bright colours, sharp focus"},
}
BOUND = 0.2
"""The bound on either axis: a fifth of the base's ID-ACC, a fifth of the distance of two seeds."""


def trained(name: str, args: argparse.Namespace) -> AnonymizationPrompt:
    """The prefix of one row, learned now unless it was before."""
    run = args.runs / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    values = config.preset("fast") | {"name": "trade", "bank": 4096, "levels_every": 0} | SETTINGS[name]
    path = run / "prefix" / "trade.safetensors"
    return load_prefix(path) if path.exists() else train(run, config.from_dict(values), cache=args.cache)


def judged(bench: Bench, prompt: AnonymizationPrompt | None, condition: str = "on") -> dict[str, Any]:
    """ID-ACC over the base's and drift over two seeds', each with its interval."""
    options = {"phrase": PHRASE} if condition == "phrase" else {}
    scores = bench.evaluate(prompt, splits=("test",), conditions=("off", condition), seeds=2, **options)
    row = scores["persons"]["test"][condition]
    return {"ratio": row["ratio_to_off"], "joint_success": row["joint_success"], "persons": row["n_persons"],
            "pictures": row["n_images"],
            **{kind: scores["drift"][kind]["ratio_to_two_seeds"][condition] for kind in scores["drift"]}}


def measure(bench: Bench, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row; "shipped", "random" and the words are no trainings."""
    ships = load_prefix(shipped.prefix_file(shipped.PREFIX))
    if name in ("shipped prefix", "random vectors"):
        return judged(bench, ships, "on" if name == "shipped prefix" else "random")
    return judged(bench, None, "phrase") if name == f'"{PHRASE}"' else judged(bench, trained(name, args))


NAMES = (*SETTINGS, "shipped prefix", "random vectors", f'"{PHRASE}"')


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown, in the order of `NAMES`."""
    def cell(value: Mapping[str, float]) -> str:
        return f"{value['value']:.3f} ({value['lo']:.2f} to {value['hi']:.2f})"

    lines = ["| | ID-ACC / base's, S_test | drift of unnamed faces | drift of things |", "|---|---|---|---|"]
    lines += [f"| {NAMES.index(name) + 1}: {name} | {cell(row['ratio'])} | {cell(row['unnamed_faces'])} | "
              f"{cell(row['nonfaces'])} |" for name in NAMES if (row := rows.get(name))]
    return "\n".join(lines)


def figure(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Drift of unnamed faces against ID-ACC, with what the bounds leave shaded."""
    def plot(axes: Any) -> None:
        axes.fill_between([0, BOUND], 0, BOUND, color=svg.colour("description"), alpha=0.15, linewidth=0)
        for number, name in ((i, n) for i, n in enumerate(NAMES, 1) if n in rows):
            kind = {"shipped prefix": "off", "random vectors": "random", f'"{PHRASE}"': "phrase"}.get(name, "on")
            x, y = rows[name]["unnamed_faces"], rows[name]["ratio"]
            axes.errorbar(x["value"], y["value"], xerr=[[x["value"] - x["lo"]], [x["hi"] - x["value"]]],
                          yerr=[[y["value"] - y["lo"]], [y["hi"] - y["value"]]], fmt=svg.marker(kind),
                          color=svg.colour(kind), markersize=5, linewidth=0.7, alpha=0.9)
            axes.annotate(str(number), (x["value"], y["value"]), xytext=(5, 4), textcoords="offset points", fontsize=9)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("drift of unnamed faces / two seeds")
        axes.set_ylabel("ID-ACC / base's")

    title = "ID-ACC against drift of unnamed faces; shaded: what the bounds leave"
    return svg.standalone(svg.draw("trade", title, plot))


def write_docs() -> None:
    rows = json.loads(FILE.read_text(encoding="utf-8"))
    write_text(FIGURE, figure(rows))
    text = DOCS.read_text(encoding="utf-8")
    write_text(DOCS, MARKED.sub(lambda m: f"{m[1]}\n{table(rows)}\n{m[2]}", text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--runs", type=Path, default=Path("runs/drift-trade"))
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"))
    parser.add_argument("--docs", action="store_true", help=f"only write table and figure of {DOCS.name}")
    args = parser.parse_args()
    if not args.docs:
        torch.set_num_threads(1)
        bench = Bench(args.cache)
        for name in args.only:
            found = measure(bench, name, args)
            known = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
            write_json(FILE, known | {name: found})
            sys.stdout.write(f"{table({name: found}).splitlines()[-1]}\n")
            sys.stdout.flush()
    write_docs()


if __name__ == "__main__":
    main()
