"""`apl demo`: train a prefix on the shipped miniature world, score it on persons it never met, and write the report.

The same trainer, files and scores that a full-size model uses; only the paths are the miniature's. A second run reuses
the training and everything that does not depend on the prefix.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np

from apl_core.atomic import write_json
from apl_core.errors import APLError
from apl_core.identity import load_embedder
from apl_core.prefix import AnonymizationPrompt, load_prefix
from apl_train import config as configs
from apl_train import shipped
from apl_train.backend import Backend
from apl_train.evaluate import evaluate
from apl_train.events import read_events
from apl_train.persons import EvaluationSet, read_evaluation_set
from apl_train.report import LevelsRow, Pair, PersonRow, Report, write_report
from apl_train.scoring import StageBars, attribute_reader
from apl_train.table import score_table
from apl_train.training import resume, train

NAME = "anonymize-miniature"
SHOWN = 8
"""Unseen persons in the report."""
LEVEL_PERSONS, LEVEL_SEEDS = 16, 2
_log = logging.getLogger("apl.demo")


class _Album:
    """Pictures that the evaluation hands over while it runs: (stage, subject) -> pictures by seed."""

    def __init__(self) -> None:
        self.pictures: dict[tuple[str, str], list[np.ndarray]] = {}

    def __call__(self, stage: str, subject: str, _k: int, image: np.ndarray) -> None:
        self.pictures.setdefault((stage, subject), []).append(image)

    def of(self, stage: str, subject: str) -> np.ndarray:
        return np.stack(self.pictures[stage, subject])


def _prefix(run: Path, backend: Backend, steps: int | None, cache: Path) -> tuple[AnonymizationPrompt, float]:
    """The run's prefix, trained now unless it is there; and the seconds that took."""
    path, began = run / "prefix" / f"{NAME}.safetensors", time.monotonic()
    if path.exists():
        return load_prefix(path), 0.0
    if (run / "config.yaml").exists():
        return resume(run, backend=backend, cache=cache), time.monotonic() - began
    values = configs.preset("fast") | {"name": NAME} | ({"steps": steps} if steps else {})
    return train(run, configs.from_dict(values), backend=backend, cache=cache), time.monotonic() - began


def _levels(run: Path, backend: Backend, people: EvaluationSet, embedder: Any, cache: Path,
            bars: StageBars) -> tuple[list[dict[str, Any]], dict[int, _Album]]:
    """ID-ACC of unseen persons at every saved level, and the levels' pictures."""
    scores, albums = [], {}
    bare = dataclasses.replace(people, neutral=())
    files = {int(p.stem.rpartition("-")[2]): p for p in (run / "prefix").glob(f"{NAME}.step-*.safetensors")}
    for step, path in sorted(files.items()):
        albums[step] = _Album()
        found = evaluate(backend, load_prefix(path), bare, embedder, splits=("test",), conditions=("off", "on"),
                         persons_limit=LEVEL_PERSONS, seeds=LEVEL_SEEDS, cache=cache, keep_images=albums[step],
                         keep_limit=SHOWN,
                         progress=lambda stage, done, total, step=step: bars(f"level {step} {stage}", done, total))
        row = found["persons"]["test"]["on"]
        scores.append({"step": step, "id_acc_mean": row["id_acc_mean"], "lo": row["ci95"][0], "hi": row["ci95"][1]})
    return scores, albums


def _pairs(album: _Album, kind: str, prompts: list[str]) -> list[Pair]:
    return [Pair(p, album.of(f"{kind}/off", p)[0], album.of(f"{kind}/on", p)[0]) for p in prompts
            if (f"{kind}/off", p) in album.pictures and (f"{kind}/on", p) in album.pictures]


