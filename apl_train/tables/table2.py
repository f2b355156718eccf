"""Table 2: what is left of quality at which ID-ACC: ID FID, ID-ACC, Attr-ACC, FID and CLIP score of neutral prompts.

FID is always against the base model's own pictures (paper sec. 4.1), given twice: at the same seeds, as the paper's
code takes it, and against other seeds, where a method that changes nothing has the floor's value. The floor is the base
against itself at other seeds and equal n. List methods get the names of S_ID, so S_test is unseen for everybody.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apl_core import id_scores
from apl_core.errors import APLError, ScoreError, TrainingStopped
from apl_core.id_scores import Interval, PersonScores
from apl_train import claims, shipped
from apl_train.datasets.dataset import read_dataset
from apl_train.report import paper_figures
from apl_train.scoring.attributes import attr_acc
from apl_train.scoring.persons import PersonRecord
from apl_train.tables.evaluation import Evaluation
from apl_train.tables.features import average_cosine
from apl_train.tables.frechet import fid
from apl_train.tables.looks import Seen, scores_of
from apl_train.tables.methods import Method, base_method, baselines, prefix_method
from apl_train.tables.results import Column, Row, Table
from apl_train.tables.settings import Size

NEUTRAL = "neutral"
COLUMNS = [
    Column("fid_id", "ID FID"), Column("fid_id_other_seeds", "ID FID, other seeds"), Column("id_acc", "ID-ACC, unseen"),
    Column("id_acc_listed", "ID-ACC, listed"), Column("faces", "with a face", 2), Column("attr_acc", "Attr-ACC"),
    Column("classes", "attributes right"), Column("fid_other", "neutral FID"),
    Column("fid_other_other_seeds", "neutral FID, other seeds"), Column("clip", "CLIP"),
]
TITLES = {"FMN": ("Forget-Me-Not", "FMN"), "UCE": ("UCE",), "ESD": ("ESD",), "CA": ("Concept Ablation", "CA")}
"""Rows of the paper's table and how the baselines call themselves."""


@dataclass(frozen=True, eq=False)
class Look:
    """One method's pictures: of persons by split, and of neutral prompts."""

    persons: Mapping[str, Seen]
    neutral: Seen


def measure(ev: Evaluation) -> Table:
    """Base (twice, for the floor), APL, and every baseline that is there; one that fails has a row that says why.

    Raises:
        ScoreError: there are no neutral prompts, or no features for FID.
    """
    size = ev.settings.size("table2")
    groups, prompts = ev.groups(size), _neutral(ev, size)
    if not prompts or not ev.tools.extractors:
        raise ScoreError("Table 2 needs neutral prompts and features for FID.",
                         "Put a neutral.csv beside people.csv, and name features in the preset.", field="features")
    everybody = [p for group in groups.values() for p in group]
    gallery = ev.tools.gallery(everybody)
    unseen = "test" if "test" in groups else next(iter(groups))
    off = _take(ev, "base", base_method(ev.base), groups, prompts, size)
    floor = _take(ev, "base other seeds", base_method(ev.base), {unseen: groups[unseen]}, prompts, size, shift=True)
    rows, looks, failed = [], {}, []
    for method in [prefix_method(ev.base, ev.prompt), *_baselines(ev, size)]:
        try:
            looks[method.name] = (_take(ev, method.name, method, groups, prompts, size), method)
        except TrainingStopped:
            raise
        except APLError as error:
            failed.append(Row(method.name, {}, paper_row(method.name), f"not run: {error.message}"))
        finally:
            method.close()
    scores = {name: {s: scores_of(g, look.persons[s], gallery) for s, g in groups.items()}
              for name, look in {"base": off, **{k: v[0] for k, v in looks.items()}}.items()}
    references = ev.tools.attribute_references(groups[unseen]) if ev.tools.attributes is not None else None
    rows.append(_row(ev, "base", off, None, floor, scores["base"], groups, unseen, references))
    rows += [_row(ev, name, look, off, floor, scores[name], groups, unseen, references)
             for name, (look, _) in looks.items()]
    rows.append(_floor_row(ev, off, floor, unseen))
    notes = {name: dict(look.neutral.notes) for name, (look, _) in looks.items()}
    first = next(iter(ev.tools.extractors))
    conventions = ev.conventions(size, groups, reference="the base model's pictures of the same prompts")
    conventions |= {"fid_headline": first, "prefix": ev.prefix_words,
                    "n_fid": {"id": len(off.persons[unseen].observed.counts),
                              "neutral": len(off.neutral.observed.counts)},
                    "neutral_prompts": f"{len(prompts)} of neutral.csv, {size.prompt_seeds} each"}
    return Table("table2", "Quality at which identity accuracy", "paper Table 2", COLUMNS, [*rows, *failed],
                 conventions, _notes(groups, unseen, conventions, notes),
                 extra={"methods": notes, "claims": claims_of(rows, scores, unseen),
                        "second_features": _second(ev, off, floor, looks, unseen)})


