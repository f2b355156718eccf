"""Other ways to write a name: what a person types who mistypes it, or who wants to get past a filter.

Step name -> characters, before any tokenizer. Trained on them, a prefix meets a name's surface in more than one form;
evaluated on them, it shows what a changed surface brings back. CLIP's tokenizers lower the case themselves, so "case"
changes nothing for them and is a control. Homoglyphs: Struppek et al. 2022 (arXiv 2209.08891).
"""

from __future__ import annotations

import random
import re
import unicodedata

from apl_core.errors import ConfigError

KINDS = ("case", "edit", "hyphen", "spacing", "diacritics", "homoglyphs", "surname", "initials")
_HOMOGLYPHS = str.maketrans(dict(zip(
    "aceiopxysABEHKMOPTX",
    "\u0430\u0441\u0435\u0456\u043e\u0440\u0445\u0443\u0455\u0410\u0412\u0415\u041d\u041a\u041c\u041e\u0420\u0422\u0425",
    strict=True)))
"""Latin letters to Cyrillic ones that look the same."""
_MARKS = "\u0301\u0300\u0302\u0308\u0303"
"""Combining acute, grave, circumflex, diaeresis, tilde."""


def disturbed(name: str, kind: str, rng: random.Random) -> str:
    """`name` written in another way; the name itself where the kind has nothing to change (a single word's surname).

    Raises:
        ConfigError: an unknown kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind is {kind!r}.", f"Use one of: {', '.join(KINDS)}.", field="kind")
    words = name.split()
    if not words:
        return name
    if kind == "case":
        return rng.choice((name.upper(), name.title(), name.lower(), name.swapcase()))
    if kind == "edit":
        for _ in range(rng.choice((1, 2))):
            name = _edited(name, rng)
        return name
    if kind == "hyphen":
        return "-".join(words) if len(words) > 1 else _inserted(name, "-", rng)
    if kind == "spacing":
        return " ".join(" ".join(word) for word in words) if rng.random() < 0.5 else "".join(words)
    if kind == "diacritics":
        return _accented(name, rng)
    if kind == "homoglyphs":
        return name.translate(_HOMOGLYPHS)
    if kind == "surname":
        return words[-1]
    return " ".join([*(f"{word[0]}." for word in words[:-1]), words[-1]]) if len(words) > 1 else f"{name[0]}."


def disturb(prompt: str, name: str, rng: random.Random, kind: str | None = None) -> str:
    """The prompt with every mention of `name` written in one other way, of a random kind by default."""
    kind = kind or rng.choice(KINDS)
    written = disturbed(name, kind, rng)
    if not name.strip():
        return prompt
    return re.sub(re.escape(name), lambda _: written, prompt, flags=re.IGNORECASE)


def _letters(name: str) -> list[int]:
    return [i for i, character in enumerate(name) if character.isalpha()]


def _inserted(name: str, character: str, rng: random.Random) -> str:
    at = rng.randint(1, len(name) - 1) if len(name) > 1 else len(name)
    return name[:at] + character + name[at:]


def _edited(name: str, rng: random.Random) -> str:
    """One letter left out, doubled, replaced or swapped with the next: an edit distance of 1, a swap 2."""
    places = _letters(name)
    if len(places) < 2:
        return name
    i = rng.choice(places)
    way = rng.choice(("drop", "double", "replace", "swap"))
    if way == "drop":
        return name[:i] + name[i + 1 :]
    if way == "double":
        return name[:i] + name[i] + name[i:]
    if way == "swap" and i + 1 < len(name):
        return name[:i] + name[i + 1] + name[i] + name[i + 2 :]
    return name[:i] + rng.choice([c for c in "abcdefghijklmnopqrstuvwxyz" if c != name[i].lower()]) + name[i + 1 :]


def _accented(name: str, rng: random.Random) -> str:
    """A mark over one or two vowels, composed where Unicode has the letter."""
    vowels = [i for i in _letters(name) if name[i].lower() in "aeiouy"] or _letters(name)
    chosen = set(rng.sample(vowels, min(len(vowels), rng.choice((1, 2)))))
    return unicodedata.normalize("NFC", "".join(c + (rng.choice(_MARKS) if i in chosen else "")
                                                for i, c in enumerate(name)))
