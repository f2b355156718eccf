"""Pictures for the page: files of a folder or its images.zip, reduced, as data URIs. No file is ever served by path."""

from __future__ import annotations

import base64
import csv
import functools
import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

EDGE = 160
MAX_BYTES = 64 * 2**20
MAX_TABLE = 64 * 2**20


@dataclass(frozen=True)
class Card:
    """One picture of a training set with its texts; `uri` "" where it cannot be shown."""

    uri: str
    name: str
    prompt: str
    description: str
    kind: str


def data_uri(data: bytes, edge: int = EDGE) -> str:
    """A picture file's bytes, no side longer than `edge`; "" for what is no picture."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.draft("RGB", (edge, edge))
            small = picture.convert("RGB")
            small.thumbnail((edge, edge))
    except Exception:  # Pillow raises whatever its decoders do; a page shows a blank then
        return ""
    out = io.BytesIO()
    small.save(out, "PNG" if max(small.size) <= 72 else "JPEG", quality=88)
    kind = "png" if max(small.size) <= 72 else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"


@functools.lru_cache(maxsize=1024)
def _cached(path: str, _changed: float, edge: int) -> str:
    return data_uri(Path(path).read_bytes(), edge)


def of_file(folder: Path, name: str, edge: int = EDGE) -> str:
    """The picture `name` directly inside `folder`; "" for one that is missing, too large or elsewhere."""
    if not name or PurePosixPath(name).name != name or "\\" in name:
        return ""
    path = folder / name
    try:
        stat = path.stat()
        return _cached(str(path), stat.st_mtime, edge) if stat.st_size <= MAX_BYTES else ""
    except OSError:
        return ""


def cards(folder: Path, start: int, count: int) -> tuple[list[Card], int]:
    """Some rows of a set spread over the whole table, from number `start` on, and how many rows it has.

    Rows are taken at equal distances, so that the first sheet already shows many different persons.
    """
    table = folder / "metadata.csv"
    if table.stat().st_size > MAX_TABLE:
        raise OSError(f"{table} is too large to look at")
    rows = list(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8-sig", errors="replace"), newline="")))
    if not rows:
        return [], 0
    stride = max(1, len(rows) // count)
    chosen = [rows[(start + i * stride) % len(rows)] for i in range(min(count, len(rows)))]
    return list(_cards(folder, chosen)), len(rows)


def _cards(folder: Path, rows: list[dict[str, str]]) -> Iterator[Card]:
    archive = None
    if (folder / "images.zip").is_file():
        archive = zipfile.ZipFile(folder / "images.zip")
    try:
        for row in rows:
            text = {key: str(row.get(key) or "") for key in ("name", "prompt", "description", "kind")}
            yield Card(_row_uri(folder, archive, str(row.get("image") or "")), **text)
    finally:
        if archive is not None:
            archive.close()


def _row_uri(folder: Path, archive: zipfile.ZipFile | None, name: str) -> str:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name:
        return ""
    try:
        if archive is not None and name in archive.namelist():
            return data_uri(archive.read(name)) if archive.getinfo(name).file_size <= MAX_BYTES else ""
        inside = (folder / name).resolve()
        if not inside.is_relative_to(folder.resolve()) or inside.stat().st_size > MAX_BYTES:
            return ""
        return data_uri(inside.read_bytes())
    except (OSError, zipfile.BadZipFile, RuntimeError):
        return ""
