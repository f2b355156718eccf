"""S_Reg from what a user has: pictures with captions from folders, shards, COCO or a `datasets` id (paper sec. 3.5).

Step captioned pictures -> a training set. Every source is read as a stream of (picture, caption); what comes out has
as many pictures of persons as of things at most, because a set of faces alone teaches the prefix to mean "face" (Fig.
7), and no caption in it names a person of S_ID.
"""

from __future__ import annotations

import csv
import io
import json
import re
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from apl_core.atomic import write_bytes
from apl_core.errors import ConfigError, DatasetError
from apl_core.identity import FaceEmbedder
from apl_train.datasets.cast import NeutralLine
from apl_train.datasets.contact_sheet import Frame, write_sheets
from apl_train.datasets.dataset import MAX_TEXT, TABLE, _has, _words
from apl_train.datasets.generate import Wanted, write_table
from apl_train.datasets.pictures import MAX_BYTES, decode

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SIDECARS = (".txt", ".caption")
_LOOK = 16
"""Pictures looked at for faces in one go."""
_PERSONS = re.compile(
    r"\b(man|men|woman|women|boy|girl|person|people|child|children|kid|baby|lady|guy|gentleman|couple|crowd|family|"
    r"player|actor|actress|singer|face|portrait|selfie|bride|groom|team|student|worker|skier|surfer|rider)s?\b", re.I)


@dataclass(frozen=True)
class Pair:
    """One captioned picture: the bytes of its file, where it came from, its caption."""

    data: bytes
    caption: str
    origin: str


@dataclass(frozen=True)
class Built:
    """What became of a source: pictures by kind, and what was left out, by reason."""

    faces: int
    nonfaces: int
    left_out: dict[str, int]
    by_words: bool

    def text(self) -> str:
        """A few lines for people."""
        lines = [f"S_Reg: {self.nonfaces} pictures without persons, {self.faces} with unnamed ones"]
        if self.by_words:
            lines.append("  told apart by their captions: no recogniser was given")
        if self.left_out:
            lines.append("  left out: " + ", ".join(f"{n} {why}" for why, n in sorted(self.left_out.items())))
        return "\n".join(lines)


def from_folder(folder: Path) -> Iterator[Pair]:
    """Pictures with a caption beside them (NAME.txt or NAME.caption), or with a line in metadata.jsonl.

    Raises:
        DatasetError: the folder is missing or no picture in it has a caption.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder} is no folder.", "Give the folder that holds pictures and captions.",
                           field="source")
    captions = _jsonl(folder / "metadata.jsonl")
    found = 0
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file()):
        beside = next((path.with_suffix(s) for s in SIDECARS if path.with_suffix(s).is_file()), None)
        caption = captions.get(path.relative_to(folder).as_posix(), "")
        if beside is not None:
            caption = beside.read_bytes()[: 4 * MAX_TEXT].decode("utf-8", "replace")
        if caption:
            found += 1
            yield Pair(_limited(path), caption, path.name)
    if not found:
        raise DatasetError(f"No picture in {folder} has a caption.",
                           "Put NAME.txt beside NAME.jpg, or a metadata.jsonl with file_name and text.", field="source")


def _limited(path: Path) -> bytes:
    with path.open("rb") as handle:
        return handle.read(MAX_BYTES + 1)


def _jsonl(path: Path) -> dict[str, str]:
    """file_name to text of Hugging Face's imagefolder metadata; empty where there is none."""
    if not path.is_file():
        return {}
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found[str(row["file_name"])] = str(row.get("text") or row.get("caption") or "")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DatasetError(f"{path.name}, line {number} is no row with file_name and text.",
                               'Write lines like {"file_name": "a.jpg", "text": "a red apple"}.',
                               field="source") from error
    return found


def from_shards(paths: Sequence[Path]) -> Iterator[Pair]:
    """webdataset or img2dataset shards: tar files with KEY.jpg beside KEY.txt (or KEY.json with "caption").

    Nothing is unpacked to disk. Raises DatasetError for a damaged shard, or where no picture has a caption.
    """
    found = 0
    for path in paths:
        try:
            with tarfile.open(path, "r|*") as tar:
                for pair in _of_tar(tar, path.name):
                    found += 1
                    yield pair
        except (OSError, tarfile.TarError, EOFError) as error:
            raise DatasetError(f"{path} cannot be read as a tar file: {error}.", "Get this shard again.",
                               field="source") from error
    if not found:
        raise DatasetError(f"No picture in {', '.join(p.name for p in paths)} has a caption.",
                           "Shards hold KEY.jpg beside KEY.txt or KEY.json.", field="source")


