"""What a user asks for: one object for the UI's components, the API's payload and the infotext.

API: `"alwayson_scripts": {"anonymize": {"args": [{"enabled": true, "prefix": "NAME", "level": 1200}]}}`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..apl_core.errors import ConfigError

KEY = "APL"
"""The infotext's key."""
WHOLE = "whole training"
"""The level's choice for the end of the training."""
_FIELDS = ("enabled", "prefix", "level")
_INFOTEXT = re.compile(r"(?P<prefix>.+) \[(?P<hash>[0-9a-f]{8,64})\](?:, level (?P<level>\d{1,9}))?")


@dataclass(frozen=True)
class ScriptArgs:
    """Enabled or not, the prefix's name in the library, and the level (optimizer steps; None for the whole training).

    Raises:
        ConfigError: a field is of another type or out of its range.
    """

    enabled: bool = False
    prefix: str = ""
    level: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.enabled, bool):
            raise ConfigError(f"enabled is {self.enabled!r}.", "Use true or false.", field="enabled")
        if not isinstance(self.prefix, str):
            raise ConfigError(f"prefix is {self.prefix!r}, not text.",
                              "Use a name from GET /apl/v1/prefixes.", field="prefix")
        if self.level is not None and not 0 <= self.level <= 999_999_999:
            raise ConfigError(f"level is {self.level}.", "Use one of the prefix's levels, or leave it out.",
                              field="level")

    @classmethod
    def of(cls, values: Sequence[Any], default: ScriptArgs) -> ScriptArgs:
        """From the script's arguments: (enabled, prefix, level) or one object first; None means the default.

        Raises:
            ConfigError: an unknown key, or a value that is none of the field's.
        """
        first = values[0] if values else None
        given: Mapping[str, Any] = first if isinstance(first, Mapping) else dict(zip(_FIELDS, values, strict=False))
        unknown = [str(key) for key in given if key not in _FIELDS]
        if unknown:
            raise ConfigError(f"The arguments of Anonymize have the unknown key {unknown[0]!r}.",
                              f"Known: {', '.join(_FIELDS)}.", field=unknown[0])
        changes = {key: value for key, value in given.items() if value is not None}
        if "level" in changes:
            changes["level"] = level_of(changes["level"])
        if "prefix" in changes and isinstance(changes["prefix"], str):
            changes["prefix"] = name_of(changes["prefix"])
        return replace(default, **changes)


def level_of(value: Any) -> int | None:
    """A level from a number, "400", "step 400" or the words for the whole training.

    Raises:
        ConfigError: it is none of these.
    """
    if value in (None, "", WHOLE):
        return None
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():  # gradio turns whole numbers to floats
        value = int(value)
    text = str(value).removeprefix("step ").strip()
    if isinstance(value, bool) or not text.isascii() or not text.isdigit() or len(text) > 9:
        raise ConfigError(f"level is {value!r}.", f"Use a number of steps, or {WHOLE!r}.", field="level")
    return int(text)


def level_label(level: int | None) -> str:
    """The choice that `level_of` reads back."""
    return WHOLE if level is None else f"step {level}"


_UNFIT = " (does not fit this model)"


def choice_label(name: str, fits: bool) -> str:
    """A library name as the dropdown shows it: only those that fit are without a remark."""
    return name if fits else name + _UNFIT


def name_of(choice: str) -> str:
    """The library name of a dropdown's choice."""
    return choice.removesuffix(_UNFIT)


def to_infotext(name: str, content_hash: str, level: int | None) -> str:
    """"name [hash], level n" for the infotext."""
    return f"{name} [{content_hash[:8]}]" + ("" if level is None else f", level {level}")


def from_infotext(text: Any) -> tuple[str, str, int | None] | None:
    """(name, hash, level) of an infotext's value; None when it is something else."""
    match = _INFOTEXT.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None:
        return None
    return match["prefix"], match["hash"], int(match["level"]) if match["level"] else None
