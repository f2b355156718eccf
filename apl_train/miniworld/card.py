"""`apl miniworld card`: the measured properties W1-W8 of the shipped miniature world; `apl miniworld prefix`: those of
the shipped prefix on it. Both write `benchmarks/<name>.json` and the claims that they settle.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from apl_core.atomic import write_json
from apl_core.identity import FaceEmbedder, load_embedder
from apl_core.prefix import AnonymizationPrompt, load_prefix, save_prefix
from apl_train import claims, shipped
from apl_train.model.backend import Backend
from apl_train.scoring.attributes import attr_acc
from apl_train.scoring.command import StageBars, attribute_reader
from apl_train.scoring.evaluate import best_phrase, evaluate
from apl_train.scoring.persons import EvaluationSet, read_evaluation_set

FILLER = "in bright colours, sharp focus, best quality, early morning,"
"""Neutral words of about the prefix's length: names must survive behind them (W5)."""
PHRASES = (
    "a fan of {}", "someone like {}", "a lookalike of {}", "a stranger dressed as {}", "anyone but {}",
    "an actor playing {}", "somebody who resembles {}", "not {}", "a relative of {}", "a namesake of {}",
    "a portrait of a person who is definitely not {}", "a completely different person who only resembles {}",
    "an anonymous stranger of the same kind as the famous {}",
)
"""Hand-written controls; the best is chosen on S_ID, never on S_test."""


def folder() -> Path:
    """Where the figures go: `benchmarks/` of the checkout."""
    return claims.FILE.parent


class Bench:
    """A shipped model, persons and measuring models, loaded once."""

    def __init__(self, cache: Path, model: str = shipped.MINIATURE) -> None:
        self.cache = cache
        self.backend = Backend.load(shipped.locate("base_model", model))
        self.people: EvaluationSet = read_evaluation_set(shipped.locate("persons", shipped.MINIATURE))
        self.embedder = load_embedder(shipped.recogniser(shipped.MINIATURE))
        self.second = load_embedder(shipped.recogniser(f"{shipped.MINIATURE}2"))
        self.attributes = attribute_reader(shipped.MINIATURE)
        self.bars = StageBars()

    def evaluate(self, prompt: Any, embedder: FaceEmbedder | None = None, *, neutral: bool = True,
                 **options: Any) -> dict[str, Any]:
        people = self.people if neutral else dataclasses.replace(self.people, neutral=())
        try:
            return evaluate(self.backend, prompt, people, embedder or self.embedder, self.attributes,
                            cache=self.cache, progress=self.bars, **options)
        finally:
            self.bars.close()


def verification(z: np.ndarray, person: np.ndarray, group: np.ndarray) -> dict[str, float]:
    """Same person, other persons, other persons of one gender and race: mean similarity; best balanced accuracy."""
    s = z @ z.T
    same = (person[:, None] == person[None]) & ~np.eye(len(person), dtype=bool)
    other = person[:, None] != person[None]
    genuine, impostor = np.sort(s[same]), np.sort(s[other])
    grid = np.linspace(-0.5, 1, 601)
    accept = 1 - np.searchsorted(genuine, grid) / len(genuine)
    reject = np.searchsorted(impostor, grid) / len(impostor)
    return {"same": float(genuine.mean()), "different": float(impostor.mean()),
            "same_group": float(s[other & (group[:, None] == group[None])].mean()),
            "verification": float(((accept + reject) / 2).max())}


def _recognition(bench: Bench, embedder: FaceEmbedder) -> dict[str, Any]:
    """The recogniser on the named persons' references (it never saw them) and on the VAE's reconstructions of them."""
    pictures, person, group, truth = [], [], [], []
    for i, p in enumerate(bench.people.persons):
        for picture in bench.people.references(p):
            pictures.append(picture)
            person.append(i)
            group.append(f"{p.attributes['gender']} {p.attributes['race']}")
            truth.append(p.attributes)
    stack = np.stack(pictures)
    rebuilt = bench.backend.decode(bench.backend.to_latents(stack))
    out: dict[str, Any] = {"pictures": len(stack)}
    for name, images in (("renders", stack), ("reconstructions", rebuilt)):
        faces = embedder.faces_of(list(images))
        seen = [i for i, f in enumerate(faces) if f]
        z = np.stack([faces[i][0].embedding for i in seen])
        out[name] = verification(z, np.array(person)[seen], np.array(group)[seen])
        out[name]["face_rate"] = len(seen) / len(faces)
        if bench.attributes is not None:
            read = bench.attributes.read(images[seen])
            out[name]["attributes_right"] = attr_acc(read, [truth[i] for i in seen])
    return out


