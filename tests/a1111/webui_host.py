"""Finding a WebUI, starting it on the CPU with the miniature checkpoint, and talking to it over HTTP.

`WEBUI_DIR` names its folder and `WEBUI_PYTHON` its interpreter; without them, ~/.cache/apl-hosts/webui and the .venv in
it. `FORGE_DIR` and `FORGE_PYTHON` are Forge's; without them, ~/.cache/apl-hosts/forge. `APL_START_WAIT` is how many
seconds a start may take at least, for a busy machine.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from setup_host import link as link_to
from setup_host import set_up

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DEFAULT = Path("~/.cache/apl-hosts/webui").expanduser()
FORGE_DEFAULT = Path("~/.cache/apl-hosts/forge").expanduser()
FORGE_CHECKPOINT = "random-sd15.safetensors"
NAME, PROBE = "anonymization-prompt", "apl-test-probe"
OPTIONS = {"live_previews_enable": False, "show_progress_type": "Approx cheap", "samples_save": False,
           "grid_save": False, "use_old_emphasis_implementation": False, "CLIP_stop_at_last_layers": 1,
           "emphasis": "Original", "comma_padding_backtrack": 20, "persistent_cond_cache": True,
           "sd_model_checkpoint": "miniature-sd1.safetensors"}


def host_folder() -> Path | None:
    """The host's folder, or None. An explicit WEBUI_DIR that holds none is an error, not a reason to skip."""
    named = os.environ.get("WEBUI_DIR", "")
    folder = Path(named).expanduser() if named else DEFAULT
    if (folder / "modules" / "processing.py").is_file():
        return folder
    if named:
        raise FileNotFoundError(f"WEBUI_DIR is {named}, which holds no WebUI")
    return None


def forge_folder() -> Path | None:
    """Forge's folder, or None. An explicit FORGE_DIR that holds none is an error, not a reason to skip."""
    named = os.environ.get("FORGE_DIR", "")
    folder = Path(named).expanduser() if named else FORGE_DEFAULT
    if (folder / "modules_forge").is_dir():
        return folder
    if named:
        raise FileNotFoundError(f"FORGE_DIR is {named}, which holds no Forge")
    return None


def why_no_forge() -> str:
    """Why its tests cannot run here, in a line; "" where they can."""
    folder = forge_folder()
    if folder is None:
        return "no Forge: set FORGE_DIR (tests/a1111/README.md)"
    if not (folder / "models/Stable-diffusion" / FORGE_CHECKPOINT).is_file():
        return f"no {FORGE_CHECKPOINT} in {folder}/models/Stable-diffusion: see make_sd15.py"
    return ""


def host_python(folder: Path, variable: str = "WEBUI_PYTHON") -> str:
    """The interpreter that the host runs with."""
    inside = folder / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    return os.environ.get(variable) or (str(inside) if inside.is_file() else sys.executable)


@dataclass
class Server:
    """A running host."""

    url: str
    folder: Path
    probe: Path
    log: Path
    process: subprocess.Popen
    auth: str = ""
    is_forge: bool = False

    def call(self, path: str, body: Any = None, *, auth: str | None = None, timeout: float = 300) -> tuple[int, Any]:
        """(status, JSON or text): a POST where there is a body; `auth` is "user:password"."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        if given := self.auth if auth is None else auth:
            request.add_header("authorization", "Basic " + base64.b64encode(given.encode()).decode())
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            text = error.read().decode("utf-8", "replace")
            try:
                return error.code, json.loads(text)
            except ValueError:
                return error.code, text

    def has(self, module: str) -> bool:
        """Whether the host's own environment has a Python module."""
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
        python = host_python(self.folder, "FORGE_PYTHON" if self.is_forge else "WEBUI_PYTHON")
        return subprocess.run([python, "-c", code], check=False).returncode == 0

    def txt2img(self, **fields: Any) -> tuple[int, Any]:
        """A one-step 64 x 64 picture with a fixed seed, but for `fields`."""
        body = {"prompt": "", "steps": 1, "width": 64, "height": 64, "seed": 7, "cfg_scale": 7.0,
                "sampler_name": "Euler", **fields}
        if self.is_forge and fields.get("enable_hr"):
            # Its defaults are what its own code cannot take, and a guidance of 1 for this pass.
            body = {"hr_additional_modules": ["Use same choices"], "hr_cfg": body["cfg_scale"], **body}
        return self.call("/sdapi/v1/txt2img", body)

    def clear(self) -> None:
        """Forget what the probe wrote."""
        for file in self.probe.glob("[0-9]*.safetensors"):
            file.unlink()

    def conds(self) -> list[dict[str, Any]]:
        """What the jobs since `clear` sampled with, oldest first: name to tensor, and "notes"."""
        found = []
        for file in sorted(self.probe.glob("[0-9]*.safetensors")):
            with safe_open(file, "pt") as held:
                notes = json.loads((held.metadata() or {}).get("notes", "{}"))
                found.append({**{key: held.get_tensor(key) for key in held.keys()}, "notes": notes})  # noqa: SIM118
        return found


