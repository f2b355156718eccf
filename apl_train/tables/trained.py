"""Trainings that a table needs: made once under the run folder, resumed where they were cut off, shared by tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from apl_core.prefix import AnonymizationPrompt, load_prefix
from apl_train.tables.evaluation import Evaluation
from apl_train.tables.settings import Size
from apl_train.training import config as configs
from apl_train.training.command import resume, train
from apl_train.training.config import TrainConfig

NAME = "sweep"


def plain_settings(ev: Evaluation, size: Size, preset: str = "") -> TrainConfig:
    """The setting that every sweep changes one thing of: the training preset, shorter, from one target bank.

    preset: instead of the evaluation's own.
    """
    s = ev.settings
    values = configs.preset(preset or s.preset) | {
        "base_model": s.checkpoint, "s_id": s.s_id, "s_reg": s.s_reg, "device": s.device, "dtype": s.dtype,
        "steps": size.steps, "levels_every": 0, "bank": size.bank, "name": NAME}
    return configs.from_dict(values)


def folder_name(plain: TrainConfig, changes: Mapping[str, Any]) -> str:
    """One name for one setting, also where two sweeps meet."""
    differs = {k: v for k, v in changes.items() if getattr(plain, k) != v}
    return "_".join(f"{k}-{v}" for k, v in sorted(differs.items())) or "plain"


def trained(ev: Evaluation, size: Size, preset: str = "", **changes: Any) -> AnonymizationPrompt:
    """The prefix of one training; a finished one is reused. `preset`: see `plain_settings`.

    Raises what a training raises.
    """
    plain = plain_settings(ev, size, preset)
    name = "_".join(filter(None, (preset, folder_name(plain, changes))))
    run = ev.run / "trainings" / f"{plain.steps}-steps" / name
    path = run / "prefix" / f"{NAME}.safetensors"
    if not ev.processes.once(path.exists):
        config = dataclasses.replace(plain, **changes)
        if ev.processes.once((run / "config.yaml").exists):
            resume(run, backend=ev.base, cache=ev.cache)
        else:
            train(run, config, backend=ev.base, cache=ev.cache)
        ev.processes.wait()
    return load_prefix(path)
