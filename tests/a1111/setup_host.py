"""Puts the miniature checkpoint and this extension into a WebUI checkout: `python tests/a1111/setup_host.py WEBUI_DIR`.

What the checkout needs before (nothing here installs packages or fetches anything):

* its side repositories and its own requirements, in a virtual environment;
* a Python package `clip`; and for pictures on a CPU no GPU build of torch.

What this does, and does again without harm: links the repository as `extensions/anonymization-prompt`, and writes
`models/Stable-diffusion/miniature-sd1.{safetensors,yaml}` with the folder of its text encoder's configuration and
tokenizer. The tests then start the server themselves, with WEBUI_DIR and WEBUI_PYTHON.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import yaml
from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "apl_train" / "miniworld" / "assets" / "model"
NAME = "miniature-sd1"
STEM = "cond_stage_model.transformer."


def text_folder(webui: Path, config: dict) -> Path:
    """The folder that `FrozenCLIPEmbedder(version=...)` reads: configuration, tokenizer and weights.

    The checkpoint's own weights replace these; transformers 5 does not make a model without a file of them.
    """
    folder = webui / "models" / "apl-miniature-clip"
    folder.mkdir(parents=True, exist_ok=True)
    for file in (MODEL / "tokenizer").iterdir():
        shutil.copyfile(file, folder / file.name)
    settings = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **config}
    (folder / "config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    with safe_open(MODEL / f"{NAME}.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith(STEM) and not name.endswith("position_ids")]  # noqa: SIM118
        save_file({name.removeprefix(STEM): file.get_tensor(name).contiguous() for name in names},
                  folder / "model.safetensors", {"format": "pt"})
    return folder


def link(target: Path, at: Path) -> None:
    """`at` points to `target`, whatever it was before; a real folder is left alone and reported."""
    if at.is_symlink():
        at.unlink()
    elif at.exists():
        raise SystemExit(f"{at} exists and is no link: remove it first.")
    at.parent.mkdir(parents=True, exist_ok=True)
    at.symlink_to(target, target_is_directory=target.is_dir())


def set_up(webui: Path) -> None:
    """Make a checkout ready for the tests in this folder."""
    if not (webui / "modules" / "processing.py").is_file():
        raise SystemExit(f"{webui} is no WebUI checkout: modules/processing.py is not there.")
    config = yaml.safe_load((MODEL / f"{NAME}.yaml").read_text(encoding="utf-8"))
    encoder = config["model"]["params"]["cond_stage_config"]
    folder = text_folder(webui, encoder.pop("text_config"))
    encoder["params"] = {"version": str(folder), "device": "cpu"}
    models = webui / "models" / "Stable-diffusion"
    link(MODEL / f"{NAME}.safetensors", models / f"{NAME}.safetensors")
    (models / f"{NAME}.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    link(ROOT, webui / "extensions" / "anonymization-prompt")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("webui", type=Path)
    set_up(parser.parse_args().webui.resolve())
