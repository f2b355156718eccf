"""Persons of the miniature world whom no model knows, with pictures to teach one by (DreamBooth, paper sec. 4.4).

`newcomers/` is an evaluation set like the world's own: people.csv, references.zip, and teaching.zip with the pictures
to learn from. Their names are written nowhere else; a teaching binds them to a rare word.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from apl_train.miniworld.people import HEADS, Anatomy, Person, draw_attributes
from apl_train.miniworld.render import draw_faces, face_parts
from apl_train.miniworld.set_files import write_pictures, write_table

SEED = 40_960
COUNT, TEACHING, REFERENCES = 6, 6, 4
"""Persons, and pictures of each to learn from and to be recognised by."""


def draw_newcomers(anatomy: Anatomy, count: int = COUNT, seed: int = SEED) -> list[Person]:
    """Persons balanced over gender and race, in a fixed order."""
    rng = random.Random(seed)
    people = []
    for i in range(count):
        a = draw_attributes(rng, HEADS["gender"][i % 2], HEADS["race"][i // 2 % 4])
        people.append(Person(a, anatomy.draw(rng, a.gender, a.race), f"newcomer {i + 1}", "test"))
    return people


def write_newcomers(folder: Path) -> None:
    """people.csv, references.zip, teaching.zip. Needs node and its packages, as the world itself does."""
    anatomy = Anatomy(face_parts())
    people, rng = draw_newcomers(anatomy), random.Random(SEED + 1)
    each = TEACHING + REFERENCES
    pictures = list(draw_faces([anatomy.picture(rng, p) for p in people for _ in range(each)], workers=1))
    rows = [(p.name, p.split, p.attributes.describe(), json.dumps(asdict(p.attributes))) for p in people]
    write_table(folder / "people.csv", ("name", "split", "description", "attributes"), rows)
    for name, first, last, quality in (("teaching", 0, TEACHING, 60), ("references", TEACHING, each, 42)):
        write_pictures(folder / f"{name}.zip", _named(people, pictures, each, first, last), quality=quality)


def _named(people: Sequence[Person], pictures: Sequence, each: int, first: int, last: int) -> list:
    return [(f"{p.name}/{k - first}.webp", pictures[i * each + k]) for i, p in enumerate(people)
            for k in range(first, last)]
