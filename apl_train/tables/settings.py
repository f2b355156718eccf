"""Settings of one evaluation: what is measured with what, and how much of it each table takes. Presets are YAML.

`miniature` runs on the shipped world on any laptop; `sd15` is its twin for real weights, whose paths the user fills in.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apl_core.errors import ConfigError
from apl_train.training.config import read_yaml

PRESETS = Path(__file__).with_name("presets")
TABLES = ("table1", "table2", "table3", "table4", "fig5", "fig6", "fig7", "fig8", "loss")
"""In the order of the paper; `loss` is equation 5 against the released code's loss."""
TRAINED = frozenset({"table3", "table4", "fig7", "fig8", "loss"})
"""Those that train prefixes of their own."""


@dataclass(frozen=True)
class ModelEntry:
    """One model of Table 1: a row for it alone and one with the prefix."""

    name: str
    checkpoint: str
    """"miniature", a .safetensors file, a diffusers folder, or a hub id on this machine."""
    prefix: str = ""
    """Prefix file or name; by default the evaluation's own. One carried over from another model goes here."""
    paper: str = ""
    """The row of the paper's Table 1 that it stands for; "" for none."""


@dataclass(frozen=True)
class Size:
    """How much of everything one table takes."""

    persons: int = 32
    """First so many persons of every split."""
    seeds: int = 2
    """Pictures of each person and condition."""
    prompts: int = 48
    """First so many neutral prompts of each kind."""
    prompt_seeds: int = 1
    """Pictures of each neutral prompt."""
    splits: tuple[str, ...] = ("train", "test")
    """Of "train" (the persons on the list), "test" (unseen ones), "final"."""
    methods: tuple[str, ...] = ()
    """Table 2: baselines to measure; all that are there when empty."""
    values: tuple[float, ...] = ()
    """Tables 3, 4 and Fig. 8: the settings that are swept."""
    steps: int = 300
    """Optimizer steps of a training that the table needs."""
    bank: int = 2048
    """Target bank that such trainings share."""
    iterations: int = 400
    """Fig. 5: DreamBooth iterations; the second prefix is trained by `steps` and `bank`."""
    every: int = 100
    """Fig. 5: pictures are taken every so many iterations."""

    def __post_init__(self) -> None:
        for name, low, high in (("persons", 1, 100_000), ("seeds", 1, 1000), ("prompts", 1, 1_000_000),
                                ("prompt_seeds", 1, 1000), ("steps", 1, 10_000_000), ("bank", 0, 10_000_000),
                                ("iterations", 1, 100_000), ("every", 1, 100_000)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ConfigError(f"{name} is {value!r}, not a whole number from {low} to {high}.",
                                  f"Set {name} in that range.", field=name)
        if not self.splits or not set(self.splits) <= {"train", "test", "final"}:
            raise ConfigError(f"splits is {list(self.splits)}.", "Name some of train, test, final.", field="splits")
        if any(isinstance(v, bool) or not isinstance(v, int | float) for v in self.values):
            raise ConfigError(f"values is {list(self.values)}.", "Give a list of numbers.", field="values")


@dataclass(frozen=True)
class EvaluateSettings:
    """One evaluation. Raises ConfigError from `__post_init__` for a value out of range."""

    name: str = "miniature"
    """Name of the preset; results of all but the miniature carry it in their file names."""
    checkpoint: str = "miniature"
    """The model that prefixes are learned on (paper: SD v1.5)."""
    prefix: str = "anonymize-miniature"
    """The prefix that is measured."""
    models: tuple[ModelEntry, ...] = ()
    """Rows of Table 1."""
    persons: str = "miniature"
    """Folder with people.csv, references and neutral.csv."""
    newcomers: str = "miniature"
    """Fig. 5: such a folder of persons that no model knows, with their pictures to learn from in teaching.zip."""
    recogniser: str = "miniature"
    """"miniature", a recogniser.json, or an insightface pack such as auraface."""
    attributes: str = "miniature"
    """Attr-ACC: "miniature", an attributes.json, "farl" (facer), or "none"."""
    features: str = "miniature"
    """FID: "miniature" (its CLIP's picture tower and its attribute model), an Inception file for clean-fid, "none"."""
    resize: str = "clean"
    """clean-fid's mode: "clean" or "legacy_tensorflow"."""
    clip: str = "miniature"
    """CLIP score: "miniature", "none", "open_clip MODEL WEIGHTS", or "torchmetrics FOLDER"."""
    clip_download: bool = False
    """Let open_clip fetch WEIGHTS, a tag, from the net."""
    preset: str = "fast"
    """Training preset of Tables 3 and 4, Figures 7 and 8."""
    s_id: str = "miniature"
    """Folder that such trainings learn from."""
    s_reg: str = "miniature"
    """The same for S_Reg."""
    steps: int = 20
    """Denoising steps, DDIM."""
    guidance: float = 3.0
    """Classifier-free guidance."""
    template: str = "A close-up portrait of {}"
    """c1, {} is the name (paper sec. 4.2)."""
    pseudo_preset: str = ""
    """Fig. 5: training preset of a second prefix, one learned against persons who are taught later; "" for none."""
    dreambooth: Mapping[str, Any] = field(default_factory=dict)
    """Fig. 5: settings of `DreamBooth` that differ from its own."""
    dreambooth_lora: Mapping[str, Any] = field(default_factory=dict)
    """Fig. 5: those of a second teaching, by LoRA matrices; its rows are left out when empty."""
    device: str = "auto"
    """Where to compute."""
    dtype: str = "fp32"
    """Numbers of UNet and VAE."""
    sizes: Mapping[str, Size] = field(default_factory=dict)
    """Size by table."""

    def __post_init__(self) -> None:
        if "{}" not in self.template:
            raise ConfigError(f"template is {self.template!r}, without a place for the name.",
                              "Write {} where the name belongs.", field="template")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or not 1 <= self.steps <= 1000:
            raise ConfigError(f"steps is {self.steps!r}, not a whole number from 1 to 1000.", "20 is usual.",
                              field="steps")
        if not isinstance(self.guidance, int | float) or not 0 <= self.guidance <= 30:
            raise ConfigError(f"guidance is {self.guidance!r}, not a number from 0 to 30.", "7.5 is usual.",
                              field="guidance")
        if unknown := set(self.sizes) - set(TABLES):
            raise ConfigError(f"sizes has {sorted(unknown)}.", f"Known: {', '.join(TABLES)}.", field="sizes")
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ConfigError(f"models has one name twice: {names}.", "Give every model its own name.", field="models")

    def size(self, table: str) -> Size:
        return self.sizes.get(table, Size())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def preset_names() -> list[str]:
    return sorted(p.stem for p in PRESETS.glob("*.yaml"))


def read_settings(preset: str) -> EvaluateSettings:
    """A shipped preset by name, or a .yaml file of the same form. Raises ConfigError."""
    if preset in preset_names():
        return from_dict(read_yaml(PRESETS / f"{preset}.yaml") | {"name": preset}, f"preset {preset}")
    path = Path(preset)
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"preset is {preset!r}.", f"Use one of: {', '.join(preset_names())}, or a .yaml file.",
                          field="preset")
    return from_dict({"name": path.stem} | read_yaml(path), str(path))


