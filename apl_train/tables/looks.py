"""Taking the pictures of a cell and noting what is in them: faces, attributes, features, CLIP scores.

A cell is one method, one set of prompts and one seed number; pictures of a subject have the seeds that every other
command of this project gives them (`observe.Shot`), so off and on are pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from apl_core.id_scores import PersonScores
from apl_train.scoring.gallery import Gallery, person_scores
from apl_train.scoring.observe import PART, Observed, Shot
from apl_train.scoring.persons import PersonRecord
from apl_train.tables.cells import Cell, Outcome, Runner
from apl_train.tables.instruments import Instruments, digest
from apl_train.tables.methods import Method
from apl_train.tables.settings import EvaluateSettings

Subjects = Sequence[tuple[str, str]]
"""(subject, prompt): a person's name and c1, or a neutral prompt twice."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What was seen in subjects x seeds pictures, the seeds of a subject side by side.

    Attributes:
        observed: faces and attribute classes, as scores take them.
        features: by extractor, float32 [N, d], "attr_acc" among them where there is an attribute model.
        clip: float64 [N]; empty where there is no CLIP.
        notes: what the method says of itself.
    """

    observed: Observed
    features: dict[str, NDArray[np.float32]]
    clip: NDArray[np.float64]
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def has_face(self) -> NDArray[np.bool_]:
        return self.observed.counts > 0


class Camera:
    """Takes pictures in cells of one method, one set of subjects and one seed number each."""

    def __init__(self, settings: EvaluateSettings, instruments: Instruments, runner: Runner) -> None:
        self.settings, self.instruments, self.runner = settings, instruments, runner

    def subjects(self, persons: Sequence[PersonRecord]) -> list[tuple[str, str]]:
        """(name, c1) of persons."""
        return [(p.name, self.settings.template.replace("{}", p.name)) for p in persons]

    def cells(self, label: str, method: Method, subjects: Subjects, seeds: Sequence[int]) -> list[Cell]:
        """One cell a seed number, with everything that this evaluation can measure: tables share what they sample."""
        key = {"pictures": dict(method.key), "subjects": digest([list(s) for s in subjects]),
               "steps": self.settings.steps, "guidance": self.settings.guidance,
               "models": dict(self.instruments.hashes())}
        return [Cell(f"{label} seed {k}", key | {"k": k}, len(subjects)) for k in seeds]

    def see(self, title: str, wanted: Sequence[tuple[str, Method, Subjects, Sequence[int]]]) -> list[Seen]:
        """What is seen by each of `wanted` (label, method, subjects, seed numbers).

        All cells are one piece of work: they are divided among the processes, and one bar tells the time left. A
        method is let go of once its last cell is done.
        """
        cells: list[Cell] = []
        jobs: dict[str, tuple[Method, Subjects, int]] = {}
        for label, method, subjects, seeds in wanted:
            for cell, k in zip(self.cells(label, method, subjects, seeds), seeds, strict=True):
                cells.append(cell)
                jobs[cell.digest] = method, subjects, k
        last: list[Method] = []

        def work(cell: Cell) -> Outcome:
            method, subjects, k = jobs[cell.digest]
            if last and last[0] is not method:
                last.pop().close()  # a baseline holds a copy of the model
            last[:] = [method]
            return self._look(method, subjects, k)

        outcomes = iter(self.runner.fill(title, cells, work))
        for method in last:
            method.close()
        return [joined([next(outcomes) for _ in seeds], len(subjects)) for _, _, subjects, seeds in wanted]

    def _look(self, method: Method, subjects: Subjects, k: int) -> Outcome:
        shots = [Shot(subject, prompt, k) for subject, prompt in subjects]
        parts = [self._part(method, shots[start : start + PART]) for start in range(0, len(shots), PART)]
        names = parts[0][0].keys()
        width = max((p[0]["embeddings"].shape[1] for p in parts if len(p[0]["embeddings"])), default=1)
        tensors = {}
        for name in names:
            rows = [p[0][name] for p in parts]
            if name == "embeddings":
                rows = [r.reshape(len(r), width) for r in rows]
            tensors[name] = torch.from_numpy(np.ascontiguousarray(np.concatenate(rows)))
        return Outcome(tensors, {"attributes": [one for p in parts for one in p[1]], "method": dict(method.notes)})

    def _part(self, method: Method, shots: Sequence[Shot]) -> tuple[dict[str, NDArray], list[Any]]:
        s, tools = self.settings, self.instruments
        images = method.sample([x.prompt for x in shots], [x.seed for x in shots], steps=s.steps,
                               guidance=s.guidance).images
        faces = tools.embedder.faces_of(list(images))
        flat = [face.embedding for found in faces for face in found]
        arrays: dict[str, NDArray] = {
            "counts": np.array([len(found) for found in faces], np.int64),
            "embeddings": np.stack(flat).astype(np.float32) if flat else np.zeros((0, 1), np.float32)}
        arrays |= {f"features.{k}": v.features(images) for k, v in tools.extractors.items()}
        if tools.attributes is not None:
            shared = next((k for k, v in tools.extractors.items() if v is tools.attributes), None)
            arrays["attribute_features"] = (arrays[f"features.{shared}"] if shared
                                            else tools.attributes.features(images))
        if tools.clip is not None:
            arrays["clip"] = np.asarray(tools.clip.scores(images, [x.prompt for x in shots]), np.float64)
        read = [None] * len(shots)
        if tools.reader is not None:
            said = tools.reader.read(images)
            read = [dict(one) if found else None for one, found in zip(said, faces, strict=True)]
        return arrays, read


def joined(outcomes: Sequence[Outcome], subjects: int) -> Seen:
    """The cells of one method and set of subjects, seed after seed, as subjects x seeds with a subject's side by side.

    outcomes: one a seed number, each over all subjects in one order.
    """
    seeds = len(outcomes)
    order = [(k, i) for i in range(subjects) for k in range(seeds)]
    faces = []
    for outcome in outcomes:
        counts = outcome.tensors["counts"].numpy()
        faces.append(np.split(outcome.tensors["embeddings"].numpy(), np.cumsum(counts)[:-1]))
    found = [faces[k][i] for k, i in order]
    width = max((f.shape[1] for f in found if len(f)), default=1)
    rows: dict[str, NDArray] = {}
    for name in outcomes[0].tensors:
        if name in ("counts", "embeddings"):
            continue
        stacked = np.stack([o.tensors[name].numpy() for o in outcomes], axis=1)
        rows[name] = stacked.reshape(subjects * seeds, *stacked.shape[2:])
    read = [outcomes[k].values["attributes"][i] for k, i in order]
    observed = Observed(np.array([len(f) for f in found], np.int64),
                        np.concatenate([f.reshape(len(f), width) for f in found]).astype(np.float32),
                        tuple(read), torch.zeros(len(found), 0))
    features = {k.removeprefix("features."): v for k, v in rows.items() if k.startswith("features.")}
    if "attribute_features" in rows:
        features["attr_acc"] = rows["attribute_features"]
    return Seen(observed, features, np.asarray(rows.get("clip", np.zeros(0)), np.float64),
                dict(outcomes[0].values.get("method", {})))


def scores_of(persons: Sequence[PersonRecord], seen: Seen, gallery: Gallery) -> list[PersonScores]:
    """Similarities of each person's pictures, the largest face of each."""
    return person_scores(persons, seen.observed, gallery)
