"""The state a training resumes from: one safetensors file, written atomically, checked by hash on the way back.

It holds the vectors, Adam's two moments and, as metadata, the step, the settings and the hashes of what was trained on.
The newest two states are kept; a damaged one is passed over. Randomness is no state (see `seeds`).
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from apl_core.atomic import storage_error, take_lock, write_safetensors
from apl_core.errors import TrainingError
from apl_core.metadata import content_hash

FOLDER = "state"
LOCK = ".training.lock"
KEEP = 2
_log = logging.getLogger("apl.state")


@dataclass(frozen=True)
class TrainState:
    """Training after `step` optimizer steps.

    Attributes:
        tensors: float32; "vectors.<key>" [m, width], "exp_avg.<key>" and "exp_avg_sq.<key>" of the same shape.
        step: optimizer steps done.
        config: the settings as plain values.
        hashes: of base model and datasets; a changed one must not go on unnoticed.
    """

    tensors: dict[str, Tensor]
    step: int
    config: dict[str, Any]
    hashes: dict[str, str]


def save_state(run: Path, state: TrainState) -> Path:
    """Writes `<run>/state/step-<n>.safetensors` and drops all but the newest states. Raises StorageError."""
    folder = run / FOLDER
    path = folder / f"step-{state.step:07d}.safetensors"
    header = {"step": str(state.step), "config": json.dumps(state.config), "hashes": json.dumps(state.hashes),
              "content": content_hash(state.tensors)}
    write_safetensors(path, state.tensors, header)
    for old in _files(run)[KEEP:]:
        old.unlink(missing_ok=True)
    return path


def _files(run: Path) -> list[Path]:
    return sorted((run / FOLDER).glob("step-*.safetensors"), reverse=True)


def _read(path: Path) -> TrainState:
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    if content_hash(tensors) != header["content"]:
        raise ValueError("its content hash differs")
    return TrainState(tensors, int(header["step"]), json.loads(header["config"]), json.loads(header["hashes"]))


def has_state(run: Path) -> bool:
    """Whether a training was ever begun in this folder: the first state is saved before the first step."""
    return bool(_files(run))


def load_state(run: Path) -> TrainState:
    """The newest state of a run folder that is whole.

    Raises:
        TrainingError: there is none.
    """
    for path in _files(run):
        try:
            return _read(path)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            _log.warning("%s is damaged (%s); going back to the state before it", path.name, error)
    raise TrainingError(f"{run} holds no training state to resume from.",
                        "Start a new training with `apl train`, or check the folder.", field="run")


@contextlib.contextmanager
def only_one(run: Path) -> Iterator[None]:
    """Keeps a second process from training in the same folder; the system lets go of it when this one ends, however.

    Raises:
        TrainingError: another process trains here. StorageError: the folder cannot be written to.
    """
    try:
        handle = (run / LOCK).open("a+b")
    except OSError as error:
        raise storage_error(run / LOCK, error) from error
    with handle:
        if not take_lock(handle.fileno()):
            raise TrainingError(f"Another process is training in {run}.",
                                "Wait for it or stop it, or choose another folder.", field="run")
        for part in (FOLDER, "prefix"):
            for half in (run / part).glob(".*.tmp"):  # of a process that was killed while it wrote
                half.unlink(missing_ok=True)
        yield
