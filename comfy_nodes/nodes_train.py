"""Train Anonymization Prompt: from a checkpoint and pictures of persons to a prefix, in a process of its own."""

from __future__ import annotations

import ipaddress
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import args as host_arguments
from comfy_api.latest import io, ui
from PIL import Image

from ..apl_core.errors import APLError, TrainingError
from ..apl_core.library import resolve_within, safe_name
from ..apl_core.prefix import load_prefix
from .pictures import to_images
from .schema import AnonymizationPromptType, schema
from .training_pictures import grid, levels, mean_score
from .training_process import Plan, follow

MINIATURE, NONE = "miniature", "none"
SHIPPED = (MINIATURE, "miniature-sdxl")
PRESETS = ("fast", "miniature", "miniature-guided", "miniature-pseudo", "miniature-sdxl", "null", "paper", "sd15-8gb",
           "sd15-fast", "sd15-guided", "sd15-paper", "sd15-pseudo", "sdxl-fast", "sdxl-paper")
REMOTE = "APL_ALLOW_REMOTE_TRAIN"
TABLE = "metadata.csv"


def allowed() -> bool:
    """Whether this server may start trainings: only people at this machine can reach it, or its owner said so."""
    if os.environ.get(REMOTE) == "1":
        return True
    return all(_is_loopback(address) for address in str(host_arguments.listen or "127.0.0.1").split(","))


def _is_loopback(address: str) -> bool:
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def checkpoints() -> list[str]:
    """The shipped small models, and the host's checkpoints that are safetensors files."""
    return [*SHIPPED, *(name for name in folder_paths.get_filename_list("checkpoints")
                         if name.endswith(".safetensors"))]


def datasets() -> list[str]:
    """"miniature", and every folder of the host's input folder with a metadata.csv."""
    try:
        found = sorted(path.name for path in Path(folder_paths.get_input_directory()).iterdir()
                       if (path / TABLE).is_file())
    except OSError:
        found = []
    return [MINIATURE, *found]


def _checkpoint(name: str) -> str:
    return name if name in SHIPPED else folder_paths.get_full_path_or_raise("checkpoints", name)


def _dataset(name: str) -> str:
    if name == MINIATURE:
        return name
    return str(resolve_within(folder_paths.get_input_directory(), name))


def plan_of(values: Mapping[str, Any]) -> Plan:
    """The plan of a node's inputs. Raises LibraryError for a name or folder that is not allowed."""
    settings: dict[str, Any] = {
        "name": safe_name(values["name"]), "preset": values["preset"], "base_model": _checkpoint(values["base_model"]),
        "s_id": _dataset(values["persons"]), "alpha": float(values["alpha"]), "seed": values["training_seed"],
        "previews": values["previews"],
    }
    if values["others"] == NONE:
        settings["no_reg"] = True
    else:
        settings["s_reg"] = _dataset(values["others"])
    for field in ("steps", "levels_every"):
        if values[field]:
            settings[field] = values[field]
    return Plan(Path(folder_paths.get_output_directory()) / "anonymization_prompts", settings)


class Progress:
    """The node's progress bar, with the newest pictures beside it, from a training's events."""

    def __init__(self, run: Path) -> None:
        self._run, self._bar, self._step, self._total = run, None, 0, 1
        self._shown = -1
        self.losses: dict[str, float] = {}

    def __call__(self, event: Mapping[str, Any]) -> None:
        if event.get("event") == "start":
            self._total, self._step = int(event["steps"]), int(event["step"])
            self._bar = comfy.utils.ProgressBar(self._total)
            self._update()
        elif event.get("event") == "step":
            self._step = int(event["step"])
            for key in ("l_id", "l_reg"):
                if event.get(key) is not None:
                    self.losses[key] = 0.95 * self.losses.get(key, event[key]) + 0.05 * event[key]
            self._update()

    def look(self) -> None:
        """Show pictures that were drawn since the last look."""
        found = levels(self._run)
        if len(found) > max(self._shown, 0) and (picture := grid(self._run, found)) is not None:
            self._shown = len(found)
            self._update(("JPEG", Image.fromarray(picture), max(picture.shape)))

    def _update(self, preview: tuple | None = None) -> None:
        if self._bar is not None:
            self._bar.update_absolute(self._step, self._total, preview)


