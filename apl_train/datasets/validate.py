"""`apl validate`: everything wrong with S_ID and S_Reg, with the row and the way out, before any work is done on them.

Errors are what a training would stop at; warnings are what it would go through with a worse prefix at its end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from apl_core.identity import FaceEmbedder
from apl_core.placement import capacity
from apl_train.datasets.cast import read_cast
from apl_train.datasets.dataset import Dataset, Problem, _has, _words, problems, read_dataset
from apl_train.datasets.generate import FACES

FEW_PERSONS = 20
"""Below this many persons ID-ACC of unseen ones is clearly worse (paper Fig. 8)."""
_LOOK = 32


@dataclass(frozen=True)
class Finding:
    """One thing found: `level` is "error" or "warning", `set` is "S_ID" or "S_Reg"."""

    level: str
    set: str
    problem: Problem

    def __str__(self) -> str:
        return f"{self.level}: {self.set}, {self.problem}"


@dataclass(frozen=True)
class Verdict:
    """All findings, and what the sets hold: pictures by kind, persons."""

    findings: tuple[Finding, ...]
    counts: dict[str, int]

    @property
    def errors(self) -> int:
        return sum(f.level == "error" for f in self.findings)

    def text(self, most: int = 50) -> str:
        """Lines for people."""
        lines = [str(f) for f in self.findings[:most]]
        if len(self.findings) > most:
            lines.append(f"and {len(self.findings) - most} more (--json shows all)")
        held = ", ".join(f"{n} {what}" for what, n in self.counts.items())
        warnings = len(self.findings) - self.errors
        return "\n".join([*lines, f"{held or 'nothing'}: {self.errors} errors, {warnings} warnings"])

    def to_dict(self) -> dict[str, Any]:
        return {"errors": self.errors, "warnings": len(self.findings) - self.errors, "counts": self.counts,
                "findings": [{"level": f.level, "set": f.set, **asdict(f.problem)} for f in self.findings]}


def validate(s_id: Path | None, s_reg: Path | None, *, num_tokens: int = 10,
             tokenize: Callable[[str], list[int]] | None = None, embedder: FaceEmbedder | None = None,
             people: Path | None = None, size: int | None = None,
             progress: Callable[[int, int], None] | None = None) -> Verdict:
    """Look at one set or both.

    Args:
        num_tokens: vectors that captions must leave room for.
        tokenize: the model's tokenizer; None: room is not looked at.
        embedder: counts faces in every picture; None: nobody looks.
        people: a table of persons; those with the split test or final must not be in S_ID.
        size: edge of the model's own pictures in pixels.
        progress: called with (pictures looked at, pictures in all).
    """
    room = capacity(num_tokens)
    found: list[Finding] = []
    sets: dict[str, Dataset] = {}
    for name, folder, expect in (("S_ID", s_id, "id"), ("S_Reg", s_reg, "reg")):
        if folder is None:
            continue
        wrong = problems(folder, expect, encoder_room=(lambda text: room - len(tokenize(text))) if tokenize else None)
        found += [Finding("error", name, p) for p in wrong]
        if not wrong:
            sets[name] = read_dataset(folder, expect=expect)
    counts = _counts(sets)
    held_out = [p.name for p in read_cast(people, descriptions=False) if p.split != "train"] if people else []
    found += [Finding(*f) for f in _between(sets, counts, held_out)]
    for name, dataset in sets.items():
        found += [Finding("warning", name, p) for p in _sizes(dataset, size)]
        if embedder is not None:
            found += [Finding("warning", name, p) for p in _faces(dataset, embedder, progress)]
    return Verdict(tuple(found), counts)


def _counts(sets: dict[str, Dataset]) -> dict[str, int]:
    counts: dict[str, int] = {}
    if "S_ID" in sets:
        counts |= {"pictures of S_ID": len(sets["S_ID"].records),
                   "persons": len({r.name for r in sets["S_ID"].records})}
    if "S_Reg" in sets:
        kinds = Counter(r.kind for r in sets["S_Reg"].records)
        counts |= {"unnamed persons": kinds["face"], "things": kinds["nonface"]}
    return counts


def _between(sets: dict[str, Dataset], counts: dict[str, int], held_out: list[str]) -> list[tuple[str, str, Problem]]:
    """What is wrong with the sets as wholes and between them."""
    found: list[tuple[str, str, Problem]] = []
    if "S_ID" in sets:
        names = dict.fromkeys(r.name for r in sets["S_ID"].records)
        kept = {_words(name): name for name in held_out}
        found += [("error", "S_ID", Problem(0, "name", f"{name} is to be kept for testing.",
                                            "Remove this person from one of the two.")) for name in names
                  if _words(name) in kept]
        if len(names) < FEW_PERSONS:
            found.append(("warning", "S_ID", Problem(0, "name", f"there are {len(names)} persons.",
                                                     "Fewer than 20 teach little about unseen ones (Fig. 8).")))
        for row, record in enumerate(sets["S_Reg"].records if "S_Reg" in sets else (), start=2):
            named = next((n for n in names if _has(_words(record.c1), _words(n))), None)
            if named:
                found.append(("error", "S_Reg", Problem(row, "prompt", f"the prompt names {named}, who is in S_ID.",
                                                        "Remove the row: S_Reg must name none of them.")))
    if "S_Reg" in sets:
        faces, things = counts["unnamed persons"], counts["things"]
        if not things:
            found.append(("error", "S_Reg", Problem(0, "kind", "there is no picture of kind nonface.", "Add things: "
                                                    "without them the prefix shows persons everywhere (Fig. 7).")))
        elif not faces or faces > 3 * things or things > 9 * faces:
            found.append(("warning", "S_Reg", Problem(0, "kind", f"{faces} faces stand against {things} things.",
                                                      "Bring both near a half: each is trained on as often.")))
    return found


def _sizes(dataset: Dataset, size: int | None) -> list[Problem]:
    if size is None:
        return []
    height, width = dataset.images([0]).shape[1:3]
    if (height, width) == (size, size):
        return []
    return [Problem(0, "image", f"pictures are {width} x {height}; the model draws {size} x {size}.",
                    "A prefix learned at another size works worse: resize them.")]


def _faces(dataset: Dataset, embedder: FaceEmbedder, progress: Callable[[int, int], None] | None) -> list[Problem]:
    found, records = [], dataset.records
    for start in range(0, len(records), _LOOK):
        part = range(start, min(start + _LOOK, len(records)))
        for index, faces in zip(part, embedder.faces_of(list(dataset.images(part))), strict=True):
            record, n = records[index], len(faces)
            least, most = FACES[record.kind]
            if not least <= n <= most:
                hint = "Remove or replace it." if record.kind == "id" else "Remove it, or change its kind."
                found.append(Problem(index + 2, "image", f"{record.image} is of kind {record.kind} and shows "
                                                         f"{n or 'no'} face{'s' if n != 1 else ''}.", hint))
        if progress:
            progress(part[-1] + 1, len(records))
    return found
