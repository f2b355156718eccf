"""The commands ahead of a training: `apl make`, `apl generate`, `apl validate`, and checkpoints for `apl convert`.

Settings to a dataset or to a finished prefix; `cli.py` parses and tells, this file only asks and calls.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from apl_core.errors import ConfigError, DatasetError
from apl_train.make.settings import MakeSettings

Tell = Callable[[Namespace, dict[str, Any], str], None]
MODEL = '"miniature", a .safetensors file, a diffusers folder, or a hub id on this machine'
RECOGNISER = '"miniature", a recogniser.json, an insightface pack such as auraface, or "none"'


def add_options(parsers: dict[str, ArgumentParser]) -> None:
    """The options of this file's commands."""
    p = parsers["make"]
    p.add_argument("--run", type=Path, default=Path("runs/make"), help="folder of the run")
    p.add_argument("--estimate", action="store_true", help="only say what would be done and how long it would take")
    p.add_argument("--go-on", action="store_true", help="go on with the plan of the run folder, whatever it was")
    p.add_class_arguments(MakeSettings)
    p = parsers["generate"]
    p.add_argument("what", choices=["id", "reg"], help="id: pictures of named persons; reg: of things and unnamed ones")
    p.add_argument("--out", type=Path, required=True, help="folder of the set; the same command goes on with it")
    p.add_argument("--base-model", type=str, default="miniature", help=MODEL)
    p.add_argument("--vae", type=str, default=None, help="VAE to use instead of the model's own")
    p.add_argument("--device", type=str, default="auto", help='"auto", "cpu", "cuda", ...')
    p.add_argument("--dtype", type=str, default="fp32", help="fp32, bf16 or fp16")
    p.add_argument("--recogniser", type=str, default="none", help=f"looks for faces: {RECOGNISER}")
    p.add_argument("--people", type=str, default="public",
                   help='CSV of name,split,description; "public" and "miniature" ship. reg: names to keep out')
    p.add_argument("--limit", type=int, default=None, help="id: first so many persons of the split train")
    p.add_argument("--each", type=int, default=4, help="id: pictures of each person")
    p.add_argument("--count", type=int, default=400, help="reg: pictures")
    p.add_argument("--source", type=str, default="prompts",
                   help='reg: "prompts" (drawn from shipped neutral prompts), a CSV of prompt,kind to draw from, a '
                        "folder of pictures with NAME.txt captions, .tar shards, COCO's captions .json, a datasets id")
    p.add_argument("--images", type=Path, default=None, help="reg: folder of COCO's pictures")
    p.add_argument("--size", type=int, default=None, help="reg: edge of pictures from files; the model's by default")
    p.add_argument("--steps", type=int, default=30, help="denoising steps")
    p.add_argument("--guidance", type=float, default=7.5, help="classifier-free guidance")
    p.add_argument("--seed", type=int, default=0, help="seed of all pictures")
    p.add_argument("--describe", type=str, default=None,
                   help='id: draft missing descriptions: "template" (from gender, race, occupation, attributes) or the '
                        "address of an OpenAI-compatible server, which is told the names")
    p.add_argument("--describe-model", type=str, default="", help="id: that server's model; its key is in APL_API_KEY")
    p.add_argument("--accept-descriptions", action="store_true", help="id: do not stop to let drafts be looked over")
    p = parsers["validate"]
    p.add_argument("--s_id", type=str, default=None, help='folder of S_ID, or "miniature"')
    p.add_argument("--s_reg", type=str, default=None, help='folder of S_Reg, or "miniature"')
    p.add_argument("--people", type=str, default=None, help="table of persons: those for testing must not be in S_ID")
    p.add_argument("--num_tokens", type=int, default=10, help="vectors that captions must leave room for")
    p.add_argument("--size", type=int, default=None, help="edge of the model's pictures, such as 512")
    p.add_argument("--recogniser", type=str, default="none", help=f"counts faces in every picture: {RECOGNISER}")


def _say(args: Namespace) -> Callable[[str], None]:
    """Progress in words: on standard output, or beside it where that is for one JSON object."""
    stream = sys.stderr if args.json else sys.stdout
    return lambda text: print(text, file=stream, flush=True)


