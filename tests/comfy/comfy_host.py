"""Finding a ComfyUI to test with, and running a script in its own interpreter. Nothing of the host is imported here.

`COMFYUI_DIR` names its folder and `COMFYUI_PYTHON` its interpreter; without them, ~/.cache/apl-hosts/ComfyUI and the
.venv in it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = Path("~/.cache/apl-hosts/ComfyUI").expanduser()


def host_folder() -> Path | None:
    """The host's folder, or None. An explicit COMFYUI_DIR that holds none is an error, not a reason to skip."""
    named = os.environ.get("COMFYUI_DIR", "")
    folder = Path(named).expanduser() if named else DEFAULT
    if (folder / "comfy" / "sd1_clip.py").is_file():
        return folder
    if named:
        raise FileNotFoundError(f"COMFYUI_DIR is {named}, which holds no ComfyUI")
    return None


def host_python(folder: Path) -> str:
    """The interpreter that the host runs with."""
    inside = folder / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    return os.environ.get("COMFYUI_PYTHON") or (str(inside) if inside.is_file() else sys.executable)


@cache
def run_in_host(script: str, timeout: int = 900, *words: str) -> dict[str, Any]:
    """What a script beside this file prints as JSON on its last line; run once a session, by the host's interpreter.

    words: further arguments, after the host's folder and this repository.
    """
    folder = host_folder()
    if folder is None:
        raise FileNotFoundError("no ComfyUI")
    # one of the packs switches itself off where it sees pytest's variable
    drop = ("PYTHONPATH", "PYTHONHOME", "PYTEST_CURRENT_TEST")
    keep = {key: value for key, value in os.environ.items() if key not in drop}
    done = subprocess.run(
        [host_python(folder), str(Path(__file__).with_name(script)), str(folder), str(ROOT), *words],
        cwd=folder, env=keep | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=timeout, check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{script} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
