"""What `apl make` is going to do: settings with everything "auto" decided, and how long and how much that will take.

Step a checkpoint's name -> a plan. Nothing is drawn or trained here but one step, to measure it.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apl_core.errors import APLError, ConfigError
from apl_core.identity import DEFAULT_ROOT, load_embedder, model_note
from apl_core.library import safe_name
from apl_train import shipped
from apl_train.datasets.cast import PUBLIC, read_cast, table_of
from apl_train.make.settings import AUTO, MakeSettings
from apl_train.model.base_model import read_header
from apl_train.model.files import find_model, read_parts
from apl_train.model.single_file import TEXT
from apl_train.training import config as configs
from apl_train.training.preflight import Measured

ROOT = Path(__file__).resolve().parents[2]
PACKS = ("auraface", "buffalo_l", "antelopev2")
"""Recognisers that are taken where they are installed; the first may be used for anything."""
_DECODE_SHARE = 0.45
"""Work of the VAE's encoder over its decoder's, in FLOPs at 512 px (1.1 / 2.5)."""


def is_miniature(checkpoint: str) -> bool:
    """Whether a model has the shipped miniature's shapes, in whatever form it comes."""
    if checkpoint == shipped.MINIATURE:
        return True
    shapes, _ = read_header(shipped.locate("base_model", shipped.MINIATURE))
    vocabulary, width = shapes[f"{TEXT}embeddings.token_embedding.weight"]
    parts = read_parts(checkpoint, meta=True)
    table = parts.text_encoder.get_input_embeddings().weight
    first = shapes["model.diffusion_model.input_blocks.0.0.weight"]
    return tuple(table.shape) == (vocabulary, width) and parts.unet.conv_in.weight.shape == first


def installed_packs() -> list[str]:
    """Insightface packs on this machine, those that may be used for anything first."""
    root = DEFAULT_ROOT.expanduser() / "models"
    found = sorted(path.parent.name for path in root.glob("*/*.onnx"))
    return sorted(dict.fromkeys(found), key=lambda name: PACKS.index(name) if name in PACKS else len(PACKS))


def _installed_pack() -> str:
    """A recogniser that is on this machine; "none" where there is none: nothing is ever fetched on the quiet."""
    for pack in installed_packs():
        if pack in PACKS:
            try:
                load_embedder(pack)
            except APLError:
                continue
            return pack
    return "none"


def _fitting_preset(device: str) -> str:
    """By the GPU's free memory; the CPU gets the one with the fewest demands."""
    if device in (AUTO, "cuda") and torch.cuda.is_available():
        return "sd15-fast" if torch.cuda.mem_get_info()[0] > 11e9 else "sd15-8gb"
    return "sd15-8gb"


def decided(settings: MakeSettings) -> MakeSettings:
    """The settings with everything "auto" and 0 decided, all named files looked for.

    Raises:
        ModelError: the checkpoint is missing or unsupported. DatasetError, ConfigError: another setting is wrong.
    """
    if settings.checkpoint != shipped.MINIATURE:
        find_model(settings.checkpoint)
    small = is_miniature(settings.checkpoint)
    stem = Path(settings.checkpoint).name.removesuffix(".safetensors")
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "model"
    found = dataclasses.replace(
        settings,
        name=f"anonymize-{plain}"[:80] if settings.name == AUTO else settings.name,
        people=(shipped.MINIATURE if small else PUBLIC) if settings.people == AUTO else settings.people,
        recogniser=(shipped.MINIATURE if small else _installed_pack()) if settings.recogniser == AUTO else
        settings.recogniser,
        persons=(shipped.MINIATURE if small else "") if settings.persons == AUTO else settings.persons,
        preset=("fast" if small else _fitting_preset(settings.device)) if settings.preset == AUTO else settings.preset,
        draw_steps=settings.draw_steps or (20 if small else 30),
        guidance=settings.guidance or (3.0 if small else 7.5),
    )
    safe_name(found.name)
    read_cast(table_of(found.people))
    train_config(found, Path("s_id"), Path("s_reg"))
    folders(found)
    return found


