"""ID-ACC of pictures that people have already: a folder of them, one of references, and perhaps one made with a prefix.

Step faces -> score (APL sec. 4.2) without a model: whoever generated the pictures. Rules for faces and references are
in `apl_core.id_check`, shares and intervals in `apl_core.id_rates` and `id_scores`; this file sets a threshold from
strangers and puts everything into one JSON-ready dict.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apl_core import id_rates, id_scores
from apl_core.errors import ScoreError
from apl_core.id_check import PersonPictures, Reference, build_reference, impostors, person_pictures
from apl_core.id_scores import Interval
from apl_core.identity import FaceEmbedder
from apl_core.recognisers import customary_threshold, model_note
from apl_train.folder_score.face_cache import Progress
from apl_train.folder_score.files import Files, FolderSettings, Looked, find_files, look_at, odd_files
from apl_train.folder_score.people import read_groups

LEAST_GROUP = 3
"""Persons a group needs for a row of its own."""


@dataclass(frozen=True, eq=False)
class Scored:
    """One recogniser's figures: its block of the JSON, and what the page needs: references and similarities."""

    block: dict[str, Any]
    references: Mapping[str, Reference]
    sides: Mapping[str, Sequence[PersonPictures]]
    files: Mapping[str, Mapping[str, tuple[str, ...]]]
    threshold: id_rates.Threshold


def score_looked(settings: FolderSettings, files: Files, looked: Looked) -> Scored:
    """The figures of one recogniser.

    Raises:
        ScoreError: nobody has a usable reference and a sound picture on every side.
    """
    references, rejected, without = {}, {}, {}
    for person, names in files.references.items():
        shown = [looked.references[name] for name in names]
        sound = [(name, one) for name, one in zip(names, shown, strict=True) if one.faces is not None]
        broken = tuple((name, one.notes[-1]) for name, one in zip(names, shown, strict=True) if one.faces is None)
        try:
            reference = build_reference([one.faces for _, one in sound], [name for name, _ in sound])
        except ScoreError as error:
            without[person] = error.message
            continue
        references[person] = reference
        rejected[person] = [{"file": name, "reason": reason} for name, reason in (*reference.rejected, *broken)]
    kept = {side: {person: tuple(name for name in own if looked.sides[side][name].faces is not None)
                   for person, own in persons.items()} for side, persons in files.sides.items()}
    for person in list(references):
        if missing := [side for side in kept if not kept[side].get(person)]:
            without[person] = f"no sound picture ({', '.join(missing)})"
            del references[person]
    if not references:
        raise ScoreError("Nobody has both a reference with exactly one face and a picture.",
                         "; ".join(f"{person}: {reason}" for person, reason in list(without.items())[:3]),
                         field="references")
    people = list(references)
    faces = {side: [[looked.sides[side][name].faces for name in kept[side][p]] for p in people] for side in kept}
    sides = {side: [person_pictures(p, shots, references[p], settings.face_choice)
                    for p, shots in zip(people, faces[side], strict=True)] for side in kept}
    strangers = impostors(list(references.values()), faces["off"], settings.face_choice)
    name = looked.embedder.name
    threshold = id_rates.choose_threshold(strangers, far=settings.far, given=settings.threshold,
                                          customary=customary_threshold(name))
    ceiling = _mean([r.ceiling for r in references.values()])
    block: dict[str, Any] = {
        "name": name, "sha256": looked.embedder.sha256, "settings": getattr(looked.embedder, "settings", {}),
        "face_choice": settings.face_choice,
        "licence": model_note(name).licence if customary_threshold(name) is not None else "",
        "threshold": asdict(threshold), "strangers": _mean(strangers), "ceiling": ceiling,
        "at_far": [_at_far(strangers, far, sides) for far in id_rates.FARS],
        "rejected_references": {p: r for p, r in rejected.items() if r and p in references}, "left_out": without,
    }
    for side, persons in sides.items():
        block[side] = _condition(persons, threshold.value, settings, _mean(strangers), ceiling)
    if "on" in sides:
        block["change"] = _change(sides["off"], sides["on"], threshold.value, settings)
    block["persons"] = [_person(i, p, references[p], sides, threshold.value) for i, p in enumerate(people)]
    if settings.groups is not None:
        block["groups"] = _groups(settings, people, references, faces, sides, threshold.value)
    return Scored(block, references, sides, {side: {p: kept[side][p] for p in people} for side in kept}, threshold)


