"""`apl ui`: the page by itself, on this machine alone unless it is told otherwise."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from .core import core
from .place import ROOT, Place, is_loopback, private_python

AUTH = "APL_UI_AUTH"
"""Variable with user:password for the page; never an option, which other users of the machine could read."""


def credentials() -> tuple[str, str] | None:
    """What `APL_UI_AUTH` holds; None where it is not set. Raises ConfigError."""
    value = os.environ.get(AUTH, "")
    if not value:
        return None
    user, _, password = value.partition(":")
    if not user or not password:
        raise core("errors").ConfigError(f"{AUTH} is not user:password.", "Write both, separated by a colon.",
                                         field=AUTH)
    return user, password


def run(*, runs: Path, checkpoints: Sequence[Path], host_embeddings: Path | None,
        address: str, port: int | None, python: str | None, open_browser: bool, allow_remote: bool,
        tell: Callable[[str], None], embeddings: Path | None = None) -> None:
    """Serves until Ctrl-C. Raises ConfigError where gradio is missing or the port is taken."""
    try:
        from .app import serve
    except ImportError as error:
        raise core("errors").ConfigError(
            f"{error.name or error} is not installed.",
            "Start the page with `python install.py ui` in the checkout, or add what it needs: pip install '.[ui]'.",
        ) from error
    auth = credentials()
    place = Place(runs=runs, python=python or private_python(), checkpoints=tuple(checkpoints),
                  embeddings=embeddings or ROOT / "embeddings", host_embeddings=host_embeddings,
                  may_start=is_loopback(address) or allow_remote)
    try:
        _, local, _ = serve(place, address=address, port=port, open_browser=open_browser, auth=auth, quiet=True)
    except OSError as error:
        raise core("errors").ConfigError(f"The page cannot listen on {address}:{port or 'any port'}: {error}",
                                         "Choose another --port or --address.", field="port") from error
    tell(local)
    threading.Event().wait()
