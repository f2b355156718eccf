"""The tab "APL Trainer": the project's own page, in the host. It starts trainings in another interpreter and reads
their folders; nothing of the trainer is imported here.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from .library import own_folder


def is_local() -> bool:
    """Whether only this machine reaches the host."""
    from modules import shared

    options = shared.cmd_opts
    if getattr(options, "listen", False) or getattr(options, "share", False) or getattr(options, "ngrok", None):
        return False
    address = getattr(options, "server_name", None)
    # The host serves its page on 127.0.0.1 when nothing is said.
    return address is None or _page("place").is_loopback(address)


def _page(name: str) -> Any:
    """A module of the page, by name: the extension itself stands on `apl_core` alone, and works without the page."""
    return importlib.import_module(f"{__package__.rpartition('.')[0]}.apl_train.ui.{name}")


def checkpoint_folders() -> tuple[Path, ...]:
    """Where this host has its checkpoints."""
    from modules import paths_internal, shared

    given = getattr(shared.cmd_opts, "ckpt_dir", None)
    found = [Path(paths_internal.models_path) / "Stable-diffusion", *([Path(given)] if given else [])]
    return tuple(path for path in found if path.is_dir())


def blocks() -> Any:
    """The page as gradio Blocks, for the host to mount.

    Raises:
        ImportError: this copy of the repository has no page.
    """
    from modules import paths_internal, shared

    allowed = bool(getattr(shared.cmd_opts, "apl_allow_remote_train", False))
    data = Path(getattr(paths_internal, "data_path", paths_internal.script_path))
    place = _page("place").Place(
        runs=data / "apl-runs", embeddings=own_folder(), host="the WebUI", checkpoints=checkpoint_folders(),
        may_start=allowed or is_local(),
    )
    return _page("app").build(place)
