"""`apl miniworld figures`: the paper's ablations on the miniature world, as plots for docs/miniworld.md.

Sweeps over alpha (Table 4), m (Table 3) and the number of persons (Fig. 8), the levels (Fig. 6) and training without
regularisation (Fig. 7). All trainings share one target bank, so a sweep pays for the prefixed prediction only.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from apl_core.atomic import write_json, write_text, write_with
from apl_core.prefix import load_prefix
from apl_train import claims, shipped
from apl_train import config as configs
from apl_train.charts import sweep_plot
from apl_train.evaluate import evaluate
from apl_train.miniworld.card import PREFIX_NAME, Bench, folder
from apl_train.svg import standalone
from apl_train.training import train

DOCS = claims.FILE.parent.parent / "docs" / "figures"
SWEEPS: dict[str, tuple[Any, ...]] = {"alpha": (0.0, 0.5, 1.0, 2.0, 5.0), "num_tokens": (1, 5, 10, 20),
                                      "persons": (4, 12, 36, 72)}
LABELS = {"alpha": "alpha", "num_tokens": "m, vectors of the prefix", "persons": "persons trained on"}
PERSONS, SEEDS, STEPS, BANK = 16, 4, 300, 2048


def _trained(bench: Bench, runs: Path, **changes: Any) -> Any:
    """The prefix of one training of the sweep; a finished one is reused, also where two sweeps meet."""
    plain = configs.from_dict(configs.preset("fast") | {"steps": STEPS, "levels_every": 0, "bank": BANK,
                                                        "name": "sweep"})
    config = dataclasses.replace(plain, **changes)
    differs = {k: v for k, v in changes.items() if getattr(plain, k) != v}
    run = runs / ("_".join(f"{k}-{v}" for k, v in sorted(differs.items())) or "plain")
    path = run / "prefix" / "sweep.safetensors"
    if not path.exists():
        train(run, config, backend=bench.backend, cache=bench.cache)
    return load_prefix(path)


def _scores(bench: Bench, prompt: Any, **options: Any) -> dict[str, Any]:
    return evaluate(bench.backend, prompt, bench.people, bench.embedder, bench.attributes, conditions=("off", "on"),
                    persons_limit=PERSONS, seeds=SEEDS, neutral_limit=24, cache=bench.cache, progress=bench.bars,
                    **options)


def _point(x: float, scores: dict[str, Any], split: str) -> dict[str, Any]:
    row = scores["persons"][split]["on"]
    return {"x": x, "id_acc_mean": row["id_acc_mean"], "lo": row["ci95"][0], "hi": row["ci95"][1],
            "series": {"train": "persons trained on", "test": "unseen persons"}[split]}


def write_figures(cache: Path | None = None, runs: Path | None = None) -> list[Path]:
    """Trains what is missing, scores it, writes docs/figures/* and benchmarks/sweeps.json; returns the files."""
    runs = runs or Path("runs/sweeps")
    bench, found, written = Bench(cache or Path("runs/cache")), {}, []
    for field, values in SWEEPS.items():
        points = []
        for value in tqdm(values, desc=f"sweep {field}"):
            everybody = field == "persons" and value == len(bench.people.of_split("train"))
            scores = _scores(bench, _trained(bench, runs, **{field: None if everybody else value}))
            points += [_point(value, scores, split) for split in ("train", "test")]
            for kind, row in scores["drift"].items():
                points[-1][f"drift_{kind}"] = row["on"] / row["two_seeds"]
        found[field] = points
        written.append(_svg(f"{field}.svg", points, LABELS[field]))
    found["no_reg"], picture = _without_regularisation(bench, runs)
    written.append(picture)
    written.append(write_before_after(bench))
    found["levels"] = _levels(bench)
    written.append(_svg("levels.svg", found["levels"], "optimizer steps"))
    write_json(folder() / "sweeps.json", found)
    return written


def write_before_after(bench: Bench, persons: int = 8) -> Path:
    """The picture at the top of README.md: unseen persons without the prefix, with it, and their descriptions alone."""
    prompt = load_prefix(shipped.prefix_file(PREFIX_NAME))
    people = bench.people.of_split("test", persons)
    named, described = [f"A close-up portrait of {p.name}" for p in people], [p.description for p in people]
    seeds = list(range(100, 100 + persons))
    rows = [bench.backend.sample(named, seeds).images, bench.backend.sample(named, seeds, vectors=prompt).images,
            bench.backend.sample(described, seeds).images]
    grid = np.concatenate([np.concatenate(list(r), 1) for r in rows])
    path = DOCS / "before-after.png"
    write_with(path, lambda temporary: Image.fromarray(grid).save(temporary, "PNG"))
    return path


def _svg(name: str, points: list[dict[str, Any]], label: str) -> Path:
    path = DOCS / name
    write_text(path, standalone(sweep_plot(points, label)))
    return path


def _without_regularisation(bench: Bench, runs: Path) -> tuple[dict[str, Any], Path]:
    """Fig. 7: the same training with and without S_Reg, on prompts that name things."""
    prompts = [p.prompt for p in bench.people.of_kind("nonface", 8)]
    rows = [bench.backend.sample(prompts, list(range(8))).images]
    rates: dict[str, Any] = {}
    for name, changes in (("with", {}), ("without", {"no_reg": True, "bank": 0})):
        prompt = _trained(bench, runs, **changes)
        rows.append(bench.backend.sample(prompts, list(range(8)), vectors=prompt).images)
        rates[name] = _scores(bench, prompt, splits=("test",))["uninvited_rate"]
    grid = np.concatenate([np.concatenate(list(r), 1) for r in rows])
    path = DOCS / "no-reg.png"
    write_with(path, lambda temporary: Image.fromarray(grid).save(temporary, "PNG"))
    rise = rates["without"]["faces_in_nonfaces_on"] - rates["without"]["faces_in_nonfaces_off"]
    claims.record({"no-reg": (rise, None, 48)})
    return rates, path


def _levels(bench: Bench) -> list[dict[str, Any]]:
    """ID-ACC of unseen persons at the levels of the shipped prefix, and whether it falls all the way (Fig. 6)."""
    bare = dataclasses.replace(bench.people, neutral=())
    beside = shipped.prefix_file(PREFIX_NAME).parent.glob(f"{PREFIX_NAME}.step-*")
    files = {int(p.stem.rpartition("-")[2]): p for p in beside}
    final = load_prefix(shipped.prefix_file(PREFIX_NAME))
    prompts = {step: load_prefix(path) for step, path in sorted(files.items())} | {final.meta.steps or 0: final}
    points = []
    for step, prompt in prompts.items():
        scores = evaluate(bench.backend, prompt, bare, bench.embedder, conditions=("off", "on"), splits=("test",),
                          seeds=SEEDS, cache=bench.cache, progress=bench.bars)
        if not points:
            off = scores["persons"]["test"]["off"]
            points.append({"x": 0, "id_acc_mean": off["id_acc_mean"], "lo": off["ci95"][0], "hi": off["ci95"][1],
                           "series": "unseen persons"})
        points.append(_point(step, scores, "test"))
    bench.bars.close()
    rise = max((b["lo"] - a["hi"] for a, b in itertools.pairwise(points)), default=0.0)
    claims.record({"levels-fall": (max(0.0, rise), None, len(points))})
    return points
