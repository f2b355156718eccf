"""Run by `accelerate launch` in tests/unit/test_processes.py: trains and samples a tiny model with all processes.

Arguments: a folder with `tiny.safetensors`, `id` and `reg`; then "all", or "die" to lose the second process at step 3.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from apl_core.errors import APLError, ConfigError, TrainingStopped
from apl_train.model.backend import Backend
from apl_train.model.files import read_parts
from apl_train.processes import this_process
from apl_train.scoring.observe import Observer, shots_of
from apl_train.training import command as training
from apl_train.training.config import TrainConfig
from apl_train.training.trainer import Trainer

SETTINGS = {"num_tokens": 3, "batch_size": 5, "steps": 6, "levels_every": 2, "save_every": 4, "learning_rate": 0.01}
PROMPTS = ["photo of ab", "a tree", "cd", "a man", "a car"]


def settings(root: Path, **changes: object) -> TrainConfig:
    return TrainConfig(**{**SETTINGS, "s_id": str(root / "id"), "s_reg": str(root / "reg"), **changes})


def load(root: Path) -> Backend:
    return Backend(read_parts(root / "tiny.safetensors"))


def generate(backend: Backend) -> torch.Tensor:
    """Final latents of PROMPTS, every process drawing its share."""
    processes = this_process()
    mine = processes.share(list(enumerate(PROMPTS)))
    made = backend.sample([p for _, p in mine], [seed for seed, _ in mine], steps=2, decode=False) if mine else None
    return torch.stack(processes.merge(list(made.latents) if made else []))


class Looks:
    """Stands for a recogniser: none, one or two "faces" by a picture's brightness, described by its colours."""

    sha256, settings = "looks", {}

    def faces_of(self, images: list[np.ndarray]) -> list[list[SimpleNamespace]]:
        colours = [image.reshape(-1, 3).mean(0).astype(np.float32) for image in images]
        return [[SimpleNamespace(embedding=one + k) for k in range(int(4 * one.mean() + 0.6) % 3)] for one in colours]


def observe(backend: Backend, cache: Path) -> dict[str, object]:
    """What an evaluation notes of pictures, twice: the second time from its cache."""
    kept: list[tuple[str, int]] = []
    observer = Observer(backend, Looks(), None, steps=2, guidance=1.0, cache=cache, keep_limit=2,
                        keep=lambda _stage, subject, k, _image: kept.append((subject, k)))
    shots = shots_of([(p, p) for p in PROMPTS[:3]], 3)
    seen, again = (observer.observe("test/off", shots, cacheable=True) for _ in range(2))
    return {"counts": seen.counts.tolist(), "faces": seen.embeddings.tolist(), "kept": kept,
            "latents": seen.latents.tolist(), "cached": [seen.cached, again.cached],
            "same": bool(torch.equal(seen.latents, again.latents))}


def main(root: Path, what: str) -> None:
    torch.set_num_threads(1)
    processes, backend = this_process(), load(root)
    one_step = Trainer.one_step
    if what == "die":
        def lost(self: Trainer) -> dict[str, float | None]:
            if self.step == 3 and not processes.main:
                os.kill(os.getpid(), signal.SIGKILL)
            return one_step(self)

        Trainer.one_step = lost
        try:
            training.train(root / "die", settings(root), backend=backend, cache=root / "cache2")
        except APLError as error:
            sys.stderr.write(f"error: {error}\n")
            sys.exit(error.exit_code)
    training.train(root / "two", settings(root), backend=backend, cache=root / "cache2")
    training.train(root / "two-bank", settings(root, bank=70), backend=backend, cache=root / "cache2")

    def asked(self: Trainer) -> dict[str, float | None]:  # one process alone is asked to stop, by a signal
        if self.step == 2 and not processes.main:
            signal.raise_signal(signal.SIGTERM)
        return one_step(self)

    Trainer.one_step = asked
    try:
        training.train(root / "stop", settings(root), backend=backend, cache=root / "cache2")
        raise SystemExit("went on though it was asked to stop")
    except TrainingStopped as stopped:
        where = str(stopped)
    Trainer.one_step = one_step
    training.resume(root / "stop", backend=backend, cache=root / "cache2")

    refused = []
    for start in (lambda: training.train(root / "two", settings(root), backend=backend, cache=root / "cache2"),
                  lambda: training.train(root / "few", settings(root, batch_size=1), backend=backend,
                                         cache=root / "cache2")):
        try:
            start()
        except ConfigError as error:
            refused.append(f"{error.message} {error.hint}")
    latents = generate(backend)
    found = {"index": processes.index, "count": processes.count, "stopped": where, "refused": refused,
             "latents": latents.tolist(), "seen": observe(backend, root / "observed2"),
             "shares": processes.everyone(processes.share(range(7)))}
    (root / f"found{processes.index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