def _of_tar(tar: tarfile.TarFile, name: str) -> Iterator[Pair]:
    """Members of one key stand side by side (webdataset's rule), so one key is held at a time."""
    key, files = "", {}
    for member in tar:
        if not member.isfile() or member.size > MAX_BYTES:
            continue
        stem, _, ending = member.name.rpartition(".")
        if stem != key:
            yield from _of_key(files, f"{name}:{key}")
            key, files = stem, {}
        handle = tar.extractfile(member)
        if handle is not None and f".{ending.lower()}" in (*ENDINGS, ".txt", ".json", ".caption"):
            files[ending.lower()] = handle.read(MAX_BYTES)
    yield from _of_key(files, f"{name}:{key}")


def _of_key(files: dict[str, bytes], origin: str) -> Iterator[Pair]:
    picture = next((data for ending, data in files.items() if f".{ending}" in ENDINGS), None)
    caption = next((files[e].decode("utf-8", "replace") for e in ("txt", "caption") if e in files), "")
    if not caption and "json" in files:
        try:
            caption = str(json.loads(files["json"]).get("caption") or "")
        except (ValueError, AttributeError):
            caption = ""
    if picture is not None and caption:
        yield Pair(picture, caption, origin)


def from_coco(captions: Path, images: Path) -> Iterator[Pair]:
    """A COCO captions file (images, annotations) and its folder of pictures; the first caption of each picture.

    Raises:
        DatasetError: the file is of another kind, or none of its pictures is in the folder.
    """
    try:
        table = json.loads(captions.read_text(encoding="utf-8"))
        files = {row["id"]: str(row["file_name"]) for row in table["images"]}
        rows = [(row["image_id"], str(row["caption"])) for row in table["annotations"]]
    except OSError as error:
        raise DatasetError(f"{captions} cannot be read: {error.strerror}.", "Check the path.",
                           field="source") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{captions.name} is no COCO captions file.",
                           "It has lists `images` and `annotations`, as captions_val2014.json does.",
                           field="source") from error
    first: dict[Any, str] = {}
    for image_id, caption in rows:
        first.setdefault(image_id, caption)
    found = 0
    for image_id, caption in first.items():
        path = images / Path(files.get(image_id, "")).name
        if path.is_file():
            found += 1
            yield Pair(_limited(path), caption, path.name)
    if not found:
        raise DatasetError(f"None of the pictures of {captions.name} is in {images}.",
                           "Give their folder with --images.", field="images")


def from_datasets(name: str, split: str = "train") -> Iterator[Pair]:
    """A `datasets` id or local copy, streamed: its image column and its caption column (text, caption, sentence).

    Raises:
        ConfigError: the library is not installed. DatasetError: it cannot be loaded or has no such columns.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("The library datasets is not installed.", "pip install datasets", field="source") from error
    try:
        rows = datasets.load_dataset(name, split=split, streaming=True)
        rows = rows.cast_column(_column(rows.features, ("image", "jpg", "png", "img")), datasets.Image(decode=False))
        image = _column(rows.features, ("image", "jpg", "png", "img"))
        text = _column(rows.features, ("text", "caption", "sentence", "txt", "TEXT", "captions", "sentences"))
        for i, row in enumerate(rows):
            data = row[image].get("bytes") or _limited(Path(row[image]["path"]))
            caption = row[text][0] if isinstance(row[text], list) and row[text] else row[text]
            yield Pair(data, str(caption or ""), f"{name}:{i}")
    except DatasetError:
        raise
    except Exception as error:  # the library raises what its many readers raise
        raise DatasetError(f"{name} cannot be read with datasets: {error}", "Check its name and split; it may need a "
                           "login or the network.", field="source") from error


def _column(features: Any, names: Sequence[str]) -> str:
    found = next((n for n in names if n in (features or {})), None)
    if found is None:
        raise DatasetError(f"The dataset has the columns {', '.join(features or {}) or 'none'}.",
                           f"One of these is needed: {', '.join(names)}.", field="source")
    return found


def source_of(value: str, images: Path | None = None) -> Iterator[Pair]:
    """The stream of a setting: a folder, .tar shards (one, a pattern, or a folder of them), COCO's .json, an id.

    Raises:
        ConfigError: COCO without the folder of its pictures. DatasetError: nothing is there.
    """
    path = Path(value).expanduser()
    if path.suffix == ".json":
        if images is None:
            raise ConfigError("A COCO captions file needs its pictures.", "Give their folder with --images.",
                              field="images")
        return from_coco(path, images)
    if path.suffix == ".tar":
        shards = sorted(path.parent.glob(path.name))
        if not shards:
            raise DatasetError(f"There is no {path}.", "Check the path of the shards.", field="source")
        return from_shards(shards)
    if path.is_dir():
        return from_shards(shards) if (shards := sorted(path.glob("*.tar"))) else from_folder(path)
    if path.is_absolute() or value.startswith(".") or value.count("/") > 1:
        raise DatasetError(f"There is no folder {path}.", "Check the path.", field="source")
    return from_datasets(value)


def prompts_of(path: Path) -> list[NeutralLine]:
    """A user's own neutral prompts: a CSV of prompt,kind. Raises DatasetError naming the row."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path} cannot be read: {error}.", "Give a UTF-8 CSV of prompt,kind.",
                           field="source") from error
    for number, row in enumerate(rows, start=2):
        if not (row.get("prompt") or "").strip() or row.get("kind") not in ("face", "nonface"):
            raise DatasetError(f"{path.name}, row {number}: prompt is {row.get('prompt')!r}, kind {row.get('kind')!r}.",
                               "Write a prompt, and face or nonface.", field="kind")
    return [NeutralLine(cleaned(row["prompt"]), row["kind"], "train") for row in rows]


