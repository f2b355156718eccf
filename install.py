"""Installs this project beside itself and starts it: `python install.py demo`. Standard library only.

Without arguments it changes nothing: the hosts (AUTOMATIC1111, Forge, ComfyUI-Manager) run every extension's
install.py, the WebUI at each start, and this extension needs nothing that they do not have.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OLDEST = (3, 10)
CPU_TORCH = "https://download.pytorch.org/whl/cpu"
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
EXTRAS = {"demo": "demo", "test": "demo,dev", "ui": "demo,ui"}
ABOUT = """\
Makes a private Python environment in .venv beside this file, installs the project and what it needs there, and starts
it. Nothing outside that folder is changed; delete it to undo. The first run downloads what is needed and fills about
2 GB (more with a CUDA build of torch), later ones start at once.

  python install.py demo [...]   train a prefix on the shipped miniature world and write a report
  python install.py ui [...]     open a page to make, watch and compare prefixes in; Ctrl-C ends it
  python install.py test [...]   run the tests; what follows goes to pytest
"""
VARIABLES = """\
APL_TORCH, if set, is the requirement by which torch is installed first, for example APL_TORCH="torch==2.13.0". Without
it, Linux without an NVIDIA GPU gets PyTorch's CPU build where its index can be reached; everything else gets what pip
finds. pip's own settings (PIP_INDEX_URL, HTTPS_PROXY, ...) apply throughout.
"""


class InstallError(Exception):
    """A phase failed; the message is the line to print. `code` is the exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def say(line: str) -> None:
    """Print a line at once, so that it stands above what a child process prints."""
    print(line, flush=True)


def venv_python(venv: Path) -> Path:
    """The interpreter of a virtual environment."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def environment() -> dict[str, str]:
    """The variables for child processes, without those that would let another Python's packages in."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}


def run(argv: list[str], cwd: Path | None = None) -> int:
    """Run a command, its output going straight to the terminal; never through a shell. Returns the exit code."""
    code = subprocess.run(argv, cwd=cwd, env=environment(), check=False).returncode
    return code if code >= 0 else 128 - code  # ended by a signal: what a shell would report