def train_config(settings: MakeSettings, s_id: Path, s_reg: Path) -> configs.TrainConfig:
    """The training that a plan ends in. Raises ConfigError."""
    values = configs.preset(settings.preset)
    if settings.steps:
        levels = min(int(values.get("levels_every", 2000)), max(1, settings.steps // 5))
        values |= {"steps": settings.steps, "levels_every": levels}
    values |= {"base_model": settings.checkpoint, "s_id": str(s_id), "s_reg": str(s_reg), "name": settings.name,
               "seed": settings.seed, "device": settings.device, "vae": settings.vae, "previews": settings.previews}
    return configs.from_dict(values, origin=f"preset {settings.preset}")


def folders(settings: MakeSettings) -> list[Path]:
    """Where the prefix goes at the end: this installation's folder and the hosts' own. Raises ConfigError."""
    from apl_core.library import shipped_folder

    own = Path(settings.embeddings).expanduser() if settings.embeddings else shipped_folder()
    return list(dict.fromkeys([own, *_surrounding_host(), *(host_embeddings(Path(h)) for h in settings.host)]))


def _surrounding_host() -> list[Path]:
    """The folder of the host that this checkout lies in, as an extension or as a node pack."""
    if ROOT.parent.name in ("custom_nodes", "extensions"):
        try:
            return [host_embeddings(ROOT.parents[1])]
        except ConfigError:
            return []
    return []


def host_embeddings(folder: Path) -> Path:
    """A host's folder for embeddings: ComfyUI's models/embeddings, the WebUI's embeddings. Raises ConfigError."""
    folder = folder.expanduser()
    for found in (folder / "models" / "embeddings", folder / "embeddings"):
        if found.is_dir():
            return found
    if folder.is_dir() and folder.name == "embeddings":
        return folder
    raise ConfigError(f"host is {str(folder)!r}, which has neither models/embeddings nor embeddings.",
                      "Give the main folder of ComfyUI, AUTOMATIC1111 or Forge.", field="host")


@dataclass(frozen=True)
class Line:
    """One part of an estimate: stage, what it does, seconds."""

    stage: str
    what: str
    seconds: float


def lines(settings: MakeSettings, measured: Measured, config: configs.TrainConfig) -> list[Line]:
    """How long every stage will take by what one step and one picture took."""
    people = read_cast(table_of(settings.people))
    seen = [p for p in people if p.split == "train"][: settings.limit or None]
    unseen = sum(p.split == "test" for p in people)
    drawn = 0 if settings.s_id else len(seen) * settings.each
    neutral = 0 if settings.s_reg else settings.neutral
    picture, scored = measured.picture_seconds(settings.draw_steps), measured.picture_seconds(20)
    found = [Line("generate", f"{drawn} pictures of {len(seen)} persons", drawn * picture),
             Line("generate", f"{neutral} pictures of things and unnamed persons", neutral * picture),
             Line("cache", "latents of all pictures", (drawn + neutral) * measured.decode_seconds * _DECODE_SHARE),
             Line("train", f"words for {config.pseudo_count} pseudo-identities",
                  config.pseudo_steps * measured.step_seconds if config.pseudo == AUTO else 0.0),
             Line("train", f"targets of {config.bank} stored tuples", config.bank * measured.predict_seconds),
             Line("train", f"{config.steps} steps of {config.batch_size}", config.steps * measured.step_seconds)]
    if settings.recogniser != "none":
        persons = min(settings.score_persons, len(seen)) + min(settings.score_persons, unseen)
        references = 0 if settings.persons else persons * REFERENCES
        shots = persons * settings.score_seeds * 4 + 16 * settings.score_persons + references
        found.append(Line("score", f"{shots} pictures of {persons} persons and neutral prompts", shots * scored))
    return [line for line in found if line.seconds]


REFERENCES = 4
"""Pictures of the base model that stand for a person where there are no photographs."""


def words(seconds: float) -> str:
    """A time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def text(settings: MakeSettings, table: Sequence[Line], run: Path, measured: Measured) -> str:
    """The plan for people, before anything is done."""
    rows = [f"  {line.stage:9}{line.what:58}{words(line.seconds):>9}" for line in table]
    recogniser = settings.recogniser
    if recogniser == "none":
        note = model_note(PACKS[0])
        recogniser = (f"none: faces are neither checked nor scored. One for any use: {note.command}\n"
                      f"            {note.licence} pip install insightface onnxruntime")
    peak = "" if measured.peak_bytes is None else f", {measured.peak_bytes / 2**30:.1f} GiB at most"
    free = shutil.disk_usage(run.parent if run.parent.exists() else Path.cwd()).free / 2**30
    return "\n".join([
        f"model       {settings.checkpoint}", f"people      {settings.people}", f"recogniser  {recogniser}",
        f"preset      {settings.preset}", f"prefix      {settings.name}",
        f"measured    {measured.step_seconds:.2f} s a step, {measured.picture_seconds(settings.draw_steps):.1f} s a "
        f"picture{peak}; {free:.0f} GiB of disk free",
        *rows, f"  {'in all, about':67}{words(sum(x.seconds for x in table)):>9}",
    ])


def to_dict(settings: MakeSettings, table: Sequence[Line]) -> dict[str, Any]:
    """The plan as plain values."""
    return {"settings": dataclasses.asdict(settings), "estimate": [dataclasses.asdict(line) for line in table],
            "seconds": sum(line.seconds for line in table)}
