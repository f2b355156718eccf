"""`apl miniworld carry`: one prefix on other models, and carried over to another family (paper Table 1; sec. 3.5).

Two questions, on persons of S_test at equal seeds. *Plug-and-play*: how much of the prefix's effect is kept on
relatives of the model it was learned on, by the same file? *Transfer*: how much of the effect of a prefix learned on
the miniature SDXL itself is reached by the SD1 prefix, carried over through the token tables alone, by every method
and by its controls? The second again with the first text encoder deaf: its half of a carried prefix
is a copy, so the other half is put to the test where nothing else can do its work. What a prefix does is its drop,
ID-ACC off less on; "kept" is a ratio of drops, with persons resampled in pairs.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apl_core.atomic import write_bytes, write_json
from apl_core.onnx_models import file_hash
from apl_core.placement import LENGTH
from apl_core.prefix import AnonymizationPrompt, load_prefix
from apl_train import claims, shipped
from apl_train.miniworld.card import FILLER, Bench, folder
from apl_train.model.backend import Backend
from apl_train.model.edited import Edited
from apl_train.model.text import Encoded, Vectors
from apl_train.report.grids import labelled, to_png
from apl_train.scoring.drift import random_vectors

RELATIVES = ("miniature-1.4", "miniature-realistic")
SDXL, NATIVE = "miniature-sdxl", "anonymize-miniature-sdxl"
METHODS = ("ridge", "ptfer", "half", "procrustes")
ALONE = ("native", "auto", "ridge", "ptfer", "procrustes")
"""Prefixes that are also drawn with the first text encoder deaf."""
RESAMPLES = 4000
REFINED = 200
"""Steps of the refinement by text encoders alone, as the command suggests."""


def kept(off: Sequence[float], on: Sequence[float], first_off: Sequence[float], first_on: Sequence[float], *,
         relative: bool = False, seed: int = 0) -> tuple[float, list[float] | None]:
    """Drop off - on as a share of the first one's, and its 95% interval over persons.

    Args:
        off, on, first_off, first_on: ID-ACC by person, in one order; a person without a face is NaN and left out.
        relative: drops are first divided by the mean without a prefix, as two models know persons unequally well.
    """
    table = np.array([off, on, first_off, first_on], dtype=np.float64)
    table = table[:, np.isfinite(table).all(0)]

    def statistic(values: np.ndarray) -> np.ndarray:
        a, b, c, d = values.mean(-1)
        ours, theirs = a - b, c - d
        return (ours / a) / (theirs / c) if relative else ours / theirs

    if table.shape[1] < 2:
        return math.nan, None
    picks = np.random.default_rng(seed).integers(0, table.shape[1], size=(RESAMPLES, table.shape[1]))
    lo, hi = np.percentile(statistic(table[:, picks]), (2.5, 97.5))
    return float(statistic(table)), [float(lo), float(hi)]


def nearest_tokens(vectors: Mapping[str, Tensor], tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every vector replaced by the token nearest by cosine: what could be typed. Key to float [m, width]."""
    out = {}
    for key, rows in vectors.items():
        table = tables[key].float()
        found = torch.nn.functional.normalize(rows.float(), dim=-1) @ torch.nn.functional.normalize(table, dim=-1).T
        out[key] = table[found.argmax(1)].clone()
    return out


def _row(scores: Mapping[str, Any], condition: str = "on") -> dict[str, Any]:
    """What the table shows of one prefix on one model."""
    test, moved = scores["persons"]["test"], scores["drift"]
    row = {k: test[condition][k] for k in ("id_acc_mean", "id_acc_max", "ci95", "face_rate", "attr_acc", "by_person",
                                           "n_persons", "n_images")}
    if condition in ("off", "on") and moved:
        row["things_to_faces"] = scores["uninvited_rate"][f"faces_in_nonfaces_{condition}"]
    return row | {f"drift_{kind}": moved[kind][condition] / moved[kind]["two_seeds"] for kind in moved
                  if moved[kind].get(condition) is not None}


def _scores(bench: Bench, prompt: Any, seeds: int, *conditions: str, neutral: bool = True) -> dict[str, Any]:
    return bench.evaluate(prompt, splits=("test",), conditions=("off", *conditions), seeds=seeds, neutral=neutral,
                          phrase=FILLER if "phrase" in conditions else None)


def measure_relatives(cache: Path, seeds: int = 4, prefix: str = shipped.PREFIX) -> dict[str, Any]:
    """The shipped prefix on the first miniature and on its relatives; writes the claims."""
    prompt, rows = load_prefix(shipped.prefix_file(prefix)), {}
    for model in (shipped.MINIATURE, *RELATIVES):
        scores = _scores(Bench(cache, model), prompt, seeds, "on", "description")
        rows[model] = {name: _row(scores, name) for name in ("off", "on", "description")}
    first = rows[shipped.MINIATURE]
    for model in RELATIVES:
        own = rows[model]
        value, interval = kept(own["off"]["by_person"], own["on"]["by_person"], first["off"]["by_person"],
                               first["on"]["by_person"], relative=True)
        own["kept"], own["kept_ci95"] = value, interval
        claims.record({f"kept-{model.removeprefix('miniature-')}": (value, interval, own["on"]["n_persons"])})
    return rows