def _free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


@contextlib.contextmanager
def running(*arguments: str, environ: dict[str, str] | None = None, probe: bool = True, wait: float = 400,
            options: dict[str, Any] | None = None, ui: bool = False, auth: str = "",
            forge: bool = False, extension: bool = True) -> Iterator[Server]:
    """A host with these arguments, ended afterwards; ready when it has loaded the checkpoint. `extension` False: as it
    comes, without this project.

    Raises:
        RuntimeError: it ended or did not answer in `wait` seconds; the end of its log is in the message.
    """
    wait = max(wait, float(os.environ.get("APL_START_WAIT", "0")))
    folder = forge_folder() if forge else host_folder()
    if folder is None:
        raise FileNotFoundError("no WebUI")
    variable = "FORGE_PYTHON" if forge else "WEBUI_PYTHON"
    flags = ["--always-cpu"] if forge else ["--use-cpu", "all", "--no-half", "--precision", "full",
                                            "--no-download-sd-model", "--do-not-download-clip"]
    # The checkout may have been set up for another copy of this repository.
    if forge:
        link_to(ROOT, folder / "extensions" / NAME)
    else:
        set_up(folder)
    if not extension:
        (folder / "extensions" / NAME).unlink()
    link = folder / "extensions" / PROBE
    if link.is_symlink():
        link.unlink()
    if probe:
        link.symlink_to(HERE / "probe", target_is_directory=True)
    port = _free_port()
    with tempfile.TemporaryDirectory(prefix="apl-webui-") as made:
        work = Path(made)
        own = {"sd_model_checkpoint": FORGE_CHECKPOINT} if forge else {}
        (work / "config.json").write_text(json.dumps({**OPTIONS, **own, **(options or {})}), "utf-8")
        keep = {key: value for key, value in os.environ.items()
                if key not in ("PYTHONPATH", "PYTHONHOME", "APL_POLICY")}
        command = [host_python(folder, variable), "-u", "launch.py", "--skip-prepare-environment",
                   "--skip-torch-cuda-test", *flags, "--no-hashing", "--disable-safe-unpickle", "--api",
                   "--server-name", "127.0.0.1", "--port", str(port), "--ui-settings-file", str(work / "config.json"),
                   "--ui-config-file", str(work / "ui-config.json"), *([] if ui else ["--nowebui"]),
                   *(["--api-auth", auth] if auth else []), *arguments]
        log = work / "log.txt"
        (work / "probe").mkdir()
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, cwd=folder, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env=keep | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False",
                            "OMP_NUM_THREADS": "1", "APL_PROBE": str(work / "probe")} | (environ or {}))
        server = Server(f"http://127.0.0.1:{port}", folder, work / "probe", log, process, auth, forge)
        try:
            _wait(server, wait, ui=ui)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(20)
            if probe:
                link.unlink(missing_ok=True)


def _wait(server: Server, seconds: float, *, ui: bool) -> None:
    """With a page, nothing is asked before the host says that it has started: A1111 adds its API to an application that
    serves already, and dies of a request that comes first."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        code = server.process.poll()
        if code is not None:
            raise RuntimeError(f"the host ended with {code}:\n{tail(server.log)}")
        if ui and b"Startup time" not in server.log.read_bytes():
            time.sleep(1)
            continue
        with contextlib.suppress(OSError):
            status, found = server.call("/sdapi/v1/options", timeout=5)
            if status == 200 and found:
                return
        time.sleep(1)
    raise RuntimeError(f"the host did not answer in {seconds:.0f} s:\n{tail(server.log)}")


def tail(log: Path, size: int = 4000) -> str:
    """The end of a log."""
    return log.read_text("utf-8", "replace")[-size:]
