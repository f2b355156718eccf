"""The prefix files a WebUI offers: `models/anonymization_prompts` beside the checkpoints, and those shipped."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from ..apl_core.errors import APLError, LibraryError
from ..apl_core.library import Entry, PrefixLibrary, shipped_folder
from ..apl_core.prefix import AnonymizationPrompt, load_prefix, read_limited
from .args import ScriptArgs
from .jobs import Choice
from .models import why_unfit

FOLDER = "anonymization_prompts"
_log = logging.getLogger("apl")


def own_folder() -> Path:
    """Where users put their files: `--apl-dir`, else models/anonymization_prompts. Not the host's `embeddings`: what
    lies there can be written into a prompt by name, the negative one too."""
    from modules import paths_internal, shared

    given = getattr(shared.cmd_opts, "apl_dir", None)
    return Path(given) if given else Path(paths_internal.models_path) / FOLDER


def prefix_library() -> PrefixLibrary:
    """The prefixes of both folders, read anew: files come and go while the server runs."""
    return PrefixLibrary([own_folder(), shipped_folder()], tell_folders=False)


def entries() -> list[Entry]:
    """Every prefix, broken files with their problem."""
    return prefix_library().entries()


@lru_cache(maxsize=16)
def _loaded(path: Path, digest: str) -> AnonymizationPrompt:
    return load_prefix(path)


def load(name: str, level: int | None) -> AnonymizationPrompt:
    """A prefix of the library; parsed again only when the file's bytes changed.

    Raises:
        LibraryError, PrefixFileError: there is no such file, or it is damaged.
    """
    if not name:
        raise LibraryError("No prefix is chosen.", f"Choose one, or put a file into the WebUI's models/{FOLDER} (or "
                           "the folder of --apl-dir) and refresh.", field="prefix")
    path = prefix_library().resolve(name, level)
    return _loaded(path, hashlib.sha256(read_limited(path)).hexdigest())


def choice_of(asked: ScriptArgs) -> Choice | None:
    """What a user's arguments come down to; None where they leave it off. Raises as `load`."""
    return Choice(asked.prefix, asked.level, load(asked.prefix, asked.level)) if asked.enabled else None


def unfit_reason(entry: Entry, level: int | None = None) -> str:
    """Why an entry cannot be used with the loaded model, in one line; "" where it can."""
    if entry.problem:
        return entry.problem
    try:
        return why_unfit(load(entry.name, level))
    except APLError as error:
        return str(error)


def first_fitting(found: Sequence[Entry]) -> str:
    """The entry to preselect: one that fits the loaded model, the user's own before those shipped; "" where none is."""
    own = own_folder()
    ordered = sorted(found, key=lambda entry: (entry.path.parent != own, bool(entry.problem)))
    return next((entry.name for entry in ordered if not unfit_reason(entry)), ordered[0].name if ordered else "")
