"""Names of what ships with the project, as paths: "miniature" as a dataset, a recogniser, an evaluation set, and as a
model, where it has relatives.

The only place outside `miniworld/` that knows where the miniature world lies; everything else takes paths.
"""

from __future__ import annotations

import os
from pathlib import Path

from apl_core.errors import ConfigError

ASSETS = Path(__file__).with_name("miniworld") / "assets"
MINIATURE = "miniature"
PREFIX = "anonymize-miniature"
"""The shipped prefix, in `embeddings/`."""
FAMILY = ("miniature-1.4", "miniature-realistic", "miniature-sdxl")
"""Base models that ship as what they add to the miniature; the whole file is made at first use."""
_SHIPPED = {
    "base_model": ASSETS / "model" / "miniature-sd1.safetensors",
    "s_id": ASSETS / "s_id",
    "s_reg": ASSETS / "s_reg",
    "persons": ASSETS,
    "recogniser": ASSETS / "faces" / "recogniser.json",
    "recogniser2": ASSETS / "faces" / "recogniser2.json",
    "attributes": ASSETS / "faces" / "attributes.json",
    "clip": ASSETS / "faces" / "clip.json",
    "newcomers": ASSETS / "newcomers",
    "captions": ASSETS / "captions.txt",
}


def locate(kind: str, value: str) -> Path:
    """The path of a setting: "miniature" means the shipped one, anything else is a path of the user's.

    Raises:
        ConfigError: the shipped file is not there (an incomplete installation).
    """
    if kind == "base_model" and value in FAMILY:
        return _assembled(value.removeprefix(f"{MINIATURE}-"))
    if value != MINIATURE:
        return Path(value).expanduser()
    path = _SHIPPED[kind]
    if not path.exists():
        raise ConfigError(f"{kind} is {value!r}, but {path.name} is not in this installation.",
                          "Install from a full clone, or make it with `apl miniworld build`.", field=kind)
    return path


def _assembled(name: str) -> Path:
    from apl_train.miniworld import relatives, sdxl_file

    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "apl" / "models"
    return sdxl_file.sdxl_checkpoint(folder) if name == "sdxl" else relatives.relative_checkpoint(name, folder)


def recogniser(value: str) -> str | Path:
    """What `load_embedder` takes: "miniature" and "miniature2" ship, *.json is a manifest, other words are packs."""
    if value in (MINIATURE, f"{MINIATURE}2"):
        return locate("recogniser" + value.removeprefix(MINIATURE), MINIATURE)
    return Path(value) if value.endswith(".json") else value


def prefix_file(name: str) -> Path:
    """A prefix by path, or by its name in `embeddings/`, with a level as "name@400"."""
    path = Path(name).expanduser()
    if path.suffix == ".safetensors" or path.exists():
        return path
    from apl_core.library import PrefixLibrary, shipped_folder

    base, _, level = name.partition("@")
    return PrefixLibrary([shipped_folder()]).resolve(base, int(level) if level.isdigit() else None)
