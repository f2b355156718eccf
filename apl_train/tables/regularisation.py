"""Fig. 7: the same training with and without S_Reg, on prompts that name nobody; and the row for the released loss.

Without regularisation the prefix is learned on faces alone and turns things into faces. `loss` trains equation 5 and
the loss of the paper's released code, whose "private" prediction is made with the prefix (see `losses.released_loss`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from apl_core import id_scores
from apl_core.atomic import write_with
from apl_train.report.grids import labelled
from apl_train.scoring.observe import Shot
from apl_train.tables.document import figure_folder
from apl_train.tables.evaluation import Evaluation
from apl_train.tables.looks import scores_of
from apl_train.tables.methods import Method, base_method, prefix_method
from apl_train.tables.results import Column, Row, Table
from apl_train.tables.table1 import SPLITS
from apl_train.tables.table2 import mean_interval, share_interval
from apl_train.tables.trained import trained

FIGURE = "no-reg.png"
SHOWN = 8
KINDS = {"nonface": "things", "unnamed_face": "unnamed persons"}


def measure(ev: Evaluation) -> Table:
    """How often a face is in pictures of things, and ID-ACC, by training."""
    size = ev.settings.size("fig7")
    groups = {s: g for s, g in ev.groups(size).items() if s != "train"} or ev.groups(size)
    methods = {
        "no prefix": base_method(ev.base, "no prefix"),
        "with S_Reg": prefix_method(ev.base, trained(ev, size), "with S_Reg"),
        "without S_Reg": prefix_method(ev.base, trained(ev, size, no_reg=True, bank=0), "without S_Reg"),
    }
    prompts = {kind: [(p.prompt, p.prompt) for p in ev.tools.people.of_kind(kind, size.prompts)] for kind in KINDS}
    prompts = {kind: found for kind, found in prompts.items() if found}
    gallery = ev.tools.gallery([p for g in groups.values() for p in g])
    rows, rates = [], {}
    for name, method in methods.items():
        wanted = [(f"{name} {s}", method, ev.camera.subjects(g), range(size.seeds)) for s, g in groups.items()]
        wanted += [(f"{name} {k}", method, p, range(size.prompt_seeds)) for k, p in prompts.items()]
        seen = iter(ev.camera.see(f"fig7 {name}", wanted))
        values: dict[str, Any] = {
            f"{s}_mean": id_scores.cluster_bootstrap(scores_of(g, next(seen), gallery)) for s, g in groups.items()}
        for kind in prompts:
            one = next(seen)
            values[f"{kind}_faces"] = share_interval(one.has_face)
            values[f"{kind}_clip"] = mean_interval(one.clip) if len(one.clip) else None
            rates[name, kind] = float(one.has_face.mean())
        rows.append(Row(name, values))
    columns = [Column(f"{s}_mean", f"{SPLITS[s]}: ID-ACC mean") for s in groups]
    columns += [c for k in prompts for c in (Column(f"{k}_faces", f"{KINDS[k]}: with a face"),
                                             Column(f"{k}_clip", f"{KINDS[k]}: CLIP"))]
    claims = {}
    if "nonface" in prompts:
        claims["no-reg"] = {"value": rates["without S_Reg", "nonface"] - rates["no prefix", "nonface"],
                            "n": len(prompts["nonface"]) * size.prompt_seeds}
    figures = [_picture(ev, methods, [p for p, _ in prompts.get("nonface", [])][:SHOWN])] if prompts else []
    training = f"preset {ev.settings.preset}, {size.steps} steps"
    return Table("fig7", "Without regularisation", "paper Fig. 7", columns, rows,
                 ev.conventions(size, groups, training=training,
                                neutral_prompts={k: len(p) * size.prompt_seeds for k, p in prompts.items()}),
                 figures=[f for f in figures if f], extra={"claims": claims})


def _picture(ev: Evaluation, methods: Mapping[str, Method], prompts: list[str]) -> str:
    """The first things under each training at equal seeds; the file's name, "" where there is nothing to show."""
    path = figure_folder(ev.run, ev.settings.name) / FIGURE
    if not prompts or not ev.processes.main:
        return path.name if prompts else ""
    seeds = [Shot(p, p, 0).seed for p in prompts]
    images = np.stack([m.sample(prompts, seeds, steps=ev.settings.steps, guidance=ev.settings.guidance).images
                       for m in methods.values()])
    grid = labelled(images, rows=list(methods))
    write_with(path, lambda temporary: Image.fromarray(grid).save(temporary, "PNG"))
    return path.name


def measure_loss(ev: Evaluation) -> Table:
    """Equation 5 at alpha 1 and 0 against the released code's loss at alpha 1, everything else equal."""
    size = ev.settings.size("loss")
    groups = ev.groups(size)
    gallery = ev.tools.gallery([p for g in groups.values() for p in g])
    methods = {
        "no prefix": base_method(ev.base, "no prefix"),
        "equation 5, alpha 1": prefix_method(ev.base, trained(ev, size, alpha=1.0), "equation 5, alpha 1"),
        "released code's loss, alpha 1": prefix_method(
            ev.base, trained(ev, size, alpha=1.0, loss="released"), "released loss"),
        "equation 5, alpha 0": prefix_method(ev.base, trained(ev, size, alpha=0.0), "equation 5, alpha 0"),
    }
    wanted = [(f"{name} {s}", m, ev.camera.subjects(g), range(size.seeds))
              for name, m in methods.items() for s, g in groups.items()]
    seen = iter(ev.camera.see("loss", wanted))
    scores = {(name, s): scores_of(g, next(seen), gallery) for name in methods for s, g in groups.items()}
    rows, ratios = [], {}
    for name in methods:
        values: dict[str, Any] = {}
        for split in groups:
            own = scores[name, split]
            values[f"{split}_mean"] = id_scores.cluster_bootstrap(own)
            values[f"{split}_max"] = id_scores.cluster_bootstrap(own, id_scores.person_maxima)
            ratio = id_scores.paired_bootstrap(scores["no prefix", split], own).ratio
            ratios[name, split] = ratio
            values[f"{split}_ratio"] = ratio if name != "no prefix" else None
        rows.append(Row(name, values))
    columns = [c for s in groups for c in (Column(f"{s}_mean", f"{SPLITS[s]}: ID-ACC mean"),
                                           Column(f"{s}_max", f"{SPLITS[s]}: max"),
                                           Column(f"{s}_ratio", f"{SPLITS[s]}: of no prefix"))]
    note = ("The released code's gradient is (1 + alpha) times that of alpha = 0, which Adam divides out again: its "
            "row should be alpha 0's, whatever alpha says.")
    return Table("loss", "Equation 5 against the released code's loss", "sec. 3.4; shiliang26/APL train.py at 8e14d91",
                 columns, rows, ev.conventions(size, groups,
                                               training=f"preset {ev.settings.preset}, {size.steps} steps"), [note])