def _captions() -> list[str]:
    return shipped.locate("captions", shipped.MINIATURE).read_text(encoding="utf-8").splitlines()


def carried_prefixes(prefix: str = shipped.PREFIX) -> dict[str, AnonymizationPrompt]:
    """The SD1 prefix in the miniature SDXL's token spaces: by every method, and by the one chosen on held-out tokens.

    Tokens weigh as often as the world's captions use them: most of its vocabulary was hardly trained.
    """
    from apl_core.token_tables import read_table, read_tables
    from apl_core.transfer import TransferSettings, caption_weights, transfer
    from apl_train.model.files import TOKENIZER, read_tokenizer

    prompt = load_prefix(shipped.prefix_file(prefix))
    source = read_table(shipped.locate("base_model", shipped.MINIATURE))
    targets = read_tables(shipped.locate("base_model", SDXL))
    ids = read_tokenizer(TOKENIZER)(_captions(), add_special_tokens=False).input_ids
    weights = caption_weights(ids, source.vocabulary)
    return {method: transfer(prompt, source, targets, TransferSettings(method=method, weights=weights)).prefix
            for method in ("auto", *METHODS)}


class SecondAlone(Edited):
    """A model of SDXL's kind whose first text encoder is given no words and no prefix, as it was for a third of the
    captions that the miniature SDXL learned from."""

    def __init__(self, base: Backend) -> None:
        super().__init__(base)
        self.sha256 = hashlib.sha256(f"{base.sha256}|second alone".encode()).hexdigest()  # what is cached is not base's

    def encode(self, prompts: Sequence[str], vectors: Vectors | None = None, **options: Any) -> Encoded:
        """As `Backend.encode`; the first encoder's states are those of an empty prompt."""
        found = super().encode(prompts, vectors, **options)
        empty = super().encode([""], chunks=found.states.shape[1] // LENGTH).states
        width = next(iter(self.text.encoders.values())).config.hidden_size
        return Encoded(torch.cat([empty[..., :width].expand(len(prompts), -1, -1), found.states[..., width:]], dim=-1),
                       found.pooled)


class _Rows:
    """Rows of the table, each written as soon as it is measured; one with an equal stamp is not measured again."""

    def __init__(self, bench: Bench, seeds: int, found: dict[str, Any], save: Callable[[], None], *,
                 neutral: bool = True) -> None:
        self._bench, self._seeds, self.found, self._save, self._neutral = bench, seeds, found, save, neutral
        self._model = file_hash(shipped.locate("base_model", SDXL))
        self.rows: dict[str, Any] = {}

    def stamp(self, prompt: Any, condition: str) -> str:
        """Of everything that a row's figures follow from: vectors, model, recogniser, seeds, pooled option."""
        tensors = getattr(prompt, "tensors", prompt)
        parts = [f"{k}:{hashlib.sha256(v.float().contiguous().numpy().tobytes()).hexdigest()}"
                 for k, v in sorted(tensors.items())] if condition in ("on", "random") else []
        parts += [FILLER] if condition == "phrase" else []
        parts += [condition, self._model, self._bench.embedder.sha256, str(self._seeds),
                  str(self._bench.backend.text.plain_pooled)]
        return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]

    def measure(self, name: str, prompt: Any, condition: str = "on") -> None:
        stamp = self.stamp(prompt, condition)
        if same := next((row for row in self.found.values() if row.get("stamp") == stamp), None):
            self.found[name] = dict(same)  # as "auto" is one of the methods
        else:
            more = () if condition == "off" else (condition,)
            scores = _scores(self._bench, prompt, self._seeds, *more, neutral=self._neutral)
            self.found[name] = _row(scores, condition) | {"stamp": stamp}
            self._save()
        self.rows[name] = self.found[name]


