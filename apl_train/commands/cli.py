"""The `apl` command: one subcommand an activity, help from the dataclasses, plain errors with their way out.

`apl --help` tells the exit codes, which are those of the errors (`help_text.exit_codes`). With --json a command prints
one JSON object on standard output and nothing else.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from apl_train.commands import (
    baselines,
    beyond,
    errors,
    evaluate,
    help_text,
    make,
    miniworld,
    score,
    transfer,
)
from apl_train.training import config as configs

COMMANDS = {
    "demo": "train a prefix on the shipped miniature world, score it and write a report to look at",
    "make": "from a checkpoint to an installed prefix: generate, validate, cache, train, score, install",
    "generate": "pictures to learn from: S_ID of named persons, S_Reg of things and unnamed ones",
    "validate": "everything wrong with a dataset, before any work is done on it",
    "train": "learn a prefix (equations 2-7)",
    "resume": "go on with an interrupted training",
    "sample": "pictures without and with a prefix, at equal seeds",
    "score": "ID-ACC, faces, attributes and drift of a prefix; with --images, of pictures that are there already",
    "blend": "a prefix at another strength, on the line from a null prefix",
    "pseudo": "bind faces of fictional persons to new words, for a training against DreamBooth",
    "evaluate": "the paper's tables and figures, on the miniature world or on real weights",
    "baselines": "rival methods on the miniature world, tuned, on listed and on unseen persons",
    "inspect": "what a prefix file says of itself",
    "convert": "embeddings of other tools to prefix files and back, .ckpt models to .safetensors (alone reads pickles)",
    "miniworld": "rebuild the miniature world, or measure it",
    "claims": "the project's targets: measured, short or not run",
    "transfer": "carry a prefix over to Stable Diffusion XL, from token tables alone",
    "use": "copy a prefix into the folders that hosts read",
    "publish": "write a copy of a prefix with title, author and licence in its metadata",
    "ui": "the same in a page: make, watch, compare and share prefixes",
    "doctor": "what is installed, what is missing, and how to get it",
}


def _parsers(defaults: dict[str, Any]) -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    top = help_text.parser("", "Anonymization Prompt Learning: make, use and measure prefixes that reduce recognisable "
                               "likeness of named persons.")
    sub = top.add_subcommands(required=True, dest="command", metavar="COMMAND")
    parsers = {name: help_text.parser(name, text) for name, text in COMMANDS.items()}
    p = parsers["demo"]
    p.add_argument("--run", type=Path, default=Path("runs/demo"),
                   help="folder of the run; a second demo reuses what is there")
    p.add_argument("--steps", type=int, default=None, help="optimizer steps instead of the preset's")
    p.add_argument("--persons", type=int, default=16, help="unseen persons to score")
    p.add_argument("--seeds", type=int, default=4,
                   help="pictures of each unseen person; at most two of each one learned from")
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the help of TrainConfig's settings
    p = parsers["train"]
    p.add_argument("--preset", type=str, default="fast",
                   help=f"where settings start from: {', '.join(configs.preset_names())}")
    p.add_argument("--run", type=Path, default=Path("runs/train"), help="folder of the run")
    p.add_argument("--dry-run", action="store_true", help="estimate memory, measure one step, and stop")
    p.add_class_arguments(configs.TrainConfig)
    p.set_defaults({k: v for k, v in defaults.items() if k != "config_version"})
    make.add_options(parsers)
    p = parsers["resume"]
    p.add_argument("run", type=Path, help="folder of the run, of `apl train` or of `apl make`")
    p.add_argument("--allow-changed", action="store_true", help="go on although the model or the data changed")
    p = parsers["sample"]
    p.add_argument("--prompt", type=str, nargs="+", required=True, help="one or more prompts")
    p.add_argument("--prefix", type=str, required=True,
                   help="prefix file, or the name of a shipped one; NAME@STEP for a level")
    p.add_argument("--base-model", type=str, default="miniature",
                   help='"miniature", a diffusers folder or a .safetensors file')
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4], help="seeds; every prompt is drawn with each")
    p.add_argument("--steps", type=int, default=20, help="DDIM steps")
    p.add_argument("--guidance", type=float, default=3.0, help="classifier-free guidance")
    p.add_argument("--out", type=Path, default=Path("runs/sample"), help="folder for the pictures")
    beyond.add_options(parsers)
    score.add_options(parsers["score"])
    evaluate.add_options(parsers["evaluate"])
    baselines.add_options(parsers)
    p = parsers["inspect"]
    p.add_argument("file", type=str, help="prefix file or name")
    p = parsers["convert"]
    p.add_argument("file", type=Path,
                   help="an embedding (.pt, .bin, .safetensors), or a .ckpt model to make a .safetensors of")
    p.add_argument("--out", type=Path, required=True, help="file to write")
    p.add_argument("--to", type=str, default=None, help="write for another tool: a1111, diffusers, kohya, forge-flux")
    miniworld.add_options(parsers["miniworld"])
    p = parsers["claims"]
    p.add_argument("--rerun", type=str, default=None, help="measure the claim with this id again")
    p.add_argument("--docs", action="store_true", help="bring the tables of figures in README and docs up to date")
    transfer.add_options(parsers)
    p = parsers["use"]
    p.add_argument("file", type=str, help="prefix file or name; NAME@STEP for a level")
    p.add_argument("--name", type=str, required=True, help="name to choose it by")
    p.add_argument("--into", type=Path, nargs="+", default=[Path("embeddings")], help="folders to copy it into")
    p.add_argument("--replace", action="store_true", help="replace another prefix of that name")
    p = parsers["publish"]
    p.add_argument("file", type=str, help="prefix file or name; NAME@STEP for a level")
    p.add_argument("--out", type=Path, required=True, help="file to write")
    p.add_argument("--title", type=str, required=True, help="what people call it")
    p.add_argument("--author", type=str, default="", help="who made it")
    p.add_argument("--license", type=str, default="", help="licence, such as CC-BY-4.0")
    p.add_argument("--description", type=str, default="", help="a sentence for people")
    p = parsers["ui"]
    p.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs")
    p.add_argument("--checkpoints", type=Path, nargs="*", default=[], help="folders to look for checkpoints in")
    p.add_argument("--embeddings", type=Path, default=None,
                   help='where "use this prefix" copies to; the project\'s embeddings folder by default')
    p.add_argument("--host-embeddings", type=Path, default=None,
                   help='an image program\'s embeddings folder, for "use this prefix"')
    p.add_argument("--address", type=str, default="127.0.0.1", help="where to listen; this machine alone by default")
    p.add_argument("--port", type=int, default=None, help="port; the first free one from 7860 on by default")
    p.add_argument("--python", type=str, default=None, help="interpreter that trains; that of .venv by default")
    p.add_argument("--no-browser", action="store_true", help="do not open a browser")
    p.add_argument("--allow-remote-train", action="store_true",
                   help="let other machines start processes and name folders; set APL_UI_AUTH=user:password with it")
    parsers["doctor"]
    for name, parser in parsers.items():
        parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
        help_text.name_groups(parser)
        sub.add_subcommand(name, parser, help=COMMANDS[name])
    return top, parsers


def _preset_of(argv: list[str]) -> dict[str, Any]:
    """Settings of the preset named on the command line: they are the defaults that other options override."""
    name = "fast"
    for i, word in enumerate(argv):
        if word == "--preset" and i + 1 < len(argv):
            name = argv[i + 1]
        elif word.startswith("--preset="):
            name = word.partition("=")[2]
    return configs.from_dict(configs.preset(name), origin=f"preset {name}").to_dict()


def _tell(args: Namespace, result: dict[str, Any], text: str) -> None:
    if os.environ.get("RANK", "0") != "0":  # of several processes under `accelerate launch` one speaks
        return
    print(json.dumps(result, ensure_ascii=False, indent=2) if args.json else text, flush=True)


def _train_config(args: Namespace) -> configs.TrainConfig:
    names = {f for f in vars(args) if f in configs.TrainConfig.__dataclass_fields__}
    return configs.from_dict({k: getattr(args, k) for k in names}, origin="command line")


def _run_demo(args: Namespace) -> None:
    from apl_train.demo import run_demo

    result, text = run_demo(args.run, steps=args.steps, persons=args.persons, seeds=args.seeds)
    _tell(args, result, text)


def _run_make(args: Namespace) -> None:
    make.make(args, _tell)


def _run_generate(args: Namespace) -> None:
    make.generate(args, _tell)


def _run_validate(args: Namespace) -> int:
    return make.run_validate(args, _tell)


def _run_train(args: Namespace) -> None:
    config = _train_config(args)  # before the imports, which take seconds
    if args.dry_run:
        make.dry_run(args, config, _tell)
        return
    from apl_train.training.command import train

    _done(args, train(args.run, config), args.run)


def _run_resume(args: Namespace) -> None:
    if (args.run / "make.json").exists():
        make.make(Namespace(run=args.run, go_on=True, estimate=False, json=args.json), _tell)
        return
    from apl_train.training.command import resume

    _done(args, resume(args.run, allow_changed=args.allow_changed), args.run)


def _done(args: Namespace, prompt: Any, run: Path) -> None:
    path = run / "prefix" / f"{prompt.meta.title}.safetensors"
    _tell(args, {"prefix": str(path), "content_hash": prompt.content_hash},
          f"prefix: {path}\nscore it:  apl score --prefix {path}\n"
          f"see it:    apl sample --prefix {path} --prompt \"...\"")


def _run_sample(args: Namespace) -> None:
    from apl_train.scoring.compare import write_pairs

    written = write_pairs(args.prompt, args.prefix, args.base_model, args.seeds, steps=args.steps,
                          guidance=args.guidance, out=args.out, strength=args.strength, null=args.null)
    _tell(args, {"files": [str(p) for p in written]}, "\n".join(f"wrote {p}" for p in written))


def _run_blend(args: Namespace) -> None:
    beyond.blend(args, _tell)


def _run_pseudo(args: Namespace) -> None:
    beyond.pseudo(args, _tell)


def _run_score(args: Namespace) -> None:
    score.run(args, _tell)


def _run_evaluate(args: Namespace) -> None:
    evaluate.run(args, _tell)


def _run_baselines(args: Namespace) -> None:
    baselines.baselines(args, _tell)


def _run_inspect(args: Namespace) -> None:
    from apl_core.prefix import load_prefix
    from apl_train.shipped import prefix_file

    path = prefix_file(args.file)
    prompt = load_prefix(path)
    meta = prompt.meta
    rows = {"file": str(path), "title": prompt.name, "family": prompt.family, "num_tokens": prompt.num_tokens,
            "widths": prompt.widths, "content_hash": prompt.content_hash, "alpha": meta.alpha,
            "base_model": meta.base_model, "steps": meta.steps, "level": meta.level, "seed": meta.seed,
            "placement": meta.placement, "date": meta.date, "scores": dict(meta.scores)}
    _tell(args, rows, "\n".join(f"{k:14}{v}" for k, v in rows.items()))


def _run_convert(args: Namespace) -> None:
    from apl_core import convert
    from apl_core.prefix import save_prefix

    if make.is_checkpoint(args.file):
        make.convert_checkpoint(args, _tell)
        return
    prompt = convert.read_foreign(args.file)
    if args.to:
        convert.export(prompt, args.out, args.to)
    else:
        save_prefix(prompt, args.out)
    _tell(args, {"file": str(args.out), "content_hash": prompt.content_hash}, f"wrote {args.out}")


def _run_miniworld(args: Namespace) -> None:
    miniworld.run(args, _tell)


def _run_claims(args: Namespace) -> int:
    from apl_train import claims

    if args.rerun:
        return claims.rerun(args.rerun)
    if args.docs:
        changed = claims.fill_documents()
        _tell(args, {"changed": [str(p) for p in changed]}, "\n".join(f"wrote {p}" for p in changed) or "up to date")
        return 0
    rows = claims.read()
    _tell(args, {"claims": rows}, claims.table(rows))
    return 0


def _run_transfer(args: Namespace) -> None:
    transfer.transfer(args, _tell)


def _run_use(args: Namespace) -> None:
    from apl_core.sharing import use
    from apl_train.shipped import prefix_file

    files = use(prefix_file(args.file), args.into, args.name, replace=args.replace)
    _tell(args, {"files": [str(p) for p in files]}, "\n".join(f"wrote {p}" for p in files))


def _run_publish(args: Namespace) -> None:
    from apl_core.sharing import publish
    from apl_train.shipped import prefix_file

    out = publish(prefix_file(args.file), args.out, title=args.title, author=args.author, license=args.license,
                  description=args.description)
    _tell(args, {"file": str(out)}, f"wrote {out}")


def _run_ui(args: Namespace) -> None:
    from apl_train.ui.alone import run

    run(runs=args.runs, checkpoints=args.checkpoints, embeddings=args.embeddings,
        host_embeddings=args.host_embeddings, address=args.address, port=args.port, python=args.python,
        open_browser=not args.no_browser, allow_remote=args.allow_remote_train,
        tell=lambda where: _tell(args, {"address": where}, f"open {where} in a browser; Ctrl-C ends the page, not "
                                                           "the runs that it started"))


def _run_doctor(args: Namespace) -> None:
    from apl_train.commands.doctor import examine

    found, text = examine()
    _tell(args, found, text)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    for library in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(library, "error")  # notes on optional parts that nothing here uses
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        defaults = _preset_of(argv) if argv[:1] == ["train"] else {}
        top, _ = _parsers(defaults)
        args = top.parse_args(argv)
        chosen = args[args.command]
        return globals()[f"_run_{args.command}"](chosen) or 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        code = errors.told(error)
        if code is None:
            raise
        return code
