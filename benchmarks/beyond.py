"""What each setting beyond the paper does, one row each: `python benchmarks/beyond.py [--only plain suffix ...]`.

Every row is a training of the miniature with the preset `fast` but for its steps, one setting changed, judged on S_test
at equal seeds; all rows that can share a target bank do. `strength` blends a null prefix with the row `plain`, `joint`
learns on two models, `pseudo` meets persons whom DreamBooth teaches to the model afterwards, with prefixes of the
presets' whole length. Rows are added to benchmarks/results/beyond.json; trainings in --runs are reused. --docs writes
the table of docs/beyond.md from there. With APL_RECORD_CLAIMS=1 the claims `beyond-strength` and `beyond-pseudo` are
recorded.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from beyond_table import DOCS, FILE, table, write_docs

from apl_core import id_scores
from apl_core.atomic import write_json
from apl_core.errors import APLError
from apl_core.prefix import AnonymizationPrompt, load_prefix
from apl_core.strength import blend
from apl_train import claims, shipped
from apl_train.datasets.dataset import read_dataset
from apl_train.miniworld.card import Bench
from apl_train.scoring.evaluate import evaluate
from apl_train.scoring.gallery import build_gallery
from apl_train.scoring.observe import shots_of
from apl_train.scoring.persons import read_evaluation_set
from apl_train.training import config as configs
from apl_train.training.command import train
from apl_train.training.pseudo_identity import Inversion, add_words, make_pseudo, read_words
from apl_train.training.surface import KINDS, disturbed

BANK = 1024
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "start-uniform": {"init": "uniform"},
    "start-vocabulary": {"init": "vocabulary"},
    "separability": {"timesteps": "separability"},
    "guided": {"guided_share": 0.5},
    "suffix": {"placement": "suffix"},
    "both": {"placement": "both"},
    "names": {"name_noise": 0.5},
}
"""Row -> what it changes in `plain`."""
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SECOND = "miniature-realistic"
NAME = "ida rosmont"
"""A word of the form of a name that belongs to nobody: how people call a person whom they teach to a model."""


class Rows:
    """The rows' trainings and measurements, on one loaded model."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.bench = args, Bench(args.runs.parent / "cache")
        self.plain = configs.from_dict(configs.preset("fast") | {
            "steps": args.steps, "levels_every": 0, "bank": BANK, "name": "beyond"})

    def trained(self, row: str, **changes: Any) -> AnonymizationPrompt:
        """The row's prefix, trained now unless it is there."""
        run = self.args.runs / f"{row}-{changes.get('steps', self.args.steps)}"
        path = run / "prefix" / "beyond.safetensors"
        if not path.exists():
            train(run, dataclasses.replace(self.plain, **changes), backend=self.bench.backend, cache=self.bench.cache)
        return load_prefix(path)

    def scores(self, prompt: Any, *, backend: Any = None, people: Any = None, neutral: bool = True,
               seeds: int | None = None) -> dict[str, Any]:
        """scores.json of the persons of S_test that are asked for."""
        people = people or self.bench.people
        people = people if neutral else dataclasses.replace(people, neutral=())
        return evaluate(backend or self.bench.backend, prompt, people, self.bench.embedder, self.bench.attributes,
                        splits=("test",), conditions=("off", "on"), persons_limit=self.args.persons,
                        neutral_limit=self.args.neutral, seeds=seeds or self.args.seeds, cache=self.bench.cache)

    def row(self, name: str) -> dict[str, Any]:
        """One trained row's figures."""
        changes = SETTINGS[name]
        found = figures(self.scores(self.trained(name, **changes)))
        if name in ("plain", "names"):
            found["written_otherwise"] = self.otherwise(self.trained(name, **changes))
        return found | {"changes": changes}

    def otherwise(self, prompt: AnonymizationPrompt) -> dict[str, float]:
        """ID-ACC with names written in other ways, each person in another one: off, on, and on / off."""
        persons = [p for p in self.bench.people.persons if p.split == "test"]
        noisy = [dataclasses.replace(p, name=disturbed(p.name, KINDS[i % len(KINDS)], random.Random(i)))
                 for i, p in enumerate(persons)]
        test = self.scores(prompt, people=dataclasses.replace(self.bench.people, persons=tuple(noisy)),
                           neutral=False)["persons"]["test"]
        return {"off": test["off"]["id_acc_mean"], "on": test["on"]["id_acc_mean"],
                "ratio": test["on"]["ratio_to_off"]["value"]}

    def strength(self) -> dict[str, Any]:
        """ID-ACC and drift along the line from the null prefix to `plain`."""
        learned = self.trained("plain")
        null = self.trained("null", alpha=configs.preset("null")["alpha"])
        points = []
        for s in STRENGTHS:
            found = self.scores(blend(null, learned, s), neutral=s in (0.0, 1.0))
            on = found["persons"]["test"]["on"]
            points.append({"strength": s, "id_acc_mean": on["id_acc_mean"], "lo": on["ci95"][0], "hi": on["ci95"][1],
                           "ratio": on["ratio_to_off"]["value"], **drifts(found)})
        rise = max(b["id_acc_mean"] - a["id_acc_mean"] for a, b in itertools.pairwise(points))
        beyond = max(0.0, max(b["lo"] - a["hi"] for a, b in itertools.pairwise(points)))
        _record("beyond-strength", beyond, None, self.args.persons)
        return {"points": points, "largest_rise": rise, "largest_rise_beyond_interval": beyond}

    def joint(self) -> dict[str, Any]:
        """`plain`, learned on one model, and a prefix learned on two, each judged on both."""
        second = Bench(self.bench.cache, SECOND)
        prompts = {"plain": self.trained("plain"), "joint": self.trained("joint", second_model=SECOND)}
        found: dict[str, Any] = {"second_model": SECOND}
        for name, prompt in prompts.items():
            for where, backend in (("first", self.bench.backend), ("second", second.backend)):
                found[f"{name}_on_{where}"] = figures(self.scores(prompt, backend=backend))
        return found

    def pseudo(self) -> dict[str, Any]:
        """Newcomers whom DreamBooth binds to a new word, drawn off, with `plain`, and with pseudo-identities."""
        from apl_train.tables.settings import read_settings
        from apl_train.training.dreambooth import DreamBooth

        folder = self.args.runs / f"identities-{self.args.identities}"
        if not (folder / "metadata.csv").exists():
            faces = read_dataset(shipped.locate("s_reg", shipped.MINIATURE), expect="reg")
            make_pseudo(self.bench.backend, faces, folder, count=self.args.identities,
                        settings=Inversion(steps=self.args.inversion_steps))
        preset = configs.preset("miniature-pseudo")
        # the preset's whole length: a shorter training would be no test of it
        changes = {key: preset[key] for key in ("alpha", "reg_weight", "pseudo_share", "steps")}
        name = "-".join(["pseudo", *(f"{changes[key]:g}" for key in ("alpha", "reg_weight", "pseudo_share"))])
        prompts = {"off": None, "plain": self.trained("plain", steps=preset["steps"]),
                   "pseudo": self.trained(name, pseudo=str(folder), **changes)}
        found: dict[str, Any] = {"words": self.likeness_of_words(folder), **figures(self.scores(prompts["pseudo"]))}
        usual = DreamBooth(**read_settings("miniature").dreambooth)  # those of Fig. 5
        found["by_word"] = {word: self.taught(dataclasses.replace(usual, token=word), prompts)
                            for word in (usual.token, NAME)}
        fall = found["by_word"][usual.token]["fall_pseudo"]
        _record("beyond-pseudo", fall["value"], [fall["lo"], fall["hi"]], self.args.taught)
        return found | {"identities": self.args.identities, "taught": self.args.taught,
                        "taught_steps": self.args.taught_steps, "steps": preset["steps"]}

    def taught(self, settings: Any, prompts: dict[str, AnonymizationPrompt | None]) -> dict[str, Any]:
        """Newcomers bound to one word: ID-ACC before, taught without a prefix, and with each; how much of it falls."""
        from apl_train.tables.newcomers import noun_of, teaching_pictures
        from apl_train.training.dreambooth import Teaching, prior_latents, subject

        newcomers = shipped.locate("newcomers", shipped.MINIATURE)
        people = read_evaluation_set(newcomers)
        persons = people.of_split("test", self.args.taught)
        gallery = build_gallery(people, persons, self.bench.embedder)
        of_each: dict[str, list[id_scores.PersonScores]] = {name: [] for name in ("before", *prompts)}
        prior = functools.cache(functools.partial(prior_latents, self.bench.backend))  # one for all persons of a noun
        for person in persons:
            noun = noun_of(person)
            teaching = Teaching(self.bench.backend, teaching_pictures(newcomers, person.name), noun, settings,
                                prior=prior(noun, settings.template, settings.prior_pictures, settings.seed))
            drawn = [("before", None, self.bench.backend), *((n, p, teaching.backend) for n, p in prompts.items())]
            for i, (name, prompt, backend) in enumerate(drawn):
                if i == 1:
                    teaching.teach(self.args.taught_steps)
                of_each[name].append(self.likeness(backend, prompt, f"A close-up portrait of {subject(settings, noun)}",
                                                   gallery.row(person), person.name, 4))
        found: dict[str, Any] = {name: id_scores.cluster_bootstrap(scores).value for name, scores in of_each.items()}
        for name in ("plain", "pseudo"):
            ratio = id_scores.paired_bootstrap(of_each["off"], of_each[name]).ratio
            found[f"fall_{name}"] = {"value": 1 - ratio.value, "lo": 1 - ratio.hi, "hi": 1 - ratio.lo}
        return found

    def likeness(self, backend: Any, prompt: AnonymizationPrompt | None, text: str, reference: np.ndarray, who: str,
                 seeds: int) -> id_scores.PersonScores:
        """Similarities of the largest faces in pictures of a prompt to a reference."""
        shots = shots_of([(who, text)], seeds)
        images = backend.sample([s.prompt for s in shots], [s.seed for s in shots], vectors=prompt).images
        faces = [f[0].embedding for f in self.bench.embedder.faces_of(list(images)) if f]
        values = id_scores.cosine(np.stack(faces), reference) if faces else np.zeros(0)
        return id_scores.PersonScores(who, np.asarray(values, dtype=np.float64), seeds)

    def likeness_of_words(self, folder: Path) -> dict[str, float]:
        """How like its picture a learned word draws: mean similarity with the word, and with c2 alone."""
        add_words(self.bench.backend.text, read_words(folder))
        faces = read_dataset(folder, expect="id")
        found: dict[str, list[float]] = {"word": [], "description": []}
        for row, record in list(enumerate(faces.records))[:8]:
            seen = self.bench.embedder.faces_of(list(faces.images([row])))[0]
            if not seen:
                continue
            own = id_scores.normalise(seen[0].embedding[None])[0]
            for kind, text in (("word", f"A close-up portrait of {record.name}"), ("description", record.c2)):
                found[kind] += self.likeness(self.bench.backend, None, text, own, record.name,
                                             2).similarities.tolist()
        return {kind: float(np.mean(values)) for kind, values in found.items() if values}