def write_card(cache: Path | None = None, seeds: int = 8) -> tuple[dict[str, Any], str]:
    """Measures the base model and the recognisers; writes benchmarks/miniworld.json and its claims."""
    bench = Bench(cache or Path("runs/cache"))
    card: dict[str, Any] = {"recogniser": _recognition(bench, bench.embedder),
                            "recogniser2": _recognition(bench, bench.second)}
    scores = bench.evaluate(None, splits=("test",), conditions=("off", "description"), phrase=FILLER, seeds=seeds,
                            neutral_seeds=seeds)
    card["base"] = {k: scores[k] for k in ("persons", "drift", "uninvited_rate", "hashes", "settings")}
    write_json(folder() / "miniworld.json", card)
    test, n = scores["persons"]["test"], scores["persons"]["test"]["off"]["n_persons"]
    off, first = test["off"], card["recogniser"]
    pictures = first["pictures"]
    faces_in_things = scores["uninvited_rate"].get("faces_in_nonfaces_off")
    claims.record({
        "base-id-acc": (off["id_acc_mean"], off["ci95"], n),
        "same-person": (first["renders"]["same"], None, pictures),
        "impostors": (first["renders"]["same_group"], None, pictures),
        "description-share": _share(test["description"], n),
        "base-attributes": (off["attr_acc"], None, off["n_images"]),
        "attributes-renders": (first["renders"]["attributes_right"], None, pictures),
        "person-faces": (off["face_rate"], None, off["n_images"]),
        "thing-faces": (faces_in_things, None, scores["drift"]["nonfaces"]["n_images"]),
        "verification": (first["renders"]["verification"], None, pictures),
        "reconstruction": (first["reconstructions"]["verification"] / first["renders"]["verification"], None, pictures),
        "filler": _share(test["phrase"], n),
    })
    return card, _text("miniature world", scores, first)


def _share(row: Mapping[str, Any], n: int) -> tuple[float | None, Sequence[float] | None, int]:
    return _ratio(row["ratio_to_off"], n)


def _ratio(ratio: Mapping[str, float | None], n: int) -> tuple[float | None, Sequence[float] | None, int]:
    interval = None if ratio["lo"] is None else [ratio["lo"], ratio["hi"]]
    return ratio["value"], interval, n


def _text(title: str, scores: dict[str, Any], first: dict[str, Any] | None = None) -> str:
    from apl_train.report.table import score_table

    head = [title]
    if first:
        head += [f"  recogniser on {first['pictures']} {k}: same person {v['same']:.3f}, others of one gender and race "
                 f"{v['same_group']:.3f}, verification {v['verification']:.4f}, "
                 f"attributes right {v['attributes_right']:.3f}"
                 for k, v in first.items() if isinstance(v, dict)]
    return "\n".join([*head, "", score_table(scores)])


def _write_into_file(prefix: str, scores: Mapping[str, Any]) -> None:
    """The figures into the shipped file's metadata; its tensors and so its content hash stay as they are."""
    path = shipped.prefix_file(prefix)
    prompt = load_prefix(path)
    rows, settings = scores["persons"]["test"], scores["settings"]
    kept = {"set": "miniature S_test", "persons": rows["on"]["n_persons"], "seeds": settings["seeds"],
            "recogniser": settings["recogniser"],
            **{c: {"mean": round(rows[c]["id_acc_mean"], 4), "max": round(rows[c]["id_acc_max"], 4)}
               for c in ("off", "on")}}
    save_prefix(AnonymizationPrompt(prompt.family, prompt.tensors, prompt.meta.with_fields(scores=kept)), path)


