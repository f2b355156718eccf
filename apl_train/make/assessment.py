"""A trained run measured and shown: scores of the prefix and of its levels, and report.html with the pictures.

Step run folder -> scores and report. The demo and `apl make` end here, with any model and any persons to score.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from apl_core.atomic import write_json
from apl_core.prefix import AnonymizationPrompt, load_prefix
from apl_train.model.backend import Backend
from apl_train.processes import this_process
from apl_train.report.page import LevelsRow, Pair, PersonRow, Report, write_report
from apl_train.scoring.command import StageBars
from apl_train.scoring.evaluate import evaluate
from apl_train.scoring.persons import EvaluationSet
from apl_train.training.events import read_events

SHOWN = 8
"""Unseen persons in the report."""
LEVEL_PERSONS, LEVEL_SEEDS = 16, 2


class Album:
    """Pictures that the evaluation hands over while it runs: (stage, subject) -> pictures by seed."""

    def __init__(self) -> None:
        self.pictures: dict[tuple[str, str], list[np.ndarray]] = {}

    def __call__(self, stage: str, subject: str, _k: int, image: np.ndarray) -> None:
        self.pictures.setdefault((stage, subject), []).append(image)

    def of(self, stage: str, subject: str) -> np.ndarray:
        return np.stack(self.pictures[stage, subject])


@dataclass(frozen=True)
class Assessment:
    """What a run is measured with.

    Attributes:
        run: folder of the training; out: where scores.json and report.html go.
        embedder, attributes: see `evaluate`.
        persons, seeds: unseen persons, and as many of S_ID, and pictures of each; train_seeds: of those of S_ID, if
            not as many.
        steps, guidance: of the sampler.
        title: of the report.
        commands: (what it does, command) for what to do next.
        miniature: whether the pictures are of the shipped world.
        seconds: what took how long before, in order; for the report.
    """

    run: Path
    out: Path
    backend: Backend
    prompt: AnonymizationPrompt
    people: EvaluationSet
    embedder: Any
    attributes: Any
    cache: Path
    persons: int = 16
    seeds: int = 4
    train_seeds: int | None = None
    steps: int = 20
    guidance: float = 3.0
    title: str = "Anonymization Prompt Learning, demonstrated"
    commands: Sequence[tuple[str, str]] = ()
    miniature: bool = True
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def prefix_path(self) -> Path:
        return self.run / "prefix" / f"{self.prompt.meta.title}.safetensors"

    def measure(self) -> dict[str, Any]:
        """Scores and writes both files; returns scores.json. Raises APLError."""
        bars, album = StageBars(), Album()
        sampler = {"steps": self.steps, "guidance": self.guidance}
        began = time.monotonic()
        try:
            scores = evaluate(self.backend, self.prompt, self.people, self.embedder, self.attributes,
                              splits=("train", "test"), seeds=self.seeds, train_seeds=self.train_seeds,
                              persons_limit=self.persons, neutral_limit=self.persons, cache=self.cache, progress=bars,
                              keep_images=album, keep_limit=max(SHOWN, self.persons), **sampler)
            self.seconds["score"] = time.monotonic() - began
            began = time.monotonic()
            level_scores, albums = self._levels(bars, sampler)
            self.seconds["levels"] = time.monotonic() - began
        finally:
            bars.close()
        on = scores["persons"]["test"]["on"]
        level_scores.append({"step": self.prompt.meta.steps, "id_acc_mean": on["id_acc_mean"],
                             "lo": on["ci95"][0], "hi": on["ci95"][1]})
        began = time.monotonic()
        scores["seconds"] |= {f"demo {k}": round(v, 1) for k, v in self.seconds.items()}
        if this_process().main:
            write_report(self.out / "report.html", self._report(scores, level_scores, album, albums))
            self.seconds["report"] = time.monotonic() - began
            write_json(self.out / "scores.json", scores)
        return scores

    def _levels(self, bars: StageBars, sampler: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[int, Album]]:
        """ID-ACC of unseen persons at every saved level, and the levels' pictures."""
        scores, albums = [], {}
        bare = dataclasses.replace(self.people, neutral=())
        name = self.prompt.meta.title
        files = {int(p.stem.rpartition("-")[2]): p for p in (self.run / "prefix").glob(f"{name}.step-*.safetensors")}
        for step, path in sorted(files.items()):
            albums[step] = Album()
            found = evaluate(self.backend, load_prefix(path), bare, self.embedder, splits=("test",),
                             conditions=("off", "on"), persons_limit=min(LEVEL_PERSONS, self.persons),
                             seeds=min(LEVEL_SEEDS, self.seeds), cache=self.cache, keep_images=albums[step],
                             keep_limit=SHOWN, **sampler,
                             progress=lambda stage, done, total, step=step: bars(f"level {step} {stage}", done, total))
            row = found["persons"]["test"]["on"]
            scores.append({"step": step, "id_acc_mean": row["id_acc_mean"], "lo": row["ci95"][0],
                           "hi": row["ci95"][1]})
        return scores, albums

    def _report(self, scores: dict[str, Any], level_scores: list[dict[str, Any]], album: Album,
                albums: dict[int, Album]) -> Report:
        test = self.people.of_split("test", min(SHOWN, self.persons))
        rows = [PersonRow(p.name, p.description, album.of("test/off", p.name), album.of("test/on", p.name),
                          album.of("test/description", p.name)) for p in test]
        strip = [LevelsRow(p.name, np.stack([album.of("test/off", p.name)[0],
                                             *(a.of("test/on", p.name)[0] for a in albums.values()),
                                             album.of("test/on", p.name)[0]])) for p in test[:4]]
        things = [p.prompt for p in self.people.of_kind("nonface", 8)]
        unnamed = [p.prompt for p in self.people.of_kind("unnamed_face", 8)]
        return Report(
            title=self.title, prefix_path=str(self.prefix_path), prefix_hash=self.prompt.content_hash,
            model_name=self.backend.name, scores=scores, events=read_events(self.run), level_scores=level_scores,
            persons=rows, levels=strip,
            level_labels=["off", *(f"step {s}" for s in albums), f"step {self.prompt.meta.steps}"],
            neutral=_pairs(album, "unnamed_faces", unnamed), nonfaces=_pairs(album, "nonfaces", things),
            seconds=self.seconds, commands=list(self.commands), miniature=self.miniature,
        )


def _pairs(album: Album, kind: str, prompts: list[str]) -> list[Pair]:
    return [Pair(p, album.of(f"{kind}/off", p)[0], album.of(f"{kind}/on", p)[0]) for p in prompts
            if (f"{kind}/off", p) in album.pictures and (f"{kind}/on", p) in album.pictures]


def next_steps(prefix: Path, base_model: str = "miniature") -> list[tuple[str, str]]:
    """What one may do with a fresh prefix: (what it does, command)."""
    model = "" if base_model == "miniature" else f" --base-model {base_model}"
    found = [
        ("draw your own prompts without and with the prefix",
         f'apl sample --prefix {prefix}{model} --prompt "a portrait of a woman"'),
        ("see what the file says of itself", f"apl inspect {prefix}"),
    ]
    if base_model == "miniature":
        found[1:1] = [
            ("measure it on all persons, with a second recogniser",
             f"apl score --prefix {prefix} --recogniser miniature2"),
            ("train one with other settings", "apl train --run runs/mine --alpha 2 --num_tokens 5"),
        ]
    return found
