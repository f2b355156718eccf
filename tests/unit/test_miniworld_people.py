"""Who lives in the miniature world: drawn the same every time, described in the paper's template, named apart."""

from __future__ import annotations

import dataclasses
import random
import re

import pytest

from apl_train.miniworld import names
from apl_train.miniworld.people import (
    FACIAL_HAIR,
    GLASSES,
    HAIR,
    HAIR_COLOURS,
    HEADS,
    HEADWEAR,
    OCCUPATIONS,
    Anatomy,
    Attributes,
    background,
    draw_attributes,
    vary,
)

KINDS = ("head", "eye", "eyebrow", "nose", "ear", "eyeLine", "smileLine", "miscLine", "mouth")
PARTS = {kind: [[f"{kind}{i}", who] for i, who in enumerate(("both", "male", "female", "both"))] + [["none", "both"]]
         for kind in KINDS}
PARTS["nose"].append(["pinocchio", "both"])


@pytest.mark.parametrize(("attributes", "words"), [
    (Attributes("female", "white", "baseball player", "long", "blond"),
     "A female white baseball player, long blond hair"),
    (Attributes("male", "black", "hockey player", "shaved", "red", "beard", "glasses", "cap"),
     "A male black hockey player, shaved head, beard, glasses, cap"),
    (Attributes("male", "asian", "football player", "curly", "gray", "none", "none", "headband"),
     "A male asian football player, curly gray hair, headband"),
])
def test_descriptions_follow_the_papers_template(attributes: Attributes, words: str) -> None:
    assert attributes.describe() == words


def test_drawn_attributes_are_classes_and_the_same_every_time() -> None:
    drawn = [draw_attributes(random.Random(seed)) for seed in range(300)]
    assert drawn == [draw_attributes(random.Random(seed)) for seed in range(300)]
    for head, classes in HEADS.items():
        assert {getattr(a, head) for a in drawn} == set(classes), head
    for a in drawn:
        assert a.hair in HAIR[a.gender]
        assert a.gender == "male" or (a.facial_hair == "none" and a.hair != "shaved")
    forced = draw_attributes(random.Random(0), gender="female", race="brown")
    assert (forced.gender, forced.race) == ("female", "brown")


def test_varying_changes_one_attribute_and_says_which() -> None:
    rng, seen = random.Random(3), set()
    for _ in range(800):
        before = draw_attributes(rng)
        after, words = vary(rng, before)
        now = dataclasses.asdict(after)
        (changed,) = [head for head, value in dataclasses.asdict(before).items() if value != now[head]]
        value = getattr(after, changed)
        seen.add(changed)
        assert changed not in ("gender", "race") and value in HEADS[changed]
        assert after.hair in HAIR[after.gender] and (after.gender == "male" or after.facial_hair == "none")
        expected = {
            ("hair", "shaved"): "with a shaved head", ("glasses", "glasses"): "wearing glasses",
            ("glasses", "none"): "without glasses", ("headwear", "none"): "without a hat",
            ("facial_hair", "none"): "clean shaven",
        }.get((changed, value)) or {
            "hair": f"with {value} hair", "hair_colour": f"with {value} hair", "headwear": f"wearing a {value}",
            "occupation": f"as a {value}", "facial_hair": f"with a {value}",
        }[changed]
        assert words == expected
    assert seen == {"hair", "hair_colour", "glasses", "headwear", "occupation", "facial_hair"}


def test_identities_are_drawn_from_the_parts_of_their_gender() -> None:
    anatomy = Anatomy(PARTS)
    looks = [anatomy.draw(random.Random(seed), gender, "asian") for gender in ("male", "female") for seed in range(60)]
    assert looks == [anatomy.draw(random.Random(seed), g, "asian") for g in ("male", "female") for seed in range(60)]
    for look, other in [(look, "female") for look in looks[:60]] + [(look, "male") for look in looks[60:]]:
        for kind in Anatomy.IDENTITY_PARTS:
            assert look[kind]["id"] in [i for i, who in PARTS[kind] if who != other], kind
        assert look["nose"]["id"] != "pinocchio"
    assert len({str(look) for look in looks}) == len(looks)


def test_a_picture_keeps_the_identity_and_shows_the_attributes() -> None:
    anatomy = Anatomy(PARTS)
    for seed in range(80):
        rng = random.Random(seed)
        person = anatomy.stranger(rng)
        shown, _ = vary(rng, person.attributes)
        for attributes in (None, shown):
            made = anatomy.picture(random.Random(seed), person, attributes)
            assert made == anatomy.picture(random.Random(seed), person, attributes)
            face, a = made["face"], attributes or person.attributes
            assert {k: face[k] for k in person.look} == person.look
            assert face["jersey"]["id"] in OCCUPATIONS[a.occupation][0]
            assert face["teamColors"] == list(OCCUPATIONS[a.occupation][1])
            assert face["hair"]["id"] in HAIR[a.gender][a.hair] and face["hair"]["color"] == HAIR_COLOURS[a.hair_colour]
            assert face["facialHair"]["id"] in FACIAL_HAIR[a.facial_hair]
            assert face["glasses"]["id"] in GLASSES[a.glasses] and face["accessories"]["id"] in HEADWEAR[a.headwear]
            assert (face["hairBg"]["id"] != "none") or a.hair != "long"
    same = anatomy.stranger(random.Random(1), person.attributes)
    assert same.attributes == person.attributes and same.look != person.look and same.name == ""


def test_backgrounds_are_pastel() -> None:
    for seed in range(50):
        colour = background(random.Random(seed))
        assert re.fullmatch("#[0-9a-f]{6}", colour)
        assert all(120 <= int(colour[i : i + 2], 16) <= 250 for i in (1, 3, 5))


def count_tokens(name: str) -> int:
    """A stand-in for the tokenizer: some names are too short for it, some too long."""
    return len(name) // 3


def test_given_names_and_surnames_are_unique() -> None:
    genders = ["female", "male", "male"] * 20
    drawn = names.draw_names(genders, count_tokens)
    assert drawn == names.draw_names(genders, count_tokens) != names.draw_names(genders, count_tokens, seed=12)
    given, surnames = zip(*(name.split(" ") for name in drawn), strict=True)
    assert len(set(given)) == len(set(surnames)) == len(drawn) == 60
    assert not set(given) & set(surnames)
    for first, gender in zip(given, genders, strict=True):
        assert first in (names.FEMALE if gender == "female" else names.MALE)
    assert all(2 <= count_tokens(name) <= 4 for name in drawn)
    assert any(count_tokens(f"{first} {a}{b}") > 4 for first in given for a in names.ONSETS for b in names.CODAS)


def test_no_given_name_is_there_twice_and_running_out_is_said() -> None:
    assert len(set(names.FEMALE) | set(names.MALE)) == len(names.FEMALE) + len(names.MALE)
    with pytest.raises(ValueError, match="no female given name is left"):
        names.draw_names(["female"] * (len(names.FEMALE) + 1), count_tokens)