def squared(picture: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The middle square of a picture, uint8 [size, size, 3]."""
    image, edge = Image.fromarray(picture), min(picture.shape[:2])
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + edge, top + edge)))


def cleaned(caption: str) -> str:
    """A caption on one line, without control characters."""
    return " ".join("".join(" " if unicodedata.category(c) == "Cc" else c for c in caption).split())


def build(pairs: Iterator[Pair], folder: Path, *, count: int, size: int, names: Sequence[str] = (),
          embedder: FaceEmbedder | None = None, progress: Callable[[int, int], None] | None = None) -> Built:
    """Write S_Reg: at most `count` pictures of `size` x `size` pixels, persons at most as many as things.

    Args:
        names: persons who must not be named in any caption.
        embedder: tells persons from things; None: the words of the caption do.

    Raises:
        ConfigError: the folder holds a set already. DatasetError: the source gives nothing usable.
    """
    if (folder / TABLE).exists():
        raise ConfigError(f"{folder} holds a dataset already.", "Choose another folder.", field="out")
    left: Counter[str] = Counter()
    rows: dict[str, list[tuple[str, Wanted]]] = {"face": [], "nonface": []}
    folded = [_words(name) for name in names]
    waiting: list[tuple[NDArray[np.uint8], str]] = []

    def look() -> None:
        seen = embedder.faces_of([p for p, _ in waiting]) if embedder and waiting else None
        for i, (picture, caption) in enumerate(waiting):
            is_face = bool(seen[i]) if seen is not None else bool(_PERSONS.search(caption))
            kind = "face" if is_face else "nonface"
            if len(rows[kind]) >= -(-count // 2):
                left[f"more {'persons' if is_face else 'things'} than needed"] += 1
                continue
            name = f"{kind}-{len(rows[kind]):05d}.png"
            data = io.BytesIO()
            Image.fromarray(picture).save(data, "PNG")
            write_bytes(folder / name, data.getvalue())
            rows[kind].append((name, Wanted("", "", caption, "", kind)))
        waiting.clear()
        if progress:
            progress(min(count, sum(map(len, rows.values()))), count)

    for pair in pairs:
        caption = cleaned(pair.caption)
        if not caption or len(caption) > MAX_TEXT:
            left["without a usable caption"] += 1
        elif any(_has(_words(caption), name) for name in folded):
            left["naming a person of S_ID"] += 1
        else:
            try:
                waiting.append((squared(decode(pair.data, pair.origin), size), caption))
            except DatasetError:
                left["damaged or of another format"] += 1
        if len(waiting) >= _LOOK:
            look()
        if all(len(kept) >= -(-count // 2) for kept in rows.values()):
            break
    look()
    return _finish(folder, rows, left, embedder is None)


def _finish(folder: Path, rows: dict[str, list[tuple[str, Wanted]]], left: Counter[str], by_words: bool) -> Built:
    faces, things = rows["face"], rows["nonface"]
    if not things:
        raise DatasetError("No picture without persons was found.",
                           "Add pictures of things: without them the prefix shows persons everywhere (Fig. 7).",
                           field="source")
    for name, _ in faces[len(things):]:
        left["more persons than things"] += 1
        (folder / name).unlink(missing_ok=True)
    kept = [*faces[: len(things)], *things]
    write_table(folder, kept)
    write_sheets(folder, [Frame(folder / name, row.prompt) for name, row in kept])
    return Built(len(kept) - len(things), len(things), dict(left), by_words)
