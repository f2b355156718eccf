"""Starts the host's main.py where torchvision or torchaudio do not fit the torch: `run_host.py HOST ARGS…`.

Only what is missing is put in place; the arguments go to main.py. `--stand-in NAME` ahead of them puts an empty module
in the place of a library of which a test pack imports nothing but names.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import runpy
import sys
import types


def stand_in(name: str) -> None:
    """A module whose attributes are empty classes."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []

    def attribute(wanted: str) -> type:
        if wanted.startswith("__"):
            raise AttributeError(wanted)
        return type(wanted, (), {})

    module.__getattr__ = attribute
    sys.modules[name] = module
    parent, _, own = name.rpartition(".")
    if parent in sys.modules:  # `import a.b.c as c` asks a for b, and would be given an empty class
        setattr(sys.modules[parent], own, module)


def fill_in() -> object:
    """Returns what has to be kept alive: registered operators vanish with their library."""
    import torch

    torch.set_num_threads(1)
    kept = None
    try:
        import torchvision  # noqa: F401
    except ImportError:
        with contextlib.suppress(ImportError):
            from transformers.utils import import_utils

            import_utils.is_torchvision_available()  # it keeps its answer, and would take the stand-in for the library
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.ops"):
            stand_in(name)
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        kept = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            kept.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        for name in ("torchaudio", "torchaudio.functional", "torchaudio.transforms"):
            stand_in(name)
    return kept


if __name__ == "__main__":
    host = sys.argv[1]
    KEPT = fill_in()
    rest = sys.argv[2:]
    while rest[:1] == ["--stand-in"]:
        if importlib.util.find_spec(rest[1]) is None:
            stand_in(rest[1])
        rest = rest[2:]
    sys.argv = ["main.py", *rest]
    sys.path.insert(0, host)
    runpy.run_path(f"{host}/main.py", run_name="__main__")
