"""Folders of prefix files and the names people choose them by. A name never leads out of its folder."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import APLError, LibraryError
from .metadata import declares_format
from .prefix import SUFFIX, AnonymizationPrompt, load_prefix, read_header, read_limited

MAX_NAME = 120
_LEVEL = re.compile(r"(?P<base>.+)\.step-(?P<step>[0-9]{1,9})")
_DEVICES = frozenset(
    ["con", "prn", "aux", "nul", "conin$", "conout$"]
    + [f"{port}{digit}" for port in ("com", "lpt") for digit in "0123456789¹²³"]
)
# Characters that look like, or on some systems become, a separator, a drive colon or a dot of "..".
_LOOKALIKES = frozenset(
    "\u2044\u2215\u29f8\u29f9\u2216\ufe68\uff0f\uff3c\ufe55\uff1a\u2024\u2025\u2026\ufe52\uff0e\u3002"
)


@dataclass(frozen=True)
class Entry:
    """One prefix in a library.

    Attributes:
        name: what `resolve` takes.
        path: the file used when no level is asked for.
        family: short family name; "" for a broken file.
        num_tokens: m; 0 for a broken file.
        levels: optimizer steps of the levels saved beside it, ascending.
        content_hash: lowercase hex; "" for a broken file.
        title: for people.
        problem: why the file cannot be used, with the way out; None for a good one.
    """

    name: str
    path: Path
    family: str
    num_tokens: int
    levels: tuple[int, ...]
    content_hash: str
    title: str
    problem: str | None


def _name_problem(name: str) -> str:
    if not name:
        return "is empty"
    if len(name) > MAX_NAME or len(name.encode("utf-8", "surrogatepass")) > 240:
        return f"is longer than {MAX_NAME} characters"
    if any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in name):
        return "holds a control or invisible character"
    if "/" in name or "\\" in name or _LOOKALIKES & set(name):
        return "holds a path separator or a character that looks like one"
    if unicodedata.normalize("NFC", name) != name:
        return "is not in Unicode's composed form (NFC)"
    if set(name) & set('<>:"|?*'):
        return "holds a character that Windows does not allow"
    if ".." in name:
        return "holds '..'"
    if name[0] in ". ":
        return "begins with a dot or a space"
    if name[-1] in ". " or name[-1].isspace():
        return "ends with a dot or a space"
    if name.split(".")[0].rstrip().lower() in _DEVICES:
        return "is the name of a Windows device"
    return ""


def safe_name(name: str) -> str:
    """The name itself, when it is one file name that means the same on every system.

    Raises:
        LibraryError: it is empty, too long, holds separators, control characters and the like.
    """
    if not isinstance(name, str):
        raise LibraryError("The prefix name is not text.", "Choose a name from the list.", field="name")
    if problem := _name_problem(name):
        raise LibraryError(
            f"The prefix name {name[:MAX_NAME]!r} {problem}.",
            "Use letters, digits, '-', '_' and single dots, without folders.",
            field="name",
        )
    return name


def resolve_within(folder: str | Path, name: str) -> Path:
    """The path of `name` inside `folder`, links followed, whether or not it exists.

    Raises:
        LibraryError: the name is not safe, or a link leads out of the folder.
    """
    root = Path(folder).resolve()
    path = root / safe_name(name)
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise LibraryError(f"{name} cannot be followed: {error}.", "Remove the link.", field="name") from error
    if not real.is_relative_to(root) or real == root:
        raise LibraryError(
            f"{name} leads out of its folder.", "Copy the file into the folder instead of linking to it.", field="name"
        )
    return path


def shipped_folder() -> Path:
    """The folder of the prefixes that come with this project: packaged in the wheel, or the repository's `embeddings/`.

    It may be missing in a partial copy; a library then simply has nothing from it.
    """
    # The packaged copy comes first: beside an installed package, `embeddings` could belong to anyone.
    packaged = Path(__file__).resolve().parent / "_embeddings"
    return packaged if packaged.is_dir() else packaged.parent.parent / "embeddings"


class PrefixLibrary:
    """Prefix files in some folders; in a clash of names the first folder wins.

    Args:
        folders: searched in this order, not their subfolders; missing ones are skipped.
        plain: list plain embeddings too, which say nothing of anonymization.
        tell_folders: name the folders when a prefix is not there. A server's users may be anyone.
    """

    def __init__(self, folders: Sequence[str | Path], *, plain: bool = False, tell_folders: bool = True) -> None:
        self.folders = tuple(Path(folder) for folder in folders)
        self.plain, self.tell_folders = plain, tell_folders

    def _stems(self) -> dict[str, Path]:
        """Stem of every file with a safe name, to its path; first folder first."""
        found: dict[str, Path] = {}
        for folder in self.folders:
            try:
                paths = sorted(folder.iterdir())
            except OSError:  # missing, or not ours to read
                continue
            for path in paths:
                # Each name once: a case-insensitive lookup of a listed name could hit another file.
                if path.suffix == SUFFIX and not _name_problem(path.name) and not path.is_dir():
                    found.setdefault(path.stem, path)
        return found

    def _grouped(self) -> dict[str, tuple[Path | None, dict[int, Path]]]:
        """Name to the file without a level, if any, and the files of its levels."""
        whole: dict[str, Path] = {}
        levels: dict[str, dict[int, Path]] = {}
        for stem, path in self._stems().items():
            match = _LEVEL.fullmatch(stem)
            if match:
                levels.setdefault(match["base"], {}).setdefault(int(match["step"]), path)
            else:
                whole[stem] = path
        return {name: (whole.get(name), levels.get(name, {})) for name in sorted({*whole, *levels})}

    def entries(self) -> list[Entry]:
        """Every prefix, by name. Broken files are listed with their problem; nothing is raised."""
        found = (self._entry(name, path, levels) for name, (path, levels) in self._grouped().items())
        return [entry for entry in found if entry is not None]

    def _entry(self, name: str, whole: Path | None, levels: dict[int, Path]) -> Entry | None:
        path = whole or levels[max(levels)]
        steps = tuple(sorted(levels))
        try:
            path = resolve_within(path.parent, path.name)
            data = read_limited(path)
            if not self.plain and not declares_format(read_header(data, path.name)[0]):
                return None
            prefix = load_prefix(path)
        except APLError as error:
            return Entry(name, path, "", 0, steps, "", name, str(error))
        except (OSError, ValueError, TypeError, RuntimeError) as error:  # one odd file must not take the list away
            return Entry(name, path, "", 0, steps, "", name, f"{path.name} cannot be read: {error}.")
        return Entry(
            name, path, prefix.family, prefix.num_tokens, steps, prefix.content_hash, prefix.name, None
        )

    def resolve(self, name: str, level: int | None = None) -> Path:
        """The file of a prefix.

        Args:
            name: an entry's name; ".safetensors" at its end is ignored.
            level: optimizer steps of a saved level; None for the whole training's result, or the highest level where
                only levels are there.

        Raises:
            LibraryError: the name is not safe or not there, the level is not there, or a link leads out.
        """
        stem = safe_name(name).removesuffix(SUFFIX)
        whole, levels = self._grouped().get(stem, (None, {}))
        if level is None:
            path = whole or (levels[max(levels)] if levels else self._stems().get(stem))
        else:
            path = levels.get(level)
            if path is None and (whole or levels):
                there = ", ".join(map(str, sorted(levels))) or "none"
                raise LibraryError(
                    f"{stem} has no level {level}.", f"Its levels: {there}.", field="level"
                )
        if path is None:
            names = ", ".join(self._grouped()) or "none"
            searched = f" Searched: {', '.join(map(str, self.folders)) or 'no folder'}." if self.tell_folders else ""
            raise LibraryError(
                f"There is no prefix named {stem!r}.", f"There are: {names}.{searched}", field="name"
            )
        return resolve_within(path.parent, path.name)

    def load(self, name: str, level: int | None = None, enforce: bool = False) -> AnonymizationPrompt:
        """Resolve and load a prefix. Raises `LibraryError` and `PrefixFileError` (see `load_prefix`)."""
        return load_prefix(self.resolve(name, level), enforce=enforce)
