"""Picture files of a folder, loose or in one archive such as `images.zip`, read as RGB without trusting any of them.

Step picture files -> pixels. Nothing is ever unpacked to disk, no path leads out of the folder, and every size is
limited before memory is taken.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from apl_core.errors import DatasetError

ARCHIVE = "images.zip"
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_BYTES = 64 * 2**20
MAX_PIXELS = 4096 * 4096
_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr"})
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
_MOVE = "Correct the path, or put the picture there."
_SAVE = f"Save it again as one of {', '.join(FORMATS)}, with 8 bits per channel."


def _error(message: str, hint: str) -> DatasetError:
    return DatasetError(message, hint, field="image")


class PictureFolder:
    """The pictures of a folder by relative path ("/" between folders): those in an archive, and loose files.

    Args:
        folder: holds the loose files; it need not be there when all pictures are in the archive.
        archive: a zip file in the folder, or elsewhere by its absolute path; there may be none.

    Raises:
        DatasetError: the archive is damaged; `field` is "image" in this and all errors below.
    """

    def __init__(self, folder: str | Path, archive: str | Path = ARCHIVE) -> None:
        self._folder = Path(folder).resolve()
        path = self._folder / archive
        self._archive_name = path.name
        try:
            self._archive = zipfile.ZipFile(path) if path.exists() else None
        except _DAMAGED as error:
            raise _error(f"{path.name} cannot be read: {error}.", "Pack it again.") from error
        self._members = {info.filename: info for info in self._archive.infolist()} if self._archive else {}

    def close(self) -> None:
        """Let go of the archive."""
        if self._archive is not None:
            self._archive.close()

    def names(self) -> list[str]:
        """Every file of the archive, or of the folder and its subfolders where there is no archive."""
        if self._archive is not None:
            return [name for name, info in self._members.items() if not info.is_dir()]
        return [path.relative_to(self._folder).as_posix() for path in self._folder.rglob("*") if path.is_file()]

    def check(self, name: str) -> None:
        """Look whether there is such a file inside the folder. Raises DatasetError when not."""
        if name in self._members:
            return
        if reason := _path_problem(name):
            raise _error(f"the path {name!r} {reason}.", "Write it relative to the folder, with '/' between folders.")
        try:
            path = (self._folder / name).resolve()
            is_inside, is_file = path.is_relative_to(self._folder), path.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a name that the system refuses
            raise _error(f"{name} cannot be followed: {error}.", _MOVE) from error
        if not is_inside:
            raise _error(f"{name} leads out of the folder.", "Copy the picture there instead of linking to it.")
        if not is_file:
            where = f" in {self._archive_name} or beside it" if self._archive else ""
            raise _error(f"there is no picture {name}{where}.", _MOVE)

    def read(self, name: str) -> bytes:
        """The file's bytes, at most 64 MiB. Raises DatasetError."""
        self.check(name)
        info = self._members.get(name)
        try:
            if self._archive is None or info is None:
                with (self._folder / name).open("rb") as handle:
                    data = handle.read(MAX_BYTES + 1)
            elif info.flag_bits & 1 or info.compress_type not in _METHODS:
                raise ValueError("it is encrypted or packed by an unusual method")
            else:
                # What an archive states about sizes is not trusted: reading stops at the limit whatever it says.
                with self._archive.open(info) as handle:
                    data = handle.read(MAX_BYTES + 1)
        except _DAMAGED as error:
            raise _error(f"{name} cannot be read: {error}.", "Copy the picture there again.") from error
        if len(data) > MAX_BYTES:
            raise _error(f"{name} is larger than {MAX_BYTES // 2**20} MiB.", _SAVE)
        return data

    def pixels(self, name: str) -> NDArray[np.uint8]:
        """The picture, uint8 [H, W, 3] RGB, turned upright, transparency on white. Raises DatasetError."""
        return decode(self.read(name), name)


def decode(data: bytes, name: str) -> NDArray[np.uint8]:
    """The picture in a file's bytes, uint8 [H, W, 3] RGB, turned upright, transparency on white.

    Raises:
        DatasetError: damaged, of another format, of more than 16.7 million pixels or of more than 8 bits per channel.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            width, height = picture.size  # known from the header, before any pixel is unpacked
            if width * height > MAX_PIXELS:
                raise _error(f"{name} has {width} x {height} pixels, too many.", "Make it smaller, such as 512 x 512.")
            if picture.mode not in _MODES:
                raise _error(f"{name} has the colour mode {picture.mode}, not 8 bits per channel.", _SAVE)
            return _to_rgb(picture)
    except Image.DecompressionBombError as error:  # so many pixels that Pillow refuses by itself
        raise _error(f"{name} has too many pixels.", "Make it smaller, such as 512 x 512.") from error
    except _DAMAGED as error:
        reason = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
        raise _error(f"{name} cannot be read as {', '.join(FORMATS)}{reason}.", _SAVE) from error


def _to_rgb(picture: Image.Image) -> NDArray[np.uint8]:
    picture.load()
    upright = ImageOps.exif_transpose(picture)
    if upright.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in upright.info:
        whole = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole)
    return np.array(upright.convert("RGB"), np.uint8)


def _path_problem(name: str) -> str:
    parts = name.split("/")
    if "\\" in name:
        return "holds a backslash"
    if name.startswith("/") or ":" in parts[0]:
        return "is absolute"
    if any(part in ("", ".", "..") for part in parts):
        return "holds '..', '.' or an empty part"
    return ""
