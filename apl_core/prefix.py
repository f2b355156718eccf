"""The anonymization prompt itself, and its file: m learned token embeddings a text encoder, in one safetensors file.

A prefix file is shared between strangers, so it is checked before anything is parsed, and nothing in it can run.
"""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from .atomic import write_bytes
from .errors import PrefixFileError
from .families import KNOWN_KEYS, family_named, family_of_tensors, supported_layouts
from .metadata import (
    PrefixMetadata,
    content_hash,
    declares_format,
    parse_header,
    standard_widths,
)

MAX_FILE_BYTES = 16 * 2**20
MAX_HEADER_BYTES = 2**20
MAX_TOKENS = 64
SUFFIX = ".safetensors"
_FLOATS = frozenset({"F16", "BF16", "F32", "F64"})
_GET_AGAIN = "The file is damaged or incomplete: download or copy it again."
_CONVERT = "Make a safe file of it once with `apl convert FILE --out NAME.safetensors`."
_log = logging.getLogger("apl")


@dataclass(frozen=True, eq=False)
class AnonymizationPrompt:
    """A learned prefix (APL sec. 3.3): m vectors in the token-embedding space of each text encoder of a family.

    Attributes:
        family: short family name, such as "sd1".
        tensors: tensor key to float32 [m, width]; before position embeddings are added. Checked when made.
        meta: what is known about it; its family, num_tokens and widths are made to agree with the tensors.

    Raises:
        PrefixFileError: a tensor is not [m, width] finite floats with 1 <= m <= 64, m differs, or widths do not fit.
    """

    family: str
    tensors: Mapping[str, torch.Tensor]
    meta: PrefixMetadata

    def __post_init__(self) -> None:
        checked = check_tensors(self.tensors)
        widths = {key: int(value.shape[1]) for key, value in checked.items()}
        declared = None if standard_widths(self.family, widths) else widths
        family_of_tensors(widths, architecture=family_named(self.family).architecture, declared=declared)
        count = int(next(iter(checked.values())).shape[0])
        meta = self.meta.with_fields(family=self.family, num_tokens=count, widths=declared)
        object.__setattr__(self, "tensors", MappingProxyType(checked))
        object.__setattr__(self, "meta", meta)

    @property
    def name(self) -> str:
        """Title of the prefix, for people."""
        return self.meta.title or "anonymization prompt"

    @property
    def num_tokens(self) -> int:
        """m, the rows the prefix takes of every chunk."""
        return self.meta.num_tokens

    @property
    def widths(self) -> dict[str, int]:
        """Tensor key to its number of columns."""
        return {key: int(value.shape[1]) for key, value in self.tensors.items()}

    @property
    def content_hash(self) -> str:
        """SHA-256 of the tensors alone, lowercase hex."""
        return content_hash(self.tensors)

    def vectors(self, key: str | None = None) -> torch.Tensor:
        """The float32 [m, width] vectors of one encoder; `key` may be left out where there is only one.

        Raises:
            PrefixFileError: there is no such tensor, or several and no key.
        """
        if key is None and len(self.tensors) == 1:
            return next(iter(self.tensors.values()))
        if key not in self.tensors:
            raise PrefixFileError(
                f"{self.name} has no tensor {key!r}." if key else f"{self.name} has several tensors.",
                f"Ask for one of: {', '.join(sorted(self.tensors))}.",
                field=key,
            )
        return self.tensors[key]


