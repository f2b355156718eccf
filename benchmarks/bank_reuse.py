"""Does a prefix over-fit a bank of stored targets? `python benchmarks/bank_reuse.py` trains with and without one.

Both trainings of the miniature have the settings of the preset `fast` but for their steps. The bank is so small that
each of its tuples is drawn as often as in the preset sd15-fast. Judged on fresh tuples that neither has seen: other
pictures' noise, other timesteps.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from apl_train import shipped
from apl_train.model.backend import Backend
from apl_train.training import config
from apl_train.training.bank import FreshTargets
from apl_train.training.command import load_training_set
from apl_train.training.losses import id_loss, reg_loss
from apl_train.training.samples import TrainingSet
from apl_train.training.trainer import Trainer

JUDGE_SEED = 10_007


@torch.no_grad()
def judged(backend: Backend, data: TrainingSet, trainer: Trainer, tuples: int) -> dict[str, float]:
    """Mean L_ID and L_Reg on fresh tuples from a seed that no training uses."""
    judge = config.from_dict({**trainer.config.to_dict(), "seed": JUDGE_SEED, "bank": 0, "batch_size": 32})
    targets, rows = FreshTargets(backend, data, judge), {"L_ID": [], "L_Reg": []}
    for step in range(tuples // 32):
        b = targets.batch(step)
        eps = backend.predict(b.x_t, b.t, backend.encode([data.c1[r] for r in b.rows.tolist()], trainer.vectors,
                                                         overflow="trim"))
        n = b.n_id
        rows["L_ID"].append(id_loss(eps[:n], b.eps_c1[:n], b.eps_c2[:n], judge.alpha))
        rows["L_Reg"].append(reg_loss(eps[n:], b.eps_c1[n:]))
    return {name: float(torch.cat(values).mean()) for name, values in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tuples", type=int, default=256, help="fresh tuples to judge by")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    model_preset = config.from_dict(config.preset("sd15-fast"))
    draws = model_preset.steps * model_preset.batch_size / model_preset.bank if model_preset.bank else 10
    values = config.preset("fast") | {"steps": args.steps}
    size = round(args.steps * values["batch_size"] / draws)
    backend = Backend.load(shipped.locate("base_model", "miniature"))
    data = load_training_set(backend, config.from_dict(values), args.cache)
    out = sys.stdout.write
    out(f"{args.steps} steps of {values['batch_size']}; a bank of {size} tuples, each drawn {draws:.1f} times\n")
    for name, bank in (("before training", None), ("fresh targets", 0), ("bank", size)):
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(backend, data, config.from_dict(values | {"bank": bank or 0}), Path(folder),
                              cache=args.cache)
            if bank is not None:
                for _ in range(args.steps):
                    trainer.one_step()
            found = judged(backend, data, trainer, args.tuples)
        out(f"{name:18}" + "".join(f"{key} {value:.6f}  " for key, value in found.items()) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
