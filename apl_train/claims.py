"""The project's targets and what was measured of them: `benchmarks/claims.json`, written by the commands that measure.

`claim_targets.TARGETS` says what is promised; a row is only ever written by `record`, with the hashes of the shipped
files that it is of. Once one of those has changed, the figure is of something else and counts as not measured.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from apl_core.atomic import storage_error, take_lock, write_json, write_text
from apl_core.errors import APLError, ConfigError, ScoreError
from apl_core.onnx_models import file_hash
from apl_core.prefix import load_prefix
from apl_train import shipped
from apl_train.claim_targets import MEASURED_ON, TARGETS

FILE = Path(__file__).resolve().parent.parent / "benchmarks" / "claims.json"
MARKED = re.compile(r"(<!-- claims: ([^>]*?) -->)\n.*?(<!-- end -->)", re.S)
INTO = "APL_CLAIMS_INTO"
"""Variable naming a file that takes the place of `FILE` for what is recorded, as for one run's table of ratios."""


def holds(bound: str, measured: float | None) -> bool | None:
    """Whether a figure keeps a bound such as "<= 0.2"; None when it was not measured."""
    if measured is None:
        return None
    sign, _, value = bound.partition(" ")
    return measured <= float(value) if sign == "<=" else measured >= float(value)


def read(file: Path | None = None) -> list[dict[str, Any]]:
    """Every target with what is known of it, in the order of `TARGETS`."""
    file = file or FILE
    known = {r["id"]: r for r in json.loads(file.read_text(encoding="utf-8"))} if file.exists() else {}
    now = {kind: _hash(kind) for kind in ("world", "relatives", "sdxl", "prefix")}
    rows = []
    for key in TARGETS:
        row = _blank(key, now)
        if (found := known.get(key)) and found.get("measured_on", {}) == row["measured_on"]:
            row |= {k: found[k] for k in ("measured", "ci95", "n", "holds")}
        rows.append(row)
    return rows


def _blank(key: str, now: Mapping[str, str]) -> dict[str, Any]:
    t = TARGETS[key]
    return {"id": key, "issue": t.issue, "claim": t.claim, "bound": t.bound, "measured": None, "ci95": None, "n": None,
            "command": t.command, "holds": None,
            "measured_on": {kind: now[kind] for kind in MEASURED_ON.get(t.command, ())}}


def _hash(kind: str) -> str:
    """Eight hex digits of what ships as "world", "relatives", "sdxl" or "prefix"; "missing" where it does not."""
    model = shipped.ASSETS / "model"
    files = {"world": [model / "miniature-sd1.safetensors"],
             "relatives": sorted((model / "relatives").glob("*.safetensors")),
             "sdxl": sorted((shipped.ASSETS / "model_xl").glob("*.safetensors"))}
    try:
        if kind == "prefix":  # of its tensors alone: its scores are written into it afterwards
            return load_prefix(shipped.prefix_file(shipped.PREFIX)).content_hash[:8]
        if not files[kind]:
            return "missing"
        return hashlib.sha256("".join(map(file_hash, files[kind])).encode()).hexdigest()[:8]
    except APLError:
        return "missing"


def record(
    found: Mapping[str, tuple[float | None, Sequence[float] | None, int | None]], file: Path | None = None
) -> None:
    """Writes measured figures: id -> (measured, 95% interval or None, n).

    Raises:
        ConfigError: an unknown id. ScoreError: a figure that is not finite. StorageError: the folder cannot be written
            to. Nothing is written then.
    """
    file = file or Path(os.environ.get(INTO) or FILE)
    with _alone(file):
        _write(found, file)


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Waits until no other command writes the file: several measure beside each other, and each writes all rows."""
    lock = file.with_name(f".{file.name}.lock")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = lock.open("a+b")
    except OSError as error:
        raise storage_error(lock, error) from error
    with handle:
        while not take_lock(handle.fileno()):
            time.sleep(0.05)
        yield


def _write(found: Mapping[str, tuple[float | None, Sequence[float] | None, int | None]], file: Path) -> None:
    rows = {r["id"]: r for r in read(file)}
    # a long measurement began before targets were added: their rows are not its own to drop
    others = [r for r in (json.loads(file.read_text(encoding="utf-8")) if file.exists() else []) if r["id"] not in rows]
    for key, (measured, ci95, n) in found.items():
        if key not in TARGETS:
            raise ConfigError(f"claim is {key!r}.", f"Known: {', '.join(TARGETS)}.", field="claim")
        if not all(math.isfinite(v) for v in (measured, *(ci95 or ())) if v is not None):
            raise ScoreError(f"{key} was measured as {measured}, 95% interval {ci95}.",
                             "Measure it on more persons or pictures.", field=key)
        value = None if measured is None else round(float(measured), 5)
        rows[key] |= {"measured": value, "ci95": None if ci95 is None else [round(float(v), 5) for v in ci95], "n": n,
                      "holds": holds(TARGETS[key].bound, value)}
    write_json(file, [*rows.values(), *others])


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The claims as text: what holds, what falls short, what was not run."""
    words = {True: "holds", False: "SHORT", None: "not run"}
    lines = [f"{'claim':72}{'bound':>10}{'measured':>10}  {'95% interval':18}{'n':>6}  state"]
    for r in rows:
        value = "" if r["measured"] is None else f"{r['measured']:.3f}"
        interval = "" if not r["ci95"] else f"[{r['ci95'][0]:.3f}, {r['ci95'][1]:.3f}]"
        lines.append(f"{r['claim']:72}{r['bound']:>10}{value:>10}  {interval:18}{r['n'] or '':>6}  {words[r['holds']]}"
                     f"  ({r['id']})")
    counts = {word: sum(words[r["holds"]] == word for r in rows) for word in words.values()}
    return "\n".join([*lines, ", ".join(f"{n} {word}" for word, n in counts.items())])


