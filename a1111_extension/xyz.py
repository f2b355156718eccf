"""Axes for the host's X/Y/Z plot: enabled, prefix, level."""

from __future__ import annotations

import sys
from typing import Any

from ..apl_core.errors import ConfigError
from .args import WHOLE, level_label
from .library import entries

_PREFIX = "[APL] "


def _apply(field: str) -> Any:
    def apply(p: Any, value: Any, values: Any) -> None:
        read = {"enabled": _enabled, "prefix": str, "level": str}[field]
        # A new dict for each cell: the host copies the job shallowly.
        p.apl_xyz = {**(getattr(p, "apl_xyz", None) or {}), field: read(value)}
        if field != "enabled":
            p.apl_xyz.setdefault("enabled", True)

    return apply


def _enabled(value: Any) -> bool:
    text = str(value).strip().lower()
    if text not in ("true", "false", "on", "off", "1", "0", "yes", "no"):
        raise ConfigError(f"enabled is {value!r}.", "Use True or False.", field="enabled")
    return text in ("true", "on", "1", "yes")


def _levels() -> list[str]:
    return [WHOLE, *(level_label(level) for level in sorted({level for entry in entries() for level in entry.levels}))]


def add_axes() -> None:
    """Put the axes into the plot's list, once; the list is made anew whenever the host reloads its scripts."""
    from modules import scripts

    for data in scripts.scripts_data:
        module = data.module if hasattr(data.module, "AxisOption") else sys.modules.get(data.script_class.__module__)
        option, options = getattr(module, "AxisOption", None), getattr(module, "axis_options", None)
        if option is None or options is None or any(str(each.label).startswith(_PREFIX) for each in options):
            continue
        options.extend([
            option(f"{_PREFIX}Enabled", str, _apply("enabled"), choices=lambda: ["True", "False"]),
            option(f"{_PREFIX}Prefix", str, _apply("prefix"), choices=lambda: [entry.name for entry in entries()]),
            option(f"{_PREFIX}Level", str, _apply("level"), choices=_levels),
        ])