def measure_transfer(cache: Path, seeds: int = 4, found: dict[str, Any] | None = None,
                     alone_found: dict[str, Any] | None = None,
                     save: Callable[[], None] = lambda: None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The miniature SDXL with its native prefix, with the carried one by every method, and with the controls; and some
    of them with its second text encoder alone.

    Args:
        found, alone_found: rows of an earlier run, extended in place; those whose stamp still holds are taken as they
            are.
        save: called after every row.
    """
    from apl_train.refine_transfer import refine

    bench = Bench(cache, SDXL)
    table = _Rows(bench, seeds, {} if found is None else found, save)
    native = load_prefix(shipped.prefix_file(NATIVE))
    tried: dict[str, Any] = {"native": native, **carried_prefixes()}
    tables = {key: bench.backend.text.embedding_table(key) for key in native.tensors}
    tried["auto, refined"] = refine(bench.backend.text, tried["auto"], _captions(), REFINED).prefix
    tried["ptfer, refined"] = refine(bench.backend.text, tried["ptfer"], _captions(), REFINED).prefix
    tried["nearest tokens"] = nearest_tokens(tried["auto"].tensors, tables)
    for name in ("off", "random", "description"):
        table.measure(name, tried["auto"], name)
    table.measure("filler", None, "phrase")  # with the two before it, the card that the first miniature has
    for name, prompt in tried.items():
        table.measure(name, prompt)
    bench.backend.text.plain_pooled = True
    table.measure("auto, pooled without it", tried["auto"])
    bench.backend.text.plain_pooled = False
    copied = dict(tried["auto"].tensors)
    copied["clip_g"] = random_vectors(copied)["clip_g"]
    table.measure("first half copied, second random", copied)
    rows = _shares(table.rows)
    bench.backend = SecondAlone(bench.backend)
    alone = _Rows(bench, seeds, {} if alone_found is None else alone_found, save, neutral=False)
    for name in ("off", "random"):
        alone.measure(name, tried["auto"], name)
    for name in ALONE:
        alone.measure(name, tried[name])
    claims.record({"transfer-kept": (rows["auto"]["kept"], rows["auto"]["kept_ci95"], rows["auto"]["n_persons"])})
    return rows, _shares(alone.rows)


def _shares(rows: dict[str, Any]) -> dict[str, Any]:
    """Every row with the share of the native prefix's drop that it keeps; None where no picture shows a face."""
    off, best = rows["off"]["by_person"], rows["native"]["by_person"]
    for name, row in rows.items():
        if name != "off":
            value, row["kept_ci95"] = kept(off, row["by_person"], off, best)
            row["kept"] = value if math.isfinite(value) else None
    return rows


def write_carried(cache: Path | None = None, only: Sequence[str] = ("relatives", "transfer")) -> tuple[dict, str]:
    """Measures; writes benchmarks/carried.json and the claims. Returns (figures, a table for people), of `only`: the
    rest of the file may be of other models."""
    path = folder() / "carried.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "relatives" in only:
        found["relatives"] = measure_relatives(cache or Path("runs/cache"))
        write_json(path, found)
    if "transfer" in only:
        earlier, alone = (found.setdefault(part, {}) for part in ("transfer", "second_alone"))
        found["transfer"], found["second_alone"] = measure_transfer(
            cache or Path("runs/cache"), found=earlier, alone_found=alone, save=lambda: write_json(path, found))
        write_json(path, found)
    write_picture(cache or Path("runs/cache"))
    parts = [p for part in only for p in (("transfer", "second_alone") if part == "transfer" else (part,))]
    measured = {part: found[part] for part in parts}
    return measured, table(measured)


def write_picture(cache: Path, carried: AnonymizationPrompt | None = None) -> Path:
    """docs/figures/family.png: six unseen persons and two things on every model, without and with the one prefix."""
    prompt = load_prefix(shipped.prefix_file(shipped.PREFIX))
    rows, labels = [], []
    for model in (shipped.MINIATURE, *RELATIVES, SDXL):
        bench = Bench(cache, model)
        persons = [f"A close-up portrait of {p.name}" for p in bench.people.of_split("test", 6)]
        prompts = persons + [p.prompt for p in bench.people.of_kind("nonface", 2)]
        vectors = (carried or carried_prefixes()["auto"]) if model == SDXL else prompt
        for label, chosen in (("without", None), ("with", vectors)):
            rows.append(bench.backend.sample(prompts, list(range(100, 108)), vectors=chosen).images)
            labels.append(f"{model} {label}")
    path = folder().parent / "docs" / "figures" / "family.png"
    write_bytes(path, to_png(labelled(np.stack(rows), labels, label_width=150)))
    return path


def table(found: Mapping[str, Any]) -> str:
    """One line a model and prefix."""
    heads = ("ID-ACC", "95% interval", "max", "Attr", "faces", "drift", "kept", "faces of things")
    lines = [" " * 42 + "{:>8} {:>16} {:>7} {:>6} {:>6} {:>12} {:>6} {}".format(*heads)]

    def line(label: str, row: Mapping[str, Any]) -> str:
        drifts = "/".join(f"{row[k]:.2f}" for k in ("drift_nonfaces", "drift_unnamed_faces") if row.get(k) is not None)
        turned = "" if row.get("things_to_faces") is None else f"{row['things_to_faces']:.3f}"
        share = "" if row.get("kept") is None else f"{row['kept']:.2f}"
        low, high = row["ci95"]
        between = "" if low is None else f"{low:.3f} to {high:.3f}"
        mean, most, right = ("" if row[k] is None else f"{row[k]:.3f}"
                             for k in ("id_acc_mean", "id_acc_max", "attr_acc"))
        return (f"{label:42}{mean:>8} {between:>16} {most:>7} {right:>6} {row['face_rate']:6.3f} {drifts:>12} "
                f"{share:>6} {turned:>6}")

    for model, rows in found.get("relatives", {}).items():
        shares = {"on": {"kept": rows.get("kept")}}
        lines += [line(f"{model} {name}", rows[name] | shares.get(name, {})) for name in ("off", "on", "description")]
    lines += [line(f"{SDXL} {name}", row) for name, row in found.get("transfer", {}).items()]
    lines += [line(f"second encoder alone, {name}", row) for name, row in found.get("second_alone", {}).items()]
    return "\n".join(lines)
