"""What the operator of a host decided, read once at its start: `APL_POLICY`, a JSON file or the JSON itself.

A policy is a promise, so nothing in it is guessed: an unknown key, a missing file or another hash is an error, and a
host that enforces must not start then. Nothing of a request ever changes it. The keys are described in docs/hosting.md.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import hmac
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .consent import Consent, Person
from .errors import APLError, ConfigError
from .families import FAMILIES
from .library import shipped_folder
from .prefix import AnonymizationPrompt, load_prefix, read_limited

VARIABLE = "APL_POLICY"
EXIT_CODE = 78  # EX_CONFIG of sysexits.h: what a host ends with when it cannot keep the policy
MODES = ("enforced", "default_on", "default_off")
NEGATIVES = ("auto", "always")
UNSUPPORTED = ("refuse", "allow")
MAX_BYTES = 2**20
_SHA256 = re.compile(r"(?:0x)?([0-9a-fA-F]{64})")
_KEYS = ("mode", "embeddings", "negative", "unsupported", "deny", "strict", "lock_training", "consent")


@dataclass(frozen=True)
class Pin:
    """One prefix file of a policy: where it lies, and the SHA-256 (lowercase hex) of the file's bytes."""

    family: str
    path: Path
    sha256: str

    def load(self) -> AnonymizationPrompt:
        """The prefix, when the file's bytes are the ones that were pinned and its content hash is right too.

        Raises:
            ConfigError: another hash, or a prefix of another family. PrefixFileError: the file is missing or unsound.
        """
        # The whole file and not only its vectors: the metadata says where in a chunk they stand.
        found = hashlib.sha256(read_limited(self.path)).hexdigest()
        if not hmac.compare_digest(found, self.sha256):
            raise ConfigError(
                f"{self.path.name} is not the file that the policy names: its sha256 is {found}, "
                f"the policy says {self.sha256}.",
                "Put the right file there, or write the new hash into the policy if you changed the file yourself.",
                field=f"embeddings.{self.family}.sha256",
            )
        prefix = load_prefix(self.path, enforce=True)
        if prefix.family != self.family:
            raise ConfigError(f"{self.path.name} is for {prefix.family}, the policy gives it to {self.family}.",
                              f"Move it to embeddings.{prefix.family}.", field=f"embeddings.{self.family}")
        return prefix


@dataclass(frozen=True)
class Policy:
    """An operator's decisions.

    Attributes:
        mode: "enforced" puts the prefix into every prompt; "default_on" and "default_off" leave the choice to users.
        embeddings: family ("sd1", "sdxl") to its pinned prefix file.
        negative: "auto" leaves it off a negative prompt that only pushes away; "always" never leaves it off.
        unsupported: text encoders without a prefix: "refuse", or "allow", which gives them no protection.
        deny: patterns of node or script names that are not served ("*IPAdapter*"); case counts.
        strict: refuse conditioning of which it is not known that it was encoded under the policy.
        lock_training: users cannot train on this host.
        consent: persons who agreed; empty by default.
        source: where the policy came from, for people.
        sha256: of the policy's text.
    """

    mode: str
    embeddings: Mapping[str, Pin] = field(default_factory=dict)
    negative: str = "auto"
    unsupported: str = "refuse"
    deny: tuple[str, ...] = ()
    strict: bool = True
    lock_training: bool = True
    consent: Consent = field(default_factory=Consent)
    source: str = ""
    sha256: str = ""

    def __post_init__(self) -> None:
        for name, allowed in (("mode", MODES), ("negative", NEGATIVES), ("unsupported", UNSUPPORTED)):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"{name} is {value!r}.", f"Use one of: {', '.join(allowed)}.", field=name)
        for name in ("strict", "lock_training"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}.", "Use true or false.", field=name)
        if self.enforced and not self.embeddings:
            raise ConfigError("The mode is enforced, but embeddings names no prefix file.",
                              'Write, for example: "embeddings": {"sd1": {"file": "…", "sha256": "…"}}.',
                              field="embeddings")
        object.__setattr__(self, "embeddings", MappingProxyType(dict(self.embeddings)))

    @property
    def enforced(self) -> bool:
        """Whether every prompt has to carry a prefix."""
        return self.mode == "enforced"

    def denies(self, name: str) -> bool:
        """Whether a node or script of this name is on the deny-list."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.deny)

    def load_prefixes(self) -> dict[str, AnonymizationPrompt]:
        """Family to its prefix, every file checked against its pin. Raises as `Pin.load`."""
        return {family: pin.load() for family, pin in self.embeddings.items()}


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different: of two equal ones the later would win without a word."""
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise ConfigError(f"The policy has {twice!r} twice.", "Keep one of them.", field=twice)
    return made


def _object(value: Any, name: str, known: Sequence[str], required: Sequence[str] = ()) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{name} is {type(value).__name__}, not an object.", f"Write {{…}} with: {', '.join(known)}.",
                          field=name)
    for key in value:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            raise ConfigError(f"{name} has the unknown key {key!r}.",
                              (f"Did you mean {close[0]}? " if close else "") + f"Known: {', '.join(known)}.",
                              field=key)
    for key in required:
        if key not in value:
            raise ConfigError(f"{name} has no {key!r}.", f"It needs: {', '.join(required)}.", field=key)
    return value