def version_of(python: Path) -> str:
    """"3.11.7" of an interpreter, or "" when it does not start."""
    ask = [str(python), "-c", "import platform; print(platform.python_version())"]
    try:
        done = subprocess.run(ask, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def number(version: str) -> tuple[int, ...]:
    """(3, 11) of "3.11.7"; (0,) of ""."""
    return tuple(int(part) for part in (version or "0").split(".")[:2])


def fingerprint(root: Path, version: str) -> str:
    """What an installation depends on, as a hash: the requirements, their pins and the Python version."""
    digest = hashlib.sha256(f"{version}\0{root}\0".encode())
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((root / name).read_bytes() + b"\0")
    return digest.hexdigest()


def is_installed(stamp: Path, wanted: str, torch: str) -> bool:
    """Whether the stamp says that exactly this is installed; any torch will do when none is asked for."""
    try:
        found = stamp.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return False
    return len(found) == 2 and found[0] == wanted and torch in ("", found[1])


def wants_cpu_torch() -> bool:
    """Whether pip's default would fetch gigabytes of CUDA libraries for a machine without an NVIDIA GPU."""
    has_nvidia = shutil.which("nvidia-smi") is not None or NVIDIA_DRIVER.exists()
    return sys.platform == "linux" and not has_nvidia


def is_reachable(url: str) -> bool:
    """Whether a page answers within five seconds, through the proxy that the environment names."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (OSError, ValueError):
        return False


def pip_commands(python: Path, purpose: str, torch: str, cpu_index: str) -> list[list[str]]:
    """The pip commands of an installation, in order.

    Args:
        python: interpreter of the private environment.
        purpose: a key of `EXTRAS`.
        torch: the requirement to install first; "" for none.
        cpu_index: address of an index with CPU builds of torch; "" for pip's own.
    """
    # Python compiles what it imports; pip would compile everything, most of it for nothing.
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-compile",
           "--constraint", "constraints.txt"]
    commands = []
    if torch:
        commands.append([*pip, torch])
    elif cpu_index:
        commands.append([*pip, "torch", "--extra-index-url", cpu_index])
    commands.append([*pip, "--editable", f".[{EXTRAS[purpose]}]"])
    return commands


def make_venv(venv: Path) -> str:
    """Make the environment with the running interpreter, or mend the one that is there.

    Returns its Python version. Raises InstallError.
    """
    python = venv_python(venv)
    version = version_of(python)
    # Emptied only where the interpreter of an environment is gone, as after an upgrade of the system.
    emptying = ["--clear"] if not version and (venv / "pyvenv.cfg").exists() else []
    if (not version and run([sys.executable, "-m", "venv", *emptying, str(venv)]) != 0) or (
        # Cut off half-way, or made by a tool that leaves pip out.
        run([str(python), "-c", "import importlib.util as u, sys; sys.exit(u.find_spec('pip') is None)"]) != 0
        and run([str(python), "-m", "ensurepip"]) != 0
    ):
        raise InstallError(
            f"Python could not make {venv}. Check that the folder may be written to; on Debian and Ubuntu the module "
            "is a package of its own: apt install python3-venv."
        )
    version = version or version_of(python)
    if number(version) < OLDEST:
        raise InstallError(f"{venv} is of Python {version}, too old: delete that folder, then run the command again.")
    return version


def install(root: Path, purpose: str) -> Path:
    """Bring the private environment up to date. Returns its interpreter. Raises InstallError."""
    venv, torch, start = root / ".venv", os.environ.get("APL_TORCH", "").strip(), time.monotonic()
    python = venv_python(venv)
    is_new = not python.exists()
    if is_new:
        say(f"[1/2] Making a private environment in {venv} ...")
    version = make_venv(venv)
    if is_new:
        say(f"[1/2] Made with Python {version} in {time.monotonic() - start:.0f} s.")
    stamp, wanted = venv / f"apl-{purpose}.stamp", fingerprint(root, version)
    if is_installed(stamp, wanted, torch):
        return python
    say("[2/2] Installing what the project needs (once; some minutes) ...")
    start = time.monotonic()
    cpu_index = CPU_TORCH if not torch and wants_cpu_torch() and is_reachable(f"{CPU_TORCH}/torch/") else ""
    for command in pip_commands(python, purpose, torch, cpu_index):
        code = run(command, cwd=root)
        if code != 0:
            raise InstallError(
                "pip could not install; its lines above say why. Without a direct connection set PIP_INDEX_URL or "
                "HTTPS_PROXY; on a full disk free some space. Then run the same command again: it goes on from there.",
                code,
            )
    stamp.write_text(f"{wanted}\n{torch}\n", encoding="utf-8")
    say(f"[2/2] Installed in {time.monotonic() - start:.0f} s.")
    return python


def command_of(python: Path, purpose: str, rest: list[str]) -> list[str]:
    """The command that a purpose comes down to."""
    start = ["pytest"] if purpose == "test" else ["apl_train", purpose]
    return [str(python), "-m", *start, *rest]


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: that of the command started, 1 for a failed installation, 2 for wrong usage."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        say("anonymization-prompt: nothing to install in this host. (`python install.py demo` tries it out by itself.)")
        return 0
    if sys.version_info < OLDEST:
        say(f"This needs Python 3.10 or newer; {sys.executable} is {platform.python_version()}: use a newer one.")
        return 1
    parser = argparse.ArgumentParser("install.py", description=ABOUT, epilog=VARIABLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("purpose", choices=sorted(EXTRAS), help="what to install for and start")
    os.environ.setdefault("APL_BEGAN", repr(time.time()))  # the demo counts from here, installing included
    purpose = parser.parse_args(argv[:1]).purpose  # what follows belongs to the command started, --help included
    try:
        python = install(ROOT, purpose)
        return run(command_of(python, purpose, argv[1:]), cwd=ROOT if purpose == "test" else None)
    except InstallError as error:
        say(str(error))
        return error.code
    except KeyboardInterrupt:
        say("Stopped. The same command goes on from there.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
