"""What the page starts, as the arguments of `apl`: the very lines that "Copy as command" shows."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .runs import read_settings

PRESETS = Path(__file__).resolve().parents[1] / "presets"
MINIATURE = "miniature"
ASSETS = PRESETS.parent / "miniworld" / "assets"
FOR_MINIATURE = ("fast", "miniature", "miniature-guided", "miniature-pseudo")
ORDER = ("fast", "miniature", "miniature-guided", "miniature-pseudo", "sd15-fast", "sd15-8gb", "sd15-guided",
         "sd15-pseudo", "sd15-paper", "paper")


@dataclass(frozen=True)
class Preset:
    """A shipped preset: `about` is the comment at its top, `steps` and `levels` what it sets."""

    name: str
    about: str
    steps: int
    levels: int


def presets() -> list[Preset]:
    """The shipped presets, those for beginners first."""
    found = []
    for path in PRESETS.glob("*.yaml"):
        lines = path.read_text(encoding="utf-8").splitlines()
        about = " ".join(line.lstrip("# ").strip() for line in lines[: _comments(lines)])
        values = read_settings(path)
        found.append(Preset(path.stem, about, int(values.get("steps", 20_000)), int(values.get("levels_every", 2000))))
    return sorted(found, key=lambda p: (ORDER.index(p.name) if p.name in ORDER else len(ORDER), p.name))


def presets_for(found: Sequence[Preset], checkpoint: str) -> list[str]:
    """Names of the presets made for a checkpoint: those for the miniature, or those for a full-size model."""
    small = [p.name for p in found if p.name in FOR_MINIATURE]
    return small if checkpoint == MINIATURE else [p.name for p in found if p.name not in small]


def _comments(lines: Sequence[str]) -> int:
    return next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))


@dataclass(frozen=True)
class Wish:
    """What the first screen asks for.

    Attributes:
        s_id, s_reg: folders, "miniature", or "" for sets that the checkpoint is to draw.
        steps: 0 for the preset's.
        people: table of persons to draw, "" for the one that ships; `limit` of them, 0 for all.
        each, neutral: pictures of each person, and of things and unnamed persons.
        score: unseen persons, and as many seen ones, that `make` scores.
    """

    name: str = "anonymize"
    checkpoint: str = MINIATURE
    s_id: str = MINIATURE
    s_reg: str = MINIATURE
    preset: str = "fast"
    steps: int = 0
    previews: int = 4
    people: str = ""
    limit: int = 0
    each: int = 4
    neutral: int = 400
    score: int = 16


def train(wish: Wish, run: Path) -> list[str]:
    """`apl train` for a wish. Fewer steps than the preset's still save five levels."""
    words = ["train", "--preset", wish.preset, "--run", str(run), "--name", wish.name, "--base_model",
             wish.checkpoint, "--s_id", wish.s_id, "--s_reg", wish.s_reg, "--previews", str(wish.previews)]
    if wish.steps:
        every = max(1, wish.steps // 5)
        words += ["--steps", str(wish.steps), "--levels_every", str(every),
                  "--save_every", str(max(1, min(50, every)))]
    return words


def make(wish: Wish, run: Path, embeddings: Path, host: Path | None) -> list[str]:
    """`apl make`: everything from the checkpoint to the installed prefix."""
    words = ["make", "--run", str(run), "--checkpoint", wish.checkpoint, "--name", wish.name, "--preset", wish.preset,
             "--embeddings", str(embeddings), "--previews", str(wish.previews), "--score_persons",
             str(wish.score)]
    words += ["--host", json.dumps([str(host)])] if host else []
    words += ["--steps", str(wish.steps)] if wish.steps else []
    if wish.s_id:
        return [*words, "--s_id", str(shipped(wish.s_id, "s_id")), "--s_reg", str(shipped(wish.s_reg, "s_reg"))]
    return [*words, *_drawn(wish), "--each", str(wish.each), "--neutral", str(wish.neutral)]


def generate(wish: Wish, run: Path) -> list[list[str]]:
    """`apl generate` for both sets, into `<run>/s_id` and `<run>/s_reg`."""
    model = ["--base-model", wish.checkpoint]
    if wish.checkpoint == MINIATURE:
        model += ["--steps", "20", "--guidance", "3.0", "--recogniser", MINIATURE]
    people = ["--people", wish.people or (MINIATURE if wish.checkpoint == MINIATURE else "public")]
    limit = ["--limit", str(wish.limit)] if wish.limit else []
    return [["generate", "id", "--out", str(run / "s_id"), *model, *people, *limit, "--each", str(wish.each)],
            ["generate", "reg", "--out", str(run / "s_reg"), *model, *people, "--count", str(wish.neutral)]]


def _drawn(wish: Wish) -> list[str]:
    return [*(["--people", wish.people] if wish.people else []), *(["--limit", str(wish.limit)] if wish.limit else [])]


def shipped(value: str, kind: str) -> Path:
    """The folder of a set: "miniature" is the shipped one."""
    return ASSETS / kind if value == MINIATURE else Path(value).expanduser()


def validate(wish: Wish) -> list[str]:
    sets = [word for flag, value in (("--s_id", wish.s_id), ("--s_reg", wish.s_reg)) if value for word in (flag, value)]
    return ["validate", *sets]


def score(file: Path, checkpoint: str, out: Path) -> list[str]:
    return ["score", "--prefix", str(file), "--base-model", checkpoint, "--out", str(out)]


def resume(run: Path) -> list[str]:
    return ["resume", str(run)]


def publish(file: Path, out: Path, title: str, author: str, licence: str, description: str) -> list[str]:
    words = ["publish", str(file), "--out", str(out), "--title", title]
    for flag, value in (("--author", author), ("--license", licence), ("--description", description)):
        words += [flag, value] if value else []
    return words


def use(file: Path, folders: Sequence[Path], name: str) -> list[str]:
    return ["use", str(file), "--name", name, "--into", *map(str, folders)]


def shown(arguments: Sequence[str]) -> str:
    """The line to copy into a terminal."""
    return shlex.join(["apl", *arguments])
