"""Faces drawn while a training runs: the same persons and seeds without and with the prefix, at step 0 and every level.

Step level -> pictures -> identity score under each. The model is in memory already, so this costs seconds a level; the
training's randomness comes from its own generators, so what is drawn between its steps does not change it. Pictures
without the prefix are drawn once. The recogniser is the one that belongs to the model, or one that is installed.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from apl_core import id_scores
from apl_core.atomic import write_bytes, write_json
from apl_core.errors import APLError, ScoreError
from apl_core.identity import FaceEmbedder, load_embedder
from apl_core.prefix import AnonymizationPrompt, load_prefix
from apl_train import shipped
from apl_train.datasets.dataset import Dataset, read_dataset
from apl_train.scoring.observe import Shot
from apl_train.scoring.persons import read_evaluation_set
from apl_train.training.config import TrainConfig

FOLDER = "previews"
PACKS = ("auraface", "buffalo_l")
"""Recognisers that are tried for a model without one of its own; nothing is downloaded."""
REFERENCES = 8
_log = logging.getLogger("apl.previews")


@dataclass(frozen=True, eq=False)
class Sitter:
    """One person to draw: `split` "train" (learned on) or "test"; `pictures` uint8 [H, W, 3], the person's face."""

    name: str
    split: str
    prompt: str
    pictures: Sequence[NDArray[np.uint8]]


def sitters(config: TrainConfig, s_id: Dataset) -> list[Sitter]:
    """The persons of a run, `config.previews` of them.

    In the miniature half of them are persons that the training never meets; elsewhere they are the first ones of S_ID,
    whose own pictures are the reference: likeness then means likeness to what the model draws by the name.
    """
    if config.base_model == shipped.MINIATURE:  # whatever set it learns from, it knows these persons
        people = read_evaluation_set(shipped.locate("persons", shipped.MINIATURE))
        test = people.of_split("test", config.previews // 2)
        train = people.of_split("train", config.previews - len(test))
        return [Sitter(p.name, p.split, f"A photo of {p.name}", people.references(p)) for p in (*train, *test)]
    rows: dict[str, list[int]] = {}
    for i, record in enumerate(s_id.records):
        rows.setdefault(record.name, []).append(i)
    chosen = list(rows.items())[: config.previews]
    return [Sitter(name, "train", s_id.records[found[0]].c1, list(s_id.images(found[:REFERENCES])))
            for name, found in chosen]


def find_embedder(config: TrainConfig) -> FaceEmbedder | None:
    """The recogniser for a run's pictures; None where none is installed: faces are then drawn without a score."""
    if config.base_model == shipped.MINIATURE:
        return load_embedder(shipped.recogniser(shipped.MINIATURE))
    for pack in PACKS:
        try:
            return load_embedder(pack)
        except ScoreError as error:
            _log.debug("%s: %s", pack, error)
    return None


class Previews:
    """Draws when a training tells of its start and its levels; for `Trainer`'s listener.

    Args:
        backend: the training's own.
        now: the prefix as it is at this moment, for step 0 and the end.
    """

    def __init__(self, backend: Any, config: TrainConfig, run: Path, people: Sequence[Sitter],
                 embedder: FaceEmbedder | None, now: Callable[[], AnonymizationPrompt]) -> None:
        self._backend, self._run, self._people, self._embedder, self._now = backend, run, people, embedder, now
        self._references: list[NDArray[np.float64] | None] | None = None
        self._off: tuple[list[str], list[float | None]] | None = None

    def __call__(self, event: dict[str, Any]) -> None:
        """A picture that cannot be drawn is no reason to lose a training: it is told and left out."""
        try:
            if event["event"] == "start" and event["step"] == 0:
                self.draw(0, self._now())
            elif event["event"] in ("level", "done"):
                self.draw(event["step"], load_prefix(self._run / event["path"]))
        except APLError as error:
            _log.warning("no pictures at step %s: %s", event.get("step"), error)

    def draw(self, step: int, prompt: AnonymizationPrompt) -> None:
        """Writes `previews/step-<n>.json` and its pictures. Raises APLError."""
        if not self._people:
            return
        if self._off is None:
            self._off = self._series("off", None)
        on = self._series(f"step-{step:07d}", prompt)
        persons = [{"name": p.name, "split": p.split, "off": off, "off_score": off_score, "on": file, "on_score": score}
                   for p, off, off_score, file, score in zip(self._people, *self._off, *on, strict=True)]
        write_json(self._run / FOLDER / f"step-{step:07d}.json", {"step": step, "persons": persons})

    def _series(self, name: str, prompt: AnonymizationPrompt | None) -> tuple[list[str], list[float | None]]:
        shots = [Shot(p.name, p.prompt, 0) for p in self._people]
        images = self._backend.sample([s.prompt for s in shots], [s.seed for s in shots], vectors=prompt).images
        files = [f"{i:02d}-{name}.png" for i in range(len(images))]
        for file, image in zip(files, images, strict=True):
            data = io.BytesIO()
            Image.fromarray(image).save(data, "PNG")
            write_bytes(self._run / FOLDER / file, data.getvalue())
        return files, self._scores(images)

    def _scores(self, images: NDArray[np.uint8]) -> list[float | None]:
        """Similarity of the largest face to the person's reference; None where there is no face or no reference."""
        if self._embedder is None:
            return [None] * len(images)
        if self._references is None:
            self._references = [self._reference(p) for p in self._people]
        found = self._embedder.faces_of(list(images))
        return [float(id_scores.cosine(faces[0].embedding[None], reference)[0])
                if faces and reference is not None else None
                for faces, reference in zip(found, self._references, strict=True)]

    def _reference(self, person: Sitter) -> NDArray[np.float64] | None:
        faces = [f[0].embedding for f in self._embedder.faces_of(list(person.pictures)) if len(f) == 1]
        if len(faces) < 2:
            return id_scores.normalise(faces[0]) if faces else None
        return id_scores.reference_embedding(np.stack(faces))


def beside(listener: Callable[[dict[str, Any]], None], backend: Any, config: TrainConfig, run: Path,
           now: Callable[[], AnonymizationPrompt]) -> Callable[[dict[str, Any]], None]:
    """`listener`, followed by the pictures that the settings ask for; `listener` alone where they ask for none."""
    if not config.previews:
        return listener
    people = sitters(config, read_dataset(shipped.locate("s_id", config.s_id), expect="id"))
    previews = Previews(backend, config, run, people, find_embedder(config), now)

    def both(event: dict[str, Any]) -> None:
        listener(event)
        previews(event)

    return both