class TrainAnonymizationPrompt(io.ComfyNode):
    """Learns a prefix; a run that was interrupted goes on when the node runs again with the same settings."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="APL_TrainAnonymizationPrompt",
            display_name="Train Anonymization Prompt",
            description="Learns an anonymization prompt on a Stable Diffusion 1.x or XL checkpoint, in a process of "
            "its own. Models loaded here are unloaded first. Interrupting saves; running again with the same settings "
            "goes on.",
            search_aliases=["APL", "learn", "prefix", "textual inversion"],
            is_output_node=True,
            inputs=[
                io.Combo.Input("base_model", options=checkpoints(), default=MINIATURE, display_name="base model",
                               tooltip="The checkpoint to learn on: Stable Diffusion 1.x or XL, or one of the "
                               "miniatures that come with the project, which need minutes on a processor."),
                io.Combo.Input("persons", options=datasets(), default=MINIATURE,
                               tooltip="S_ID: a folder of input/ with pictures of named persons and a metadata.csv. "
                               "miniature is the shipped set of fictional, drawn persons."),
                io.Combo.Input("others", options=[*datasets(), NONE], default=MINIATURE,
                               tooltip="S_Reg: a folder of input/ with things and unnamed persons, which keep the "
                               "prefix from changing them. none trains without: persons then appear uninvited."),
                io.Combo.Input("preset", options=list(PRESETS), default="fast",
                               tooltip="Where all other settings start from: fast and miniature for the miniature, "
                               "sd15-... for Stable Diffusion 1.5 by memory and patience, paper as published, "
                               "miniature-sdxl, sdxl-fast and sdxl-paper for SDXL."),
                io.String.Input("name", default="my-anonymization-prompt",
                                tooltip="Name of the prefix: letters, digits, '-', '_' and single dots."),
                io.Int.Input("steps", default=0, min=0, max=10_000_000,
                             tooltip="Optimizer steps; 0 takes the preset's."),
                io.Float.Input("alpha", default=1.0, min=0.0, max=100.0, step=0.1,
                               tooltip="Strength of anonymization (the paper's alpha). Higher moves further from the "
                               "person, and changes more."),
                io.Int.Input("levels_every", default=0, min=0, max=10_000_000, display_name="levels every",
                             tooltip="Steps between saved levels, each a whole prefix; pictures are drawn at each. 0 "
                             "takes the preset's."),
                io.Int.Input("previews", default=4, min=1, max=16,
                             tooltip="Persons drawn at each level, without and with the prefix."),
                # not "seed": the page would change an input of that name after every run, and start anew
                io.Int.Input("training_seed", default=0, min=0, max=2**31 - 1, display_name="seed",
                             tooltip="Seed of the start, the order of the pictures and the noise."),
            ],
            outputs=[
                AnonymizationPromptType.Output("anonymization_prompt", display_name="anonymization prompt",
                                               tooltip="The finished prefix: connect it to Anonymize or Save."),
                io.Image.Output("levels", tooltip="One picture: a row without the prefix, then one a level."),
                io.String.Output("report", tooltip="Steps, losses, scores and the run's folder as text."),
            ],
        )

    @classmethod
    def validate_inputs(cls, name: str) -> bool | str:
        try:
            safe_name(name)
        except APLError as error:
            return str(error)
        if not allowed():
            return ("This server can be reached from other machines, so training is off. Its owner can allow it by "
                    f"starting ComfyUI with the variable {REMOTE}=1.")
        return True

    @classmethod
    def execute(cls, **values: Any) -> io.NodeOutput:
        if not allowed():  # a graph can be run by other ways than the one that validates
            raise TrainingError("Training is off on this server.", f"Start it with {REMOTE}=1.", field="training")
        plan = plan_of(values)
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
        began, progress = time.monotonic(), Progress(plan.run)

        def interrupted() -> None:
            progress.look()
            comfy.model_management.throw_exception_if_processing_interrupted()

        for event in follow(plan, interrupted):
            progress(event)
        prefix = load_prefix(plan.result)
        found = levels(plan.run)
        picture = grid(plan.run, found)
        images = to_images([picture]) if picture is not None else torch.zeros(1, 64, 64, 3)
        report = _report(plan, prefix, found, progress.losses, time.monotonic() - began)
        return io.NodeOutput(prefix, images, report, ui=ui.PreviewText(report))


def _report(plan: Plan, prefix: Any, found: list[dict[str, Any]], losses: Mapping[str, float], seconds: float) -> str:
    lines = [f"{prefix.name}: {prefix.meta.steps} steps, content hash {prefix.content_hash[:12]}"]
    if losses:
        names = {"l_id": "L_ID", "l_reg": "L_Reg"}
        lines.append(", ".join(f"{names[key]} {value:.5f}" for key, value in losses.items())
                     + f", {seconds:.0f} s in this run")
    for state, level in [("off", level) for level in found[:1]] + [("on", level) for level in found]:
        if (score := mean_score(level, state)) is not None:
            title = "without" if state == "off" else f"step {level['step']}"
            lines.append(f"{title}: mean identity score {score:.3f} of {len(level['persons'])} persons drawn")
    return "\n".join([*lines, f"run folder: {plan.run}"])


NODES = [TrainAnonymizationPrompt]
