"""Fig. 5: persons whom DreamBooth teaches to the model after the prefix was learned, off and on while it learns them.

Every newcomer is taught on a copy of the model; every so many iterations pictures of "[V] [noun]" are taken without and
with the prefix at equal seeds (paper sec. 4.4; there 50 persons of VGGFace2, 800 iterations: 0.53 off, 0.43 on).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from apl_core import id_scores
from apl_core.atomic import write_text
from apl_core.errors import ConfigError, DatasetError
from apl_core.id_scores import PersonScores
from apl_train import shipped
from apl_train.charts import sweep_plot
from apl_train.dreambooth import DreamBooth, Teaching, subject
from apl_train.observe import Shot
from apl_train.persons import PICTURES, PersonRecord, read_evaluation_set
from apl_train.pictures import PictureFolder
from apl_train.svg import standalone
from apl_train.tables.cells import Cell, Outcome
from apl_train.tables.document import figure_folder
from apl_train.tables.evaluation import Evaluation
from apl_train.tables.results import Column, Row, Table
from apl_train.tables.settings import Size
from apl_train.tables.sweeps import point

FIGURE = "newcomers.svg"
NOUNS = {"female": "woman", "male": "man"}
PAPER = {"off": 0.53, "on": 0.43}
"""Sec. 4.4, at 800 iterations; the paper gives no other figure in words."""


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
    """One cell a newcomer: taught from the start, looked at on the way."""
    size, settings = ev.settings.size("fig5"), teaching_settings(ev)
    folder = shipped.locate("newcomers", ev.settings.newcomers)
    people = read_evaluation_set(folder)
    persons = people.of_split("test", size.persons)
    gallery = ev.tools.gallery(persons, people)
    marks = iterations(size)
    key = {"newcomers": people.sha256, "model": ev.base.sha256, "dreambooth": dataclasses.asdict(settings),
           "marks": marks, "seeds": size.seeds, "prefix": ev.prompt.content_hash, "template": ev.settings.template,
           "steps": ev.settings.steps, "guidance": ev.settings.guidance, "models": dict(ev.tools.hashes())}
    cells = [Cell(f"fig5 {p.name}", key | {"person": p.name}, len(marks)) for p in persons]
    by_digest = {cell.digest: person for cell, person in zip(cells, persons, strict=True)}

    def work(cell: Cell) -> Outcome:
        person = by_digest[cell.digest]
        values = curve(ev, teaching_pictures(folder, person.name), person, gallery.row(person), settings, marks, size)
        return Outcome({"similarities": torch.from_numpy(values)}, {"person": person.name})

    outcomes = ev.runner.fill("fig5", cells, work)
    found = np.stack([o.tensors["similarities"].numpy() for o in outcomes])
    return _table(ev, size, settings, persons, marks, found)


def teaching_settings(ev: Evaluation) -> DreamBooth:
    """The preset's DreamBooth settings. Raises ConfigError for an unknown one."""
    known = [f.name for f in dataclasses.fields(DreamBooth)]
    if unknown := sorted(set(ev.settings.dreambooth) - set(known)):
        raise ConfigError(f"dreambooth has {unknown}.", f"Known: {', '.join(known)}.", field="dreambooth")
    return DreamBooth(**ev.settings.dreambooth)


def iterations(size: Size) -> list[int]:
    """Where pictures are taken: 0, every so many, and the last."""
    return sorted({*range(0, size.iterations + 1, size.every), size.iterations})


def curve(ev: Evaluation, pictures: NDArray[np.uint8], person: PersonRecord, reference: NDArray, settings: DreamBooth,
          marks: Sequence[int], size: Size) -> NDArray[np.float32]:
    """Similarities of one newcomer's pictures, float32 [marks, 2 (off, on), seeds]; NaN where there is no face."""
    noun = noun_of(person)
    prompt = ev.settings.template.replace("{}", subject(settings, noun))
    seeds = [Shot(person.name, prompt, k).seed for k in range(size.seeds)]
    teaching = Teaching(ev.base, pictures, noun, settings)
    rows = np.full((len(marks), 2, size.seeds), np.nan, np.float32)
    for i, mark in enumerate(marks):
        teaching.teach(mark - teaching.step)
        for j, vectors in enumerate((None, ev.prompt)):
            images = teaching.backend.sample([prompt] * len(seeds), seeds, vectors=vectors, steps=ev.settings.steps,
                                             guidance=ev.settings.guidance).images
            for k, faces in enumerate(ev.tools.embedder.faces_of(list(images))):
                if faces:
                    rows[i, j, k] = id_scores.cosine(faces[0].embedding, reference)
    return rows


def persons_at(persons: Sequence[PersonRecord], values: NDArray[np.float32]) -> list[PersonScores]:
    """Scores of one mark and condition: float [persons, seeds], NaN where there is no face."""
    return [PersonScores(p.name, row[np.isfinite(row)].astype(np.float64), len(row))
            for p, row in zip(persons, values, strict=True)]


def _table(ev: Evaluation, size: Size, settings: DreamBooth, persons: Sequence[PersonRecord], marks: Sequence[int],
           found: NDArray[np.float32]) -> Table:
    rows, points = [], []
    ratio = None
    for i, mark in enumerate(marks):
        off, on = (persons_at(persons, found[:, i, j]) for j in (0, 1))
        pair = id_scores.paired_bootstrap(off, on)
        ratio = pair.ratio
        values: dict[str, Any] = {"off": pair.off, "on": pair.on, "ratio": pair.ratio,
                                  "faces_off": id_scores.face_rate(off), "faces_on": id_scores.face_rate(on)}
        is_last = mark == marks[-1]
        rows.append(Row(f"{mark} iterations", values,
                        {**PAPER, "ratio": PAPER["on"] / PAPER["off"]} if is_last else {},
                        "the paper's figure is of 800" if is_last else ""))
        points += [point(mark, pair.off, "off"), point(mark, pair.on, "on")]
    path = figure_folder(ev.run, ev.settings.name) / FIGURE
    if ev.processes.main:
        write_text(path, standalone(sweep_plot(points, "DreamBooth iterations")))
    columns = [Column("off", "ID-ACC off"), Column("on", "ID-ACC on"), Column("ratio", "on / off"),
               Column("faces_off", "with a face, off", 2), Column("faces_on", "on", 2)]
    claims = {} if ratio is None else {"dreambooth-drop": {
        "value": 1 - ratio.value, "ci95": None if np.isnan(ratio.lo) else [1 - ratio.hi, 1 - ratio.lo],
        "n": len(persons)}}
    conventions = ev.conventions(size, {"newcomers": persons}, prefix=ev.prefix_words,
                                 dreambooth=", ".join(f"{k} {v}" for k, v in dataclasses.asdict(settings).items()))
    notes = ["The newcomers are drawn for this table alone: no model, prefix or recogniser has seen them."] \
        if ev.settings.newcomers == shipped.MINIATURE else []
    return Table("fig5", "Persons taught by DreamBooth", "paper Fig. 5", columns, rows, conventions, notes,
                 [path.name], extra={"claims": claims})