def run_demo(run: Path, *, steps: int | None = None, persons: int = 16, seeds: int = 4) -> tuple[dict[str, Any], str]:
    """Everything in one go; returns scores.json and what the terminal shows.

    Writes `<run>/prefix/*.safetensors`, `scores.json` and `report.html`. Raises APLError.
    """
    seconds: dict[str, float] = {}
    cache = run.parent / "cache"
    began = time.monotonic()
    backend = Backend.load(shipped.locate("base_model", shipped.MINIATURE))
    people = read_evaluation_set(shipped.locate("persons", shipped.MINIATURE))
    embedder = load_embedder(shipped.recogniser(shipped.MINIATURE))
    attributes = attribute_reader(shipped.MINIATURE)
    seconds["load"] = time.monotonic() - began
    prompt, seconds["train"] = _prefix(run, backend, steps, cache)

    bars, album = StageBars(), _Album()
    began = time.monotonic()
    try:
        scores = evaluate(backend, prompt, people, embedder, attributes, splits=("train", "test"), seeds=seeds,
                          persons_limit=persons, neutral_limit=persons, cache=cache, progress=bars, keep_images=album,
                          keep_limit=max(SHOWN, persons))
        seconds["score"] = time.monotonic() - began
        began = time.monotonic()
        level_scores, albums = _levels(run, backend, people, embedder, cache, bars)
        seconds["levels"] = time.monotonic() - began
    finally:
        bars.close()
    on = scores["persons"]["test"]["on"]
    level_scores.append({"step": prompt.meta.steps, "id_acc_mean": on["id_acc_mean"],
                         "lo": on["ci95"][0], "hi": on["ci95"][1]})

    began = time.monotonic()
    test = people.of_split("test", SHOWN)
    prefix_path = run / "prefix" / f"{NAME}.safetensors"
    rows = [PersonRow(p.name, p.description, album.of("test/off", p.name), album.of("test/on", p.name),
                      album.of("test/description", p.name)) for p in test]
    strip = [LevelsRow(p.name, np.stack([album.of("test/off", p.name)[0],
                                         *(a.of("test/on", p.name)[0] for a in albums.values()),
                                         album.of("test/on", p.name)[0]])) for p in test[:4]]
    things = [p.prompt for p in people.of_kind("nonface", 8)]
    unnamed = [p.prompt for p in people.of_kind("unnamed_face", 8)]
    scores["seconds"] |= {f"demo {k}": round(v, 1) for k, v in seconds.items()}
    report = Report(
        title="Anonymization Prompt Learning, demonstrated", prefix_path=str(prefix_path),
        prefix_hash=prompt.content_hash, model_name=backend.name, scores=scores, events=read_events(run),
        level_scores=level_scores, persons=rows, levels=strip,
        level_labels=["off", *(f"step {s}" for s in albums), f"step {prompt.meta.steps}"],
        neutral=_pairs(album, "unnamed_faces", unnamed), nonfaces=_pairs(album, "nonfaces", things), seconds=seconds,
        commands=_next_steps(prefix_path),
    )
    write_report(run / "report.html", report)
    seconds["report"] = time.monotonic() - began
    write_json(run / "scores.json", scores)
    _record(scores, seconds)
    text = "\n".join([score_table(scores), "", f"report:  {run / 'report.html'}   (open it in a browser)",
                      f"prefix:  {prefix_path}", f"scores:  {run / 'scores.json'}", "", "next:",
                      *(f"  {command}\n      {what}" for what, command in _next_steps(prefix_path))])
    return scores, text


def _next_steps(prefix: Path) -> list[tuple[str, str]]:
    return [
        ("draw your own prompts without and with the prefix",
         f'apl sample --prefix {prefix} --prompt "a portrait of a woman"'),
        ("measure it on all persons, with a second recogniser", f"apl score --prefix {prefix} --recogniser miniature2"),
        ("train one with other settings", "apl train --run runs/mine --alpha 2 --num_tokens 5"),
        ("see what the file says of itself", f"apl inspect {prefix}"),
    ]


def _record(scores: dict[str, Any], seconds: dict[str, float]) -> None:
    """The demo's own claims, where this is the full-length demo of a checkout."""
    from apl_train import claims

    try:
        claims.record_demo(scores, seconds)
    except APLError as error:
        _log.info("the demo's claims were not recorded: %s", error)
