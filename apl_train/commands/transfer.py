"""`apl transfer`: a prefix, or all levels of one, from one model family to another.

`cli.py` parses and tells, this file only asks and calls; `apl_core.transfer` does the work.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from apl_core.errors import ConfigError, DatasetError

Tell = Callable[[Namespace, dict[str, Any], str], None]
_COLUMNS = ("caption", "prompt", "text")


def add_options(parsers: dict[str, ArgumentParser]) -> None:
    """The options of this command."""
    p = parsers["transfer"]
    p.add_argument("--prefix", type=str, required=True,
                   help="prefix file, or the name of a shipped one; NAME@STEP for a level")
    p.add_argument("--from", type=str, default="miniature", dest="source",
                   help='model that it was learned on: "miniature", a .safetensors file, a diffusers folder, a hub id '
                        "on this machine, or a text encoder's own file")
    p.add_argument("--to", type=str, nargs="+", required=True,
                   help='Stable Diffusion XL model, as for --from ("miniature-sdxl" ships); or two text encoders\' '
                        "files, CLIP-L first")
    p.add_argument("--out", type=Path, required=True, help="prefix file to write")
    p.add_argument("--levels", action="store_true", help="the saved levels beside it too, as OUT.step-N.safetensors")
    p.add_argument("--method", type=str, default="auto",
                   help="auto (by held-out tokens), ridge, half, ptfer, procrustes, none")
    p.add_argument("--centre", type=str, default="auto", choices=["auto", "yes", "no"],
                   help="take the tables' means off first")
    p.add_argument("--rho", type=float, default=None, help="damping, relative; chosen by held-out tokens without it")
    p.add_argument("--topk", type=int, default=None,
                   help="ptfer: entries of a relative code that count, 0 for all; by held-out tokens without it")
    p.add_argument("--captions", type=str, default=None,
                   help='captions that tell which tokens were learned: "miniature", a text file of one a line, or a '
                        "CSV with a column caption, prompt or text. Without them every token counts alike")
    p.add_argument("--clip-norms", action="store_true",
                   help="shorten vectors longer than 999 of 1000 of the target's tokens")
    p.add_argument("--refine", type=int, default=0,
                   help="steps that then bring the second text encoder's states nearer to what the prefix did to the "
                        "first's; needs --captions and whole models, and takes minutes or a GPU")


def captions_of(name: str) -> list[str]:
    """The captions of a setting.

    Raises:
        DatasetError: the file cannot be read, holds none, or is a CSV without a known column.
    """
    from apl_train import shipped

    path = shipped.locate("captions", name)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"captions: cannot read {path}: {error}.", "Give a text file of one caption a line.",
                           field="captions") from error
    if path.suffix.lower() == ".csv":
        rows = csv.DictReader(text.splitlines())
        column = next((name for name in _COLUMNS if name in (rows.fieldnames or ())), None)
        if column is None:
            raise DatasetError(f"captions: {path.name} has columns {', '.join(rows.fieldnames or ()) or 'none'}.",
                               f"One must be called {', '.join(_COLUMNS)}.", field="captions")
        lines = [row[column] or "" for row in rows]
    else:
        lines = text.splitlines()
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise DatasetError(f"captions: {path.name} holds no caption.", "Give one a line.", field="captions")
    return found


def _located(name: str) -> Path:
    from apl_train import shipped
    from apl_train.model.files import find_model

    return find_model(shipped.locate("base_model", name))


def _targets(names: list[str]) -> dict[str, Any]:
    from apl_core.token_tables import read_table, read_tables

    if len(names) == 1:
        return read_tables(_located(names[0]))
    if len(names) != 2:
        raise ConfigError(f"to names {len(names)} files.", "Name one model, or CLIP-L's file and CLIP-G's.", field="to")
    return {key: read_table(_located(name)) for key, name in zip(("clip_l", "clip_g"), names, strict=True)}


def _levels(file: Path) -> dict[int, Path]:
    """The saved levels beside a prefix file, by their steps."""
    found = {}
    for path in sorted(file.parent.glob(f"{file.stem}.step-*.safetensors")):
        step = path.stem.rpartition(".step-")[2]
        if step.isdigit():
            found[int(step)] = path
    return found


def transfer(args: Namespace, tell: Tell) -> None:
    """`apl transfer`."""
    if args.out.suffix != ".safetensors":
        raise ConfigError(f"out is {str(args.out)!r}, which does not end in .safetensors.",
                          f"Name it {args.out.stem}.safetensors.", field="out")
    if args.refine and not args.captions and args.source != "miniature":
        raise ConfigError("refine needs captions.", "Give --captions FILE.", field="captions")
    if args.refine and len(args.to) != 1:
        raise ConfigError("refine needs a whole model, not text encoders' files.", "Name one model with --to.",
                          field="to")
    from apl_core.prefix import load_prefix, save_prefix
    from apl_core.token_tables import read_table
    from apl_core.transfer import Mapper, TransferSettings, caption_weights, source_vectors
    from apl_train.model.files import TOKENIZER, read_tokenizer
    from apl_train.shipped import prefix_file

    file = prefix_file(args.prefix)
    prefix, source = load_prefix(file), read_table(_located(args.source))
    source_vectors(prefix, source)
    tokenizer = read_tokenizer(TOKENIZER)
    name = args.captions or ("miniature" if args.source == "miniature" else None)
    captions = captions_of(name) if name else []
    weights = None
    if captions:
        weights = caption_weights(tokenizer(captions, add_special_tokens=False, verbose=False).input_ids,
                                  source.vocabulary)
    settings = TransferSettings(args.method, {"auto": None, "yes": True, "no": False}[args.centre], args.rho, weights,
                                args.topk, clip_norms=args.clip_norms)
    mapper = Mapper(source, _targets(args.to), settings)
    wanted = {args.out: prefix}
    if args.levels:
        wanted |= {args.out.with_name(f"{args.out.stem}.step-{step}.safetensors"): load_prefix(path)
                   for step, path in _levels(file).items()}
    found = {out: mapper.carry(each) for out, each in wanted.items()}
    made = {out: each.prefix for out, each in found.items()}
    notes = []
    if args.refine:
        from apl_train.refine_transfer import refine_all

        made, notes = refine_all(_located(args.to[0]), made, captions, args.refine)
    for out, each in made.items():
        save_prefix(each, out)
    report = found[args.out].report

    def word(token: int) -> str:
        return str(tokenizer.convert_ids_to_tokens(token)).replace("</w>", "")

    tell(args, {"files": {str(out): each.content_hash for out, each in made.items()}, "captions": len(captions),
                **report.to_dict(), "refined": notes},
         "\n".join([report.text(word), *(note["text"] for note in notes), *(f"wrote {out}" for out in made)]))
