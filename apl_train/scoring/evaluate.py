"""Scoring a prefix: ID-ACC, face rate, Attr-ACC, joint success, drift and uninvited persons, as one JSON-ready dict.

Step image -> score (APL sec. 4.1 to 4.3). Every condition (`conditions`) uses the same persons and seeds. Formulas live
in `apl_core.id_scores` and `drift`.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from apl_core import id_scores
from apl_core.atomic import write_with
from apl_core.errors import ScoreError
from apl_core.id_scores import Interval
from apl_core.identity import FaceEmbedder
from apl_core.library import safe_name
from apl_core.metadata import content_hash
from apl_core.prefix import AnonymizationPrompt
from apl_train.scoring import drift
from apl_train.scoring.attributes import attr_acc
from apl_train.scoring.conditions import chosen_conditions, prompt_of, tensors_of, vectors_by_condition
from apl_train.scoring.gallery import (
    Gallery,
    Threshold,
    build_gallery,
    description_floor,
    faces_by_person,
    find_threshold,
    named_rate,
    person_scores,
)
from apl_train.scoring.observe import Keep, Observed, Observer, Progress, shots_of
from apl_train.scoring.persons import SPLITS, EvaluationSet, NeutralPrompt, PersonRecord

MOVES = ("on", "random", "phrase", "two_seeds")
NEUTRAL = {"unnamed_faces": "unnamed_face", "nonfaces": "nonface"}


@dataclass
class _Run:
    """One evaluation: what is measured with, and the stages already done."""

    observer: Observer
    vectors: Mapping[str, Mapping[str, Tensor]]
    seconds: dict[str, float] = field(default_factory=dict)
    cached: list[str] = field(default_factory=list)

    def timed(self, stage: str, work: Callable[[], Any]) -> Any:
        started = time.monotonic()
        result = work()
        self.seconds[stage] = round(time.monotonic() - started, 3)
        return result

    def observe(self, stage: str, condition: str, subjects: Sequence[tuple[str, str]], seeds: int) -> Observed:
        vectors = self.vectors.get(condition)
        observed = self.timed(stage, lambda: self.observer.observe(
            stage, shots_of(subjects, seeds), vectors=vectors, cacheable=vectors is None))
        if observed.cached:
            self.cached.append(stage)
        return observed


def evaluate(
    backend: Any,
    prompt_vectors: AnonymizationPrompt | Mapping[str, Tensor] | None,
    evaluation_set: EvaluationSet,
    embedder: FaceEmbedder,
    attributes: Any = None,
    *,
    splits: Sequence[str] = ("train", "test"),
    conditions: Sequence[str] = ("off", "on", "random", "description"),
    phrase: str | None = None,
    seeds: int = 8,
    train_seeds: int | None = None,
    neutral_seeds: int = 2,
    persons_limit: int | None = None,
    neutral_limit: int | None = None,
    template: str = "A close-up portrait of {}",
    steps: int = 20,
    guidance: float = 3.0,
    random_seed: int = 0,
    face_choice: str = "largest",
    cache: str | Path | None = None,
    progress: Progress | None = None,
    keep_images: str | Path | Keep | None = None,
    keep_limit: int = 4,
) -> dict[str, Any]:
    """Everything scores.json holds, as plain values; what cannot be had is None, never NaN.

    Args:
        backend: an object with `sample`, `decode` and `sha256` (see `apl_train.model.backend.Backend`).
        prompt_vectors: the prefix, key to float [m, width]; None scores the model alone ("on" and "random" fall away).
        attributes: an object with `read` (see `AttributeReader`), or None: no Attr-ACC then.
        splits: of "train", "test", "final"; the last is for one final measurement.
        conditions: of `conditions.CONDITIONS`; "off" must be among them. "phrase" is added by `phrase`.
        phrase: words ahead of the prompt, or a template around the name such as "a fan of {}". Its drift is measured
            only for the former: a template has nothing to stand around in a prompt that names nobody.
        seeds: pictures per person and condition; train_seeds: per person of "train", where fewer (or more) will do;
            neutral_seeds: per neutral prompt, two or more.
        persons_limit, neutral_limit: the first so many of each split and kind.
        template: c1, {} is the name (paper sec. 4.2).
        random_seed: of the random vectors.
        face_choice: which face of a picture is compared: "largest", or "best" match (the worst case for privacy).
        cache: folder that keeps the stages without a prefix; damaged files are computed again. Personal data.
        progress: called with (stage, done, total).
        keep_images: folder for PNG files of the first `keep_limit` subjects of each stage, or a callback.

    Raises:
        ScoreError: a setting is out of range, or a person has fewer than two references with exactly one face.
    """
    conditions = chosen_conditions(conditions, phrase, prompt_vectors is not None)
    _check(splits=splits, template=template, seeds=seeds, train_seeds=train_seeds, neutral_seeds=neutral_seeds,
           face_choice=face_choice, persons_limit=persons_limit, neutral_limit=neutral_limit, steps=steps)
    learned = tensors_of(prompt_vectors)
    vectors = vectors_by_condition(prompt_vectors, random_seed)
    groups = {split: evaluation_set.of_split(split, persons_limit) for split in splits}
    keep = keep_images if callable(keep_images) or keep_images is None else _writer(Path(keep_images))
    run = _Run(Observer(backend, embedder, attributes, steps, guidance, Path(cache) if cache else None, progress, keep,
                        keep_limit), vectors)
    gallery = run.timed("references", lambda: build_gallery(
        evaluation_set, [p for persons in groups.values() for p in persons], embedder, progress))

    seen: dict[tuple[str, str], Observed] = {}
    for split, persons in groups.items():
        each = train_seeds if split == "train" and train_seeds is not None else seeds
        for condition in conditions if persons else ():
            subjects = [(p.name, prompt_of(condition, p, template, phrase)) for p in persons]
            seen[split, condition] = run.observe(f"{split}/{condition}", condition, subjects, each)
    off = [faces for split, persons in groups.items() if persons
           for faces in faces_by_person(seen[split, "off"], len(persons))]
    threshold = find_threshold(gallery, off)
    scored: dict[str, Any] = {
        split: _score_split(persons, {c: seen[split, c] for c in conditions}, gallery, threshold, face_choice)
        for split, persons in groups.items() if persons
    }
    scored |= {
        "impostor_floor": description_floor(gallery, off),
        "impostor_mean": _mean(id_scores.cross_similarities(gallery.matrix, off)),
        "threshold": threshold.value, "far": threshold.far, "impostors": threshold.impostors,
        "ceiling": gallery.ceiling,
    }
    neutral = {kind: evaluation_set.of_kind(name, neutral_limit) for kind, name in NEUTRAL.items()}
    drifts, uninvited = _score_neutral(run, neutral, conditions, phrase, neutral_seeds, gallery, threshold)
    return _plain({
        "persons": scored, "drift": drifts, "uninvited_rate": uninvited, "seconds": run.seconds, "cached": run.cached,
        "hashes": {"prefix": content_hash(learned) if learned else None, "model": backend.sha256,
                   "recogniser": embedder.sha256, "attributes": getattr(attributes, "sha256", None),
                   "evaluation_set": evaluation_set.sha256},
        "settings": {"splits": list(splits), "conditions": list(conditions), "phrase": phrase, "seeds": seeds,
                     "train_seeds": train_seeds, "neutral_seeds": neutral_seeds, "persons_limit": persons_limit,
                     "neutral_limit": neutral_limit, "template": template, "steps": steps, "guidance": guidance,
                     "random_seed": random_seed, "face_choice": face_choice, "model": getattr(backend, "name", ""),
                     "recogniser": embedder.name, "recogniser_settings": getattr(embedder, "settings", {})},
    })


@dataclass(frozen=True)
class PhraseChoice:
    """The best phrase and, for every phrase tried, its joint success and ID-ACC (mean) on the persons chosen by."""

    phrase: str
    joint_success: Mapping[str, float]
    id_acc_mean: Mapping[str, float]
    threshold: Threshold


def best_phrase(backend: Any, phrases: Sequence[str], evaluation_set: EvaluationSet, embedder: FaceEmbedder, *,
                persons: int = 12, seeds: int = 4, template: str = "A close-up portrait of {}", steps: int = 20,
                guidance: float = 3.0, threshold: float | None = None, cache: str | Path | None = None,
                progress: Progress | None = None) -> PhraseChoice:
    """The phrase with the highest joint success on the first `persons` persons of the train split, never of another.

    Equal ones are told apart by the lower ID-ACC. Unless `threshold` is given, it is set from the pictures without a
    phrase, with everybody in the train split as an impostor.

    Raises:
        ScoreError: no phrase, nobody, or too few impostors for a threshold.
    """
    if not phrases:
        raise ScoreError("There is no phrase to choose from.", "Give one or more.", field="phrases")
    _check(splits=("train",), template=template, seeds=seeds, persons_limit=persons, steps=steps)
    everybody = evaluation_set.of_split("train")
    chosen = everybody[:persons]
    run = _Run(Observer(backend, embedder, None, steps, guidance, Path(cache) if cache else None, progress), {})
    found = build_gallery(evaluation_set, everybody if threshold is None else chosen, embedder, progress)
    limit = Threshold(threshold if threshold is not None else math.nan, math.nan, 0)
    if threshold is None:
        subjects = [(p.name, prompt_of("off", p, template, None)) for p in chosen]
        observed = run.observe("train/off", "off", subjects, seeds)
        nobody = [np.zeros((0, found.matrix.shape[1]))] * (len(everybody) - len(chosen))
        limit = find_threshold(found, [*faces_by_person(observed, len(chosen)), *nobody])
        if math.isnan(limit.value):
            raise ScoreError(f"{limit.impostors} impostor similarities are too few for a threshold.",
                             "Take more persons or seeds, or give `threshold`.", field="threshold")
    joint, mean = {}, {}
    for number, phrase in enumerate(phrases):
        subjects = [(p.name, prompt_of("phrase", p, template, phrase)) for p in chosen]
        observed = run.observe(f"train/phrase{number}", "phrase", subjects, seeds)
        scores = person_scores(chosen, observed, found)
        joint[phrase] = id_scores.joint_success(scores, limit.value)
        mean[phrase] = id_scores.id_acc_mean(scores)
    best = min(joint, key=lambda p: (-joint[p], mean[p] if math.isfinite(mean[p]) else math.inf))
    return PhraseChoice(best, joint, mean, limit)


def _score_split(persons: Sequence[PersonRecord], seen: Mapping[str, Observed], gallery: Gallery, threshold: Threshold,
                 face_choice: str) -> dict[str, Any]:
    scores = {condition: person_scores(persons, one, gallery, face_choice) for condition, one in seen.items()}
    table: dict[str, Any] = {}
    for condition, own in scores.items():
        mean = id_scores.cluster_bootstrap(own)
        known = math.isfinite(threshold.value)
        truth = [person.attributes for person in persons for _ in range(len(seen[condition].counts) // len(persons))]
        table[condition] = {
            "id_acc_mean": mean.value, "id_acc_max": id_scores.id_acc_max(own), "ci95": [mean.lo, mean.hi],
            "ci95_max": _ends(id_scores.cluster_bootstrap(own, id_scores.person_maxima)),
            "face_rate": id_scores.face_rate(own), "attr_acc": attr_acc(seen[condition].attributes, truth),
            "joint_success": id_scores.joint_success(own, threshold.value) if known else math.nan,
            # worst of k pictures: one recognised picture is enough to have the person
            "recognised_persons": _mean(np.array([p.max >= threshold.value for p in own])) if known else math.nan,
            "n_persons": len(persons), "n_images": len(seen[condition].counts),
            "by_person": [float(p.mean) for p in own],
        }
        if condition != "off":
            table[condition]["ratio_to_off"] = _interval(id_scores.paired_bootstrap(scores["off"], own).ratio)
    return table


def _score_neutral(run: _Run, neutral: Mapping[str, Sequence[NeutralPrompt]], conditions: Sequence[str],
                   phrase: str | None, seeds: int, gallery: Gallery, threshold: Threshold) -> tuple[dict, dict]:
    """Drift per kind, and how often faces and named persons appear though nobody asked for them."""
    drifts, uninvited = {}, {}
    moving = [c for c in MOVES[:3] if c in conditions and (c != "phrase" or "{}" not in (phrase or ""))]
    for kind, group in neutral.items():
        if not group:
            continue
        prompts = [p.prompt for p in group]
        seen = {"off": run.observe(f"{kind}/off", "off", [(p, p) for p in prompts], seeds)}
        distances = {"two_seeds": drift.two_seed_latents(prompts, seen["off"].latents)}
        for c in moving:
            subjects = [(p, f"{phrase} {p}" if c == "phrase" else p) for p in prompts]
            seen[c] = run.observe(f"{kind}/{c}", c, subjects, seeds)
            distances[c] = drift.paired_latents(prompts, seen["off"].latents, seen[c].latents)
        pixels = run.timed(f"{kind}/pixels", lambda p=prompts, s=seen: run.observer.pixel_distances(p, s))
        row: dict[str, Any] = {c: distances[c].mean if c in distances else None for c in MOVES}
        row |= {f"pixel_{c}": pixels[c].mean if c in pixels else None for c in MOVES}
        row["ci95"] = {c: _ends(d.interval()) for c, d in distances.items()}
        row["ratio_to_two_seeds"] = {c: _interval(distances[c].ratio(distances["two_seeds"])) for c in moving}
        if {"on", "random"} <= set(distances):
            row["ratio_on_to_random"] = _interval(distances["on"].ratio(distances["random"]))
        row |= {f"face_rate_{c}": float((seen[c].counts > 0).mean()) if c in seen else None for c in ("off", "on")}
        drifts[kind] = row | {"n_prompts": len(prompts), "n_images": len(prompts) * seeds}
        named = {c: named_rate(seen[c], gallery, threshold) if c in seen else math.nan for c in ("off", "on")}
        uninvited |= {f"named_in_{kind}_{c}": rate for c, rate in named.items()}
        uninvited[f"named_in_{kind}_excess"] = named["on"] - named["off"]
        if kind == "nonfaces":
            uninvited |= {f"faces_in_nonfaces_{c}": row[f"face_rate_{c}"] for c in ("off", "on")}
    return drifts, uninvited


def _check(*, splits: Sequence[str], template: str, **numbers: Any) -> None:
    if not splits or len(set(splits)) < len(splits) or not set(splits) <= set(SPLITS):
        raise ScoreError(f"splits is {list(splits)}.", f"Name some of {', '.join(SPLITS)}, each once.", field="splits")
    if "{}" not in template:
        raise ScoreError(f"template is {template!r}, without a place for the name.", "Write {} where the name belongs.",
                         field="template")
    if numbers.pop("face_choice", "largest") not in ("largest", "best"):
        raise ScoreError("face_choice is neither largest nor best.", "Use largest.", field="face_choice")
    for name, value in numbers.items():
        low = 2 if name == "neutral_seeds" else 1
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
            raise ScoreError(f"{name} is {value!r}, not a whole number of {low} or more.", f"Raise {name}.", field=name)


def _writer(folder: Path) -> Keep:
    """A callback that writes FOLDER/STAGE/SUBJECT/SEED.png, lossless."""
    def write(stage: str, subject: str, k: int, image: NDArray[np.uint8]) -> None:
        plain = re.sub(r"[^A-Za-z0-9-]+", "_", subject).strip("_")[:60]
        if plain.replace("_", " ") != subject:  # two subjects must not share a folder
            plain = f"{plain}-{hashlib.sha256(subject.encode()).hexdigest()[:8]}"
        path = folder / stage / safe_name(plain) / f"{k}.png"
        write_with(path, lambda temporary: Image.fromarray(image).save(temporary, format="PNG"))
    return write


def _interval(value: Interval) -> dict[str, float]:
    return {"value": value.value, "lo": value.lo, "hi": value.hi}


def _ends(value: Interval) -> list[float]:
    return [value.lo, value.hi]


def _mean(values: NDArray) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _plain(value: Any) -> Any:
    """JSON values only: NaN and infinity become None, numpy scalars Python's own."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
