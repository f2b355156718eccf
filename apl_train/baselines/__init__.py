"""Other ways to keep a model from depicting persons, each written from its paper; the rivals of APL's Table 2.

`BASELINES` maps a method's name to the method; a method's file is imported when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module

from apl_core.errors import ConfigError
from apl_train.baselines.protocol import Baseline, Person, Prepared

_FILES = {
    "negative-prompt": "negative_prompt",
    "esd": "esd",
    "uce": "uce",
    "ca": "concept_ablation",
    "fmn": "forget_me_not",
    "speed": "null_space",
    "semantic-surgery": "semantic_surgery",
    "sld": "safe_guidance",
}


class _Registry(Mapping[str, Baseline]):
    """Name to method, in the order of `_FILES`."""

    def __getitem__(self, name: str) -> Baseline:
        if name not in _FILES:
            raise ConfigError(f"method is {name!r}.", f"Use one of: {', '.join(_FILES)}.", field="method")
        return import_module(f"{__name__}.{_FILES[name]}").METHOD

    def __contains__(self, name: object) -> bool:
        return name in _FILES

    def __iter__(self) -> Iterator[str]:
        return iter(_FILES)

    def __len__(self) -> int:
        return len(_FILES)


BASELINES: Mapping[str, Baseline] = _Registry()

__all__ = ["BASELINES", "Baseline", "Person", "Prepared"]