def check_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as contiguous float32 on the CPU, sorted by key, once they are known to be sound.

    Raises:
        PrefixFileError: naming the tensor in `field`.
    """
    if not tensors:
        raise PrefixFileError("The file holds no tensor.", f"Supported: {supported_layouts()}.", field="tensors")
    rows: dict[str, int] = {}
    for key, tensor in tensors.items():
        _check_known(key)
        if not tensor.is_floating_point():
            raise PrefixFileError(
                f"Tensor {key} holds {str(tensor.dtype).removeprefix('torch.')}, not floating-point numbers.",
                "Save the vectors as float32.",
                field=key,
            )
        _check_shape(key, tuple(tensor.shape))
        if not bool(torch.isfinite(tensor).all()):
            raise PrefixFileError(
                f"Tensor {key} holds NaN or infinity.",
                "The training that made it diverged: take an earlier level, or train with a lower learning rate.",
                field=key,
            )
        rows[key] = int(tensor.shape[0])
    if len(set(rows.values())) > 1:
        raise PrefixFileError(
            "The tensors have different numbers of vectors: " + ", ".join(f"{k}: {n}" for k, n in sorted(rows.items())),
            "Every text encoder needs the same number of vectors.",
            field="num_tokens",
        )
    return {key: tensors[key].detach().to("cpu", torch.float32).contiguous() for key in sorted(tensors)}


def _check_known(key: str) -> None:
    if key in KNOWN_KEYS:
        return
    if key == "emp_params" or key == "t5" or key.endswith("_out"):
        raise PrefixFileError(f"Tensor {key!r} is one that another trainer writes.", _CONVERT, field=key)
    raise PrefixFileError(
        f"Tensor {key[:80]!r} has no place in an anonymization prompt.",
        f"A file holds these and no other: {', '.join(sorted(KNOWN_KEYS))}. {_CONVERT}",
        field=key,
    )


def _check_shape(key: str, shape: tuple[int, ...]) -> None:
    if len(shape) != 2:
        raise PrefixFileError(
            f"Tensor {key} has shape {list(shape)}, not [vectors, width].", "Save it as a 2-D tensor.", field=key
        )
    if not 1 <= shape[0] <= MAX_TOKENS:
        raise PrefixFileError(
            f"Tensor {key} has {shape[0]} vectors.", f"A prefix has 1 to {MAX_TOKENS}; 10 is usual.", field=key
        )


def read_limited(path: str | Path) -> bytes:
    """All bytes of a file of at most 16 MiB.

    Raises:
        PrefixFileError: it is missing, no file, too large, empty, or cannot be read.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise PrefixFileError(f"{path} is a folder.", f"Name a {SUFFIX} file inside it.", field="path")
        with path.open("rb") as handle:
            data = handle.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise PrefixFileError(f"{path} does not exist.", "Check the name and the folder.", field="path") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise PrefixFileError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.",
            "Check the file's permissions and its name.",
            field="path",
        ) from error
    if len(data) > MAX_FILE_BYTES:
        raise PrefixFileError(
            f"{path.name} is larger than {MAX_FILE_BYTES // 2**20} MiB.",
            "A prefix takes some kilobytes; this may be a checkpoint or a LoRA: choose another file.",
            field="path",
        )
    if not data:
        raise PrefixFileError(f"{path.name} is empty.", _GET_AGAIN, field="path")
    return data


