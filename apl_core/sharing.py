"""Putting a finished prefix where it is used, and saying on it what others need to know: title, author, licence.

Step prefix file -> embeddings folders and people. The vectors are never touched, so the content hash stays the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .errors import LibraryError, PrefixFileError
from .library import resolve_within
from .prefix import SUFFIX, load_prefix, save_prefix

MAX_TEXT = 2000


def use(path: str | Path, folders: Sequence[str | Path], name: str, *, replace: bool = False) -> list[Path]:
    """Copies a prefix into every folder as `<name>.safetensors`, after checking it; returns the files.

    A level or a renamed file gets the name as its title, or hosts would list one prefix under another's.

    Raises:
        PrefixFileError: the file is damaged, or its content is not what it says.
        LibraryError: the name is not safe, no folder is given, or another prefix has it already and `replace` is not
            set. Nothing is written then.
        StorageError: a folder cannot be written to.
    """
    prompt = load_prefix(path, enforce=True)
    if not folders:
        raise LibraryError("There is no folder to copy the prefix into.", "Name at least one.", field="into")
    targets = [resolve_within(folder, f"{name}{SUFFIX}") for folder in folders]
    for target in targets:
        if target.exists() and not replace and not _same(target, prompt.content_hash):
            raise LibraryError(f"{target} is another prefix already.", "Choose another name, or allow replacing it.",
                               field="name")
    named = type(prompt)(prompt.family, prompt.tensors, prompt.meta.with_fields(title=name))
    for target in targets:
        save_prefix(named, target)
    return targets


def _same(path: Path, content_hash: str) -> bool:
    try:
        return load_prefix(path).content_hash == content_hash
    except PrefixFileError:
        return False


def publish(path: str | Path, out: str | Path, *, title: str, author: str = "", license: str = "",
            description: str = "") -> Path:
    """Writes a copy with what is told to others in its metadata; scores and settings that are in it stay.

    Raises:
        PrefixFileError: the file is damaged, or a text is missing, too long or holds control characters.
        StorageError: `out` cannot be written.
    """
    prompt = load_prefix(path, enforce=True)
    texts = {"title": title, "author": author, "license": license, "description": description}
    for field, text in texts.items():
        if len(text) > MAX_TEXT:
            raise PrefixFileError(f"{field} has {len(text)} characters; {MAX_TEXT} are allowed.", "Shorten it.",
                                  field=field)
        if any(ord(character) < 32 and character not in "\n\t" for character in text):
            raise PrefixFileError(f"{field} holds a control character.", "Remove it.", field=field)
    if not title.strip():
        raise PrefixFileError("title is empty.", "Give the prefix a name that people can tell it by.", field="title")
    told = {field: text.strip() for field, text in texts.items() if text.strip()}
    save_prefix(type(prompt)(prompt.family, prompt.tensors, prompt.meta.with_fields(**told)), out)
    return Path(out)