def make(args: Namespace, tell: Tell) -> None:
    """`apl make`."""
    names = MakeSettings.__dataclass_fields__
    settings = None
    if not args.go_on:
        values = {k: getattr(args, k) for k in names}
        settings = MakeSettings(**values | {"host": tuple(values["host"] or ())})
    from apl_train.make.run import Making

    making = Making(args.run, settings, _say(args))
    if args.estimate:
        tell(args, making.plan(only=True), "")
        return
    tell(args, *making.everything())


def _embedder(name: str) -> Any:
    if name == "none":
        return None
    from apl_core.identity import load_embedder
    from apl_train import shipped

    return load_embedder(shipped.recogniser(name))


def _backend(args: Namespace) -> Any:
    from apl_train import shipped
    from apl_train.model.backend import Backend
    from apl_train.model.precision import chosen
    from apl_train.processes import this_process

    asked = chosen(args.device, args.dtype)
    own = this_process().own_device() if args.device in ("auto", "cuda") else None
    return Backend.load(shipped.locate("base_model", args.base_model), device=own or asked.device, dtype=asked.dtype,
                        vae=args.vae)


def _whole(field: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        raise ConfigError(f"{field} is {value}, not a whole number from {low} to {high}.",
                          f"Set --{field} in that range.", field=field)


def generate(args: Namespace, tell: Tell) -> None:
    """`apl generate`."""
    for field, low, high in (("each", 1, 1000), ("count", 2, 1_000_000), ("steps", 1, 1000), ("limit", 1, 1_000_000),
                             ("size", 8, 4096), ("seed", 0, 2**31 - 1)):
        _whole(field, getattr(args, field), low, high)
    tell(args, *(_generate_id(args) if args.what == "id" else _generate_reg(args)))


def _drawn(args: Namespace, wanted: list[Any], what: str) -> tuple[dict[str, Any], str]:
    from tqdm import tqdm

    from apl_train.datasets.generate import Drawing, Studio, report
    from apl_train.processes import this_process
    from apl_train.training.command import ctrl_c

    embedder, backend = _embedder(args.recogniser), _backend(args)
    how = Drawing(args.steps, args.guidance, args.seed, batch=16 if backend.size <= 128 else 4)
    quiet = not this_process().main
    with tqdm(total=len(wanted), desc="draw", unit="picture", dynamic_ncols=True, disable=quiet) as bar, \
            ctrl_c() as asked:
        outcome = Studio(backend, args.out, how, embedder=embedder, stop=asked.is_set,
                         progress=lambda done, _total: bar.update(done - bar.n)).fill(wanted)
    found = report(outcome, args.out)
    sheets = ", ".join(found["contact_sheets"])
    return found, f"{outcome.text(what)}\nlook at them: {sheets}\nthen: apl validate --s_{args.what} {args.out}"


def _generate_id(args: Namespace) -> tuple[dict[str, Any], str]:
    from apl_train.datasets.cast import read_cast, table_of
    from apl_train.datasets.generate import wanted_of_cast

    people = read_cast(table_of(args.people), descriptions=not args.describe)
    if args.describe:
        people = _described(args, people)
    return _drawn(args, wanted_of_cast([p for p in people if p.split == "train"][: args.limit], args.each), "S_ID")


def _described(args: Namespace, people: list[Any]) -> list[Any]:
    """The persons with drafted descriptions, once somebody looked them over."""
    from apl_train.datasets.cast import read_cast
    from apl_train.datasets.describe import Endpoint, draft
    from apl_train.processes import this_process

    drafts = args.out / "descriptions.csv"
    seen = drafts.exists() and all(p.description for p in read_cast(drafts, descriptions=False))
    endpoint = None if args.describe == "template" else Endpoint(args.describe, args.describe_model)
    found = this_process().once(lambda: draft(people, endpoint, drafts))  # of several processes one asks
    if not seen and not args.accept_descriptions:
        drafted = sum(not p.description for p in people)
        raise DatasetError(f"{drafted} descriptions were drafted; nothing was drawn yet.",
                           f"Look them over in {drafts}, change what is wrong, and run the same command again.",
                           field="description")
    read_cast(drafts)  # what a person changed is checked as any table is
    return found


def _generate_reg(args: Namespace) -> tuple[dict[str, Any], str]:
    from apl_train.datasets.cast import neutral_prompts, read_cast, table_of
    from apl_train.datasets.generate import wanted_of_prompts
    from apl_train.datasets.neutral_sources import build, prompts_of, source_of
    from apl_train.processes import this_process

    if args.source == "prompts" or args.source.endswith(".csv"):
        world = "miniature" if args.people == "miniature" else "public"
        lines = neutral_prompts("train", world) if args.source == "prompts" else prompts_of(Path(args.source))
        return _drawn(args, wanted_of_prompts(lines, args.count), "S_Reg")
    pairs = source_of(args.source, args.images)
    names = [p.name for p in read_cast(table_of(args.people), descriptions=False)]
    size = args.size or _native_size(args)
    found = this_process().once(lambda: build(pairs, args.out, count=args.count, size=size, names=names,
                                              embedder=_embedder(args.recogniser)))
    values = {"folder": str(args.out), "faces": found.faces, "nonfaces": found.nonfaces, "left_out": found.left_out}
    return values, f"{found.text()}\nlook at them: {args.out / 'contact-sheet-1.jpg'}"


def _native_size(args: Namespace) -> int:
    from apl_train import shipped
    from apl_train.model.files import read_parts

    parts = read_parts(shipped.locate("base_model", args.base_model), meta=True)
    return int(parts.unet.config.sample_size) * 2 ** (len(parts.vae.config.block_out_channels) - 1)


def run_validate(args: Namespace, tell: Tell) -> int:
    """`apl validate`; 5 where something is wrong."""
    if not args.s_id and not args.s_reg:
        raise ConfigError("There is no set to look at.", "Give --s_id FOLDER, --s_reg FOLDER, or both.", field="s_id")
    _whole("num_tokens", args.num_tokens, 1, 64)
    _whole("size", args.size, 8, 4096)
    from apl_train import shipped
    from apl_train.datasets.cast import table_of
    from apl_train.datasets.validate import validate
    from apl_train.model.files import TOKENIZER, read_tokenizer

    tokenizer = read_tokenizer(TOKENIZER)
    verdict = validate(
        shipped.locate("s_id", args.s_id) if args.s_id else None,
        shipped.locate("s_reg", args.s_reg) if args.s_reg else None, num_tokens=args.num_tokens, size=args.size,
        tokenize=lambda text: tokenizer(text, add_special_tokens=False, verbose=False).input_ids,
        embedder=_embedder(args.recogniser), people=table_of(args.people) if args.people else None)
    tell(args, verdict.to_dict(), verdict.text())
    return DatasetError.exit_code if verdict.errors else 0


def is_checkpoint(path: Path) -> bool:
    """Whether `apl convert` is given a whole model: by its ending, or too large for an embedding."""
    return path.suffix.lower() == ".ckpt" or (path.is_file() and path.stat().st_size > 100 * 2**20)


def convert_checkpoint(args: Namespace, tell: Tell) -> None:
    """`apl convert model.ckpt --out model.safetensors`: what it holds is told before anything is written."""
    from apl_core.atomic import write_safetensors
    from apl_core.convert import read_checkpoint
    from apl_train.model.base_model import kind_of, standard_name

    if args.out.suffix != ".safetensors":
        raise ConfigError(f"out is {str(args.out)!r}, which does not end in .safetensors.",
                          f"Name it {args.out.stem}.safetensors.", field="out")
    tensors = {standard_name(k): v for k, v in read_checkpoint(args.file).items() if not k.startswith("model_ema.")}
    kind = kind_of({k: tuple(v.shape) for k, v in tensors.items()}, {}, args.file.name)
    write_safetensors(args.out, {k: v.clone() for k, v in tensors.items()})
    tell(args, {"file": str(args.out), "prediction": kind.prediction, "vae": kind.has_vae}, f"wrote {args.out}")


def dry_run(args: Namespace, config: Any, tell: Tell) -> None:
    """`apl train --dry-run`: the memory by shapes, then one step measured."""
    from apl_train import shipped
    from apl_train.make.plan import words
    from apl_train.model.backend import Backend
    from apl_train.training import preflight
    from apl_train.training.memory import estimate

    source = shipped.locate("base_model", config.base_model)
    expected = estimate(source, config)
    _say(args)(expected.text())
    found = preflight.dry_run(Backend.for_settings(source, config), config)
    peak = "" if found.peak_bytes is None else f", {found.peak_bytes / 2**30:.2f} GiB at most"
    tell(args, {"memory": expected.to_dict(), "measured": found.to_dict()},
         f"measured: {found.step_seconds:.2f} s a step{peak}; {config.steps} steps take about "
         f"{words(config.steps * found.step_seconds)}")
