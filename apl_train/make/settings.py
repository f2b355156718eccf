"""Settings of `apl make` as a dataclass; its attribute docstrings are the command line's help.

Whatever is "auto" or 0 is decided by `plan.decided`, from the checkpoint and from this machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from apl_core.errors import ConfigError
from apl_train import shipped

AUTO = "auto"


@dataclass(frozen=True)
class MakeSettings:
    """One `apl make`. Raises ConfigError from `__post_init__` for a value out of range."""

    checkpoint: str = shipped.MINIATURE
    """Model to make a prefix for: a .safetensors file, a diffusers folder, a hub id on this machine, or "miniature"."""
    name: str = AUTO
    """Name of the prefix; by default anonymize-<model>."""
    people: str = AUTO
    """CSV of name, split, description: whom to learn from and whom to test on. "public": the shipped public figures."""
    s_id: str = ""
    """A finished S_ID folder to use instead of drawing one."""
    s_reg: str = ""
    """A finished S_Reg folder to use instead of drawing one (see `apl generate reg`)."""
    recogniser: str = AUTO
    """Looks for faces and scores: "miniature", a recogniser.json, an insightface pack, or "none"."""
    persons: str = AUTO
    """Folder with references to score against; by default the base model's own pictures of the test persons."""
    preset: str = AUTO
    """Preset to train with: sd15-fast, sd15-8gb, sd15-pseudo, sd15-paper, ...; by default one that fits the memory."""
    steps: int = 0
    """Optimizer steps instead of the preset's; 0 = the preset's."""
    limit: int = 0
    """Learn from the first so many persons; 0 = all."""
    each: int = 4
    """Pictures drawn of each person."""
    neutral: int = 400
    """Pictures drawn of things and unnamed persons."""
    draw_steps: int = 0
    """Denoising steps of a picture; 0 = 20 for the miniature, 30 otherwise."""
    guidance: float = 0.0
    """Classifier-free guidance of all pictures; 0 = 3 for the miniature, 7.5 otherwise."""
    previews: int = 4
    """Persons to draw without and with the prefix at every level of the training; 0 = none."""
    score_persons: int = 16
    """Unseen persons, and as many seen ones, to score."""
    score_seeds: int = 4
    """Pictures of each of them."""
    device: str = AUTO
    """Where to compute: "auto", "cpu", "cuda", ..."""
    vae: str = ""
    """VAE to use instead of the model's own."""
    host: tuple[str, ...] = ()
    """Folders of image programs (ComfyUI, AUTOMATIC1111, Forge) to install the prefix into."""
    embeddings: str = ""
    """Folder of prefixes to install into; by default the one of this installation."""
    seed: int = 0
    """Seed of everything."""

    def __post_init__(self) -> None:
        ranges = (("steps", 0, 10_000_000), ("limit", 0, 1_000_000), ("each", 1, 1000), ("neutral", 2, 1_000_000),
                  ("draw_steps", 0, 1000), ("previews", 0, 64),
                  ("score_persons", 1, 100_000), ("score_seeds", 1, 1000),
                  ("seed", 0, 2**31 - 1))
        for field, low, high in ranges:
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ConfigError(f"{field} is {value!r}, not a whole number from {low} to {high}.",
                                  f"Set {field} in that range.", field=field)
        if not 0 <= self.guidance <= 30:
            raise ConfigError(f"guidance is {self.guidance!r}, not a number from 0 to 30.", "7.5 is usual.",
                              field="guidance")