def _condition(persons: Sequence[PersonPictures], threshold: float, settings: FolderSettings, strangers: float,
               ceiling: float) -> dict[str, Any]:
    mean = id_scores.cluster_bootstrap(persons, resamples=settings.resamples)
    top = id_scores.cluster_bootstrap(persons, id_scores.person_maxima, resamples=settings.resamples)
    row: dict[str, Any] = {
        "n_persons": len(persons), "n_images": sum(p.n_images for p in persons),
        "n_faces": sum(p.n_faces for p in persons),
        "id_acc_mean": _dict(mean), "id_acc_max": _dict(top),
        "between": id_rates.between(mean.value, strangers, ceiling),
        "face_rate": _dict(id_rates.picture_share(persons, lambda p: p.n_faces, resamples=settings.resamples)),
    }
    if math.isnan(threshold):
        return row | {"recognised": None, "joint_success": None, "worst_of_k": None}
    worst, k = id_rates.worst_of_k(persons, threshold, _possible_k(persons, settings.k), resamples=settings.resamples)
    shares = {"recognised": lambda p: p.recognised(threshold), "joint_success": lambda p: p.anonymised(threshold)}
    row |= {key: _dict(id_rates.picture_share(persons, count, resamples=settings.resamples))
            for key, count in shares.items()}
    return row | {"worst_of_k": _dict(worst) | {"k": k}}


def _possible_k(persons: Sequence[PersonPictures], k: int | None) -> int | None:
    least = min(p.n_images for p in persons)
    if k is not None and k > least:
        raise ScoreError(f"k is {k}, but somebody has {least} sound pictures only.", f"Use {least} or less.", field="k")
    return k


def _change(off: Sequence[PersonPictures], on: Sequence[PersonPictures], threshold: float,
            settings: FolderSettings) -> dict[str, Any]:
    paired = id_scores.paired_bootstrap(off, on, resamples=settings.resamples)
    change = {"ratio": _dict(paired.ratio), "face_rate": _dict(id_rates.share_change(
        off, on, lambda p: p.n_faces, resamples=settings.resamples))}
    if not math.isnan(threshold):
        change["joint_success"] = _dict(id_rates.share_change(off, on, lambda p: p.anonymised(threshold),
                                                              resamples=settings.resamples))
    return change


def _person(i: int, name: str, reference: Reference, sides: Mapping[str, Sequence[PersonPictures]],
            threshold: float) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "references": len(reference.kept), "ceiling": reference.ceiling}
    for side, persons in sides.items():
        p = persons[i]
        row[side] = {"mean": p.mean, "max": p.max, "n_images": p.n_images, "n_faces": p.n_faces,
                     "recognised": None if math.isnan(threshold) else p.recognised(threshold)}
    return row


def _at_far(strangers: np.ndarray, far: float, sides: Mapping[str, Sequence[PersonPictures]]) -> dict[str, Any]:
    """The threshold at a false accept rate and the share of pictures recognised there; None with too few strangers."""
    if strangers.size * far * (1 + 1e-12) < 1:
        return {"far": far, "threshold": None} | dict.fromkeys(sides)
    value = id_scores.impostor_threshold(strangers, far)
    return {"far": far, "threshold": value} | {
        side: sum(p.recognised(value) for p in persons) / sum(p.n_images for p in persons)
        for side, persons in sides.items()}