def drifts(scores: dict[str, Any]) -> dict[str, float]:
    """Drift of neutral pictures over that of two seeds, by kind."""
    return {f"drift_{kind}": row["on"] / row["two_seeds"] for kind, row in scores["drift"].items()}


def figures(scores: dict[str, Any]) -> dict[str, Any]:
    """What a row shows: ratios to the model without a prefix."""
    off, on = (scores["persons"]["test"][c] for c in ("off", "on"))
    attributes = on["attr_acc"] / off["attr_acc"] if on["attr_acc"] and off["attr_acc"] else None
    return {"ratio": on["ratio_to_off"], "attributes": attributes, "faces": on["face_rate"],
            "joint_success": on["joint_success"], **drifts(scores), "persons": on["n_persons"],
            "pictures": on["n_images"]}


def _record(key: str, value: float, ci95: list[float] | None, n: int) -> None:
    if os.environ.get("APL_RECORD_CLAIMS"):
        claims.record({key: (value, ci95, n)})


def main() -> None:
    own = ("strength", "joint", "pseudo")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=(*SETTINGS, *own), default=(*SETTINGS, *own))
    parser.add_argument("--runs", type=Path, default=Path("runs/beyond"))
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of every training")
    parser.add_argument("--persons", type=int, default=16, help="of S_test")
    parser.add_argument("--seeds", type=int, default=2, help="pictures of each")
    parser.add_argument("--neutral", type=int, default=8, help="neutral prompts of each kind")
    parser.add_argument("--identities", type=int, default=16, help="pseudo: faces bound to words")
    parser.add_argument("--inversion-steps", type=int, default=150, help="pseudo: steps of textual inversion")
    parser.add_argument("--taught", type=int, default=6, help="pseudo: persons that DreamBooth teaches")
    parser.add_argument("--taught-steps", type=int, default=200, help="pseudo: steps of DreamBooth")
    parser.add_argument("--docs", action="store_true", help=f"only write the table of {DOCS.name}")
    args = parser.parse_args()
    out = sys.stdout.write
    if args.docs:
        out(f"{'wrote' if write_docs() else 'up to date:'} {DOCS}\n")
        return
    torch.set_num_threads(1)
    rows = Rows(args)
    for name in args.only:
        try:
            found = getattr(rows, name)() if name in own else rows.row(name)
        except APLError as error:  # such as a second model that is not there
            out(f"{name}: skipped: {error}\n")
            continue
        known = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
        known[name] = {"steps": args.steps} | found
        write_json(FILE, known)
        out(f"{table(known, [name])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