def _texts(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) and item.strip() == item != "" for item in value):
        raise ConfigError(f"{name} is not a list of texts.", 'Write ["…", "…"], without spaces at either end.',
                          field=name)
    return tuple(value)


def _pin(family: str, value: Any, folder: Path | None) -> Pin:
    name = f"embeddings.{family}"
    if family not in FAMILIES:
        raise ConfigError(f"embeddings has the unknown family {family!r}.", f"Known: {', '.join(FAMILIES)}.",
                          field="embeddings")
    entry = _object(value, name, ("file", "sha256"), ("file", "sha256"))
    match = _SHA256.fullmatch(entry["sha256"]) if isinstance(entry["sha256"], str) else None
    if match is None:
        raise ConfigError(f"{name}.sha256 is {entry['sha256']!r}.",
                          "Write the 64 hexadecimal digits that sha256sum prints for the file.", field=f"{name}.sha256")
    if not isinstance(entry["file"], str) or not entry["file"]:
        raise ConfigError(f"{name}.file is {entry['file']!r}.", "Write the path of a .safetensors file.",
                          field=f"{name}.file")
    path = Path(entry["file"]).expanduser()
    if not path.is_absolute():
        places = [place for place in (folder, shipped_folder()) if place is not None]
        # Which of two files it is does not matter: the hash decides.
        path = next((place / path for place in places if (place / path).is_file()), places[0] / path)
    return Pin(family, path, match[1].lower())


def _consent(value: Any) -> Consent:
    entry = _object(value, "consent", ("persons", "words"), ("persons",))
    if not isinstance(entry["persons"], list):
        raise ConfigError("consent.persons is not a list.", 'Write [{"id": "…", "name": "…"}].',
                          field="consent.persons")
    persons = [_object(person, "consent.persons", ("id", "name"), ("id", "name")) for person in entry["persons"]]
    words = frozenset(_texts(entry.get("words", []), "consent.words"))
    return Consent(tuple(Person(person["id"], person["name"]) for person in persons), words)


def parse_policy(text: str, *, folder: Path | None = None, source: str = "policy") -> Policy:
    """A policy from its JSON.

    Args:
        text: the JSON.
        folder: where relative file names are looked up first; then the shipped `embeddings/`.
        source: for people.

    Raises:
        ConfigError: no JSON object, an unknown or repeated key, or a value out of its range. Files are not read yet.
    """
    try:
        data = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source} is not JSON: {error}.", "Check it with `python -m json.tool FILE`.",
                          field=VARIABLE) from error
    data = _object(data, "The policy", _KEYS, ("mode",))
    embeddings = data.get("embeddings", {})
    if not isinstance(embeddings, dict):
        raise ConfigError("embeddings is not an object.", 'Write {"sd1": {"file": "…", "sha256": "…"}}.',
                          field="embeddings")
    plain = {key: data[key] for key in ("mode", "negative", "unsupported", "strict", "lock_training") if key in data}
    return Policy(
        embeddings={family: _pin(family, entry, folder) for family, entry in embeddings.items()},
        deny=_texts(data.get("deny", []), "deny"),
        consent=_consent(data["consent"]) if "consent" in data else Consent(),
        source=source, sha256=hashlib.sha256(text.encode("utf-8")).hexdigest(), **plain,
    )


def load_policy(path: str | Path) -> Policy:
    """A policy from its file. Raises `ConfigError`, also where the file is missing, too large or no UTF-8."""
    path = Path(path).expanduser()
    try:
        with path.open("rb") as handle:
            data = handle.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES // 2**20} MiB")
        text = data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"The policy {path} cannot be read: {reason}.",
                          f"Check {VARIABLE} and the file's permissions.", field=VARIABLE) from error
    return parse_policy(text, folder=path.resolve().parent, source=str(path))


def read_policy(environ: Mapping[str, str] | None = None, fallback: str | Path | None = None) -> Policy | None:
    """The operator's policy: `APL_POLICY` (a path, or JSON that begins with "{"), else the file `fallback`, else None.

    Raises:
        ConfigError: there is a policy and it cannot be read or is wrong. An empty APL_POLICY is one: a script that
            meant to set it must not leave the host open.
    """
    value = (os.environ if environ is None else environ).get(VARIABLE)
    if value is None:
        return load_policy(fallback) if fallback is not None and Path(fallback).exists() else None
    if not value.strip():
        raise ConfigError(f"{VARIABLE} is set but empty.", "Name a policy file, or unset the variable.", field=VARIABLE)
    if value.lstrip().startswith("{"):
        return parse_policy(value, source=f"the variable {VARIABLE}")
    return load_policy(value)


@lru_cache(maxsize=1)
def _read_once(fallback: str | None) -> Policy | APLError | None:
    try:
        return read_policy(fallback=fallback)
    except APLError as error:
        return error


def current_policy(fallback: str | None = None) -> Policy | None:
    """`read_policy` of this process, read at the first call and kept, an error too. Raises as `read_policy`."""
    found = _read_once(fallback)
    if isinstance(found, APLError):
        raise found
    return found
