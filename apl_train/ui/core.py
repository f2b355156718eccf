"""apl_core, wherever this package was loaded from: installed beside apl_train, or as a part of a host's extension.

A host loads the repository as one package under a name of its own, where an absolute `import apl_core` could meet
another extension's; the command line has apl_core at the top. Nothing is imported before it is needed.
"""

from __future__ import annotations

import importlib
from types import ModuleType


def core(module: str) -> ModuleType:
    """The module `apl_core.<module>` that belongs to this package."""
    root = __package__.removesuffix("apl_train.ui")
    return importlib.import_module(f"{root}apl_core.{module}")
