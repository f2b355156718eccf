"""Names written in other ways: what each kind may and may not change."""

from __future__ import annotations

import random
import unicodedata

import pytest

from apl_core.errors import ConfigError
from apl_train.training.surface import KINDS, disturb, disturbed

NAME = "sadie wenert"


def distance(a: str, b: str) -> int:
    """Levenshtein's, by the table."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, last = [i, *row[1:]], row
        for j, y in enumerate(b, 1):
            row[j] = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (x != y))
    return row[-1]


@pytest.mark.parametrize("seed", range(30))
def test_kinds_change_what_they_say(seed: int) -> None:
    def made(kind: str) -> str:
        return disturbed(NAME, kind, random.Random(seed))

    assert made("case").lower() == NAME
    assert 1 <= distance(made("edit"), NAME) <= 4 or made("edit") == NAME
    assert made("hyphen") == "sadie-wenert"
    assert made("spacing") in ("s a d i e w e n e r t", "sadiewenert")
    marked = made("diacritics")
    assert marked != NAME
    plain = "".join(c for c in unicodedata.normalize("NFD", marked) if not unicodedata.combining(c))
    assert plain == NAME
    alike = made("homoglyphs")
    assert len(alike) == len(NAME) and alike.split()[1][0] == "w"
    assert all(a == b or unicodedata.name(a).startswith("CYRILLIC") for a, b in zip(alike, NAME, strict=True))
    assert sum(a != b for a, b in zip(alike, NAME, strict=True)) >= 4
    assert made("surname") == "wenert" and made("initials") == "s. wenert"


def test_edits_are_small_and_mostly_there() -> None:
    found = [distance(disturbed(NAME, "edit", random.Random(s)), NAME) for s in range(200)]
    assert max(found) <= 4 and np_mean(d > 0 for d in found) > 0.9


def np_mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def test_a_prompt_keeps_everything_but_the_name() -> None:
    prompt = "A photo of Sadie Wenert, smiling"
    found = disturb(prompt, NAME, random.Random(0), "hyphen")
    assert found == "A photo of sadie-wenert, smiling"
    assert disturb(prompt, NAME, random.Random(3)) == disturb(prompt, NAME, random.Random(3))
    assert disturb("a tree", NAME, random.Random(0)) == "a tree"
    assert disturb("a tree", "", random.Random(0)) == "a tree"
    assert disturb("of a.b (x)", "a.b (x)", random.Random(0), "surname") == "of (x)"
    assert {disturb(prompt, NAME, random.Random(s)) for s in range(60)} - {prompt}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["x", "李小龙", "a", "jean-luc d'or", " "])
def test_odd_names_do_not_break_it(kind: str, name: str) -> None:
    for seed in range(10):
        assert isinstance(disturbed(name, kind, random.Random(seed)), str)


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ConfigError, match="kind is 'rot13'"):
        disturbed(NAME, "rot13", random.Random(0))
