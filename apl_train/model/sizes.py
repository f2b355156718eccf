"""The six numbers of a picture's size and crop that SDXL is told, checked. Needs no torch: settings are read early."""

from __future__ import annotations

from typing import Any

from apl_core.errors import ConfigError


def check_sizes(values: Any) -> None:
    """Raises ConfigError unless these are six numbers of sizes (see `conditioning.Sizes`)."""
    whole = isinstance(values, list | tuple) and all(isinstance(v, int) and not isinstance(v, bool) for v in values)
    least = (1, 1, 0, 0, 1, 1)
    if not whole or len(values) != 6 or not all(low <= v <= 65_536 for v, low in zip(values, least, strict=True)):
        raise ConfigError(f"size_conditioning is {values!r}.",
                          "Give six whole numbers: height and width of the original picture, top and left of its crop, "
                          "height and width of the target, such as [1024, 1024, 0, 0, 1024, 1024].",
                          field="size_conditioning")
