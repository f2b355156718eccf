"""`apl doctor`: what is installed here, what is missing, and the command that gets it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from apl_core.identity import model_note
from apl_train import shipped
from apl_train.make.plan import PACKS, installed_packs

EXTRAS = {"core": ("torch", "safetensors", "numpy", "pillow", "jsonargparse"),
          "train": ("diffusers", "transformers", "accelerate"), "score": ("insightface", "onnxruntime"),
          "report": ("matplotlib", "jinja2"), "ui": ("gradio",)}
_MODULES = {"pillow": "PIL"}


def misfits() -> dict[str, str]:
    """Packages that are there and stop transformers and diffusers from being imported, each with the way out.

    A torchvision of another build than the torch beside it cannot find its operators and raises RuntimeError; both
    libraries import it wherever it is, though nothing here draws, trains or scores with it.
    """
    if importlib.util.find_spec("torchvision") is None:
        return {}
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        return {"torchvision": f"torchvision {_version('torchvision')} does not belong to torch {_version('torch')} "
                               f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); no model can "
                               "be loaded  ->  pip uninstall torchvision, or install both from one index"}
    return {}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "of unknown version"


def examine() -> tuple[dict[str, Any], str]:
    """(facts, the same for people)."""
    import torch

    facts: dict[str, Any] = {
        "python": platform.python_version(), "interpreter": sys.executable, "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(), "cuda": torch.cuda.is_available(),
        "free_disk_gb": round(shutil.disk_usage(Path.cwd()).free / 2**30, 1), "packages": {}, "missing": {},
        "miniature": (shipped.ASSETS / "model" / "miniature-sd1.safetensors").exists(),
    }
    if facts["cuda"]:
        facts["gpu"] = torch.cuda.get_device_name(0)
        facts["gpu_memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    for extra, names in EXTRAS.items():
        for name in names:
            if importlib.util.find_spec(_MODULES.get(name, name)) is None:
                facts["missing"].setdefault(extra, []).append(name)
            else:
                facts["packages"][name] = metadata.version(name)
    facts["recognisers"], note = installed_packs(), model_note(PACKS[0])
    lines = [f"Python {facts['python']} at {facts['interpreter']}, {facts['cores']} cores, "
             f"{'GPU ' + facts['gpu'] if facts['cuda'] else 'no GPU'}, {facts['free_disk_gb']} GB of disk free"]
    lines += [f"  {name:14}{version}" for name, version in facts["packages"].items()]
    facts["misfits"] = misfits()
    lines += [f"broken: {text}" for text in facts["misfits"].values()]
    for extra, names in facts["missing"].items():
        lines.append(f"missing for {extra}: {', '.join(names)}  ->  pip install '.[{extra}]' in the checkout")
    lines.append(f"recognisers for photographs: {', '.join(facts['recognisers'])}" if facts["recognisers"] else
                 f"no recogniser for photographs: faces are neither checked nor scored  ->  {note.command}")
    lines.append("the miniature world is here" if facts["miniature"] else
                 "the miniature world is missing: `apl miniworld build`")
    return facts, "\n".join(lines)
