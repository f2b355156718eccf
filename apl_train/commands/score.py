"""`apl score`: a prefix, by pictures that are made for it; or, with --images, pictures that are there already."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from apl_core.errors import ConfigError
from apl_core.id_check import CHOICES
from apl_core.recognisers import choices_text

Tell = Callable[[Namespace, dict[str, Any], str], None]
SCORES = Path("runs/score/scores.json")
RECOGNISER = f'"miniature", "miniature2", a recogniser.json, or by name: {choices_text()}; a missing one says how to ' \
             "get it"


def add_options(p: ArgumentParser) -> None:
    """The options of `apl score`."""
    p.add_argument("--prefix", type=str, default=None,
                   help="prefix file or name; without one the model alone is scored")
    p.add_argument("--base-model", type=str, default="miniature",
                   help='"miniature", a diffusers folder or a .safetensors file')
    p.add_argument("--persons", type=str, default="miniature",
                   help="folder with people.csv, references and neutral.csv")
    p.add_argument("--recogniser", type=str, default="miniature", help=RECOGNISER)
    p.add_argument("--splits", type=str, nargs="+", default=["train", "test"], help="of train, test, final")
    p.add_argument("--seeds", type=int, default=8, help="pictures of each person and condition")
    p.add_argument("--limit", type=int, default=None, help="first so many persons of each split")
    p.add_argument("--phrase", type=str, default=None, help='hand-written control, such as "a fan of {}"')
    p.add_argument("--out", type=Path, default=SCORES,
                   help="where scores.json goes; with --images also a .md and a .html beside it")
    p.add_argument("--cache", type=Path, default=Path("runs/cache"), help="keeps what need not be done twice")
    p.add_argument("--images", type=Path, default=None,
                   help="score these pictures instead of making any: FOLDER/NAME/*.png, or FOLDER/NAME_1.png")
    p.add_argument("--images-on", type=Path, default=None,
                   help="--images: the same persons' pictures made with the prefix, at the same seeds and file names")
    p.add_argument("--references", type=Path, default=None,
                   help="--images: pictures of the persons, REFERENCES/NAME/*.jpg or NAME_1.jpg; several of each")
    p.add_argument("--table", type=Path, default=None, help="--images: CSV of file,person instead of names in paths")
    p.add_argument("--groups", type=Path, default=None,
                   help="--images: CSV of name,gender,... ; one panel a column")
    p.add_argument("--second", type=str, default=None, help="--images: a second recogniser beside the first")
    p.add_argument("--face-choice", type=str, default="largest",
                   help=f"--images: the face that counts in a picture: {', '.join(CHOICES)}; best is the worst case")
    p.add_argument("--far", type=float, default=1e-3, help="--images: share of strangers the threshold may accept")
    p.add_argument("--threshold", type=float, default=None, help="--images: a fixed threshold instead")
    p.add_argument("--k", type=int, default=None,
                   help="--images: pictures of the worst-of-k rate; the least anybody has by default")
    p.add_argument("--det-size", type=int, default=640, help="--images: edge of the detector's input in pixels")
    p.add_argument("--root", type=Path, default=None,
                   help="--images: folder with models/NAME of the recognisers; ~/.insightface by default")


def run(args: Namespace, tell: Tell) -> None:
    """`apl score`."""
    if args.images is not None:
        _run_folder(args, tell)
        return
    for name in ("images_on", "references", "table", "groups", "second", "threshold", "k"):
        if getattr(args, name) is not None:
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} is given without --images.", f"Add --images FOLDER, or leave {option} out.",
                              field=name)
    from apl_train.report.table import score_table
    from apl_train.scoring.command import score

    scores = score(args.prefix, args.base_model, args.persons, args.recogniser, splits=args.splits, seeds=args.seeds,
                   limit=args.limit, phrase=args.phrase, out=args.out, cache=args.cache)
    tell(args, scores, f"{score_table(scores)}\n\nwrote {args.out}")


def _run_folder(args: Namespace, tell: Tell) -> None:
    if args.references is None:
        raise ConfigError("--images is given without --references.",
                          "Add --references FOLDER with pictures of the persons.", field="references")
    if args.prefix is not None:
        raise ConfigError("--prefix and --images are given: pictures are either made or there.",
                          "Leave one out; pictures made with a prefix go to --images-on.", field="prefix")
    from apl_core.identity import load_embedder
    from apl_train import shipped
    from apl_train.folder_score.files import FolderSettings
    from apl_train.folder_score.page import write_all
    from apl_train.folder_score.score import check_folder
    from apl_train.folder_score.text import markdown
    from apl_train.scoring.command import StageBars

    settings = FolderSettings(args.images, args.references, args.images_on, args.table, args.groups, args.face_choice,
                              args.far, args.threshold, args.k)
    names = [args.recogniser, *([args.second] if args.second else [])]
    embedders = [load_embedder(shipped.recogniser(name), args.root, det_size=args.det_size) for name in names]
    bars = StageBars()
    try:
        result = check_folder(settings, embedders, args.cache / "faces", bars)
    finally:
        bars.close()
    out = args.out.with_name("identity.json") if args.out == SCORES else args.out
    written = write_all(out, result)
    tell(args, result.scores, f"{markdown(result.scores)}\n" + "\n".join(f"wrote {path}" for path in written))
