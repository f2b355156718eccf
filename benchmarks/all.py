"""All benchmarks in one command, and one table of ratios measured side by side in this run: `python benchmarks/all.py`

Every part is a program of its own in this folder, started one after the other; what it measures goes into a table apart
from benchmarks/claims.json, which changes only with APL_RECORD_CLAIMS=1. Parts that need something which is not here (a
checkout, a host) say so and are skipped. --only names parts, --list shows them; a part's own output is shown.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from apl_core.atomic import write_json
from apl_train import claims

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


@dataclass(frozen=True)
class Part:
    """One benchmark: `argv` of its program, `what` it compares, `by_itself` False where it is not started unasked."""

    argv: tuple[str, ...]
    what: str
    by_itself: bool = True


PARTS: dict[str, Part] = {
    "flops": Part(("step_cost.py", "flops"), "FLOPs of a step, SD1.5: ours, the paper's code, diffusers', the floor"),
    "flops-sdxl": Part(("step_cost_sdxl.py",), "FLOPs of a step, SDXL"),
    "seconds": Part(("step_cost.py", "seconds"), "seconds of a step, miniature: ours, emulated loops of others"),
    "loops": Part(("published_loops.py",), "seconds of a step: others' own loops, from their checkouts"),
    "memory": Part(("step_memory.py",), "memory of a step, SD1.5 at full size"),
    "samples": Part(("samples_to_target.py", "--quick"), "samples until likeness has fallen: ours, the paper's"),
    "encode": Part(("encode_cost.py",), "an encode with and without the prefix"),
    "transfer": Part(("transfer_cost.py", "agree"), "transfer to another family: closed form, the published search"),
    "scoring": Part(("scoring_cost.py",), "scoring: ours, the paper's test_id.py"),
    "processes": Part(("two_processes.py",), "one process and two: generation, scoring"),
    "comfyui": Part(("comfyui_cost.py",), "import and encode inside ComfyUI (COMFYUI_DIR)", by_itself=False),
    "webui": Part(("webui_cost.py",), "import and encode inside a WebUI (WEBUI_DIR)", by_itself=False),
}


def run_part(name: str, folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """(how it went, rows of what it measured)."""
    part = PARTS[name]
    script = HERE / part.argv[0]
    if not script.is_file():
        return f"skipped: there is no benchmarks/{part.argv[0]} here", []
    into = folder / f"{name}.json"
    env = {**os.environ, "APL_RECORD_CLAIMS": "1", claims.INTO: str(into), "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    done = subprocess.run([sys.executable, str(script), *part.argv[1:]], cwd=ROOT, env=env, check=False)
    took = f"{time.monotonic() - began:.0f} s"
    rows = [row for row in claims.read(into) if row["measured"] is not None] if into.exists() else []
    if done.returncode:
        return f"failed with exit code {done.returncode} after {took}", rows
    return took if rows else f"{took}, nothing measured", rows


def show(found: dict[str, tuple[str, list[dict[str, Any]]]]) -> str:
    """The table of ratios."""
    lines = [f"{'part':12}{'ratio':84}{'measured':>9}  bound"]
    for name, (state, rows) in found.items():
        lines += [f"{name:12}{r['claim'][:83]:84}{r['measured']:9.3f}  {r['bound']}{'' if r['holds'] else '  SHORT'}"
                  for r in rows] or [f"{name:12}{state}"]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=None)
    parser.add_argument("--list", action="store_true", help="show the parts and stop")
    parser.add_argument("--json", type=Path, default=None, help="write the rows of this run to a file")
    args = parser.parse_args()
    if args.list:
        for name, part in PARTS.items():
            sys.stdout.write(f"{name:12}{part.what}{'' if part.by_itself else ' (only with --only)'}\n")
        return 0
    found: dict[str, tuple[str, list[dict[str, Any]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only or [name for name, part in PARTS.items() if part.by_itself]:
            sys.stdout.write(f"--- {name}: {PARTS[name].what}\n")
            sys.stdout.flush()
            found[name] = run_part(name, Path(folder))
    sys.stdout.write(f"\n{show(found)}\n")
    rows = [row for _, of_part in found.values() for row in of_part]
    if args.json:
        write_json(args.json, {"rows": rows, "parts": {name: state for name, (state, _) in found.items()}})
    if os.environ.get("APL_RECORD_CLAIMS"):
        claims.record({r["id"]: (r["measured"], r["ci95"], r["n"]) for r in rows})
    return int(any(state.startswith("failed") for state, _ in found.values()))


if __name__ == "__main__":
    sys.exit(main())
