"""The rows of benchmarks/beyond.py as a table, on the terminal and in docs/beyond.md."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apl_core.atomic import write_text

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "benchmarks" / "results" / "beyond.json"
DOCS = ROOT / "docs" / "beyond.md"
MARKED = re.compile(r"(<!-- beyond: rows -->)\n.*?(<!-- end -->)", re.S)
WORDS = {"plain": "`fast`, shorter", "start-uniform": "start off the manifold, as the released code",
         "start-vocabulary": "start at random words, as `paper`", "separability": "timesteps by separability",
         "guided": "half of S_ID judged under guidance 3 to 12", "suffix": "suffix", "both": "prefix + suffix",
         "names": "half of the names written otherwise"}
HEAD = ("| setting | ID-ACC / base's | 95% interval | Attr-ACC / base's | faces | drift of things | drift of faces |\n"
        "|---|---|---|---|---|---|---|")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _line(label: str, found: Mapping[str, Any]) -> str:
    ratio = found["ratio"]
    cells = (label, _number(ratio["value"]), f"{ratio['lo']:.3f} to {ratio['hi']:.3f}", _number(found["attributes"]),
             _number(found["faces"]), _number(found.get("drift_nonfaces")), _number(found.get("drift_unnamed_faces")))
    return f"| {' | '.join(cells)} |"


def _strength(found: Mapping[str, Any]) -> list[str]:
    points = found["points"]
    return ["| strength | " + " | ".join(f"{p['strength']:g}" for p in points) + " |",
            "|---|" + "---|" * len(points),
            "| ID-ACC / base's | " + " | ".join(_number(p["ratio"]) for p in points) + " |",
            "| ID-ACC, 95% interval | " + " | ".join(f"{p['lo']:.3f} to {p['hi']:.3f}" for p in points) + " |",
            "| drift of things | " + " | ".join(_number(p.get("drift_nonfaces")) for p in points) + " |",
            "| drift of faces | " + " | ".join(_number(p.get("drift_unnamed_faces")) for p in points) + " |"]


def _pseudo(found: Mapping[str, Any]) -> list[str]:
    lines = [f"{found['taught']} newcomers taught by {found['taught_steps']} steps of DreamBooth; prefixes of "
             f"{found['steps']} steps, {found['identities']} pseudo-identities in S_ID.", "",
             "| bound to | before | taught | `fast` | falls by | `miniature-pseudo` | falls by |",
             "|---|---|---|---|---|---|---|"]
    for word, row in found["by_word"].items():
        cells = [_number(row["before"]), _number(row["off"])]
        for name in ("plain", "pseudo"):
            fall = row[f"fall_{name}"]
            cells += [_number(row[name]), f"{fall['value']:.0%} [{fall['lo']:.0%}, {fall['hi']:.0%}]"]
        lines.append(f"| {word} | " + " | ".join(cells) + " |")
    words = found["words"]
    return [*lines, "", f"Similarity of pictures to the face that a pseudo-identity's word was learned from: "
                        f"{words['word']:.3f}; of its description alone: {words['description']:.3f}."]


def table(rows: Mapping[str, Any], names: Sequence[str] | None = None) -> str:
    """Markdown of the rows that are there."""
    there = [n for n in (names or rows) if n in rows]
    parts: list[str] = []
    trained = [n for n in WORDS if n in there]
    if trained:
        steps = sorted({rows[n]["steps"] for n in trained})
        parts.append("\n".join([f"{' and '.join(map(str, steps))} steps of 8 samples; "
                                f"{rows[trained[0]]['persons']} persons, {rows[trained[0]]['pictures']} pictures.", "",
                                HEAD, *(_line(WORDS[n], rows[n]) for n in trained)]))
        noisy = [n for n in trained if "written_otherwise" in rows[n]]
        if noisy:
            parts.append("\n".join(["| names written otherwise | ID-ACC off | on | on / off |", "|---|---|---|---|",
                                    *(f"| {WORDS[n]} | {_number(w['off'])} | {_number(w['on'])} | "
                                      f"{_number(w['ratio'])} |"
                                      for n in noisy for w in [rows[n]["written_otherwise"]])]))
    if "strength" in there:
        parts.append("\n".join(_strength(rows["strength"])))
    if "joint" in there:
        found = rows["joint"]
        parts.append("\n".join([HEAD, *(_line(f"learned on {'one model' if name == 'plain' else 'two'}, drawn with "
                                              f"{'it' if where == 'first' else found['second_model']}",
                                              found[f"{name}_on_{where}"])
                                        for name in ("plain", "joint") for where in ("first", "second"))]))
    if "pseudo" in there:
        parts.append("\n".join([*_pseudo(rows["pseudo"]), "", HEAD,
                                _line("`miniature-pseudo`", rows["pseudo"])]))
    return "\n\n".join(parts)


def write_docs() -> bool:
    """Brings docs/beyond.md up to date with the measured rows; whether it changed."""
    rows = json.loads(FILE.read_text(encoding="utf-8"))
    text = DOCS.read_text(encoding="utf-8")
    new = MARKED.sub(lambda m: f"{m[1]}\n{table(rows)}\n{m[2]}", text)
    if new != text:
        write_text(DOCS, new)
    return new != text
