"""Settings of one training as a dataclass; its attribute docstrings are the command line's help, presets are YAML.

The defaults are the paper's (sec. 4.1): m = 10, alpha = 1, learning rate 1e-3, 20,000 steps, batch 1, both sets mixed.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from apl_core.errors import ConfigError
from apl_train.model.sizes import check_sizes

PRESETS = Path(__file__).parent.parent / "presets"
CONFIG_VERSION = 1


@dataclass(frozen=True)
class TrainConfig:
    """One APL training. Raises ConfigError from `__post_init__` for a value out of range."""

    base_model: str = "miniature"
    """Model to learn on: "miniature", a .safetensors file, a diffusers folder, or the hub id of one on this machine."""
    vae: str = ""
    """VAE to use instead of the model's own: a .safetensors file or a diffusers VAE folder."""
    device: str = "auto"
    """Where to compute: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", "mps"."""
    dtype: str = "fp32"
    """Numbers of the frozen UNet and VAE: "fp32", "bf16" or "fp16"; the prefix is fp32 always."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, a third more work."""
    offload: str = "none"
    """What waits on the CPU: "none", "vae" (while it has nothing to do), "all" (the text encoder too)."""
    size_conditioning: list[int] | None = None
    """SDXL: what it is told of every picture: height and width of the original, top and left of its crop, height and
    width of the target; the pictures' own size without a crop when not given."""
    s_id: str = "miniature"
    """Folder of S_ID: pictures of named persons with c1 and c2 ("miniature" for the shipped one)."""
    s_reg: str = "miniature"
    """Folder of S_Reg: pictures of things and unnamed persons with captions."""
    name: str = "anonymize"
    """Name of the prefix file."""
    num_tokens: int = 10
    """m, learnable vectors (paper sec. 4.5: 10)."""
    alpha: float = 1.0
    """Strength of anonymization in equation 5 (paper: 1)."""
    learning_rate: float = 1e-3
    """Adam's learning rate (paper: 1e-3)."""
    schedule: str = "constant"
    """Learning rate over the run: "constant" or "cosine"."""
    warmup: int = 0
    """Optimizer steps over which the learning rate rises from 0."""
    steps: int = 20_000
    """Optimizer steps (paper: 20,000)."""
    batch_size: int = 1
    """Samples per optimizer step (paper: 1)."""
    id_share: float = 0.5
    """Share of S_ID among the samples; the rest is S_Reg."""
    face_share: float = 0.5
    """Share of unnamed persons among the samples of S_Reg; the rest are things."""
    reg_weight: float = 1.0
    """Weight of L_Reg (paper: 1)."""
    loss: str = "paper"
    """"paper" (equation 5), or "released": that of the paper's code, which encodes c1 of the target with the prefix."""
    no_reg: bool = False
    """Train on S_ID alone, the ablation of Fig. 7: persons then appear uninvited."""
    persons: int | None = None
    """Train on the first so many persons of S_ID (Fig. 8); all when not given."""
    init: str = "vocabulary"
    """Start of the vectors: "vocabulary" (random tokens' embeddings), "text" (tokens of `init_text`, repeated) or
    "uniform" (numbers from 0 to 1, off the tokens' manifold, as in the paper's released code)."""
    init_text: str = "a photo of some person"
    """Words to start from when `init` is "text"."""
    low_t: int = 0
    """Lowest timestep drawn."""
    high_t: int = 999
    """Highest timestep drawn."""
    bank: int = 0
    """Size of the target bank: tuples (picture, timestep, noise) with stored targets, shared by all runs; 0 = none."""
    placement: str = "prefix"
    """Where the vectors stand: "prefix" (paper sec. 3.3), "suffix" (behind the words, which a causal encoder lets them
    see) or "both" (half ahead, half behind; the same token budget)."""
    timesteps: str = "uniform"
    """How timesteps are drawn: "uniform" (paper) or "separability": more often where eps(c1) and eps(c2) differ, as the
    bank says (needs `bank`; SDErasure picks steps so)."""
    time_floor: float = 0.3
    """Share of timesteps that stay uniform when they are drawn by separability."""
    guided_share: float = 0.0
    """Share of S_ID samples judged as guidance will use them: the push away from c1 is then not multiplied by it."""
    guided_low: float = 3.0
    """Lowest guidance scale of those samples (Stable Diffusion is used at 3 to 12)."""
    guided_high: float = 12.0
    """Highest guidance scale of those samples."""
    name_noise: float = 0.0
    """Share of S_ID samples whose name is written in another way: case, typing errors, hyphens, spaced letters,
    accents, look-alike letters (Struppek et al. 2022), surname, initials. The target stays that of the clean name."""
    pseudo: str = ""
    """Folder of pseudo-identities (`apl pseudo`): fictional faces bound to new words, as DreamBooth binds them. "auto":
    unnamed faces of S_Reg are bound before the training, once a model."""
    pseudo_count: int = 16
    """How many with "auto"."""
    pseudo_steps: int = 150
    """Steps of textual inversion with "auto", of `batch_size` samples (8 at most), for all of them together."""
    pseudo_share: float = 0.25
    """Share of pseudo-identities among the samples of S_ID, where there are any."""
    second_model: str = ""
    """Another base model of this family, such as a fine-tune: steps take turns between the two."""
    levels_every: int = 2000
    """Optimizer steps between saved levels (paper Fig. 6); each is a complete prefix file. 0 = none."""
    save_every: int = 200
    """Optimizer steps between saved training states."""
    previews: int = 0
    """Persons to draw without and with the prefix at step 0 and at every level, with their scores; 0 = none."""
    seed: int = 0
    """Seed of initialisation, sampling and noise."""

    def __post_init__(self) -> None:
        whole = (("num_tokens", 1, 64), ("steps", 1, 10_000_000), ("batch_size", 1, 1024), ("warmup", 0, 10_000_000),
                 ("low_t", 0, 999), ("high_t", 0, 999), ("bank", 0, 10_000_000), ("levels_every", 0, 10_000_000),
                 ("save_every", 1, 10_000_000), ("previews", 0, 64), ("pseudo_count", 1, 10_000),
                 ("pseudo_steps", 1, 1_000_000), ("seed", 0, 2**31 - 1))
        for field, low, high in whole:
            _check(field, getattr(self, field), int, low, high)
        for field, low, high in (("alpha", -10.0, 100.0), ("learning_rate", 1e-8, 10.0), ("id_share", 0.0, 1.0),
                                 ("face_share", 0.0, 1.0), ("reg_weight", 0.0, 1000.0), ("time_floor", 0.0, 1.0),
                                 ("guided_share", 0.0, 1.0), ("guided_low", 1.0, 100.0), ("guided_high", 1.0, 100.0),
                                 ("name_noise", 0.0, 1.0), ("pseudo_share", 0.0, 1.0)):
            _check(field, getattr(self, field), float, low, high)
        if self.persons is not None:
            _check("persons", self.persons, int, 1, 1_000_000)
        for field, allowed in (("schedule", ("constant", "cosine")), ("init", ("vocabulary", "text", "uniform")),
                               ("loss", ("paper", "released")),
                               ("placement", ("prefix", "suffix", "both")), ("timesteps", ("uniform", "separability")),
                               ("dtype", ("fp32", "bf16", "fp16")), ("offload", ("none", "vae", "all"))):
            if getattr(self, field) not in allowed:
                raise ConfigError(f"{field} is {getattr(self, field)!r}.", f"Use one of: {', '.join(allowed)}.",
                                  field=field)
        if self.size_conditioning is not None:
            check_sizes(self.size_conditioning)
        if self.device.partition(":")[0] not in ("auto", "cpu", "cuda", "mps"):
            raise ConfigError(f"device is {self.device!r}.", "Use one of: auto, cpu, cuda, mps.", field="device")
        for low, high in (("low_t", "high_t"), ("guided_low", "guided_high")):
            if (a := getattr(self, low)) > (b := getattr(self, high)):
                raise ConfigError(f"{low} is {a}, above {high} {b}.", "Swap the two.", field=low)
        if self.timesteps == "separability" and not self.bank:
            raise ConfigError("timesteps is 'separability', but there is no bank to tell it from.",
                              "Set bank to 1000 or more, or timesteps to uniform.", field="timesteps")
        if self.no_reg and self.id_share == 0:
            raise ConfigError("no_reg with id_share 0 leaves nothing to train on.", "Raise id_share.", field="id_share")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the version of this format."""
        return {"config_version": CONFIG_VERSION, **dataclasses.asdict(self)}


def _check(field: str, value: Any, kind: type, low: float, high: float) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and (kind is float or isinstance(value, int))
    if not good or not math.isfinite(value) or not low <= value <= high:
        noun = "a whole number" if kind is int else "a number"
        raise ConfigError(f"{field} is {value!r}, not {noun} from {low} to {high}.", f"Set {field} in that range.",
                          field=field)


def from_dict(values: dict[str, Any], origin: str = "config") -> TrainConfig:
    """The settings in `values`; the rest keeps its defaults.

    Raises:
        ConfigError: an unknown setting, a future config_version, or a value out of range.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{origin} holds {type(values).__name__}, not settings.", "Write lines like `steps: 1000`.")
    values = dict(values)
    version = values.pop("config_version", CONFIG_VERSION)
    if version != CONFIG_VERSION:
        raise ConfigError(f"config_version is {version!r}; this version reads {CONFIG_VERSION}.",
                          "Update this software to use the file.", field="config_version")
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    for key in values:
        if key not in known:
            raise ConfigError(f"{origin} has the unknown setting {key!r}.", f"Known: {', '.join(sorted(known))}.",
                              field=str(key))
    for field in dataclasses.fields(TrainConfig):
        # YAML 1.1 reads 1e-3 as a string
        if field.type == "float" and isinstance(values.get(field.name), str):
            try:
                values[field.name] = float(values[field.name])
            except ValueError as error:
                raise ConfigError(f"{field.name} is {values[field.name]!r}, not a number.", "Write 0.001.",
                                  field=field.name) from error
    return TrainConfig(**values)


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a YAML file as a dict. Raises ConfigError."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}.", "Check the path.", field="config") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}", "Compare it with apl_train/presets/fast.yaml.",
                          field="config") from error


def preset_names() -> list[str]:
    return sorted(p.stem for p in PRESETS.glob("*.yaml"))


def preset(name: str) -> dict[str, Any]:
    """Settings of a shipped preset. Raises ConfigError when there is none of this name."""
    if name not in preset_names():
        raise ConfigError(f"preset is {name!r}.", f"Use one of: {', '.join(preset_names())}.", field="preset")
    return read_yaml(PRESETS / f"{name}.yaml")
