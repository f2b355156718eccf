"""The pictures of the miniature world and what is true of each of them, drawn once and kept on disk.

`render_world` writes `<name>.npy` (uint8 [N, 128, 128, 3]) with `<name>.jsonl` beside it, one row a picture:
kind ("person" | "double" | "stranger" | "thing"), person (index or -1), attributes, words (the varied attribute).
A *double* is a stranger who shares every described attribute with a named person: what "a fan of X" shows.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from apl_train.miniworld.names import draw_names
from apl_train.miniworld.people import HEADS, Anatomy, Attributes, Person, draw_attributes, vary
from apl_train.miniworld.render import SIZE, Things, draw_faces, face_parts

SPLITS = {"train": 72, "test": 32, "final": 16}
"""Named persons by split: S_ID, S_test, and the group kept out of every development decision."""


@dataclass(frozen=True)
class WorldPlan:
    """How much of everything is drawn."""

    seed: int = 2024
    person_pictures: int = 48
    """Pictures of each named person; a quarter of them vary one attribute."""
    reference_pictures: int = 8
    """Renders of each named person that no generative model sees: they stand for photos."""
    doubles: int = 72
    """Strangers of each named person's description; a third of them is shown (`doubles.look_alikes`)."""
    strangers: int = 6000
    """Unnamed persons with a caption."""
    things: int = 200
    thing_pictures: int = 16
    face_identities: int = 2600
    """Strangers that the recognisers are trained on, never shown to a generative model."""
    held_out_identities: int = 200
    identity_pictures: int = 10


def draw_people(anatomy: Anatomy, count_tokens, plan: WorldPlan) -> list[Person]:
    """The named persons, balanced over gender and race, in a fixed order."""
    rng = random.Random(plan.seed)
    splits = [s for s, n in SPLITS.items() for _ in range(n)]
    genders = [HEADS["gender"][i % 2] for i in range(len(splits))]
    races = [HEADS["race"][(i // 2) % 4] for i in range(len(splits))]
    names = draw_names(genders, count_tokens)
    people = []
    for split, gender, race, name in zip(splits, genders, races, names, strict=True):
        a = draw_attributes(rng, gender, race)
        people.append(Person(a, anatomy.draw(rng, gender, race), name, split))
    return people


def write_people(path: Path, people: list[Person]) -> None:
    rows = [{"name": p.name, "split": p.split, "attributes": asdict(p.attributes), "look": p.look} for p in people]
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n", encoding="utf-8")


def read_people(path: Path) -> list[Person]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Person(Attributes(**r["attributes"]), r["look"], r["name"], r["split"]) for r in rows]


def _store(folder: Path, name: str, rows: list[dict], images, total: int) -> None:
    """Pictures to `<name>.npy` through a temporary file: an interrupted stage is done again, never half-used."""
    part = folder / f"{name}.part.npy"
    out = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=(total, SIZE, SIZE, 3))
    for i, picture in enumerate(tqdm(images, total=total, desc=f"draw {name}")):
        out[i] = picture
    out.flush()
    del out
    (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(r) for r in rows) + "\n", encoding="utf-8")
    part.replace(folder / f"{name}.npy")


def read_pictures(folder: Path, name: str) -> tuple[np.ndarray, list[dict]]:
    """(uint8 [N, 128, 128, 3] memory-mapped, rows)."""
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return np.load(folder / f"{name}.npy", mmap_mode="r"), rows


def render_world(folder: Path, count_tokens, plan: WorldPlan | None = None) -> None:
    """Draws what is missing: people.jsonl, faces, things, references, identities, held_out."""
    plan = plan or WorldPlan()
    folder.mkdir(parents=True, exist_ok=True)
    anatomy = Anatomy(face_parts())
    if not (folder / "people.jsonl").exists():
        write_people(folder / "people.jsonl", draw_people(anatomy, count_tokens, plan))
    people = read_people(folder / "people.jsonl")
    if not (folder / "faces.npy").exists():
        _faces(folder, anatomy, people, plan)
    if not (folder / "things.npy").exists():
        things, rng = Things(plan.things), random.Random(plan.seed + 2)
        rows = [{"kind": "thing", "name": n} for n in things.names for _ in range(plan.thing_pictures)]
        _store(folder, "things", rows, (things.draw(rng, r["name"]) for r in rows), len(rows))
    if not (folder / "references.npy").exists():
        rng, rows, jobs = random.Random(plan.seed + 3), [], []
        for i, person in enumerate(people):
            for _ in range(plan.reference_pictures):
                rows.append({"kind": "person", "person": i})
                jobs.append(anatomy.picture(rng, person))
        _store(folder, "references", rows, draw_faces(jobs), len(jobs))
    for name, count, seed in (
        ("identities", plan.face_identities, plan.seed + 4),
        ("held_out", plan.held_out_identities, plan.seed + 5),
    ):
        if not (folder / f"{name}.npy").exists():
            _identities(folder, name, anatomy, count, plan.identity_pictures, random.Random(seed))


def _faces(folder: Path, anatomy: Anatomy, people: list[Person], plan: WorldPlan) -> None:
    rng, rows, jobs = random.Random(plan.seed + 1), [], []

    def add(kind: str, index: int, person: Person, a: Attributes, words: str = "") -> None:
        rows.append({"kind": kind, "person": index, "attributes": asdict(a), "words": words})
        jobs.append(anatomy.picture(rng, person, a))

    for i, person in enumerate(people):
        for k in range(plan.person_pictures):
            a, words = vary(rng, person.attributes) if k % 4 == 3 else (person.attributes, "")
            add("person", i, person, a, words)
        for _ in range(plan.doubles):
            double = anatomy.stranger(rng, person.attributes)
            add("double", i, double, double.attributes)
    for _ in range(plan.strangers):
        stranger = anatomy.stranger(rng)
        add("stranger", -1, stranger, stranger.attributes)
    _store(folder, "faces", rows, draw_faces(jobs), len(jobs))


def _identities(folder: Path, name: str, anatomy: Anatomy, count: int, pictures: int, rng: random.Random) -> None:
    """Strangers for the recognisers: everything that a description names changes from picture to picture."""
    rows, jobs = [], []
    for i in range(count):
        person = anatomy.stranger(rng)
        for _ in range(pictures):
            a = replace(draw_attributes(rng, person.attributes.gender, person.attributes.race))
            rows.append({"kind": "stranger", "person": i, "attributes": asdict(a)})
            jobs.append(anatomy.picture(rng, person, a))
    _store(folder, name, rows, draw_faces(jobs), len(jobs))
