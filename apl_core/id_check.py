"""One person's pictures against that person's references: which face counts, what is no reference, what is recognised.

Step image -> score (APL sec. 4.2), shared by the command line, the ComfyUI node and the WebUI panel. A picture without
a face has no similarity, whatever is asked; formulas over many persons are in `id_scores` and `id_rates`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import ScoreError
from .faces import Face, FaceEmbedder
from .id_scores import cosine, leave_one_out, normalise, reference_embedding

CHOICES = ("largest", "best", "all")
"""Which face of a picture is compared: the largest one, the best match (the worst case for privacy), or every one."""


@dataclass(frozen=True, eq=False)
class Reference:
    """A person's reference: `vector` float64 [d] of length 1, from the pictures `kept`.

    `rejected` are (name, reason); `leave_one_out` float64 [n] is each kept picture against the others, what another
    real picture of the person reaches; empty with one picture.
    """

    vector: NDArray[np.float64]
    kept: tuple[str, ...]
    rejected: tuple[tuple[str, str], ...]
    leave_one_out: NDArray[np.float64]

    @property
    def ceiling(self) -> float:
        """Mean of `leave_one_out`; NaN with one picture."""
        return float(self.leave_one_out.mean()) if self.leave_one_out.size else math.nan


@dataclass(frozen=True, eq=False)
class PersonPictures:
    """One person's pictures: for each the similarities of its faces that count, float64 [k]; none without a face."""

    name: str
    values: tuple[NDArray[np.float64], ...]

    @property
    def n_images(self) -> int:
        """Pictures, with and without a face."""
        return len(self.values)

    @property
    def n_faces(self) -> int:
        """Pictures with a face."""
        return sum(len(each) > 0 for each in self.values)

    @property
    def mean(self) -> float:
        """Mean of all similarities that count; NaN when there is none."""
        known = self._known()
        return float(known.mean()) if known.size else math.nan

    @property
    def max(self) -> float:
        """The highest similarity; NaN when no picture has a face."""
        known = self._known()
        return float(known.max()) if known.size else math.nan

    def recognised(self, threshold: float) -> int:
        """Pictures with a face at or above the threshold."""
        return sum(bool((each >= threshold).any()) for each in self.values)

    def anonymised(self, threshold: float) -> int:
        """Joint success: pictures that have a face AND none at or above the threshold."""
        return self.n_faces - self.recognised(threshold)

    def _known(self) -> NDArray[np.float64]:
        return np.concatenate(self.values) if self.values else np.zeros(0)


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare` found: every picture's faces, and the similarities that count."""

    reference: Reference
    faces: tuple[list[Face], ...]
    scores: PersonPictures
    choice: str = "largest"

    def shown(self, index: int) -> float:
        """The highest similarity of a picture that counts; NaN without a face."""
        values = self.scores.values[index]
        return float(values.max()) if len(values) else math.nan

    def chosen(self, index: int) -> Face | None:
        """The face with that similarity; None without a face."""
        return counted_face(self.faces[index], self.reference.vector, self.choice)


def build_reference(faces: Sequence[Sequence[Face]], names: Sequence[str] | None = None, *,
                    field: str = "references") -> Reference:
    """The mean of the normalised embeddings, normalised again, of the pictures that show exactly one face.

    Args:
        faces: per picture; names: of the pictures, for the lists.

    Raises:
        ScoreError: no picture shows exactly one face.
    """
    names = [f"picture {i + 1}" for i in range(len(faces))] if names is None else list(names)
    reasons = ["no face was found" if not found else f"{len(found)} faces were found" for found in faces]
    kept = [i for i, found in enumerate(faces) if len(found) == 1]
    rejected = tuple((names[i], reasons[i]) for i in range(len(faces)) if i not in kept)
    if not kept:
        why = "; ".join(f"{name}: {reason}" for name, reason in rejected[:4]) or "there is none"
        raise ScoreError(f"No reference picture shows exactly one face ({why}).",
                         "Use sharp frontal pictures of that person alone, with a border around the head.",
                         field=field)
    embeddings = np.stack([faces[i][0].embedding for i in kept])
    several = len(kept) > 1
    return Reference(reference_embedding(embeddings) if several else normalise(embeddings[0]),
                     tuple(names[i] for i in kept), rejected,
                     leave_one_out(embeddings) if several else np.zeros(0))


def counted(faces: Sequence[Face], vector: NDArray, choice: str = "largest") -> NDArray[np.float64]:
    """Similarities that count in one picture: float64 [0] without a face, [1] for largest and best, [k] for all.

    Raises:
        ScoreError: an unknown choice.
    """
    if choice not in CHOICES:
        raise ScoreError(f"face_choice is {choice!r}.", f"Use one of: {', '.join(CHOICES)}.", field="face_choice")
    if not faces:
        return np.zeros(0)
    if choice == "largest":
        return cosine(_largest(faces).embedding, vector).reshape(1)
    values = cosine(np.stack([face.embedding for face in faces]), vector)
    return values.max(keepdims=True) if choice == "best" else values


def person_pictures(name: str, faces: Sequence[Sequence[Face]], reference: Reference,
                    choice: str = "largest") -> PersonPictures:
    """The similarities of one person's pictures to the reference."""
    return PersonPictures(name, tuple(counted(found, reference.vector, choice) for found in faces))


def compare(embedder: FaceEmbedder, pictures: Sequence[NDArray[np.uint8]], references: Sequence[NDArray[np.uint8]],
            choice: str = "largest") -> Comparison:
    """Pictures, uint8 [H, W, 3] RGB each, against a person's reference pictures.

    Raises:
        ScoreError: no reference shows exactly one face, or an unknown choice.
    """
    reference = build_reference(embedder.faces_of(list(references)))
    faces = tuple(embedder.faces_of(list(pictures)))
    return Comparison(reference, faces, person_pictures("person", faces, reference, choice), choice)


def counted_face(faces: Sequence[Face], vector: NDArray, choice: str = "largest") -> Face | None:
    """The face to show for a picture: the largest, or for other choices the best match; None without a face."""
    if not faces:
        return None
    return _largest(faces) if choice == "largest" else faces[int(np.argmax(counted(faces, vector, "all")))]


def impostors(references: Sequence[Reference], faces: Sequence[Sequence[Sequence[Face]]],
              choice: str = "largest") -> NDArray[np.float64]:
    """What strangers reach: each picture with a face against everyone ELSE's reference, by the same choice of face.

    Args:
        references: one per person; faces: per person, per picture.

    Returns:
        float64 [n]: one value a picture and other person, the highest of those that count, so that a false accept rate
        of it is one of pictures.
    """
    picked, owners, starts, total = [], [], [], 0
    for j, own in enumerate(faces):
        for picture in own:
            if picture:
                chosen = [_largest(picture)] if choice == "largest" else list(picture)
                picked += [face.embedding for face in chosen]
                owners.append(j)
                starts.append(total)
                total += len(chosen)
    if not picked:
        return np.zeros(0)
    vectors = np.stack([reference.vector for reference in references])
    highest = np.maximum.reduceat(normalise(np.stack(picked)) @ vectors.T, starts, axis=0)
    return highest[np.arange(len(references)) != np.array(owners)[:, None]]


def _largest(faces: Sequence[Face]) -> Face:
    return max(faces, key=lambda face: (face.area, face.score))
