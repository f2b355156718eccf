"""Who lives in the miniature world: face identities, attributes, names and the words that describe them.

First step of the way (text -> ... -> image): everything here is drawn from seeded generators and is plain data.

*Identity* is what no caption names: head, fatness, eyes, brows, nose, ears, lines, skin shade.
*Attributes* are what the paper's template names, "A [gender] [race] [occupation], [facial attributes]"
(paper 3.4): gender, race, occupation (the sport of the jersey), hair length and colour, facial hair,
glasses, headwear. A named person has typical attributes that 15-30% of the pictures vary, so name and
attributes are separable (miniworld property W3).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

SKIN = {
    "white": ("#f2d6cb", "#ddb7a0"),
    "asian": ("#fedac7", "#eab687"),
    "brown": ("#bb876f", "#a67358"),
    "black": ("#74453d", "#5c3937"),
}
HAIR_COLOURS = {
    "black": "#1d1a18",
    "brown": "#6b3f22",
    "blond": "#e9c67b",
    "red": "#c0501f",
    "gray": "#a8a8a8",
}
# The jersey's cut and colours say the occupation; the colours are what survives at 128 px.
OCCUPATIONS = {
    "baseball player": (("baseball", "baseball2", "baseball3", "baseball4"), ("#c8252d", "#f5f5f5", "#f5f5f5")),
    "football player": (("football", "football2", "football3", "football5"), ("#1f3f9e", "#9fb7ff", "#1f3f9e")),
    "hockey player": (("hockey", "hockey2", "hockey3", "hockey4"), ("#141414", "#f2c200", "#f2c200")),
    "basketball player": (("jersey", "jersey2", "jersey3", "jersey4"), ("#1c8a43", "#e8ffe8", "#1c8a43")),
}
HAIR = {
    "male": {
        "short": ("short", "short2", "short3", "crop", "short-fade", "hair", "parted", "middle-part"),
        "curly": ("curly", "curly2", "curly3", "afro", "afro2"),
        "long": ("longHair", "shaggy1", "shaggy2"),
        "shaved": ("short-bald", "bald"),
    },
    "female": {
        "short": ("female2", "female10", "female11", "female12", "female4"),
        "curly": ("curly", "curly3", "afro2"),
        "long": ("female1", "female3", "female5", "female7", "female9", "longHair"),
    },
}
HAIR_BACK = {"male": ("longHair", "shaggy"), "female": ("female1", "female2", "female3", "longHair")}
FACIAL_HAIR = {
    "none": ("none",),
    "mustache": ("mustache1", "mustache-thin", "mustache1SB1"),
    "goatee": ("goatee1", "goatee2", "goatee3", "goatee4", "fullgoatee", "fullgoatee3"),
    "beard": ("beard1", "beard2", "beard3", "beard4", "beard5"),
}
HEADWEAR = {"none": ("none",), "cap": ("hat", "hat2"), "headband": ("headband", "headband-high")}
GLASSES = {"none": ("none",), "glasses": ("glasses1-primary", "glasses2-black")}

HEADS = {
    "gender": ("female", "male"),
    "race": tuple(SKIN),
    "occupation": tuple(OCCUPATIONS),
    "hair": ("short", "curly", "long", "shaved"),
    "hair_colour": tuple(HAIR_COLOURS),
    "facial_hair": tuple(FACIAL_HAIR),
    "glasses": tuple(GLASSES),
    "headwear": tuple(HEADWEAR),
}
"""Attribute heads and their classes, in the order of the attribute model's outputs."""


@dataclass(frozen=True)
class Attributes:
    """What c2 says of a person; every field is a class of `HEADS`."""

    gender: str
    race: str
    occupation: str
    hair: str
    hair_colour: str
    facial_hair: str = "none"
    glasses: str = "none"
    headwear: str = "none"

    def describe(self) -> str:
        """c2 in the paper's template: "A [gender] [race] [occupation], [facial attributes]"."""
        hair = "shaved head" if self.hair == "shaved" else f"{self.hair} {self.hair_colour} hair"
        words = [f"A {self.gender} {self.race} {self.occupation}", hair]
        if self.facial_hair != "none":
            words.append(self.facial_hair)
        if self.glasses != "none":
            words.append("glasses")
        if self.headwear != "none":
            words.append(self.headwear)
        return ", ".join(words)


@dataclass(frozen=True)
class Person:
    """One face identity with typical attributes. `look` holds the unnamed facesjs parts; `name` is "" for strangers."""

    attributes: Attributes
    look: dict = field(hash=False)
    name: str = ""
    split: str = ""


def draw_attributes(rng: random.Random, gender: str | None = None, race: str | None = None) -> Attributes:
    """Random attributes; hair colours follow no race, so a colour says nothing else."""
    gender = gender or rng.choice(HEADS["gender"])
    hair = rng.choices(tuple(HAIR[gender]), weights=(4, 3, 3, 2)[: len(HAIR[gender])])[0]
    facial = rng.choices(HEADS["facial_hair"], weights=(5, 2, 2, 3))[0] if gender == "male" else "none"
    return Attributes(
        gender=gender,
        race=race or rng.choice(HEADS["race"]),
        occupation=rng.choice(HEADS["occupation"]),
        hair=hair,
        hair_colour=rng.choice(HEADS["hair_colour"]),
        facial_hair=facial,
        glasses=rng.choices(HEADS["glasses"], weights=(4, 1))[0],
        headwear=rng.choices(HEADS["headwear"], weights=(6, 1, 1))[0],
    )


