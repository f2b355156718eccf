"""`apl miniworld build`: the whole miniature world from packages, stage by stage, each resumable.

    tokenizer -> pictures -> VAE -> text tower -> latents -> UNet -> text tower once more
    -> recognisers, attribute and face models -> export (three-format checkpoint, ONNX models, data) -> S_ID / S_Reg
    -> the miniature SDXL and two relatives

A stage that is finished is skipped, one that was cut off goes on where it was. Needs node, two npm packages and
three Python packages (`pip install ".[miniworld]"` in the checkout); hours on two cores.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed

from apl_core.errors import ConfigError
from apl_train.miniworld import ASSETS, export
from apl_train.miniworld.build import Build

STAGES = ("tokenizer", "pictures", "recogniser2", "left_out", "vae", "text", "latents", "unet", "tower", "text2",
          "unet_xl", "recogniser", "attributes", "presence", "export", "dataset", "family")


def run_stages(build: Build, until: str = STAGES[-1], assets: Path = ASSETS) -> None:
    """Runs the stages up to and with `until`. Raises ConfigError for an unknown stage."""
    if until not in STAGES:
        raise ConfigError(f"until is {until!r}, which is no stage.", f"Use one of: {', '.join(STAGES)}.", field="until")
    if "WORLD_SIZE" in os.environ and not torch.distributed.is_initialized():  # started by torchrun
        torch.distributed.init_process_group("gloo")
    for stage in STAGES[: STAGES.index(until) + 1]:
        if stage == "pictures":
            build.render()
        elif stage == "export":
            export.write_all(build, assets)
        elif stage == "dataset":
            export.write_dataset(build, assets)
        elif stage == "family":
            export.write_family(build, assets)
        else:
            getattr(build, stage)
