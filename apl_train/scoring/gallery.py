"""Named persons' references, and who is recognised in which pictures (APL sec. 4.1, 4.2).

Step what recognisers see -> score. The threshold is set from data, for this recogniser and these pictures: how similar
everyone's pictures are to everyone ELSE's reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from apl_core import id_scores
from apl_core.errors import ScoreError
from apl_core.id_scores import PersonScores
from apl_core.identity import FaceEmbedder
from apl_train.scoring.observe import Observed, Progress
from apl_train.scoring.persons import EvaluationSet, PersonRecord

FARS = (1e-3, 1e-2)
"""False accept rates of the threshold: the second only where there are too few impostors for the first."""
SAME = ("gender", "race")
"""Heads in which two persons must agree to be of one description for the impostor floor."""


@dataclass(frozen=True, eq=False)
class Gallery:
    """The named persons' references: `matrix` float64 [persons, d], unit rows in the order of `persons`."""

    persons: tuple[PersonRecord, ...]
    matrix: NDArray[np.float64]
    ceiling: float

    def row(self, person: PersonRecord) -> NDArray[np.float64]:
        return self.matrix[self.persons.index(person)]


@dataclass(frozen=True)
class Threshold:
    """Similarity from which a picture counts as recognised; NaN where there are too few impostors to set one."""

    value: float
    far: float
    impostors: int


def build_gallery(evaluation_set: EvaluationSet, persons: Sequence[PersonRecord], embedder: FaceEmbedder,
                  progress: Progress | None = None) -> Gallery:
    """References of `persons`. A reference with no face, or more than one, is left out.

    Raises:
        ScoreError: nobody, or a person keeps fewer than two references.
    """
    if not persons:
        raise ScoreError("There is nobody to score.", "Choose a split with persons in it.", field="splits")
    rows, ceilings = [], []
    for done, person in enumerate(persons, start=1):
        looked = embedder.faces_of(evaluation_set.references(person))
        faces = [found[0].embedding for found in looked if len(found) == 1]
        if len(faces) < 2:
            raise ScoreError(f"{len(faces)} references of {person.name} show exactly one face; two are needed.",
                             "Add reference pictures with that person alone.", field="references")
        rows.append(id_scores.reference_embedding(np.stack(faces)))
        ceilings.append(float(id_scores.leave_one_out(np.stack(faces)).mean()))
        if progress is not None:
            progress("references", done, len(persons))
    return Gallery(tuple(persons), np.stack(rows), float(np.mean(ceilings)))


def find_threshold(gallery: Gallery, off: Sequence[NDArray]) -> Threshold:
    """From the similarities of everyone's pictures without a prefix to everyone ELSE's reference, at FAR 1e-3.

    With fewer than 1000 of them at 1e-2, with fewer than 100 NaN. `off`: faces, float [k, d], of each person there.
    """
    values = id_scores.cross_similarities(gallery.matrix, off)
    for far in FARS:
        if values.size * far * (1 + 1e-12) >= 1:
            return Threshold(id_scores.impostor_threshold(values, far), far, values.size)
    return Threshold(math.nan, math.nan, values.size)


def person_scores(persons: Sequence[PersonRecord], observed: Observed, gallery: Gallery,
                  face_choice: str = "largest") -> list[PersonScores]:
    """Similarities of each person's pictures to that person's reference; pictures without a face have none."""
    images = observed.faces()
    each = len(images) // len(persons)
    scored = []
    for i, person in enumerate(persons):
        faces = [found for found in images[i * each : (i + 1) * each] if len(found)]
        chosen = [found if face_choice == "best" else found[:1] for found in faces]
        values = [float(id_scores.cosine(found, gallery.row(person)).max()) for found in chosen]
        scored.append(PersonScores(person.name, np.array(values), each))
    return scored


def named_rate(observed: Observed, gallery: Gallery, threshold: Threshold) -> float:
    """Share of pictures in which some face is recognised as some named person."""
    if not math.isfinite(threshold.value):
        return math.nan
    return float(np.mean([bool(len(f)) and bool((id_scores.normalise(f) @ gallery.matrix.T >= threshold.value).any())
                          for f in observed.faces()]))


def description_floor(gallery: Gallery, off: Sequence[NDArray]) -> float:
    """Similarity of other persons of the same description (see `SAME`) to each person's reference."""
    def like(a: PersonRecord, b: PersonRecord) -> bool:
        return all(a.attributes.get(head) == b.attributes.get(head) for head in SAME)
    width = gallery.matrix.shape[1]
    others = [
        np.concatenate([np.zeros((0, width)), *(off[j] for j, q in enumerate(gallery.persons)
                                                if j != i and len(off[j]) and like(p, q))])
        for i, p in enumerate(gallery.persons)
    ]
    return id_scores.impostor_floor(gallery.matrix, others)


def faces_by_person(observed: Observed, persons: int) -> list[NDArray[np.float32]]:
    """All faces of each person's pictures, float [k, d]."""
    images = observed.faces()
    each = len(images) // persons
    return [np.concatenate(images[i * each : (i + 1) * each]) for i in range(persons)]
