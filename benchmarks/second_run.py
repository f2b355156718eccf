"""A second run on a fresh clone: `python benchmarks/second_run.py [--only NAME ...]`

Clones this checkout's last commit into runs/second-run, takes away the figures that came with it, and runs the commands
there that docs/results.md and the README name, one after the other: hours on one core. Then every figure that has a 95%
interval is compared: does what the second run measured lie inside the interval of the first? What is done is kept, so
that the same command goes on; --only names parts. With everything measured and APL_RECORD_CLAIMS=1 it writes its claim.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from apl_train import claims

ROOT = Path(__file__).resolve().parent.parent
TABLES = ("table1", "table2", "table3", "table4", "fig5", "fig6", "fig7", "fig8", "loss")
PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "card": ("benchmarks/miniworld.json", ("miniworld", "card")),
    "prefix": ("benchmarks/prefix.json", ("miniworld", "prefix", "--final")),
    **{t: (f"benchmarks/results/{t}.json", ("evaluate", "--preset", "miniature", "--only", t)) for t in TABLES},
}
"""Name -> file of its figures, and the command of `apl` that measures them."""
SLACK = 1e-9
"""Files keep figures and ends of intervals rounded."""


class Figure(NamedTuple):
    """One figure of a first run with its interval, and what a second run made of it (None: nothing)."""

    where: str
    first: float
    low: float
    high: float
    second: float | None

    @property
    def inside(self) -> bool:
        return self.second is not None and self.low - SLACK <= self.second <= self.high + SLACK


def figures(first: Any, second: Any, where: str = "") -> Iterator[Figure]:
    """Every figure of `first` that has an interval, beside its fellow in `second`.

    Two forms are known: {"value", "lo", "hi"}, and "ci95" (or "ci95_max") beside what it is the interval of:
    id_acc_mean (id_acc_max), or one figure for each of its keys.
    """
    if isinstance(first, list):
        other = second if isinstance(second, list) else []
        for i, row in enumerate(first):
            name = row.get("name", i) if isinstance(row, dict) else i
            yield from figures(row, other[i] if i < len(other) else None, f"{where}/{name}")
    if not isinstance(first, dict):
        return
    other = second if isinstance(second, dict) else {}
    if first.get("lo") is not None and first.get("value") is not None:
        yield Figure(where, first["value"], first["lo"], first["hi"], other.get("value"))
        return
    for ends, key in (("ci95", "id_acc_mean"), ("ci95_max", "id_acc_max")):
        if isinstance(first.get(ends), list) and None not in first[ends] and first.get(key) is not None:
            yield Figure(f"{where}/{key}", first[key], *first[ends], other.get(key))
    if isinstance(first.get("ci95"), dict):
        for key, (low, high) in first["ci95"].items():
            yield Figure(f"{where}/{key}", first[key], low, high, other.get(key))
    for key, value in first.items():
        yield from figures(value, other.get(key), f"{where}/{key}")


def clone(into: Path) -> None:
    """A clone of the last commit without the figures of `PARTS`; one that is there is taken as it is."""
    if (into / ".git").exists():
        return
    if not (ROOT / ".git").exists():
        sys.exit(f"{ROOT} is no git checkout. Clone the repository and start this there.")
    half = into.with_name(f"{into.name}.half")  # one that was cut off would still hold the first run's figures
    shutil.rmtree(half, ignore_errors=True)
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(half)], check=True)
    for file, _ in PARTS.values():
        (half / file).unlink()
    half.rename(into)


def measure(into: Path, name: str) -> None:
    """Runs a part's command in the clone unless its figures are there. Raises CalledProcessError."""
    file, argv = PARTS[name]
    if not (into / file).exists():
        sys.stdout.write(f"--- {name}: apl {' '.join(argv)}\n")
        sys.stdout.flush()
        subprocess.run([sys.executable, "-m", "apl_train", *argv], cwd=into, check=True,
                       env={**os.environ, "PYTHONPATH": str(into.resolve())})


def compared(into: Path, name: str) -> list[Figure]:
    """A part's figures in both runs. Exits where the first ones are no longer those of the clone's commit."""
    file = PARTS[name][0]
    cloned = subprocess.run(["git", "show", f"HEAD:{file}"], cwd=into, check=True, capture_output=True).stdout
    if json.loads(cloned) != json.loads((ROOT / file).read_text(encoding="utf-8")):
        sys.exit(f"{file} was measured again after {into} was cloned. Remove that folder and start once more.")
    first, second = (json.loads((root / PARTS[name][0]).read_text(encoding="utf-8")) for root in (ROOT, into))
    return list(figures(first, second))


def show(found: dict[str, list[Figure]]) -> str:
    """A line for every part, and one for every figure that lies outside."""
    lines = [f"{'part':10}{'figures':>8}{'equal':>8}{'inside':>8}{'outside':>8}"]
    for name, rows in found.items():
        out = [f for f in rows if not f.inside]
        lines.append(f"{name:10}{len(rows):8}{sum(f.first == f.second for f in rows):8}{len(rows) - len(out):8}"
                     f"{len(out):8}")
        lines += [f"    {f.where[1:]}: {'nothing' if f.second is None else f'{f.second:.4f}'}, first {f.first:.4f} "
                  f"[{f.low:.4f}, {f.high:.4f}]" for f in out]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, default=Path("runs/second-run"), help="folder of the clone")
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    args = parser.parse_args()
    clone(args.into)
    for name in args.only:
        measure(args.into, name)
    found = {name: compared(args.into, name) for name in args.only}
    sys.stdout.write(f"\n{show(found)}\n")
    every = [f for rows in found.values() for f in rows]
    outside = sum(not f.inside for f in every)
    if os.environ.get("APL_RECORD_CLAIMS") and set(found) == set(PARTS):
        claims.record({"second-run": (outside, None, len(every))})
    return int(outside > 0)


if __name__ == "__main__":
    sys.exit(main())
