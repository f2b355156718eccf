"""What a recogniser saw in picture files: looked at once, kept by content, read ahead while faces are looked for.

Step picture file -> faces. Each part of the work is stored whole when it is done, under the hash of the file's bytes,
of the recogniser and of its settings; a check that was killed goes on where it was. Embeddings are personal data: the
folder belongs to the user alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from apl_core.atomic import write_safetensors
from apl_core.errors import DatasetError
from apl_core.identity import Face, FaceEmbedder
from apl_core.metadata import content_hash
from apl_core.onnx_models import threads
from apl_train.datasets.pictures import PictureFolder
from apl_train.folder_score.odd_pictures import LONGEST, Opened, open_any

CACHE_VERSION = 1
PART = 32
"""Pictures in memory at once, and those lost when the process is killed; the next as many are read meanwhile."""
Progress = Callable[[str, int, int], None]
_log = logging.getLogger("apl")


@dataclass(frozen=True, eq=False)
class Seen:
    """One file: its faces, largest first (None where the file holds no sound picture), and what is unusual about it."""

    faces: tuple[Face, ...] | None
    notes: tuple[str, ...]
    sha256: str = ""


class FaceCache:
    """Faces by the content of the file, for one recogniser with its settings. `folder` None keeps nothing on disk."""

    def __init__(self, folder: Path | None, embedder: FaceEmbedder) -> None:
        values = {"version": CACHE_VERSION, "recogniser": embedder.sha256, "longest": LONGEST,
                  "settings": getattr(embedder, "settings", {})}
        self.key = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        self._folder = folder
        self._known: dict[str, Seen] = {}
        for file in sorted(folder.glob(f"faces-{self.key[:16]}-*.safetensors")) if folder else ():
            self._read(file)

    def __len__(self) -> int:
        return len(self._known)

    def get(self, sha256: str) -> Seen | None:
        """What is known of a file with these bytes."""
        return self._known.get(sha256)

    def add(self, seen: Sequence[Seen]) -> None:
        """Remember these, on disk too, as one file that is written whole or not at all. Raises `StorageError`."""
        new = list({one.sha256: one for one in seen if one.sha256 not in self._known}.values())
        self._known |= {one.sha256: one for one in new}
        kept = [one for one in new if one.faces is not None]
        if self._folder is None or not kept:
            return
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        faces = [face for one in kept for face in one.faces]
        text = json.dumps([list(one.notes) for one in kept]).encode()
        tensors = {
            "files": torch.from_numpy(np.array([list(bytes.fromhex(one.sha256)) for one in kept], np.uint8)),
            "counts": torch.tensor([len(one.faces) for one in kept]),
            "boxes": torch.tensor([face.box for face in faces], dtype=torch.float64).reshape(-1, 4),
            "scores": torch.tensor([face.score for face in faces], dtype=torch.float64),
            "embeddings": torch.from_numpy(np.stack([f.embedding for f in faces]) if faces else np.zeros(
                (0, 1), np.float32)),
            "notes": torch.frombuffer(bytearray(text), dtype=torch.uint8),
        }
        digest = content_hash(tensors)
        write_safetensors(self._folder / f"faces-{self.key[:16]}-{digest[:16]}.safetensors", tensors,
                          {"apl.key": self.key, "apl.content": digest})

    def _read(self, file: Path) -> None:
        try:
            with safe_open(str(file), framework="pt") as opened:
                meta = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            if meta.get("apl.key") != self.key or meta.get("apl.content") != content_hash(tensors):
                raise ValueError("its content is not what was stored")
            notes, at = json.loads(bytes(tensors["notes"].numpy())), 0
            embeddings = tensors["embeddings"].numpy()
            for i, count in enumerate(tensors["counts"].tolist()):
                faces = tuple(Face(tuple(tensors["boxes"][j].tolist()), float(tensors["scores"][j]), embeddings[j])
                              for j in range(at, at + count))
                sha256 = bytes(tensors["files"][i].tolist()).hex()
                self._known[sha256] = Seen(faces, tuple(notes[i]), sha256)
                at += count
        except Exception as error:  # safetensors, I/O and JSON errors alike: the pictures are simply looked at again
            _log.warning("The cached faces %s are damaged (%s): they are looked for again.", file.name, error)


@dataclass(frozen=True, eq=False)
class _Loaded:
    name: str
    sha256: str
    opened: Opened | None  # None: known from the cache


def look(folder: PictureFolder, names: Sequence[str], embedder: FaceEmbedder, cache: FaceCache, stage: str = "faces",
         progress: Progress | None = None) -> dict[str, Seen]:
    """What is in each of these files. Files of equal content are looked at once; none stops the others.

    Args:
        names: relative paths in `folder`.
        stage: told to `progress` with (files done, files in all).
    """
    found: dict[str, Seen] = {}
    parts = [names[i : i + PART] for i in range(0, len(names), PART)]
    if progress is not None:
        progress(stage, 0, len(names))
    with ThreadPoolExecutor(threads()) as pool:
        def ahead(i: int) -> list:
            return [pool.submit(_load, folder, name, cache) for name in parts[i]] if i < len(parts) else []

        coming = ahead(0)
        for i in range(len(parts)):
            loaded = [each.result() for each in coming]
            coming = ahead(i + 1)
            fresh = list({one.sha256: one for one in loaded if one.opened is not None}.values())
            askable = [one for one in fresh if one.opened.askable]
            faces = dict(zip([one.sha256 for one in askable],
                             embedder.faces_of([one.opened.pixels for one in askable]), strict=True))
            cache.add([Seen(None if one.opened.pixels is None else tuple(faces.get(one.sha256, ())), one.opened.notes,
                            one.sha256) for one in fresh])
            found |= {one.name: cache.get(one.sha256) for one in loaded}
            if progress is not None:
                progress(stage, len(found), len(names))
    return found


def _load(folder: PictureFolder, name: str, cache: FaceCache) -> _Loaded:
    try:
        data = folder.read(name)
    except DatasetError as error:
        sha256 = hashlib.sha256(f"unreadable\0{name}".encode()).hexdigest()
        return _Loaded(name, sha256, Opened(None, (f"broken: {error.message}",)))
    sha256 = hashlib.sha256(data).hexdigest()
    return _Loaded(name, sha256, None if cache.get(sha256) is not None else open_any(data))
