"""Samples until unseen persons are a fifth as recognisable: `python benchmarks/samples_to_target.py`

Trains the miniature with the preset `fast` at the paper's own batch of 1 and rate of 1e-3 (its batches of 8 save time,
not samples), measures ID-ACC on S_test at every level, and notes after how many samples it first falls to the target, a
share of the base model's. The target lies below what the words that it starts from do untrained. Then the paper's plain
setting (preset `paper`: random words to start from) is trained for as long as it takes, at most `--most` times as many
samples. Ten minutes to an hour on two cores; begun trainings are resumed. --quick takes minutes: fewer persons, and
levels of the plain setting only up to what decides the claim, five times as many samples. With APL_RECORD_CLAIMS=1 the
ratio becomes a row of benchmarks/claims.json; where the plain setting never gets there, it is an upper bound.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch import Tensor

from apl_core.identity import load_embedder
from apl_core.prefix import load_prefix
from apl_train import claims, shipped
from apl_train.model.backend import Backend
from apl_train.scoring.evaluate import evaluate
from apl_train.scoring.persons import read_evaluation_set
from apl_train.training import config
from apl_train.training.command import resume, train
from apl_train.training.trainer import initial_vectors


class Judge:
    """ID-ACC of a prefix file over the base model's, on persons that no training sees."""

    def __init__(self, backend: Backend, persons: int, seeds: int, cache: Path) -> None:
        self._backend, self._persons, self._seeds, self._cache = backend, persons, seeds, cache
        self._people = dataclasses.replace(
            read_evaluation_set(shipped.locate("persons", shipped.MINIATURE)), neutral=())
        self._embedder = load_embedder(shipped.recogniser(shipped.MINIATURE))

    def ratio(self, prefix: Path | dict[str, Tensor]) -> float:
        """Of a prefix file, or of vectors: key to [m, width]."""
        prompt = load_prefix(prefix) if isinstance(prefix, Path) else prefix
        found = evaluate(self._backend, prompt, self._people, self._embedder, splits=("test",),
                         conditions=("off", "on"), persons_limit=self._persons, seeds=self._seeds, cache=self._cache)
        rows = found["persons"]["test"]
        return rows["on"]["id_acc_mean"] / rows["off"]["id_acc_mean"]


def trained(run: Path, settings: config.TrainConfig, backend: Backend, cache: Path) -> dict[int, Path]:
    """Step -> prefix file of a training, begun or resumed here unless it is done."""
    if not (run / "prefix" / f"{settings.name}.safetensors").exists():
        if (run / "config.yaml").exists():
            resume(run, backend=backend, cache=cache)
        else:
            train(run, settings, backend=backend, cache=cache)
    files = {int(p.stem.rpartition("-")[2]): p for p in (run / "prefix").glob(f"{settings.name}.step-*.safetensors")}
    return files | {settings.steps: run / "prefix" / f"{settings.name}.safetensors"}


def first_below(files: dict[int, Path], judge: Judge, target: float, batch: int, label: str) -> int | None:
    """Samples at the first level whose ratio is at most the target; None where there is none."""
    for step, file in sorted(files.items()):
        ratio = judge.ratio(file)
        sys.stdout.write(f"{label}: {step * batch:6} samples  ID-ACC / base's {ratio:.3f}\n")
        sys.stdout.flush()
        if ratio <= target:
            return step * batch
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/samples-to-target"))
    parser.add_argument("--quick", action="store_true", help="minutes instead of an hour")
    parser.add_argument("--target", type=float, default=None,
                        help="ID-ACC on S_test over the base model's; 0.2, the bound of the shipped prefix")
    parser.add_argument("--most", type=int, default=None,
                        help="times as many samples for the plain setting, at most; 20, quick 5")
    parser.add_argument("--persons", type=int, default=None, help="of S_test; 32, quick 12")
    parser.add_argument("--seeds", type=int, default=None, help="pictures of each; 2, quick 1")
    args = parser.parse_args()
    for field, long, quick in (("target", 0.2, 0.2), ("most", 20, 5), ("persons", 32, 12), ("seeds", 2, 1)):
        if getattr(args, field) is None:
            setattr(args, field, quick if args.quick else long)
    bank = {"bank": 1024} if args.quick else {}
    # levels lie close: it starts near the target
    shorter = bank | {"batch_size": 1, "warmup": 0, "learning_rate": config.preset("paper")["learning_rate"],
                      "steps": 64 if args.quick else 400, "levels_every": 5}
    cache = args.run.parent / "cache"
    backend = Backend.load(shipped.locate("base_model", shipped.MINIATURE))
    judge = Judge(backend, args.persons, args.seeds, cache)

    def settings(name: str, **changes: Any) -> config.TrainConfig:
        return config.from_dict(config.preset(name) | {"name": name, "base_model": shipped.MINIATURE} | changes)

    fast = settings("fast", **shorter)
    run = args.run / ("fast-quick" if args.quick else "fast")
    start = judge.ratio(initial_vectors(backend, fast))
    sys.stdout.write(f"untrained, {fast.init_text!r}: {start:.3f}\n")
    if start <= args.target:
        sys.stdout.write(f"the words alone are below the target {args.target:g}: take a lower --target\n")
        sys.exit(9)
    ours = first_below(trained(run, fast, backend, cache), judge, args.target, fast.batch_size, "fast")
    if ours is None:
        sys.stdout.write("the preset fast does not reach the target: nothing to compare\n")
        sys.exit(9)
    limit = args.most * ours
    plain = settings("paper", steps=limit, levels_every=max(1, limit // (5 if args.quick else 20)), save_every=200,
                     **bank)
    theirs = first_below(trained(args.run / f"plain-{limit}", plain, backend, cache), judge, args.target, 1, "plain")
    ratio = ours / (theirs or limit)
    sys.stdout.write(f"fast {ours}, plain {theirs or f'more than {limit}'}: ratio "
                     f"{'' if theirs else 'below '}{ratio:.3f}\n")
    if os.environ.get("APL_RECORD_CLAIMS"):
        claims.record({"samples-to-target": (ratio, None, args.persons)})


if __name__ == "__main__":
    main()