def _foreign_kind(data: bytes) -> str:
    if data.startswith(b"PK\x03\x04") or (data[:1] == b"\x80" and data[1:2] in b"\x02\x03\x04\x05"):
        return "a pickle (.pt, .bin), which could run code"
    if data.startswith((b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8")):
        return "an image"
    return ""


def read_header(data: bytes, name: str) -> tuple[dict[str, str], dict[str, Any]]:
    """The metadata and the table of tensors of a safetensors file's bytes, read without touching any tensor.

    Raises:
        PrefixFileError: not a safetensors file, or its header is cut off, larger than 1 MiB or malformed.
    """
    size = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    # A safetensors length may begin with a pickle's first bytes, so the magic counts only where no header fits.
    plausible = len(data) > 8 and data[8:9] == b"{" and size <= MAX_HEADER_BYTES
    if not plausible and (kind := _foreign_kind(data)):
        raise PrefixFileError(f"{name} is {kind}, not a safetensors file.", _CONVERT, field="path")
    if len(data) < 8:
        raise PrefixFileError(f"{name} is cut off: {len(data)} bytes.", _GET_AGAIN, field="path")
    if size > MAX_HEADER_BYTES:
        raise PrefixFileError(
            f"{name} claims a header of {size} bytes; {MAX_HEADER_BYTES} are allowed.",
            "This is no safetensors file, or a hostile one: get the file from a source you trust.",
            field="header",
        )
    if size > len(data) - 8:
        raise PrefixFileError(f"{name} is cut off inside its header.", _GET_AGAIN, field="header")
    try:
        header = json.loads(data[8 : 8 + size].decode("utf-8"))
        metadata = header.pop("__metadata__", None) or {}
        ends = [int(entry["data_offsets"][1]) for entry in header.values()]
        sound = all(isinstance(value, str) for value in metadata.values()) and all(
            isinstance(entry["dtype"], str) and all(type(number) is int for number in entry["shape"])
            for entry in header.values()
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise PrefixFileError(f"{name} has a header that is not safetensors.", _GET_AGAIN, field="header")
    if max(ends, default=0) > len(data) - 8 - size:
        raise PrefixFileError(f"{name} is cut off: its tensors are incomplete.", _GET_AGAIN, field="tensors")
    return metadata, header


def parse_tensors(data: bytes, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file's bytes. Raises `PrefixFileError`."""
    try:
        return load_safetensors(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise PrefixFileError(
            f"{name} is not a sound safetensors file: {error}.", _GET_AGAIN, field="tensors"
        ) from error


def load_prefix(path: str | Path, *, enforce: bool = False) -> AnonymizationPrompt:
    """Load and check a prefix file; plain embeddings of the supported families load too, outside enforce mode.

    Args:
        path: a .safetensors file.
        enforce: refuse a file whose content hash is missing or wrong, instead of a warning on the logger "apl".

    Raises:
        PrefixFileError: the file is missing, too large, damaged, foreign, of a future version, or does not fit.
    """
    path = Path(path)
    data = read_limited(path)
    header, table = read_header(data, path.name)
    meta = parse_header(header)
    for key, entry in table.items():
        _check_known(key)
        if entry["dtype"] not in _FLOATS:
            raise PrefixFileError(
                f"Tensor {key} holds {entry['dtype']}, not floating-point numbers.",
                "Save the vectors as float32.",
                field=key,
            )
        _check_shape(key, tuple(entry["shape"]))
    tensors = check_tensors(parse_tensors(data, path.name))
    widths = {key: int(value.shape[1]) for key, value in tensors.items()}
    family = family_of_tensors(widths, architecture=header.get("modelspec.architecture", ""), declared=meta.widths)
    count = int(next(iter(tensors.values())).shape[0])
    if meta.num_tokens not in (0, count):
        raise PrefixFileError(
            f"apl.num_tokens is {meta.num_tokens}, but the tensors have {count} vectors.", _GET_AGAIN,
            field="apl.num_tokens",
        )
    _check_hash(path.name, header, tensors, enforce=enforce)
    return AnonymizationPrompt(family.name, tensors, meta.with_fields(title=meta.title or path.stem))


def _check_hash(
    name: str, header: Mapping[str, str], tensors: Mapping[str, torch.Tensor], *, enforce: bool
) -> None:
    # Other trainers fill modelspec.hash_sha256 by other rules; only this format's own promise can be held to.
    stated = header.get("modelspec.hash_sha256", "").lower() if declares_format(header) else ""
    found = f"0x{content_hash(tensors)}"
    if stated == found or (not stated and not enforce):
        return
    problem = (
        f"{name} is not what was saved: its content hash is {found}, its metadata says {stated}."
        if stated
        else f"{name} carries no content hash."
    )
    hint = "Get the file again from a source you trust" + ("." if stated else f", or: {_CONVERT}")
    if enforce:
        raise PrefixFileError(problem, hint, field="modelspec.hash_sha256")
    _log.warning("%s %s", problem, hint)


def to_bytes(tensors: Mapping[str, torch.Tensor], header: Mapping[str, str]) -> bytes:
    """A safetensors file of float32 tensors, the same bytes for the same content whatever wrote them.

    The library's own writer does not promise an order of the metadata, so the header is made here.
    """
    table: dict[str, Any] = {"__metadata__": {key: header[key] for key in sorted(header)}}
    body = b""
    for key in sorted(tensors):
        tensor = tensors[key].detach().to("cpu", torch.float32).contiguous()
        raw = tensor.numpy().astype("<f4", copy=False).tobytes()
        offsets = [len(body), len(body) + len(raw)]
        table[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": offsets}
        body += raw
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    if len(text) > MAX_HEADER_BYTES:
        raise PrefixFileError(
            f"The metadata takes {len(text)} bytes; {MAX_HEADER_BYTES} are allowed.",
            "Shorten the description or the scores.",
            field="header",
        )
    return struct.pack("<Q", len(text)) + text + body


def save_prefix(prefix: AnonymizationPrompt, path: str | Path) -> None:
    """Write a prefix file whole or not at all; the same prefix gives the same bytes.

    Raises:
        PrefixFileError: the name does not end in .safetensors.
        StorageError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise PrefixFileError(
            f"{path.name} does not end in {SUFFIX}.", f"Name it {path.stem}{SUFFIX}: other kinds are not written.",
            field="path",
        )
    write_bytes(path, to_bytes(prefix.tensors, prefix.meta.to_header(prefix.content_hash)))
