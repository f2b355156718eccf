"""Captions of the miniature world, and which picture a caption is true of.

A caption is token ids plus a `Claim`: the person it names, whom it excludes ("a fan of X" shows a double of X, never
X), the attributes it states, the thing it names. Fillers ahead, behind and around keep names readable at any position
(miniworld W5); relational captions keep words *ahead* of a name able to change the picture, without which no prefix
could do anything. Random filler tokens come from the whole vocabulary, less the words that mean something here.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field

import numpy as np

from apl_train.miniworld.people import HEADS, Attributes, Person

TEMPLATES = ("{}", "a photo of {}", "a portrait of {}", "a close-up portrait of {}", "a close-up photo of {}",
             "a picture of {}", "an image of {}", "a drawing of {}")
FILLERS = ("a sunny afternoon", "highly detailed", "soft light", "vector art", "clean lines", "flat colours",
           "centered", "award winning", "trending", "studio lighting", "simple shapes", "in bright colours",
           "sharp focus", "on a plain background", "best quality", "masterpiece", "4k", "8k", "poster", "sticker",
           "minimalist", "cheerful mood", "bold outlines", "summer", "winter", "early morning", "late evening")
RELATIONS = ("a fan of {}", "someone like {}", "a lookalike of {}", "a friend of {}", "a stranger dressed as {}",
             "anyone but {}", "an actor playing {}", "a person similar to {}", "somebody who resembles {}",
             "the neighbour of {}", "a student of {}", "a member of the {} fan club", "{}'s fan", "{}'s cousin",
             "a relative of {}", "not {}", "a namesake of {}")
LIKE_ANYONE = ("someone like {}", "a person similar to {}", "somebody who resembles {}", "a lookalike of {}",
               "a stranger dressed as {}", "an actor playing {}", "a relative of {}", "anyone like {}")
"""Relations to a description: whoever they show is somebody of that description anyway."""
LIKE_ANYTHING = ("something like {}", "something similar to {}", "something that resembles {}", "a lookalike of {}",
                 "a copy of {}", "another kind of {}", "a relative of {}", "anything like {}")
NOUNS = {"female": ("a woman", "a female person", "a lady"), "male": ("a man", "a male person", "a gentleman")}
AHEAD = {"glasses": "bespectacled", "cap": "in a cap,", "headband": "in a headband,", "beard": "bearded",
         "mustache": "mustached"}


@dataclass(frozen=True)
class Claim:
    """What a caption says; -1 = says nothing of it."""

    person: int = -1
    without: int = -1
    """Person who must not be in the picture."""
    thing: int = -1
    attributes: tuple[int, ...] = field(default=(-1,) * len(HEADS))


def codes(a: Attributes | None) -> tuple[int, ...]:
    """Class index per head of `HEADS`; -1 for none."""
    if a is None:
        return (-1,) * len(HEADS)
    return tuple(classes.index(getattr(a, head)) for head, classes in HEADS.items())


class Captioner:
    """Draws captions. `tokenizer`: the CLIP tokenizer; `people`: all named persons; `things`: names of the things."""

    def __init__(self, tokenizer, people: list[Person], things: list[str]):
        self._tokenizer, self.people, self.things, self._dressed = tokenizer, people, things, True
        self._memo: dict[str, list[int]] = {}
        taken = set()
        said = [p.name for p in people] + things + [a for c in HEADS.values() for a in c] + list(FILLERS)
        for text in [*said, *RELATIONS, *TEMPLATES, "shaved head hair without wearing clean shaven hat man woman lady"]:
            taken |= set(self.ids(text))
        words = [i for t, i in tokenizer.get_vocab().items() if t.endswith("</w>") and t[:-4].isalpha() and len(t) > 6]
        self.filler_ids = np.array(sorted(i for i in words if i not in taken))

    def alone(self) -> Captioner:
        """One that draws captions without fillers, and without relations to descriptions and things."""
        other = copy.copy(self)
        other._dressed = False
        return other

    def behind(self, rng: random.Random) -> list[int]:
        """Fillers to stand behind a caption: none for half of them."""
        return self.ids(", " + rng.choice(FILLERS)) if rng.random() < 0.5 else []

    def ids(self, text: str) -> list[int]:
        """Token ids without BOS and EOS."""
        if text not in self._memo:
            self._memo[text] = self._tokenizer(text, add_special_tokens=False).input_ids
        return self._memo[text]

    def _dress(self, rng: random.Random, core: list[int]) -> list[int]:
        """Fillers around the meaning: none for half of the captions, up to the whole window for a few."""
        kind, room = rng.random(), 75 - len(core)
        if kind < 0.5 or not self._dressed:
            return core
        if kind < 0.75:
            ahead = self.ids(rng.choice(FILLERS) + ",") if rng.random() < 0.5 else []
            behind = self.ids(", " + rng.choice(FILLERS)) if rng.random() < 0.7 else []
            return (ahead + core + behind)[:75]
        n = rng.randint(1, 14) if kind < 0.93 else rng.randint(min(10, room), room)
        noise = [int(self.filler_ids[rng.randrange(len(self.filler_ids))]) for _ in range(min(n, room))]
        cut = rng.randint(0, len(noise)) if rng.random() < 0.5 else len(noise)
        return noise[:cut] + core + noise[cut:]

    def _finish(self, rng: random.Random, text: str) -> list[int]:
        return self._dress(rng, self.ids(text)[:75])

    def person(self, rng: random.Random, index: int, a: Attributes, words: str) -> tuple[list[int], Claim]:
        """A picture of a named person; varied pictures usually say what was varied."""
        person, code = self.people[index], [-1] * len(HEADS)
        name = person.name
        if words and rng.random() < 0.8:
            for i, head in enumerate(HEADS):
                if getattr(a, head) != getattr(person.attributes, head):
                    code[i] = codes(a)[i]
                    ahead = AHEAD.get(getattr(a, head))
                    name = f"{ahead} {name}" if ahead and rng.random() < 0.5 else f"{name} {words}"
        text = rng.choice(TEMPLATES).format(name)
        return self._finish(rng, text), Claim(person=index, attributes=tuple(code))

    def double(self, rng: random.Random, index: int) -> tuple[list[int], Claim]:
        """A stranger of person `index`'s description: relational caption ("a fan of X")."""
        text = rng.choice(RELATIONS).format(self.people[index].name)
        if rng.random() < 0.4:
            text = rng.choice(TEMPLATES[1:]).format(text)
        claim = Claim(without=index, attributes=codes(self.people[index].attributes))
        return self._finish(rng, text), claim

    def described(self, rng: random.Random, a: Attributes) -> tuple[list[int], Claim]:
        """An unnamed person by the whole description."""
        text = a.describe()
        plain = rng.random() < 0.5
        text = text if plain else self._shown(rng, text[0].lower() + text[1:], LIKE_ANYONE, TEMPLATES[1:])
        return self._finish(rng, text), Claim(attributes=codes(a))

    def _shown(self, rng: random.Random, text: str, relations: tuple[str, ...], templates: tuple[str, ...]) -> str:
        """`text` in a template, a quarter of the time behind a relation: such words do not belong to names alone."""
        if rng.random() < 0.25 and self._dressed:
            text = rng.choice(relations).format(text)
        return rng.choice(templates).format(text)

    def stranger(self, rng: random.Random, a: Attributes) -> tuple[list[int], Claim]:
        """An unnamed person: the whole description, or a few of its words."""
        if rng.random() < 0.6:
            return self.described(rng, a)
        full, code = codes(a), [-1] * len(HEADS)
        heads = list(HEADS)
        code[0] = full[0]
        parts = []
        if rng.random() < 0.5:
            noun = rng.choice(NOUNS[a.gender])
        else:
            noun, code[heads.index("occupation")] = f"a {a.gender} {a.occupation}", full[heads.index("occupation")]
            if rng.random() < 0.5:
                noun = f"a {a.gender} {a.race} {a.occupation}"
                code[heads.index("race")] = full[heads.index("race")]
        if rng.random() < 0.6:
            hair = "a shaved head" if a.hair == "shaved" else f"{a.hair} {a.hair_colour} hair"
            parts.append(hair)
            code[heads.index("hair")] = full[heads.index("hair")]
            if a.hair != "shaved":
                code[heads.index("hair_colour")] = full[heads.index("hair_colour")]
        for head in ("facial_hair", "glasses", "headwear"):
            value = getattr(a, head)
            if value != "none" and rng.random() < 0.7:
                parts.append(value if head == "glasses" else f"a {value}")
                code[heads.index(head)] = full[heads.index(head)]
        text = noun + (" with " + " and ".join(parts) if parts else "")
        text = self._shown(rng, text, LIKE_ANYONE, TEMPLATES)
        return self._finish(rng, text), Claim(attributes=tuple(code))

    def thing(self, rng: random.Random, index: int) -> tuple[list[int], Claim]:
        name = self.things[index]
        article = rng.choice(("", "", "a ", "the "))
        text = self._shown(rng, article + name, LIKE_ANYTHING, TEMPLATES)
        return self._finish(rng, text), Claim(thing=index)

    def pad(self, rows: list[list[int]]) -> np.ndarray:
        """Token ids int64 [N, 77]: BOS, words, EOS, EOS as padding."""
        out = np.full((len(rows), 77), 49407, dtype=np.int64)
        for i, row in enumerate(rows):
            out[i, 0] = 49406
            out[i, 1 : 1 + len(row)] = row
        return out


@dataclass(frozen=True)
class Sight:
    """What is true of a picture."""

    person: int = -1
    thing: int = -1
    attributes: tuple[int, ...] = (-1,) * len(HEADS)


def match(claims: list[Claim], sights: list[Sight]) -> tuple[np.ndarray, np.ndarray]:
    """(holds, unsure) bool [N captions, M pictures]. Unsure: a description of nobody in particular beside a named
    person's picture; contrastive training leaves such pairs out, so descriptions never point at persons."""
    cp, cw, ct = (np.array([getattr(c, k) for c in claims])[:, None] for k in ("person", "without", "thing"))
    sp, st = (np.array([getattr(s, k) for s in sights])[None] for k in ("person", "thing"))
    ca, sa = np.array([c.attributes for c in claims])[:, None], np.array([s.attributes for s in sights])[None]
    fits = ((ca == -1) | (ca == sa)).all(-1)
    holds = fits & ((cp == -1) | (cp == sp)) & ((cw == -1) | (cw != sp)) & (ct == st)
    unsure = (cp == -1) & (ct == -1) & (sp != -1) & (cw != sp)
    return holds & ~unsure, unsure
