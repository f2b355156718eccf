"""Seconds a sample of others' own training loops, run from their checkouts on the miniature, beside ours.

    python benchmarks/published_loops.py --diffusers FOLDER --apl FOLDER

FOLDER is a checkout of https://github.com/huggingface/diffusers, or of https://github.com/shiliang26/APL; neither is
downloaded here, and a loop whose checkout is missing is skipped, visibly. diffusers' examples/textual_inversion runs as
it is, on the miniature as a diffusers folder, twice with different numbers of steps: the difference is what steps cost.
The paper's train.py needs files that its repository lacks (people, templates, pictures): where it cannot be imported,
it is said why, and its schedule is *emulated* (other_ways.py). CPU seconds of one thread. With APL_RECORD_CLAIMS=1 the
ratio to diffusers' loop becomes a row of benchmarks/claims.json.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import os
import resource
import runpy
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from apl_train import claims, shipped

BATCH, SHORT, LONG = 8, 2, 10
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def diffusers_folder(out: Path) -> Path:
    """The miniature in diffusers' layout."""
    from diffusers import DDPMScheduler

    from apl_train.model.files import read_parts

    parts = read_parts(shipped.locate("base_model", shipped.MINIATURE))
    for name in ("unet", "vae", "text_encoder", "tokenizer"):
        getattr(parts, name).save_pretrained(out / name)
    DDPMScheduler.from_config(parts.schedule).save_pretrained(out / "scheduler")  # DDIM's own settings fall away
    return out


def pictures(out: Path) -> Path:
    """Eight pictures of S_ID as PNG files."""
    from PIL import Image

    from apl_train.datasets.dataset import read_dataset

    out.mkdir(parents=True)
    for i, picture in enumerate(read_dataset(shipped.locate("s_id", shipped.MINIATURE), expect="id").images(range(8))):
        Image.fromarray(picture).save(out / f"{i}.png")
    return out


def run_as_it_is(script: str, arguments: list[str]) -> None:
    """The script as its own program. Where torchvision is missing, its random flip is stood in for: no part of a step's
    cost."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        from PIL import ImageOps

        class RandomHorizontalFlip:
            def __init__(self, p: float = 0.5) -> None:
                self.p = p

            def __call__(self, picture: Any) -> Any:
                import random

                return ImageOps.mirror(picture) if random.random() < self.p else picture

        module = types.ModuleType("torchvision")
        module.transforms = types.ModuleType("torchvision.transforms")
        module.transforms.RandomHorizontalFlip = RandomHorizontalFlip
        module.__spec__ = importlib.machinery.ModuleSpec("torchvision", None)
        # these look for the real one as they are imported, and remember that there is none
        from diffusers import StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
        from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

        sys.modules |= {"torchvision": module, "torchvision.transforms": module.transforms}
    import torch

    torch.set_num_threads(1)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def cpu_seconds(arguments: list[str]) -> float:
    """CPU seconds of a process of this file. Raises CalledProcessError, with what it said on stderr."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True,
                   env={**os.environ, **ONE_THREAD, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def inversion_seconds(script: Path, work: Path) -> float:
    """CPU seconds a sample of diffusers' loop: the difference of a long and a short run."""
    model, data = diffusers_folder(work / "model"), pictures(work / "pictures")

    def run(steps: int) -> float:
        return cpu_seconds(["--inside", str(script), "--", "--pretrained_model_name_or_path", str(model),
                            "--train_data_dir", str(data), "--placeholder_token", "<benchmark>", "--initializer_token",
                            "person", "--num_vectors", "10", "--resolution", "128", "--train_batch_size", str(BATCH),
                            "--max_train_steps", str(steps), "--save_steps", "1000000", "--checkpointing_steps",
                            "1000000", "--learning_rate", "5e-4", "--repeats", "100", "--output_dir",
                            str(work / f"out-{steps}")])

    run(SHORT)  # compiles what is compiled once
    return (run(LONG) - run(SHORT)) / ((LONG - SHORT) * BATCH)


def our_seconds(work: Path, steps: int = 8) -> float:
    """CPU seconds a sample of the preset `fast`, with its part of what is computed once."""
    from step_cost import Ours

    ours = Ours(work)
    ours.trainer.one_step()
    began = time.process_time()
    for _ in range(steps):
        ours.trainer.one_step()
    return (time.process_time() - began) / (steps * ours.config.batch_size) + ours.once


def why_not(checkout: Path) -> str:
    """What keeps the paper's train.py from being imported; "" when nothing does."""
    done = subprocess.run([sys.executable, "-c", "import train"], cwd=checkout, capture_output=True, text=True,
                          check=False, env={**os.environ, **ONE_THREAD, "PYTHONPATH": str(checkout)})
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it failed"])[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers", type=Path, default=os.environ.get("APL_DIFFUSERS_CHECKOUT"),
                        help="checkout of diffusers (or the variable APL_DIFFUSERS_CHECKOUT)")
    parser.add_argument("--apl", type=Path, default=os.environ.get("APL_PAPER_CHECKOUT"),
                        help="checkout of the paper's code (or the variable APL_PAPER_CHECKOUT)")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        run_as_it_is(args.inside, args.rest)
        return 0
    out = sys.stdout.write
    script = Path(args.diffusers or "") / "examples" / "textual_inversion" / "textual_inversion.py"
    if not args.diffusers or not script.is_file():
        out(f"skipped: no {script.relative_to(args.diffusers) if args.diffusers else script} "
            "(--diffusers names a checkout); its schedule is emulated by step_cost.py\n")
    else:
        with tempfile.TemporaryDirectory() as name:
            work = Path(name)
            (work / "ours").mkdir()
            try:
                theirs = inversion_seconds(script, work)
            except subprocess.CalledProcessError as error:
                out(f"diffusers' loop failed: {(error.stderr or '').strip().splitlines()[-1:]}\n")
                return 1
            ours = our_seconds(work / "ours")
        out(f"diffusers' textual_inversion.py, batch {BATCH}: {1000 * theirs:.1f} ms a sample; preset fast: "
            f"{1000 * ours:.1f}; ratio {ours / theirs:.3f}\n")
        if os.environ.get("APL_RECORD_CLAIMS"):
            claims.record({"loop-inversion": (ours / theirs, None, (LONG - SHORT) * BATCH)})
    if not args.apl or not (Path(args.apl) / "train.py").is_file():
        out("skipped: no checkout of the paper's code (--apl); its schedule is emulated by step_cost.py\n")
    else:
        reason = why_not(Path(args.apl))
        out(f"the paper's train.py cannot run as it is ({reason}); its schedule is emulated by step_cost.py\n"
            if reason else "the paper's train.py can be imported here, but wants a GPU: emulated by step_cost.py\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