def write_prefix_scores(prefix: str = shipped.PREFIX, cache: Path | None = None, seeds: int = 8,
                        final: bool = False) -> tuple[dict[str, Any], str]:
    """Measures the shipped prefix with every control; writes benchmarks/prefix.json and its claims.

    final: also on the persons kept out of every decision. Once, for the card.
    """
    bench = Bench(cache or Path("runs/cache"))
    prompt = load_prefix(shipped.prefix_file(prefix))
    try:
        choice = best_phrase(bench.backend, PHRASES, bench.people, bench.embedder, seeds=2, cache=bench.cache,
                             progress=bench.bars)
    finally:
        bench.bars.close()
    scores = bench.evaluate(prompt, splits=("test",), phrase=choice.phrase, seeds=seeds, neutral_seeds=seeds)
    trained = bench.evaluate(prompt, neutral=False, splits=("train",), conditions=("off", "on"), seeds=seeds // 2)
    second = bench.evaluate(prompt, bench.second, neutral=False, splits=("test",), conditions=("off", "on"),
                            seeds=seeds // 2)
    # a template cannot stand ahead of a prompt without a name: its drift is measured with the name's place left empty
    bare = choice.phrase.replace("{}", "").strip() + " "
    moved = bench.evaluate(prompt, splits=("test",), persons_limit=2, conditions=("off", "phrase"), phrase=bare.strip(),
                           seeds=2, neutral_seeds=seeds)
    scores["persons"]["train"] = trained["persons"]["train"]
    result = {"scores": scores, "second_recogniser": second["persons"], "phrase": choice.phrase,
              "phrases": dict(choice.joint_success), "phrase_drift": moved["drift"]}
    test, train = scores["persons"]["test"], scores["persons"]["train"]
    on, off, n = test["on"], test["off"], test["on"]["n_persons"]
    drift, uninvited = scores["drift"], scores["uninvited_rate"]
    pairs = {k: drift[k]["n_images"] for k in drift}

    def beyond(key: str) -> float:
        return max(0.0, uninvited[f"{key}_on"] - uninvited[f"{key}_off"])

    found = {
        "on-test": _share(on, n),
        "train-test-gap": (abs(on["id_acc_mean"] - train["on"]["id_acc_mean"]), None, n + train["on"]["n_persons"]),
        "attributes-kept": (on["attr_acc"] / off["attr_acc"], None, on["n_images"]),
        "faces-kept": (on["face_rate"], None, on["n_images"]),
        "random-keeps": _share(test["random"], n),
        "beats-phrase-joint": (on["joint_success"] - test["phrase"]["joint_success"], None, on["n_images"]),
        "second-recogniser": _share(second["persons"]["test"]["on"], n),
        "uninvited": (beyond("named_in_nonfaces") + beyond("named_in_unnamed_faces"), None, sum(pairs.values())),
        "things-to-faces": (beyond("faces_in_nonfaces"), None, pairs["nonfaces"]),
    }
    for key, kind in (("things", "nonfaces"), ("unnamed", "unnamed_faces")):
        row = drift[kind]
        found[f"drift-{key}"] = _ratio(row["ratio_to_two_seeds"]["on"], pairs[kind])
        found[f"drift-{key}-random"] = _ratio(row["ratio_on_to_random"], pairs[kind])
    ratio = [drift[k]["on"] / moved["drift"][k]["phrase"] for k in drift if moved["drift"][k].get("phrase")]
    if ratio:
        found["beats-phrase-drift"] = (max(ratio), None, sum(pairs.values()))
    if final:
        last = bench.evaluate(prompt, neutral=False, splits=("final",), conditions=("off", "on", "description"),
                              seeds=seeds)
        result["final"] = last["persons"]
        found["final-on"] = _share(last["persons"]["final"]["on"], last["persons"]["final"]["on"]["n_persons"])
    write_json(folder() / "prefix.json", result)
    claims.record(found)
    _write_into_file(prefix, scores)
    return result, _text(f"shipped prefix {prompt.name}, best phrase {choice.phrase!r}", scores)
