"""Modules of `comfy_nodes` that need no host, imported as a host would: the repository as one package."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

from comfy_host import ROOT

PACKAGE = "apl_pack_under_test"


def module(name: str) -> ModuleType:
    """The module `name` ("comfy_nodes.provenance") of the repository."""
    if PACKAGE not in sys.modules:
        spec = importlib.util.spec_from_file_location(PACKAGE, ROOT / "__init__.py",
                                                      submodule_search_locations=[str(ROOT)])
        package = importlib.util.module_from_spec(spec)
        sys.modules[PACKAGE] = package
        spec.loader.exec_module(package)
    return importlib.import_module(f"{PACKAGE}.{name}")