def markdown(keys: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of the claims with these ids. Raises ConfigError for an unknown id."""
    known = {r["id"]: r for r in rows}
    words = {True: "holds", False: "**short**", None: "not run"}
    lines = ["| | bound | measured | 95% interval | n | |", "|---|---|---|---|---|---|"]
    for key in keys:
        if key not in known:
            raise ConfigError(f"claim is {key!r}.", f"Known: {', '.join(TARGETS)}.", field="claim")
        r = known[key]
        value = "" if r["measured"] is None else f"{r['measured']:.3f}"
        interval = "" if not r["ci95"] else f"{r['ci95'][0]:.3f} to {r['ci95'][1]:.3f}"
        bound = r["bound"].replace("<=", "≤").replace(">=", "≥")
        lines.append(f"| {r['claim']} | {bound} | {value} | {interval} | {r['n'] or ''} | {words[r['holds']]} |")
    return "\n".join(lines)


def fill(text: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A document with every table between `<!-- claims: ID ... -->` and `<!-- end -->` as the figures are now."""
    return MARKED.sub(lambda m: f"{m[1]}\n{markdown(m[2].split(), rows)}\n{m[3]}", text)


def fill_documents() -> list[Path]:
    """Rewrites the tables of figures in the documents; returns the files that changed."""
    root, changed = FILE.parent.parent, []
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        if (new := fill(text, read())) != text:
            write_text(path, new)
            changed.append(path)
    return changed


def rerun(key: str) -> int:
    """Runs the command that measures a claim; returns its exit code. Raises ConfigError for an unknown id."""
    if key not in TARGETS:
        raise ConfigError(f"claim is {key!r}.", f"Known: {', '.join(TARGETS)}.", field="rerun")
    words = shlex.split(TARGETS[key].command)
    argv = [sys.executable, "-m", "apl_train", *words[1:]] if words[0] == "apl" else [sys.executable, *words[1:]]
    env = {**os.environ, "APL_RECORD_CLAIMS": "1"}  # a test records nothing unless it is run for its figure
    return subprocess.run(argv, cwd=FILE.parent.parent, env=env, check=False).returncode


def record_demo(scores: Mapping[str, Any], seconds: Mapping[str, float]) -> None:
    """The demo's claims: minutes, memory, and its drop of ID-ACC against the shipped prefix's."""
    if not FILE.parent.is_dir() or not seconds.get("train"):
        return
    found: dict[str, tuple[float | None, Sequence[float] | None, int | None]] = {
        "demo-train-minutes": (seconds["train"] / 60, None, 1),
        "demo-memory": (_peak_gb(), None, 1),
    }
    if "APL_BEGAN" in os.environ:
        found["demo-minutes"] = ((time.time() - float(os.environ["APL_BEGAN"])) / 60, None, 1)
    shipped = next(r for r in read() if r["id"] == "on-test")["measured"]
    rows = scores["persons"]["test"]
    if shipped is not None:
        drop = 1 - rows["on"]["id_acc_mean"] / rows["off"]["id_acc_mean"]
        found["demo-drop"] = (drop / (1 - shipped), None, rows["on"]["n_persons"])
    record(found)


def _peak_gb() -> float | None:
    """Most memory that this process held, in GB; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
