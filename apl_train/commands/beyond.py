"""`apl blend` and `apl pseudo`: a prefix at another strength, and faces of nobody bound to words.

`cli.py` parses and tells, this file only asks and calls.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from apl_core.errors import ConfigError

Tell = Callable[[Namespace, dict[str, Any], str], None]


def add_options(parsers: dict[str, ArgumentParser]) -> None:
    """The options of these commands, and `apl sample`'s for strength."""
    p = parsers["sample"]
    p.add_argument("--strength", type=float, default=None, help="0 changes nothing, 1 is the prefix; needs --null")
    p.add_argument("--null", type=str, default=None, help="null prefix of the same model (preset null)")
    p = parsers["blend"]
    p.add_argument("file", type=str, help="prefix file or name")
    p.add_argument("--null", type=str, required=True, help="null prefix of the same model (preset null)")
    p.add_argument("--strength", type=float, required=True, help="0 is the null prefix, 1 the prefix; up to 2")
    p.add_argument("--out", type=Path, required=True, help="prefix file to write")
    p = parsers["pseudo"]
    p.add_argument("--out", type=Path, required=True, help="folder to write; `apl train --pseudo` takes it")
    p.add_argument("--base-model", type=str, default="miniature",
                   help='"miniature", a .safetensors file, a diffusers folder, or a hub id on this machine')
    p.add_argument("--faces", type=str, default="miniature",
                   help="set of faces: an S_Reg folder, each unnamed face being one; or one of fictional or consenting "
                        "persons as S_ID")
    p.add_argument("--count", type=int, default=16, help="identities")
    p.add_argument("--vectors", type=int, default=2, help="vectors of each word")
    p.add_argument("--steps", type=int, default=100, help="steps of textual inversion, for all of them together")
    p.add_argument("--batch-size", type=int, default=8, help="samples a step")
    p.add_argument("--learning-rate", type=float, default=5e-3, help="Adam's learning rate")
    p.add_argument("--seed", type=int, default=0, help="seed of start and sampling")


def blend(args: Namespace, tell: Tell) -> None:
    """`apl blend`."""
    from apl_core import strength
    from apl_core.prefix import load_prefix, save_prefix
    from apl_train.shipped import prefix_file

    made = strength.blend(load_prefix(prefix_file(args.null)), load_prefix(prefix_file(args.file)), args.strength)
    save_prefix(made, args.out)
    tell(args, {"file": str(args.out), "content_hash": made.content_hash}, f"wrote {args.out}")


def pseudo(args: Namespace, tell: Tell) -> None:
    """`apl pseudo`."""
    if not 1 <= args.count <= 10_000:
        raise ConfigError(f"count is {args.count}, not a whole number from 1 to 10000.", "Set --count in that range.",
                          field="count")
    from tqdm import tqdm

    from apl_train import shipped
    from apl_train.datasets.dataset import problems, read_dataset
    from apl_train.model.backend import Backend
    from apl_train.model.precision import chosen
    from apl_train.training.pseudo_identity import Inversion, make_pseudo

    settings = Inversion(args.vectors, args.steps, args.batch_size, args.learning_rate, seed=args.seed)
    folder = shipped.locate("s_reg", args.faces)
    expect = "id" if not problems(folder, "id", check_images=False) else "reg"
    faces = read_dataset(folder, expect=expect)
    backend = Backend.load(shipped.locate("base_model", args.base_model), device=chosen().device)
    with tqdm(total=args.steps, desc="inversion", unit="step") as bar:
        words = make_pseudo(backend, faces, args.out, count=args.count, settings=settings,
                            progress=lambda done, _total: bar.update(done - bar.n))
    tell(args, {"folder": str(args.out), "words": len(words)},
         f"wrote {args.out}: {len(words)} identities\nlearn with them:  apl train --pseudo {args.out} --run RUN")
