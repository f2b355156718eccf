"""What the page starts, as the arguments of `apl`: the very lines that "Copy as command" shows."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .runs import read_settings

PRESETS = Path(__file__).resolve().parents[1] / "presets"
MINIATURE = "miniature"
FOR_MINIATURE = ("fast", "miniature")
ORDER = ("fast", "miniature", "sd15-fast", "sd15-8gb", "sd15-paper", "paper")


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
    """What the first screen asks for. `steps` 0: the preset's; `s_id` and `s_reg`: folders or "miniature"."""

    name: str = "anonymize"
    checkpoint: str = MINIATURE
    s_id: str = MINIATURE
    s_reg: str = MINIATURE
    preset: str = "fast"
    steps: int = 0
    previews: int = 4


def train(wish: Wish, run: Path) -> list[str]:
    """`apl train` for a wish. Fewer steps than the preset's still save five levels."""
    words = ["train", "--preset", wish.preset, "--run", str(run), "--name", wish.name, "--base_model",
             wish.checkpoint, "--s_id", wish.s_id, "--s_reg", wish.s_reg, "--previews", str(wish.previews)]
    if wish.steps:
        every = max(1, wish.steps // 5)
        words += ["--steps", str(wish.steps), "--levels_every", str(every),
                  "--save_every", str(max(1, min(50, every)))]
    return words


def validate(wish: Wish) -> list[str]:
    return ["validate", "--s_id", wish.s_id, "--s_reg", wish.s_reg]


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
