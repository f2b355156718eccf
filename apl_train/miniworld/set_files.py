"""Files of the miniature world's sets: CSV tables, and pictures as WebP in one zip, the same bytes every time."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from apl_core.atomic import write_text, write_with


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A CSV table in UTF-8 with line feeds, whatever the system, written whole or not at all."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, out.getvalue())


def write_pictures(path: Path, pictures: Iterable[tuple[str, np.ndarray]], quality: int) -> None:
    """(name, uint8 [H, W, 3]) as WebP into one zip, with fixed dates: the same pictures give the same bytes."""

    def write(temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as out:
            for name, picture in pictures:
                data = io.BytesIO()
                Image.fromarray(picture).save(data, "WEBP", quality=quality, method=6)
                out.writestr(zipfile.ZipInfo(name, (2024, 1, 1, 0, 0, 0)), data.getvalue())

    write_with(path, write)
