"""Pseudo-identities that a training makes for itself (`pseudo: auto`): once a model and set of faces, in its cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from apl_core.errors import TrainingStopped
from apl_train import shipped
from apl_train.datasets.dataset import TABLE, read_dataset
from apl_train.model.backend import Backend
from apl_train.processes import this_process
from apl_train.training.config import TrainConfig
from apl_train.training.pseudo_identity import Inversion, make_pseudo

AUTO = "auto"


def pseudo_folder(backend: Backend, config: TrainConfig, cache: Path, *, stop: Callable[[], bool] | None = None,
                  progress: Callable[[int, int], None] | None = None) -> Path | None:
    """The folder of pseudo-identities that the settings ask for; None where they ask for none.

    With "auto", faces of S_Reg are bound to words now unless that was done before; of several processes one does it.

    Raises:
        TrainingStopped: `stop()` said so; binding starts anew then. DatasetError: S_Reg shows no face.
    """
    if config.pseudo != AUTO:
        return Path(config.pseudo) if config.pseudo else None
    faces = read_dataset(shipped.locate("s_reg", config.s_reg), expect="reg")
    # the memory of a training step is what the preset was made for
    settings = Inversion(steps=config.pseudo_steps, batch_size=min(8, config.batch_size), seed=config.seed)
    key = {"model": backend.sha256, "faces": faces.content_sha256, "count": config.pseudo_count, **asdict(settings)}
    folder = cache / "identities" / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]

    def tell(done: int, total: int) -> None:
        if progress:
            progress(done, total)
        if stop is not None and stop():
            raise TrainingStopped("Stopped while pseudo-identities were bound to words; nothing was trained.",
                                  "`apl resume` binds them from the start.")

    def make() -> None:
        if not (folder / TABLE).exists():  # written last: a folder without it was cut off
            make_pseudo(backend, faces, folder, count=config.pseudo_count, settings=settings, progress=tell)

    this_process().once(make)
    return folder
