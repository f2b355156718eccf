"""Where the page finds and puts things, and what it may do: one frozen value, given by `apl ui` or by a host."""

from __future__ import annotations

import ipaddress
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""What children need on their path to find apl_train: the checkout, or site-packages."""
NOT_ALLOWED = (
    "This page listens beyond this machine, so starting processes and naming folders is off. The person who runs the "
    "server can allow it with --allow-remote-train (apl ui) or --apl-allow-remote-train (WebUI)."
)

PRIVATE = (
    "Faces, names, logs and commands are not shown on a page that listens beyond this machine: they may be personal "
    "data."
)


def is_loopback(address: str | None) -> bool:
    """Whether a server bound to `address` is reached from this machine alone; None and "" mean every interface."""
    if not address:
        return False
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def private_python() -> str:
    """The interpreter that trains: the checkout's .venv where install.py made one, else the one that runs this."""
    venv = ROOT / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    return str(venv) if venv.is_file() else sys.executable


@dataclass(frozen=True)
class Place:
    """Surroundings of one page.

    Attributes:
        runs: folder of all runs; made when the first one starts.
        python: interpreter for `-m apl_train`; it has the trainer's packages, this process need not.
        embeddings: folder where "use this prefix" puts a copy, beside `host_embeddings`.
        host_embeddings: the host's own folder for embeddings; None for a page that stands alone.
        host: name of the host for people, "" for none.
        checkpoints: folders in which checkpoints are looked for.
        may_start: whether processes may be started and folders named; False where others can reach the page.
    """

    runs: Path = Path("runs")
    python: str = field(default_factory=private_python)
    embeddings: Path = ROOT / "embeddings"
    host_embeddings: Path | None = None
    host: str = ""
    checkpoints: tuple[Path, ...] = ()
    may_start: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", Path(self.runs).expanduser().absolute())
        object.__setattr__(self, "checkpoints", tuple(Path(p).expanduser().absolute() for p in self.checkpoints))

    def models(self, most: int = 200) -> list[str]:
        """"miniature" and every single-file checkpoint and diffusers folder below `checkpoints`, two levels deep."""
        found: list[str] = []
        for folder in self.checkpoints:
            for pattern in ("*.safetensors", "*/*.safetensors", "*/model_index.json"):
                for path in sorted(folder.glob(pattern)):
                    if path.name == "model_index.json":
                        found.append(str(path.parent))
                    elif not (path.parent / "model_index.json").exists():
                        found.append(str(path))
        return ["miniature", *dict.fromkeys(found)][:most]
