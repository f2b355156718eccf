"""Writes that either happen whole or not at all: temp file in the same folder, fsync, rename, fsync of the folder.

Used for every file this project makes, so that a kill -9, a full disk or a pulled plug never leaves half a prefix,
half a training state or half a report under its final name.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .errors import StorageError

_HINTS = {
    errno.ENOSPC: "The disk is full: free some space and run the same command again; nothing was half-written.",
    errno.EDQUOT: "The disk quota is used up: free some space and run the same command again.",
    errno.EACCES: "You may not write there: choose another folder or change its permissions.",
    errno.EPERM: "You may not write there: choose another folder or change its permissions.",
    errno.EROFS: "The file system is read-only: choose another folder.",
    errno.ENAMETOOLONG: "The name is too long: choose a shorter one.",
}


def storage_error(path: Path, error: OSError) -> StorageError:
    """The `StorageError` for an `OSError` met while writing `path`, with a way out."""
    hint = _HINTS.get(error.errno or 0, "Check that the folder exists and can be written to.")
    return StorageError(f"Cannot write {path}: {error.strerror or error}.", hint, field=str(path))


def take_lock(descriptor: int) -> bool:
    """Takes the lock of an open file until it is closed; False where another has it. Where there are no locks: True."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:  # some network file systems know no locks
        logging.getLogger("apl.atomic").info("no lock on this file system: %s", error)
    return True


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open folders; its rename is durable by itself
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse fsync on folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a clean exit it becomes `path`, otherwise it is removed."""
    temporary = path.with_name(f".{path.name[:80]}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_with(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Let `write(temporary_path)` make the file, then put it in place atomically.

    Raises:
        StorageError: the disk is full, the folder cannot be written to, ...; nothing is left behind.
    """
    with _replacing(Path(path)) as temporary:
        write(temporary)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` atomically. Raises `StorageError`."""
    write_with(path, lambda temporary: temporary.write_bytes(data))


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 atomically. Raises `StorageError`."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON atomically; NaN and infinity are refused: JSON has none. Raises StorageError."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_safetensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors (made contiguous, moved to the CPU) and string metadata atomically. Raises `StorageError`."""
    ready = {key: value.detach().to("cpu").contiguous() for key, value in tensors.items()}

    def save(temporary: Path) -> None:
        try:
            save_file(ready, str(temporary), dict(metadata) if metadata else None)
        except Exception as error:  # safetensors wraps I/O errors in its own type, without errno
            if type(error).__name__ == "SafetensorError":
                code = errno.ENOSPC if "No space" in str(error) else errno.EIO
                raise OSError(code, str(error)) from error
            raise

    write_with(path, save)
