"""Where prefixes lie in a ComfyUI: the model folder `anonymization_prompts`, and the folder that this pack ships."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import folder_paths

from ..apl_core.library import PrefixLibrary, shipped_folder
from ..apl_core.prefix import SUFFIX, read_limited

FOLDER = "anonymization_prompts"
NONE_YET = "(none found)"
_log = logging.getLogger("apl")


def register() -> None:
    """Make the model folder known to the host. Its own folder, apart from `embeddings`: what lies there can be written
    into a negative prompt by name, and would undo itself."""
    own = Path(folder_paths.models_dir) / FOLDER
    # A folder first named in extra_model_paths.yaml has no set of extensions, which the host takes for "every file".
    paths, extensions = folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))
    folder_paths.folder_names_and_paths[FOLDER] = (list(paths), {*extensions, SUFFIX})
    for path in (own, shipped_folder()):
        folder_paths.add_model_folder_path(FOLDER, str(path))
    try:
        own.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a read-only installation; the shipped prefixes are still there
        _log.info("%s could not be made: %s.", own, error.strerror or error)


def own_folder() -> Path:
    """Where new prefixes are saved: the first folder of the host's list that is not this pack's own."""
    shipped = shipped_folder().resolve()
    paths = [Path(path) for path in folder_paths.get_folder_paths(FOLDER)]
    return next((path for path in paths if path.resolve() != shipped), Path(folder_paths.models_dir) / FOLDER)


def prefix_library() -> PrefixLibrary:
    """The prefixes of all those folders, read anew: files come and go while the server runs."""
    return PrefixLibrary(folder_paths.get_folder_paths(FOLDER), tell_folders=False)


def prefix_names() -> list[str]:
    """Names for a list to choose from; never empty, since the host cannot show an empty list."""
    return [entry.name for entry in prefix_library().entries()] or [NONE_YET]


def file_fingerprint(path: Path) -> str:
    """SHA-256 of a file's bytes: nodes run again when it changes, and not when it is only touched."""
    return hashlib.sha256(read_limited(path)).hexdigest()