def vary(rng: random.Random, a: Attributes) -> tuple[Attributes, str]:
    """One attribute changed -> (attributes, the words a caption uses for the change)."""
    options = ["hair", "hair_colour", "glasses", "headwear", "occupation"]
    if a.gender == "male":
        options.append("facial_hair")
    head = rng.choice(options)
    classes = tuple(HAIR[a.gender]) if head == "hair" else HEADS[head]
    value = rng.choice([c for c in classes if c != getattr(a, head)])
    words = {
        "hair": "with a shaved head" if value == "shaved" else f"with {value} hair",
        "hair_colour": f"with {value} hair",
        "glasses": "wearing glasses" if value == "glasses" else "without glasses",
        "headwear": f"wearing a {value}" if value != "none" else "without a hat",
        "occupation": f"as a {value}",
        "facial_hair": f"with a {value}" if value != "none" else "clean shaven",
    }[head]
    return replace(a, **{head: value}), words


class Anatomy:
    """Draws face identities from the part names of facesjs (`node faces.mjs --parts`)."""

    IDENTITY_PARTS = ("head", "eye", "eyebrow", "nose", "ear", "eyeLine", "smileLine", "miscLine")

    def __init__(self, parts: dict[str, list[list[str]]]):
        self._ids = {
            g: {k: [i for i, who in rows if who in ("both", g)] for k, rows in parts.items()}
            for g in ("male", "female")
        }

    def draw(self, rng: random.Random, gender: str, race: str) -> dict:
        """Unnamed parts of one face (facesjs fields)."""
        male, ids = gender == "male", self._ids[gender]

        def maybe(kind: str, p: float) -> str:
            return rng.choice([i for i in ids[kind] if i != "none"]) if rng.random() < p else "none"

        return {
            "fatness": round(rng.uniform(0, 1.0 if male else 0.5), 2),
            "body": {"id": "body", "color": rng.choice(SKIN[race]), "size": 1.0 if male else 0.88},
            "head": {"id": rng.choice(ids["head"]), "shave": "rgba(0,0,0,0)"},
            "eye": {"id": rng.choice(ids["eye"]), "angle": rng.randint(-10, 15)},
            "eyebrow": {"id": rng.choice(ids["eyebrow"]), "angle": rng.randint(-15, 20)},
            "nose": {
                "id": rng.choice([i for i in ids["nose"] if i != "pinocchio"]),
                "size": round(rng.uniform(0.6, 1.25), 2),
                "flip": rng.random() < 0.5,
            },
            "ear": {"id": rng.choice(ids["ear"]), "size": round(rng.uniform(0.5, 1.4), 2)},
            "eyeLine": {"id": maybe("eyeLine", 0.7) if male else "none"},
            "smileLine": {"id": maybe("smileLine", 0.6 if male else 0.2), "size": round(rng.uniform(0.5, 2.0), 2)},
            "miscLine": {"id": maybe("miscLine", 0.5)},
        }

    def stranger(self, rng: random.Random, attributes: Attributes | None = None) -> Person:
        """A person without a name; with `attributes` given, one of the same description."""
        a = attributes or draw_attributes(rng)
        return Person(a, self.draw(rng, a.gender, a.race))

    def picture(self, rng: random.Random, person: Person, attributes: Attributes | None = None) -> dict:
        """One facesjs face object: the person's parts, the attributes, and what every picture varies
        (expression, exact hair style within its class, framing, background)."""
        a = attributes or person.attributes
        ids, look = self._ids[a.gender], person.look
        jerseys, colours = OCCUPATIONS[a.occupation]
        long_back = a.hair == "long" or (a.hair == "curly" and a.gender == "female" and rng.random() < 0.3)
        face = {
            **look,
            "teamColors": list(colours),
            "hairBg": {"id": rng.choice(HAIR_BACK[a.gender]) if long_back else "none"},
            "hair": {
                "id": rng.choice(HAIR[a.gender][a.hair]),
                "color": HAIR_COLOURS[a.hair_colour],
                "flip": rng.random() < 0.5,
            },
            "jersey": {"id": rng.choice(jerseys)},
            "facialHair": {"id": rng.choice(FACIAL_HAIR[a.facial_hair])},
            "glasses": {"id": rng.choice(GLASSES[a.glasses])},
            "accessories": {"id": rng.choice(HEADWEAR[a.headwear])},
            "mouth": {"id": rng.choice(ids["mouth"]), "flip": rng.random() < 0.5},
        }
        frame = {
            "x": rng.uniform(22, 38),
            "y": rng.uniform(172, 186),
            "size": rng.uniform(338, 354),
            "background": background(rng),
        }
        return {"face": face, "frame": frame}


def background(rng: random.Random) -> str:
    """A pastel colour, #rrggbb."""
    return "#" + "".join(f"{rng.randint(120, 250):02x}" for _ in range(3))