def check_there(settings: EvaluateSettings, tables: Sequence[str]) -> None:
    """Raises ConfigError naming everything that `tables` need and that is not on this machine.

    Other models of Table 1 are no such thing: their rows say that they did not run.
    """
    needed = {"persons": settings.persons}
    if "fig5" in tables:
        needed["newcomers"] = settings.newcomers
    if set(tables) & TRAINED or ("fig5" in tables and settings.pseudo_preset):
        needed |= {"s_id": settings.s_id, "s_reg": settings.s_reg}
    absent = [f"{key} {value}" for key, value in needed.items()
              if value != "miniature" and not Path(value).expanduser().is_dir()]
    if settings.checkpoint.endswith(".safetensors") and not Path(settings.checkpoint).expanduser().is_file():
        absent.insert(0, f"checkpoint {settings.checkpoint}")
    if absent:
        raise ConfigError(f"The preset {settings.name} names what is not here: {', '.join(absent)}.",
                          "Copy apl_train/tables/presets/sd15.yaml, write your own paths into the copy, and give it as "
                          "--preset; docs/evaluate.md says what the folders hold.", field="preset")


def from_dict(values: Mapping[str, Any], origin: str) -> EvaluateSettings:
    """The settings in `values`; the rest keeps its defaults.

    Raises:
        ConfigError: an unknown setting, or a value out of range, naming it.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{origin} holds {type(values).__name__}, not settings.", "Write lines like `steps: 20`.")
    values = dict(_known(EvaluateSettings, values, origin))
    models = values.get("models", ())
    values["models"] = tuple(_made(ModelEntry, one, f"{origin}, models") for one in _list(models, "models", origin))
    sizes = values.get("sizes", {})
    if not isinstance(sizes, Mapping):
        raise ConfigError(f"{origin}: sizes is {sizes!r}.", "Write a table's name and its sizes.", field="sizes")
    values["sizes"] = {table: _made(Size, _tuples(one), f"{origin}, {table}") for table, one in sizes.items()}
    return EvaluateSettings(**values)


def _list(value: Any, name: str, origin: str) -> Sequence[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ConfigError(f"{origin}: {name} is {value!r}, not a list.", "Write one entry a line.", field=name)
    return value


def _tuples(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}


def _known(kind: type, values: Any, origin: str) -> Mapping[str, Any]:
    names = [f.name for f in dataclasses.fields(kind)]
    if not isinstance(values, Mapping):
        raise ConfigError(f"{origin} holds {values!r}, not settings.", f"Known settings: {', '.join(names)}.")
    for key in values:
        if key not in names:
            raise ConfigError(f"{origin} has the unknown setting {key!r}.", f"Known: {', '.join(names)}.",
                              field=str(key))
    return values


def _made(kind: type, values: Any, origin: str) -> Any:
    try:
        return kind(**_known(kind, values, origin))
    except TypeError as error:
        raise ConfigError(f"{origin}: {error}", "Compare it with apl_train/tables/presets/miniature.yaml.") from error
