"""The shipped persons and prompts keep their promises; tables of persons are checked before anything is drawn."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from apl_core.errors import DatasetError
from apl_train.datasets.cast import CastMember, cast_problems, neutral_prompts, read_cast, table_of, write_cast
from apl_train.datasets.dataset import _has, _words

PEOPLE = read_cast(table_of("public"))
PARTICLES = {"da", "del"}


def words(name: str) -> set[str]:
    return {w for w in re.split(r"[ \-.]+", name.lower()) if len(w) > 1} - PARTICLES


def test_a_hundred_to_learn_from_and_a_hundred_to_test_with() -> None:
    assert Counter(p.split for p in PEOPLE) == {"train": 100, "test": 100}
    assert len({p.name for p in PEOPLE}) == len({p.description for p in PEOPLE}) == 200


def test_both_halves_are_balanced_alike() -> None:
    cells = Counter((p.split, p.gender, p.race, p.occupation) for p in PEOPLE)
    assert set(cells.values()) == {2} and len(cells) == 2 * 2 * 5 * 5


def test_no_part_of_a_name_is_in_both_halves() -> None:
    halves = {s: set().union(*(words(p.name) for p in PEOPLE if p.split == s)) for s in ("train", "test")}
    assert not halves["train"] & halves["test"]


def test_descriptions_follow_the_papers_template() -> None:
    """A [gender] [race] [occupation], [facial attributes] (sec. 3.4), without any part of the name."""
    for person in PEOPLE:
        head, comma, attributes = person.description.partition(", ")
        assert head.startswith(f"A {person.gender} ") and comma and attributes.count(",") >= 1, person
        assert len(head.split()) >= 4 and not words(person.name) & words(person.description), person


def test_descriptions_fit_beside_the_prefix() -> None:
    from apl_core.placement import capacity
    from apl_train.model.files import TOKENIZER, read_tokenizer

    tokenizer = read_tokenizer(TOKENIZER)
    for person in PEOPLE:
        assert len(tokenizer(person.description, add_special_tokens=False).input_ids) <= capacity(10)


def test_neutral_prompts_are_balanced_and_name_nobody() -> None:
    train, test = neutral_prompts("train"), neutral_prompts("test")
    assert not {p.prompt for p in train} & {p.prompt for p in test}
    for lines in (train, test):
        kinds = Counter(p.kind for p in lines)
        assert set(kinds) == {"face", "nonface"} and 0.8 < kinds["face"] / kinds["nonface"] < 1.25
    for line in (*train, *test):
        assert not any(_has(_words(line.prompt), _words(p.name)) for p in PEOPLE), line
    # as many women as men are asked for
    faces = [p.prompt for p in train if p.kind == "face"]
    female = sum(bool(re.search(r"\b(woman|female)\b", p)) for p in faces)
    male = sum(bool(re.search(r"\b(man|male)\b", p)) for p in faces)
    assert abs(female - male) <= 4


def test_the_miniatures_prompts_are_those_its_world_can_draw() -> None:
    lines = neutral_prompts("train", "miniature")
    assert {p.kind for p in lines} == {"face", "nonface"} and len({p.prompt for p in lines}) == len(lines)
    assert {p.kind for p in neutral_prompts("test", "miniature")} == {"face", "nonface"}


BAD = {
    "no file": (None, 0, "", "cannot be read", "CSV file"),
    "empty": ("", 0, "", "the set is empty", "name,description"),
    "no name column": ("who,description\nAda,A woman\n", 1, "name", "column name is missing", "name,description"),
    "no name": ("name,description\n,A woman\n", 2, "name", "name is empty", "Fill it in"),
    "twice": ("name,description\nAda,A woman\nADA,A lady\n", 3, "name", "ADA is in row 2 too", "Remove one"),
    "unknown split": ("name,split,description\nAda,dev,A woman\n", 2, "split", "split is 'dev'", "train, test"),
    "no description": ("name,description\nAda,\n", 2, "description", "Ada has no description", "--describe"),
    "given away": ("name,description\nAda Hill,A woman called Hill\n", 2, "description", "'Hill' of the name",
                   "without any part"),
    "slash": ("name,description\nAC/DC,A band\n", 2, "name", "cannot be the name of a folder", "slashes"),
    "cells": ("name,description\nAda,A woman, smiling\n", 2, "", "3 cells, the heading has 2", '"..."'),
    "nobody to learn from": ("name,split,description\nAda,test,A woman\n", 0, "split", "nobody has the split train",
                             "as train"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_tables(what: str, tmp_path: Path) -> None:
    text, row, column, message, hint = BAD[what]
    path = tmp_path / "people.csv"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    (problem,) = cast_problems(path)
    assert (problem.row, problem.column) == (row, column)
    assert message in problem.message and hint in problem.hint
    with pytest.raises(DatasetError, match=r"people\.csv"):
        read_cast(path)


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    people = [CastMember("Ödön Kis", "train", 'A "male" painter, with a beard', "male", "white", "painter", "beard", 2),
              CastMember("Ada", "test", "A woman", row=3)]
    write_cast(tmp_path / "a.csv", people)
    assert read_cast(tmp_path / "a.csv") == people