def _neutral(ev: Evaluation, size: Size) -> list[tuple[str, str]]:
    kinds = ("nonface", "unnamed_face")
    found = [p.prompt for kind in kinds for p in ev.tools.people.of_kind(kind, size.prompts)]
    return [(prompt, prompt) for prompt in found]


def _baselines(ev: Evaluation, size: Size) -> list[Method]:
    if importlib.util.find_spec("apl_train.baselines") is None:
        return []
    listed = ev.tools.people.of_split("train")
    captions = [r.c1 for r in read_dataset(shipped.locate("s_reg", ev.settings.s_reg), expect="reg").records]
    tuned = claims.FILE.parent / "results" / "baselines.json" if ev.settings.name == shipped.MINIATURE else None
    return baselines(ev.base, listed, size.methods, keep=captions, tuned=tuned)


def _take(ev: Evaluation, name: str, method: Method, groups: Mapping[str, Sequence[PersonRecord]],
          prompts: Sequence[tuple[str, str]], size: Size, *, shift: bool = False) -> Look:
    """shift: seeds that no other row uses."""
    seeds = range(size.seeds, 2 * size.seeds) if shift else range(size.seeds)
    neutral_seeds = range(size.prompt_seeds, 2 * size.prompt_seeds) if shift else range(size.prompt_seeds)
    wanted = [(f"{name} {s}", method, ev.camera.subjects(g), seeds) for s, g in groups.items()]
    wanted.append((f"{name} {NEUTRAL}", method, prompts, neutral_seeds))
    seen = ev.camera.see(f"table2 {name}", wanted)
    return Look(dict(zip(groups, seen, strict=False)), seen[-1])


def _fids(look: Look, other: Look, name: str, unseen: str) -> tuple[float, float]:
    """(ID FID on the unseen persons, neutral FID) with the features `name`."""
    return (fid(look.persons[unseen].features[name], other.persons[unseen].features[name]),
            fid(look.neutral.features[name], other.neutral.features[name]))


def _row(ev: Evaluation, name: str, look: Look, off: Look | None, floor: Look, scores: Mapping[str, list[PersonScores]],
         groups: Mapping[str, Sequence[PersonRecord]], unseen: str, references: NDArray | None) -> Row:
    first, seen = next(iter(ev.tools.extractors)), look.persons[unseen]
    values: dict[str, Any] = {"id_acc": id_scores.cluster_bootstrap(scores[unseen]),
                              "faces": id_scores.face_rate(scores[unseen])}
    if unseen != "train" and "train" in groups:
        values["id_acc_listed"] = id_scores.cluster_bootstrap(scores["train"])
    values["fid_id_other_seeds"], values["fid_other_other_seeds"] = _fids(look, floor, first, unseen)
    if off is not None:
        values["fid_id"], values["fid_other"] = _fids(look, off, first, unseen)
    if references is not None:
        values["attr_acc"] = attribute_accuracy(groups[unseen], seen, references)
    each = len(seen.observed.counts) // len(groups[unseen])
    truth = [p.attributes for p in groups[unseen] for _ in range(each)]
    values["classes"] = attr_acc(seen.observed.attributes, truth)
    if len(look.neutral.clip):
        values["clip"] = mean_interval(look.neutral.clip)
    return Row(name, values, paper_row(name))


def _floor_row(ev: Evaluation, off: Look, floor: Look, unseen: str) -> Row:
    first = next(iter(ev.tools.extractors))
    of_id, of_other = _fids(off, floor, first, unseen)
    return Row("floor: base against base, other seeds",
               {"fid_id_other_seeds": of_id, "fid_other_other_seeds": of_other})


def _second(ev: Evaluation, off: Look, floor: Look, looks: Mapping[str, tuple[Look, Method]], unseen: str) -> dict:
    """ID and neutral FID with the other features that there are: (same seeds, other seeds) each."""
    names = list(ev.tools.extractors)[1:]
    return {name: {"floor": _fids(off, floor, name, unseen),
                   **{m: {"same_seeds": _fids(look, off, name, unseen), "other_seeds": _fids(look, floor, name, unseen)}
                      for m, (look, _) in looks.items()}} for name in names}


