"""Files and faces of an identity check: settings, whose picture each file is, what recognisers see, what is odd.

Step folders -> faces. Every file is looked at once a recogniser; whatever falls out is listed with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from apl_core import id_scores
from apl_core.errors import DatasetError, ScoreError
from apl_core.id_check import CHOICES
from apl_core.identity import FaceEmbedder
from apl_train.datasets.pictures import PictureFolder
from apl_train.folder_score.face_cache import FaceCache, Progress, Seen, look
from apl_train.folder_score.odd_pictures import ENDINGS, NOT_ASKED
from apl_train.folder_score.people import persons_of_pictures, persons_of_references, read_table

SIDES = ("off", "on")


@dataclass(frozen=True)
class FolderSettings:
    """What is compared and how. Paths are folders; `images_on` holds the same persons' pictures made with the prefix.

    `threshold` None: from strangers at `far`. `k`: pictures of the worst-of-k rate; the least anybody has when None.
    """

    images: Path
    references: Path
    images_on: Path | None = None
    table: Path | None = None
    groups: Path | None = None
    face_choice: str = "largest"
    far: float = 1e-3
    threshold: float | None = None
    k: int | None = None
    resamples: int = id_scores.RESAMPLES

    def __post_init__(self) -> None:
        if self.face_choice not in CHOICES:
            raise ScoreError(f"face_choice is {self.face_choice!r}.", f"Use one of: {', '.join(CHOICES)}.",
                             field="face_choice")
        if not 0 < self.far < 1:
            raise ScoreError(f"far is {self.far}, it must lie between 0 and 1.", "Use 0.001.", field="far")
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise ScoreError(f"threshold is {self.threshold}, not from -1 to 1.", "Leave it out to have it measured.",
                             field="threshold")
        if self.k is not None and self.k < 1:
            raise ScoreError(f"k is {self.k}, not 1 or more.", "Leave it out for the least number of pictures.",
                             field="k")
        for name in ("images", "references", "images_on"):
            path = getattr(self, name)
            if path is not None and not path.is_dir():
                raise DatasetError(f"{name} is {path}, which is no folder.", "Give a folder of pictures.", field=name)


@dataclass(frozen=True, eq=False)
class Files:
    """The files of a run: `references` and `sides` map a person to relative paths; `odd` lists what fell out."""

    references: Mapping[str, tuple[str, ...]]
    sides: Mapping[str, Mapping[str, tuple[str, ...]]]
    odd: list[dict[str, str]]


@dataclass(frozen=True, eq=False)
class Looked:
    """One recogniser's view: what it saw in every file of every folder."""

    embedder: FaceEmbedder
    references: Mapping[str, Seen]
    sides: Mapping[str, Mapping[str, Seen]]


def find_files(settings: FolderSettings) -> Files:
    """Which file is whose.

    Raises:
        DatasetError: no reference, nobody with a picture, or a table is wrong.
    """
    odd: list[dict[str, str]] = []
    references = persons_of_references(_pictures(settings.references, "references", odd))
    table = read_table(settings.table) if settings.table else None
    sides: dict[str, Mapping[str, tuple[str, ...]]] = {}
    for side, folder in zip(SIDES, (settings.images, settings.images_on), strict=True):
        if folder is not None:
            found = persons_of_pictures(_pictures(folder, side, odd), list(references), table)
            odd += [{"folder": side, "file": file, "reason": reason} for file, reason in found.left]
            sides[side] = found.persons
    if not any(sides["off"].values()):
        raise DatasetError(f"No picture in {settings.images} belongs to anybody in {settings.references}.",
                           "Name sub-folders or files after the references, or give a table of file,person.",
                           field="images")
    return Files(references, sides, odd)


def _pictures(folder: Path, where: str, odd: list[dict[str, str]]) -> list[str]:
    store = PictureFolder(folder)
    try:
        names = sorted(name for name in store.names() if not any(p.startswith(".") for p in name.split("/")))
    finally:
        store.close()
    kept = [name for name in names if Path(name).suffix.lower() in ENDINGS]
    odd += [{"folder": where, "file": name, "reason": "no picture by its ending"}
            for name in names if name not in set(kept) and Path(name).suffix.lower() not in (".csv", ".zip")]
    return kept


def look_at(settings: FolderSettings, files: Files, embedder: FaceEmbedder, cache: Path | None = None,
            progress: Progress | None = None) -> Looked:
    """Every file once through one recogniser, from the cache where it has been looked at before."""
    kept = FaceCache(cache, embedder)

    def seen(stage: str, folder: Path, persons: Mapping[str, Sequence[str]]) -> dict[str, Seen]:
        store = PictureFolder(folder)
        try:
            return look(store, [name for own in persons.values() for name in own], embedder, kept,
                        f"{embedder.name}: {stage}", progress)
        finally:
            store.close()

    folders = {"off": settings.images, "on": settings.images_on}
    return Looked(embedder, seen("references", settings.references, files.references),
                  {side: seen(side, folders[side], persons) for side, persons in files.sides.items()})


def odd_files(files: Files, looked: Looked) -> list[dict[str, str]]:
    """Every file with something unusual: folder, file, reason; one entry a reason."""
    rows, first = list(files.odd), {}
    for where, seen in (("references", looked.references), *looked.sides.items()):
        for name, one in seen.items():
            reasons = list(one.notes)
            if one.faces is not None and not one.faces and not any(NOT_ASKED in note for note in one.notes):
                reasons.append("no face was found")
            if one.faces is not None and len(one.faces) > 1:
                reasons.append(f"{len(one.faces)} faces were found")
            if one.faces is not None and (same := first.setdefault((where, one.sha256), name)) != name:
                reasons.append(f"the same file as {same}")
            rows += [{"folder": where, "file": name, "reason": reason} for reason in reasons]
    return sorted(rows, key=lambda row: (row["folder"], row["file"]))