def _groups(settings: FolderSettings, people: Sequence[str], references: Mapping[str, Reference],
            faces: Mapping[str, Sequence[Any]], sides: Mapping[str, Sequence[PersonPictures]],
            threshold: float) -> list[dict[str, Any]]:
    """A row a group with three or more persons: the same figures, and the group's own threshold where n allows."""
    rows = []
    for column, classes in read_groups(settings.groups, people).items():
        for value, members in classes.items():
            at = [i for i, person in enumerate(people) if person in members]
            if len(at) < LEAST_GROUP:
                rows.append({"column": column, "group": value, "n_persons": len(at), "too_few": True})
                continue
            alike = impostors([references[people[i]] for i in at], [faces["off"][i] for i in at], settings.face_choice)
            own = id_rates.choose_threshold(alike, far=settings.far)
            row = {"column": column, "group": value, "n_persons": len(at), "too_few": False, "strangers": _mean(alike),
                   "own_threshold": asdict(own)}
            for side, persons in sides.items():
                chosen = [persons[i] for i in at]
                row[side] = _condition(chosen, threshold, settings, math.nan, math.nan)
            rows.append(row)
    return rows


def agreement(first: Scored, second: Scored) -> dict[str, Any]:
    """How two recognisers agree on the pictures of the persons both have, side by side."""
    found: dict[str, Any] = {}
    for side in first.sides:
        values: list[list[float]] = [[], []]
        for person, names in first.files[side].items():
            if person not in second.files[side]:
                continue
            for out, one in zip(values, (first, second), strict=True):
                own = next(p for p in one.sides[side] if p.name == person)
                top = dict(zip(one.files[side][person], (float(v.max()) if len(v) else math.nan for v in own.values),
                               strict=True))
                out += [top[name] for name in names]
        found[side] = asdict(id_rates.agreement(np.array(values[0]), np.array(values[1]), first.threshold.value,
                                                second.threshold.value))
    return found


def _dict(value: Interval) -> dict[str, float]:
    return {"value": value.value, "lo": value.lo, "hi": value.hi}


def _mean(values: Any) -> float:
    known = np.asarray(values, np.float64)
    known = known[np.isfinite(known)]
    return float(known.mean()) if known.size else math.nan


def plain_values(value: Any) -> Any:
    """JSON values only: NaN becomes None, paths text, numpy scalars Python's own."""
    if isinstance(value, Mapping):
        return {str(key): plain_values(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(one) for one in value]
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True, eq=False)
class FolderResult:
    """What a check found: `scores` is the JSON; `scored` one entry a recogniser, for the page."""

    scores: dict[str, Any]
    scored: tuple[Scored, ...]
    looked: tuple[Looked, ...]
    settings: FolderSettings


def check_folder(settings: FolderSettings, embedders: Sequence[FaceEmbedder], cache: Path | None = None,
                 progress: Progress | None = None) -> FolderResult:
    """Pictures against references with one recogniser, or with two side by side.

    Raises:
        DatasetError, ScoreError: see `find_files` and `score_looked`.
    """
    started = time.monotonic()
    files = find_files(settings)
    looked = tuple(look_at(settings, files, embedder, cache, progress) for embedder in embedders)
    scored = tuple(score_looked(settings, files, one) for one in looked)
    names = {side: {name for own in persons.values() for name in own} for side, persons in files.sides.items()}
    scores = {
        "kind": "identity check", "recognisers": [one.block for one in scored],
        "agreement": agreement(*scored[:2]) if len(scored) > 1 else None,
        "paired_names": {"off": len(names["off"]), "on": len(names["on"]), "both": len(names["off"] & names["on"])}
        if "on" in names else None,
        "odd": odd_files(files, looked[0]), "settings": asdict(settings),
        "seconds": round(time.monotonic() - started, 3),
    }
    return FolderResult(plain_values(scores), scored, looked, settings)
