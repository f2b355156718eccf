"""Fig. 5: persons whom DreamBooth teaches to the model after the prefix was learned, off and on while it learns them.

Every newcomer is taught on a copy of the model; every so many iterations pictures of "[V] [noun]" are taken without and
with the prefix at equal seeds (paper sec. 4.4; there 50 persons of VGGFace2, 800 iterations: 0.53 off, 0.43 on). A
second prefix, learned with the evaluation's `pseudo_preset`, met faces bound to new words while it was learned. The
description alone (c2) is drawn as well: where the copy draws its person under that too, no prefix that leads to c2 can
take the likeness away. The whole UNet learns, as in the paper; with `dreambooth_lora` set the same is done again with
LoRA matrices on its attention, as most people teach a model today. What a prefix takes is claimed where the word alone
first draws its person as well as in the paper, at an ID-ACC of 0.53.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from apl_core import id_scores
from apl_core.atomic import write_text
from apl_core.errors import ConfigError, DatasetError
from apl_core.id_scores import PersonScores
from apl_core.prefix import AnonymizationPrompt
from apl_train import shipped
from apl_train.datasets.pictures import PictureFolder
from apl_train.report.charts import sweep_plot
from apl_train.report.svg import standalone
from apl_train.scoring.observe import Shot
from apl_train.scoring.persons import PICTURES, PersonRecord, read_evaluation_set
from apl_train.tables.cells import Cell, Outcome
from apl_train.tables.document import figure_folder
from apl_train.tables.evaluation import Evaluation
from apl_train.tables.results import Column, Row, Table
from apl_train.tables.settings import Size
from apl_train.tables.sweeps import point
from apl_train.tables.trained import trained
from apl_train.training.dreambooth import DreamBooth, Teaching, prior_latents, subject

FIGURES = {"full": "newcomers.svg", "lora": "newcomers-lora.svg"}
CLAIMS = {"full": "dreambooth-drop", "lora": "dreambooth-lora-drop"}
WORDS = {"full": "whole UNet", "lora": "LoRA"}
NOUNS = {"female": "woman", "male": "man"}
PAPER = {"off": 0.53, "on": 0.43}
"""Sec. 4.4, at 800 iterations; the paper gives no other figure in words."""
ON = {"on": "on", "pseudo": "with pseudo-identities"}
"""Condition -> its words, where a prefix is on."""
DESCRIPTION = "description"


def noun_of(person: PersonRecord) -> str:
    """What the person is called beside the rare word."""
    return NOUNS.get(person.attributes.get("gender", ""), "person")


def teaching_pictures(folder: Path, person: str) -> NDArray[np.uint8]:
    """The pictures to learn somebody from, uint8 [N, H, W, 3]: teaching.zip, or teaching/NAME/*.

    Raises:
        DatasetError: there are none, or they differ in size.
    """
    store = PictureFolder(folder / "teaching", (folder / "teaching.zip").resolve())
    try:
        names = sorted(n for n in store.names() if PurePosixPath(n).parent.name == person
                       and PurePosixPath(n).suffix.lower() in PICTURES)
        pictures = [store.pixels(name) for name in names]
    finally:
        store.close()
    if not pictures or len({p.shape for p in pictures}) > 1:
        raise DatasetError(f"{person} has {len(pictures)} pictures to learn from, of "
                           f"{len({p.shape for p in pictures})} sizes.",
                           f"Put three or more of one size under {folder / 'teaching'}/{person}.", field="teaching")
    return np.stack(pictures)


def measure(ev: Evaluation) -> Table:
    """One cell a newcomer and way of teaching: taught from the start, looked at on the way."""
    size, ways = ev.settings.size("fig5"), ways_of_teaching(ev)
    folder = shipped.locate("newcomers", ev.settings.newcomers)
    people = read_evaluation_set(folder)
    persons = people.of_split("test", size.persons)
    gallery = ev.tools.gallery(persons, people)
    marks = iterations(size)
    prefixes = prefixes_of(ev, size)
    key = {"newcomers": people.sha256, "model": ev.base.sha256, "marks": marks, "seeds": size.seeds,
           "control": DESCRIPTION, "prefixes": {k: p.content_hash for k, p in prefixes.items()},
           "template": ev.settings.template,
           "steps": ev.settings.steps, "guidance": ev.settings.guidance, "models": dict(ev.tools.hashes())}
    prior = functools.cache(functools.partial(prior_latents, ev.base))  # one for all persons of a noun
    found = []
    for way in ways:
        cells = [Cell(f"fig5 {way.method} {p.name}", key | {"dreambooth": dataclasses.asdict(way), "person": p.name},
                      len(marks)) for p in persons]
        by_digest = {cell.digest: person for cell, person in zip(cells, persons, strict=True)}

        def work(cell: Cell, by_digest: Mapping[str, PersonRecord] = by_digest, way: DreamBooth = way) -> Outcome:
            person = by_digest[cell.digest]
            noun = noun_of(person)
            shared = prior(noun, way.template, way.prior_pictures, way.seed) if way.prior_weight else None
            teaching = Teaching(ev.base, teaching_pictures(folder, person.name), noun, way, prior=shared)
            values = curve(ev, prefixes, teaching, person, gallery.row(person), marks, size)
            return Outcome({"similarities": torch.from_numpy(values)}, {"person": person.name})

        outcomes = ev.runner.fill("fig5", cells, work)
        found.append(np.stack([o.tensors["similarities"].numpy() for o in outcomes]))
    return _table(ev, size, ways, persons, marks, tuple(prefixes), found)


def prefixes_of(ev: Evaluation, size: Size) -> dict[str, AnonymizationPrompt]:
    """The prefix that is measured, "on", and the one learned against persons taught later, "pseudo", if asked for."""
    found = {"on": ev.prompt}
    if ev.settings.pseudo_preset:
        found["pseudo"] = trained(ev, size, preset=ev.settings.pseudo_preset)
    return found


def ways_of_teaching(ev: Evaluation) -> list[DreamBooth]:
    """The preset's DreamBooth settings, of the whole UNet and of LoRA where it has any. Raises ConfigError."""
    return [made for field, method in (("dreambooth", "full"), ("dreambooth_lora", "lora"))
            if (made := _teaching(field, method, getattr(ev.settings, field)))]


def _teaching(field: str, method: str, values: Mapping[str, Any]) -> DreamBooth | None:
    known = [f.name for f in dataclasses.fields(DreamBooth) if f.name != "method"]
    if unknown := sorted(set(values) - set(known)):
        raise ConfigError(f"{field} has {unknown}.", f"Known: {', '.join(known)}.", field=field)
    return DreamBooth(method=method, **values) if values or method == "full" else None


def iterations(size: Size) -> list[int]:
    """Where pictures are taken: 0, every so many, and the last."""
    return sorted({*range(0, size.iterations + 1, size.every), size.iterations})


def curve(ev: Evaluation, prefixes: Mapping[str, AnonymizationPrompt], teaching: Teaching, person: PersonRecord,
          reference: NDArray, marks: Sequence[int], size: Size) -> NDArray[np.float32]:
    """Similarities of one newcomer's pictures, float32 [marks, 2 + prefixes (off, each, description), seeds]; NaN
    without a face."""
    prompt = ev.settings.template.replace("{}", subject(teaching.settings, noun_of(person)))
    seeds = [Shot(person.name, prompt, k).seed for k in range(size.seeds)]
    drawn = [*((prompt, vectors) for vectors in (None, *prefixes.values())), (person.description, None)]
    rows = np.full((len(marks), len(drawn), size.seeds), np.nan, np.float32)
    for i, mark in enumerate(marks):
        teaching.teach(mark - teaching.step)
        for j, (text, vectors) in enumerate(drawn):
            images = teaching.backend.sample([text] * len(seeds), seeds, vectors=vectors, steps=ev.settings.steps,
                                             guidance=ev.settings.guidance).images
            for k, faces in enumerate(ev.tools.embedder.faces_of(list(images))):
                if faces:
                    rows[i, j, k] = id_scores.cosine(faces[0].embedding, reference)
    return rows


def persons_at(persons: Sequence[PersonRecord], values: NDArray[np.float32]) -> list[PersonScores]:
    """Scores of one mark and condition: float [persons, seeds], NaN where there is no face."""
    return [PersonScores(p.name, row[np.isfinite(row)].astype(np.float64), len(row))
            for p, row in zip(persons, values, strict=True)]


def _table(ev: Evaluation, size: Size, ways: Sequence[DreamBooth], persons: Sequence[PersonRecord],
           marks: Sequence[int], conditions: Sequence[str], found: Sequence[NDArray[np.float32]]) -> Table:
    rows: list[Row] = []
    claims: dict[str, Any] = {}
    figures = []
    for way, seen in zip(ways, found, strict=True):
        own, points = [], []
        for i, mark in enumerate(marks):
            values = _values(persons, seen[:, i], conditions)
            points += [point(mark, values[key], label) for key, label in
                       (("off", "off"), *((c, ON[c]) for c in conditions), (DESCRIPTION, "description alone"))]
            own.append(Row(f"{WORDS[way.method]}, {mark} iterations", values))
        at = as_in_the_paper([row.values["off"].value for row in own])
        own[at] = dataclasses.replace(own[at], paper={**PAPER, "ratio": PAPER["on"] / PAPER["off"]},
                                      note="compared with the paper's figure, of 800")
        fall = own[at].values[_ratio(conditions[-1])]  # of the prefix that was made for this, where there is one
        claims[CLAIMS[way.method]] = {"value": None if np.isnan(fall.value) else 1 - fall.value, "n": len(persons),
                                      "ci95": None if np.isnan(fall.lo) else [1 - fall.hi, 1 - fall.lo]}
        path = figure_folder(ev.run, ev.settings.name) / FIGURES[way.method]
        if ev.processes.main:
            write_text(path, standalone(sweep_plot(points, f"DreamBooth iterations, {WORDS[way.method]}")))
        figures.append(path.name)
        rows += own
    columns = [Column("off", "ID-ACC off")]
    for condition in conditions:
        columns += [Column(condition, f"ID-ACC {ON[condition]}"), Column(_ratio(condition), f"{ON[condition]} / off")]
    columns.append(Column(DESCRIPTION, "ID-ACC of the description alone"))
    columns += [Column("faces_off", "with a face, off", 2), *(Column(f"faces_{c}", ON[c], 2) for c in conditions)]
    second = {"pseudo": f"preset {ev.settings.pseudo_preset}, {size.steps} steps, bank {size.bank}"} \
        if "pseudo" in conditions else {}
    taught = {f"dreambooth, {WORDS[way.method]}": ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(way).items())
              for way in ways}
    conventions = ev.conventions(size, {"newcomers": persons}, prefix=ev.prefix_words, **second, **taught)
    notes = ["The newcomers are drawn for this table alone: no model, prefix or recogniser has seen them."] \
        if ev.settings.newcomers == shipped.MINIATURE else []
    return Table("fig5", "Persons taught by DreamBooth", "paper Fig. 5", columns, rows, conventions, notes, figures,
                 extra={"claims": claims})


def _values(persons: Sequence[PersonRecord], seen: NDArray[np.float32], conditions: Sequence[str]) -> dict[str, Any]:
    """A row's values: `seen` is one mark of every newcomer, float32 [persons, 2 + prefixes, seeds]."""
    off = persons_at(persons, seen[:, 0])
    values: dict[str, Any] = {"off": id_scores.cluster_bootstrap(off), "faces_off": id_scores.face_rate(off)}
    for j, condition in enumerate(conditions, 1):
        on = persons_at(persons, seen[:, j])
        pair = id_scores.paired_bootstrap(off, on)
        values |= {condition: pair.on, _ratio(condition): pair.ratio, f"faces_{condition}": id_scores.face_rate(on)}
    return values | {DESCRIPTION: id_scores.cluster_bootstrap(persons_at(persons, seen[:, -1]))}


def as_in_the_paper(off: Sequence[float]) -> int:
    """Number of the first mark at which the word alone draws its person as well as in the paper; the last if none."""
    return next((i for i, value in enumerate(off) if value >= PAPER["off"]), len(off) - 1)


def _ratio(condition: str) -> str:
    """Key of a condition's ratio to "off"."""
    return "ratio" if condition == "on" else f"{condition}_ratio"
