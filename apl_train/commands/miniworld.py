"""`apl miniworld`: build the miniature world, measure it, its prefix, and what the prefix does on other models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

MODELS = ("relatives", "transfer")


def add_options(p: ArgumentParser) -> None:
    """The options of `apl miniworld`."""
    p.add_argument("action", choices=["build", "card", "prefix", "figures", "carry"],
                   help="build: from packages; card: measure the world; prefix: measure the shipped prefix; "
                        "figures: sweeps; carry: the prefix on other models")
    p.add_argument("--work", type=Path, default=Path("runs/miniworld"), help="work folder of the build")
    p.add_argument("--until", type=str, default="family", help="last stage of a build")
    p.add_argument("--compiled", action="store_true", help="build: UNet through torch.compile (needs a C++ compiler)")
    p.add_argument("--final", action="store_true", help="prefix: also on the persons kept out of every decision")
    p.add_argument("--only", type=str, nargs="+", default=list(MODELS), choices=list(MODELS),
                   help="carry: relatives of the miniature, or the miniature SDXL by transfer")


def run(args: Namespace, tell: Callable[[Namespace, dict[str, Any], str], None]) -> None:
    """Does one action and tells what was found."""
    if args.action == "build":
        from apl_train.miniworld.build import Build
        from apl_train.miniworld.stages import run_stages

        run_stages(Build(args.work, compiled=args.compiled), args.until)
        tell(args, {"work": str(args.work)}, "built")
    elif args.action == "card":
        from apl_train.miniworld.card import write_card

        tell(args, *write_card())
    elif args.action == "prefix":
        from apl_train.miniworld.card import write_prefix_scores

        tell(args, *write_prefix_scores(final=args.final))
    elif args.action == "carry":
        from apl_train.miniworld.carried import write_carried

        tell(args, *write_carried(only=args.only))
    else:
        from apl_train.miniworld.figures import write_figures

        tell(args, {"files": [str(p) for p in write_figures()]}, "wrote the figures of docs/miniworld.md")
