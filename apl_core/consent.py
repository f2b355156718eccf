"""Persons who agreed to be depicted, and the prompts that may name them without the anonymization prompt.

A prompt passes only as a whole: every word of it belongs to an agreed name or to a closed list of plain words. A word
that nobody listed keeps the prefix on, since it could be another person's name.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

from .errors import ConfigError

MAX_PROMPT = 400
MAX_NAME = 120
_SPLIT = re.compile(r"[\s,.;!]+")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

# None of these is at home among given names or surnames; words such as "rose", "snow" or "young" are left out.
_WORDS = """
    a an the of in on at with and by for from into near behind before beside under over to as is his her their
    photo photograph photography picture image portrait painting drawing sketch watercolor illustration close-up closeup
    headshot selfie snapshot face person man woman people smiling laughing standing sitting walking running reading
    eating talking dancing working looking wearing holding happy serious calm outdoors indoors garden kitchen office
    city beach mountain mountains library studio classroom restaurant cafe boat train car bicycle horse dog tree trees
    flowers sunset sunrise evening blue yellow orange purple pink shirt dress suit coat jacket hat glasses scarf
    background light lighting natural detailed realistic quality focus color colour oil pencil digital cinematic
"""
PLAIN_WORDS = frozenset(_WORDS.split())


def _words(text: str) -> tuple[str, ...]:
    """Lower-case words of a text in Unicode's composed form. Look-alikes stay, and match nothing."""
    return tuple(word for word in _SPLIT.split(unicodedata.normalize("NFC", text).casefold()) if word)


@dataclass(frozen=True)
class Person:
    """Someone who agreed. `id` names the agreement and is what gets logged; `name` is how prompts call the person."""

    id: str
    name: str

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not _ID.fullmatch(self.id):
            raise ConfigError(f"consent.persons has the id {self.id!r}.",
                              "Use 1 to 64 letters, digits, '.', '_' or '-', such as agreement-12.",
                              field="consent.persons.id")
        if not isinstance(self.name, str) or not _words(self.name) or len(self.name) > MAX_NAME:
            raise ConfigError(f"consent.persons has no usable name for {self.id}.",
                              f"Write the name as prompts do, in 1 to {MAX_NAME} characters.",
                              field="consent.persons.name")
        if set(_words(self.name)) <= PLAIN_WORDS:
            raise ConfigError(f"The name for {self.id} consists of everyday words.",
                              "Write the person's full name.", field="consent.persons.name")


@dataclass(frozen=True)
class Consent:
    """The allow-list; empty by default, which lets nothing through.

    Attributes:
        persons: who agreed.
        words: the operator's additions to `PLAIN_WORDS`, lower case, one word each.
    """

    persons: tuple[Person, ...] = ()
    words: frozenset[str] = frozenset()
    _names: tuple[tuple[tuple[str, ...], str], ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        ids = [person.id for person in self.persons]
        if len(ids) != len(set(ids)):
            raise ConfigError("consent.persons has the same id twice.", "Give every agreement its own id.",
                              field="consent.persons.id")
        for word in self.words:
            if not isinstance(word, str) or _words(word) != (word,):
                raise ConfigError(f"consent.words holds {word!r}.", "List single words in lower case.",
                                  field="consent.words")
        # Longest first: "Ada Maria Example" must not be read as "Ada" and words left over.
        names = sorted(((_words(p.name), p.id) for p in self.persons), key=lambda pair: (-len(pair[0]), pair))
        object.__setattr__(self, "_names", tuple(names))

    def __bool__(self) -> bool:
        return bool(self.persons)

    def match(self, text: str) -> tuple[str, ...]:
        """Ids of the agreements that cover a prompt as a whole, in order; empty where the prefix has to stay.

        A prompt that names nobody is not covered either: then there is nothing to agree to, and the prefix does no
        harm. Emphasis, brackets, `embedding:` and every other syntax is no listed word, and keeps the prefix on.
        """
        if not self.persons or not isinstance(text, str) or len(text) > MAX_PROMPT:
            return ()
        words, found, at = _words(text), [], 0
        while at < len(words):
            named = next(((name, id_) for name, id_ in self._names if _starts(words, at, name)), None)
            if named:
                found.append(named[1])
                at += len(named[0])
            elif words[at] in PLAIN_WORDS or words[at] in self.words:
                at += 1
            else:
                return ()
        return tuple(dict.fromkeys(found))


def _starts(words: Sequence[str], at: int, name: Sequence[str]) -> bool:
    return tuple(words[at : at + len(name)]) == tuple(name)