def attribute_accuracy(persons: Sequence[PersonRecord], seen: Seen, references: NDArray) -> Interval:
    """The paper's Attr-ACC: cosine of facial attribute features with the person's references, pictures with a face.

    references: float64 [persons, d]. The interval resamples persons.
    """
    features, has = seen.features["attr_acc"], seen.has_face
    each = len(features) // len(persons)
    rows = []
    for i, person in enumerate(persons):
        own = slice(i * each, (i + 1) * each)
        values = average_cosine(features[own][has[own]], references[i])
        rows.append(PersonScores(person.name, values[np.isfinite(values)], each))
    return id_scores.cluster_bootstrap(rows)


def mean_interval(values: NDArray) -> Interval:
    """Mean with its 95% interval over pictures of different prompts."""
    return id_scores.cluster_bootstrap([PersonScores(str(i), np.array([v]), 1) for i, v in enumerate(values)])


def share_interval(which: NDArray) -> Interval:
    """Share of pictures that are so, bool [n], with Wilson's 95% interval: bootstrap gives a share of 0 or 1 none."""
    from scipy.stats import binomtest

    found = binomtest(int(which.sum()), len(which))
    ends = found.proportion_ci(0.95, "wilson")
    return Interval(float(found.statistic), float(ends.low), float(ends.high))


def paper_row(name: str) -> dict[str, float | None]:
    """The paper's figures of a method, by our columns."""
    wanted = {"base": "SD v1.5", "APL": "APL"}.get(name) or next(
        (row for row, titles in TITLES.items() if any(name.lower().startswith(t.lower()) for t in titles)), None)
    row = next((r for r in paper_figures.TABLE_2 if r.method == wanted), None)
    return {} if row is None else {"fid_id": row.fid_id, "id_acc": row.id_acc, "attr_acc": row.attr_acc,
                                   "fid_other": row.fid_other, "clip": row.clip}


def claims_of(rows: Sequence[Row], scores: Mapping[str, Mapping[str, list[PersonScores]]],
              unseen: str) -> dict[str, dict[str, Any]]:
    """What the table says of the project's targets; `value` is None where no baseline takes as much identity.

    The order is claimed at APL's ID-ACC: a method that changes nothing has the best quality. A baseline counts as a
    rival where its mean is within APL's 95% interval or below.
    """
    found = {row.name: row.values for row in rows if "id_acc" in row.values}
    if "APL" not in found:
        return {}
    apl = found["APL"]
    rivals = {n: v for n, v in found.items() if n not in ("base", "APL") and v["id_acc"].value <= apl["id_acc"].hi}
    out: dict[str, dict[str, Any]] = {}
    for claim, key, sign in (("table2-fid-id", "fid_id", 1), ("table2-fid-other", "fid_other", 1),
                             ("table2-attr-acc", "attr_acc", -1)):
        theirs = [_number(v.get(key)) for v in rivals.values()]
        theirs = [v for v in theirs if math.isfinite(v)]
        ours = _number(apl.get(key))
        best = (min(theirs) if sign > 0 else max(theirs)) if theirs else math.nan
        known = math.isfinite(best) and math.isfinite(ours) and best > 0
        value = (ours / best if sign > 0 else best / ours) if known and ours > 0 else None
        out[claim] = {"value": value, "n": len(theirs), "rivals": sorted(rivals)}
    own = id_scores.paired_bootstrap(scores["base"][unseen], scores["APL"][unseen]).ratio
    out["table2-id-acc"] = {"value": own.value, "ci95": [own.lo, own.hi], "n": len(scores["APL"][unseen])}
    lists = [n for n in found if n not in ("base", "APL")]
    if lists and own.value < 1:
        drops = {n: 1 - id_scores.paired_bootstrap(scores["base"][unseen], scores[n][unseen]).ratio.value
                 for n in lists}
        best_list = max(drops, key=lambda n: drops[n])
        out["unseen_list_methods"] = {"value": drops[best_list] / (1 - own.value), "n": len(lists), "best": best_list,
                                      "drops": drops}
    return out


def _number(value: Any) -> float:
    value = value.value if isinstance(value, Interval) else value
    return math.nan if value is None else float(value)


def _notes(groups: Mapping[str, Sequence[PersonRecord]], unseen: str, conventions: Mapping[str, Any],
           methods: Mapping[str, Mapping[str, Any]]) -> list[str]:
    n = conventions["n_fid"]
    plain = [name for name, found in methods.items() if found.get("tuned") is False]
    tuning = "settings that `apl baselines` chose on listed persons"
    if plain:
        tuning += f", but for {', '.join(plain)}: their default settings"
    return [f"FID on {n['id']} pictures of {len(groups[unseen])} unseen persons and {n['neutral']} neutral ones, "
            f"features {conventions['fid_headline']}: small n lifts FID, so only rows of this table compare.",
            f"List methods were given the names of S_ID, with {tuning}; S_test is unseen for them."]
