"""Sampling the pictures of one condition and noting what is in them: faces, attributes, final latents.

Step prompt -> image -> what recognisers see. Pictures are made and looked at in parts, so that memory does not grow
with their number. Stages that do not depend on the prefix can be kept in a cache folder and are then shared by all
evaluations of one model; embeddings are personal data, so that folder belongs to the user alone. Under `accelerate
launch` every process takes its share of the pictures, and all of them know everything afterwards.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from apl_core.atomic import write_safetensors
from apl_core.errors import ScoreError
from apl_core.identity import FaceEmbedder
from apl_core.metadata import content_hash
from apl_train.processes import this_process
from apl_train.scoring import drift

Progress = Callable[[str, int, int], None]
"""Called with stage, pictures done, pictures in all."""
Keep = Callable[[str, str, int, NDArray[np.uint8]], None]
"""Called with stage, subject (person or prompt), number of the seed, uint8 [H, W, 3] picture."""
CACHE_VERSION = 1
PART = 64
"""Pictures in memory at once."""
_log = logging.getLogger("apl")


@dataclass(frozen=True)
class Shot:
    """One picture to take: `subject` is the person or neutral prompt it belongs to, `k` the number of its seed."""

    subject: str
    prompt: str
    k: int

    @property
    def seed(self) -> int:
        """Depends on subject and k alone: the same in every condition, and whoever else is evaluated."""
        digest = hashlib.sha256(f"{self.subject}\0{self.k}".encode()).digest()
        return int.from_bytes(digest[:4], "big") & 0x7FFFFFFF


@dataclass(frozen=True, eq=False)
class Observed:
    """What was seen in N pictures.

    Attributes:
        counts: int64 [N], faces in each picture.
        embeddings: float32 [sum of counts, d], faces of a picture side by side, largest first.
        attributes: one entry a picture; None where there is no face or no attribute model.
        latents: float32 [N, 4, h, w], final.
        cached: read from the cache, not sampled.
    """

    counts: NDArray[np.int64]
    embeddings: NDArray[np.float32]
    attributes: tuple[Mapping[str, str] | None, ...]
    latents: Tensor
    cached: bool = False

    def faces(self) -> list[NDArray[np.float32]]:
        """Embeddings of every picture, float32 [k, d] each; k may be 0."""
        return np.split(self.embeddings, np.cumsum(self.counts)[:-1])


@dataclass(frozen=True, eq=False)
class Observer:
    """Takes and looks at pictures with one model, one recogniser and one attribute model (or none).

    `keep` is handed the pictures of a stage's first `keep_limit` subjects.
    """

    backend: Any
    embedder: FaceEmbedder
    attributes: Any
    steps: int
    guidance: float
    cache: Path | None = None
    progress: Progress | None = None
    keep: Keep | None = None
    keep_limit: int = 4

    def observe(self, stage: str, shots: Sequence[Shot], *, vectors: Mapping[str, Tensor] | None = None,
                cacheable: bool = False) -> Observed:
        """Pictures of `shots`, with the prefix `vectors` or none.

        Args:
            stage: for progress and as the beginning of the cache file's name, such as "test/off".
            cacheable: nothing but what the key covers has an influence; never for a stage with vectors.

        Raises:
            ScoreError: there are no shots.
        """
        if not shots:
            raise ScoreError(f"There is nothing to sample for {stage}.", "Name at least one person.", field="splits")
        file = key = None
        if self.cache is not None and cacheable and vectors is None:
            key = self._key(stage, shots)
            file = Path(self.cache) / f"{stage.replace('/', '-')}-{key[:16]}.safetensors"
            found = _load(file, key, len(shots))
            # all or none: a process that finds nothing would wait for the others' pictures
            if all(this_process().everyone(found is not None)):
                self._tell(stage, len(shots), len(shots))
                self._keep_again(stage, shots, found)
                return found
        observed = self._together(stage, shots, vectors)
        if file is not None:
            if this_process().main:
                _store(file, key, observed)
            this_process().wait()  # whoever looks for it next finds it
        return observed

    def _together(self, stage: str, shots: Sequence[Shot], vectors: Mapping[str, Tensor] | None) -> Observed:
        """What all processes saw, in the order of the shots; a picture does not depend on who takes it."""
        processes = this_process()
        if processes.count == 1:
            return self._sample(stage, shots, vectors)
        mine = processes.share(shots)
        # an album needs every picture of a subject: see `_keep_again`
        own = replace(self, keep=None)._sample(stage, mine, vectors) if mine else None
        seen = processes.merge(list(zip(own.faces(), own.attributes, own.latents, strict=True)) if own else [])
        width = max((faces.shape[1] for faces, _, _ in seen if len(faces)), default=1)
        observed = Observed(
            np.array([len(faces) for faces, _, _ in seen], np.int64),
            np.concatenate([faces.reshape(len(faces), width) for faces, _, _ in seen]).astype(np.float32),
            tuple(attributes for _, attributes, _ in seen), torch.stack([latents for _, _, latents in seen]))
        self._keep_again(stage, shots, observed)
        return observed

    def pictures(self, observed: Observed, start: int, stop: int) -> NDArray[np.uint8]:
        """The pictures [start, stop) again, decoded from their latents."""
        return self.backend.decode(observed.latents[start:stop])

    def pixel_distances(self, prompts: Sequence[str], seen: Mapping[str, Observed]) -> dict[str, drift.Distances]:
        """Distances of pictures from those of "off", by condition; "two_seeds": of different seeds of "off".

        Pictures are decoded a few prompts at a time, those of "off" once for all conditions.
        """
        each = len(seen["off"].counts) // len(prompts)
        step = max(1, PART // each) * each
        rows: dict[str, list[NDArray[np.float64]]] = {}
        for start in range(0, len(seen["off"].counts), step):
            off = self.pictures(seen["off"], start, start + step)
            by_prompt = off.reshape(-1, each, *off.shape[1:])
            rows.setdefault("two_seeds", []).append(np.stack(
                [drift.pixel_rms(by_prompt[:, i], by_prompt[:, j]) for i, j in drift.seed_pairs(each)], axis=1))
            for condition in seen.keys() - {"off"}:
                other = self.pictures(seen[condition], start, start + step)
                rows.setdefault(condition, []).append(drift.pixel_rms(off, other).reshape(-1, each))
        return {c: drift.Distances(tuple(prompts), np.concatenate(parts)) for c, parts in rows.items()}

    def _sample(self, stage: str, shots: Sequence[Shot], vectors: Mapping[str, Tensor] | None) -> Observed:
        counts: list[int] = []
        embeddings: list[NDArray[np.float32]] = []
        read: list[Mapping[str, str] | None] = []
        latents: list[Tensor] = []
        self._tell(stage, 0, len(shots))
        for start in range(0, len(shots), PART):
            part = shots[start : start + PART]
            made = self.backend.sample(
                [s.prompt for s in part], [s.seed for s in part], vectors=vectors, steps=self.steps,
                guidance=self.guidance,
                progress=lambda done, _total, start=start: self._tell(stage, start + done, len(shots)),
            )
            faces = self.embedder.faces_of(list(made.images))
            counts += [len(found) for found in faces]
            embeddings += [face.embedding for found in faces for face in found]
            said = self.attributes.read(made.images) if self.attributes is not None else [None] * len(part)
            read += [one if found else None for one, found in zip(said, faces, strict=True)]
            latents.append(made.latents.detach().float().cpu())
            self._keep(stage, shots, start, made.images)
        stacked = np.stack(embeddings).astype(np.float32) if embeddings else np.zeros((0, 1), np.float32)
        self._tell(stage, len(shots), len(shots))
        return Observed(np.array(counts, np.int64), stacked, tuple(read), torch.cat(latents))

    def _kept(self, shots: Sequence[Shot]) -> int:
        """How many pictures from the first on are handed to `keep`."""
        subjects = list(dict.fromkeys(shot.subject for shot in shots))[: self.keep_limit]
        return 0 if self.keep is None else sum(shot.subject in subjects for shot in shots)

    def _keep(self, stage: str, shots: Sequence[Shot], start: int, images: NDArray[np.uint8]) -> None:
        for shot, image in zip(shots[start : self._kept(shots)], images, strict=False):
            self.keep(stage, shot.subject, shot.k, image)

    def _keep_again(self, stage: str, shots: Sequence[Shot], observed: Observed) -> None:
        for start in range(0, self._kept(shots), PART):
            self._keep(stage, shots, start, self.pictures(observed, start, start + PART))

    def _tell(self, stage: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)

    def _key(self, stage: str, shots: Sequence[Shot]) -> str:
        values = {
            "version": CACHE_VERSION, "stage": stage, "model": self.backend.sha256,
            "dtype": str(getattr(self.backend, "dtype", "")), "recogniser": self.embedder.sha256,
            "recogniser_settings": getattr(self.embedder, "settings", {}),
            "attributes": getattr(self.attributes, "sha256", ""), "steps": self.steps, "guidance": self.guidance,
            "shots": [[s.prompt, s.seed] for s in shots],
        }
        if sizes := getattr(self.backend, "sizes", None):
            values["sizes"] = sizes
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _store(file: Path, key: str, observed: Observed) -> None:
    text = json.dumps([None if one is None else dict(one) for one in observed.attributes]).encode()
    tensors = {
        "counts": torch.from_numpy(observed.counts), "embeddings": torch.from_numpy(observed.embeddings),
        "attributes": torch.frombuffer(bytearray(text), dtype=torch.uint8), "latents": observed.latents,
    }
    write_safetensors(file, tensors, {"apl.key": key, "apl.content": content_hash(tensors)})


def _load(file: Path, key: str, count: int) -> Observed | None:
    """What was stored under this key; None, with a warning unless it is simply missing, when it cannot be trusted."""
    if not file.is_file():
        return None
    try:
        with safe_open(str(file), framework="pt") as opened:
            meta = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        if meta.get("apl.key") != key or meta.get("apl.content") != content_hash(tensors):
            raise ValueError("its content is not what was stored")
        found = Observed(
            tensors["counts"].numpy(), tensors["embeddings"].numpy(),
            tuple(json.loads(bytes(tensors["attributes"].numpy()))), tensors["latents"], cached=True)
        if not len(found.counts) == len(found.attributes) == len(found.latents) == count:
            raise ValueError("it holds another number of pictures")
        return found
    except Exception as error:  # safetensors, I/O and JSON errors alike: the pictures are simply made again
        _log.warning("The cached scores %s are damaged (%s): they are computed again.", file.name, error)
        return None


def shots_of(subjects: Sequence[tuple[str, str]], seeds: int) -> list[Shot]:
    """All shots for (subject, prompt) pairs: the seeds of a subject side by side."""
    return [Shot(subject, prompt, k) for subject, prompt in subjects for k in range(seeds)]
