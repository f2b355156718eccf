"""What a prefix file says of itself: ModelSpec 1.0.1 keys and the `apl.*` keys, and the hash of its content."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .errors import PrefixFileError
from .families import FAMILIES, family_named, family_of_architecture

MODELSPEC_VERSION = "1.0.1"
FORMAT_VERSION = "1"
IMPLEMENTATION = "anonymization-prompt-learning"
USAGE_HINT = "put first in every chunk of the positive prompt"
PLACEMENTS = ("prefix", "suffix", "both")
_GET_AGAIN = "The file's metadata was damaged or edited: get the file again, or save it anew with this project."


@dataclass(frozen=True)
class PrefixMetadata:
    """What is known about a prefix. Only `family` and `num_tokens` are needed; None or "" means "not known".

    Attributes:
        title: name shown to people.
        family: short family name ("sd1"); "" in a foreign file that does not say.
        num_tokens: m, the number of vectors (0 in a foreign file that does not say).
        alpha: strength of anonymization (APL eq. 5).
        base_model: name of the model it was learned on.
        base_model_sha256: hash of that model's weights, lowercase hex.
        steps: optimizer steps of the whole training.
        level: optimizer steps after which this level was saved; None for the final one.
        seed: seed of the training.
        dataset_sha256: hash of the training set's table.
        transferred_from: content hash and mapper when vectors were carried over from another family (APL sec. 4.1).
        scores: measured scores, JSON values only; never names of persons.
        widths: tensor widths, only when they are not the family's own.
        placement: where the vectors stand: "prefix", "suffix" or "both".
        extra: other header keys, kept as they were.
    """

    title: str = ""
    family: str = ""
    num_tokens: int = 0
    alpha: float | None = None
    base_model: str = ""
    base_model_sha256: str = ""
    steps: int | None = None
    level: int | None = None
    seed: int | None = None
    dataset_sha256: str = ""
    transferred_from: str = ""
    scores: Mapping[str, Any] = field(default_factory=dict)
    widths: Mapping[str, int] | None = None
    placement: str = "prefix"
    author: str = ""
    description: str = ""
    license: str = ""
    date: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)

    def to_header(self, content_hash: str) -> dict[str, str]:
        """The safetensors metadata: one string a key, sorted, empty values left out.

        Args:
            content_hash: lowercase hex of `content_hash(tensors)`.

        Raises:
            ModelError: `family` is unknown.
            PrefixFileError: `scores` is not JSON, or `placement` is none of the three.
        """
        if self.placement not in PLACEMENTS:
            raise PrefixFileError(
                f"placement is {self.placement!r}.", f"Use one of: {', '.join(PLACEMENTS)}.", field="apl.placement"
            )
        family = family_named(self.family)
        header = {key: str(value) for key, value in self.extra.items() if not _is_owned(key)}
        header |= {
            "modelspec.sai_model_spec": MODELSPEC_VERSION,
            "modelspec.architecture": family.architecture,
            "modelspec.implementation": IMPLEMENTATION,
            "modelspec.title": self.title or "anonymization prompt",
            "modelspec.description": self.description,
            "modelspec.author": self.author,
            "modelspec.date": self.date,
            "modelspec.license": self.license,
            "modelspec.hash_sha256": f"0x{content_hash}",
            "modelspec.usage_hint": USAGE_HINT,
            "modelspec.tags": "privacy,anonymization",
            "modelspec.is_negative_embedding": "false",
            "apl.format_version": FORMAT_VERSION,
            "apl.num_tokens": str(self.num_tokens),
            "apl.alpha": "" if self.alpha is None else repr(float(self.alpha)),
            "apl.base_model": self.base_model,
            "apl.base_model_sha256": self.base_model_sha256,
            "apl.steps": "" if self.steps is None else str(self.steps),
            "apl.level": "" if self.level is None else str(self.level),
            "apl.seed": "" if self.seed is None else str(self.seed),
            "apl.dataset_sha256": self.dataset_sha256,
            "apl.transferred_from": self.transferred_from,
            "apl.scores": _json(self.scores, "apl.scores") if self.scores else "",
            "apl.widths": _json(self.widths, "apl.widths") if self.widths else "",
            "apl.placement": self.placement,
        }
        return {key: header[key] for key in sorted(header) if header[key] != ""}

    def with_fields(self, **changes: Any) -> PrefixMetadata:
        """A copy with some fields changed."""
        return replace(self, **changes)


_OWNED_MODELSPEC = (
    *("sai_model_spec", "architecture", "implementation", "title", "description", "author", "date", "license"),
    *("hash_sha256", "usage_hint", "tags", "is_negative_embedding"),
)
_OWNED_APL = (
    *("format_version", "num_tokens", "alpha", "base_model", "base_model_sha256", "steps", "level", "seed"),
    *("dataset_sha256", "transferred_from", "scores", "widths", "placement"),
)
_OWNED = frozenset(f"modelspec.{key}" for key in _OWNED_MODELSPEC) | {f"apl.{key}" for key in _OWNED_APL}


def _is_owned(key: str) -> bool:
    return key in _OWNED


def _json(value: Any, name: str) -> str:
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise PrefixFileError(
            f"{name} cannot be written as JSON: {error}.", "Use numbers, strings, lists and objects only.", field=name
        ) from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def declares_format(header: Mapping[str, str]) -> bool:
    """Whether the header is that of a file of this project (any version), not of a plain embedding."""
    return "apl.format_version" in header


def _integer(header: Mapping[str, str], key: str, *, least: int | None = 0) -> int | None:
    text = header.get(key, "")
    if text == "":
        return None
    if not re.fullmatch(r"-?[0-9]{1,20}", text) or (least is not None and int(text) < least):
        wanted = "a whole number" if least is None else f"a whole number of at least {least}"
        raise PrefixFileError(f"{key} is {text!r}, not {wanted}.", _GET_AGAIN, field=key)
    return int(text)


def _number(header: Mapping[str, str], key: str) -> float | None:
    text = header.get(key, "")
    if text == "":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise PrefixFileError(f"{key} is {text!r}, not a finite number.", _GET_AGAIN, field=key)
    return value


def _object(header: Mapping[str, str], key: str) -> dict[str, Any] | None:
    text = header.get(key, "")
    if text == "":
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PrefixFileError(f"{key} is not JSON.", _GET_AGAIN, field=key) from error
    if not isinstance(value, dict):
        raise PrefixFileError(f"{key} is not a JSON object.", _GET_AGAIN, field=key)
    return value


def _widths(header: Mapping[str, str]) -> dict[str, int] | None:
    value = _object(header, "apl.widths")
    if value is not None and not all(type(width) is int and 1 <= width <= 65536 for width in value.values()):
        raise PrefixFileError("apl.widths holds something other than whole widths.", _GET_AGAIN, field="apl.widths")
    return value


def parse_header(header: Mapping[str, str]) -> PrefixMetadata:
    """Read the metadata of a file. A foreign plain embedding may lack any key; a key that is there must be right.

    Raises:
        PrefixFileError: a value is of the wrong type or range, or `apl.format_version` is of a future version;
            `field` names the key.
    """
    version = header.get("apl.format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise PrefixFileError(
            f"apl.format_version is {version!r}; this version reads {FORMAT_VERSION!r}.",
            "Update this software to read the file, or ask for the file in format version 1.",
            field="apl.format_version",
        )
    placement = header.get("apl.placement", "prefix")
    if placement not in PLACEMENTS:
        raise PrefixFileError(
            f"apl.placement is {placement!r}.", f"It must be one of: {', '.join(PLACEMENTS)}.", field="apl.placement"
        )
    family = family_of_architecture(header.get("modelspec.architecture", ""))
    return PrefixMetadata(
        title=header.get("modelspec.title", ""),
        family=family.name if family else "",
        num_tokens=_integer(header, "apl.num_tokens", least=1) or 0,
        alpha=_number(header, "apl.alpha"),
        base_model=header.get("apl.base_model", ""),
        base_model_sha256=header.get("apl.base_model_sha256", ""),
        steps=_integer(header, "apl.steps"),
        level=_integer(header, "apl.level"),
        seed=_integer(header, "apl.seed", least=None),
        dataset_sha256=header.get("apl.dataset_sha256", ""),
        transferred_from=header.get("apl.transferred_from", ""),
        scores=_object(header, "apl.scores") or {},
        widths=_widths(header),
        placement=placement,
        author=header.get("modelspec.author", ""),
        description=header.get("modelspec.description", ""),
        license=header.get("modelspec.license", ""),
        date=header.get("modelspec.date", ""),
        extra={key: value for key, value in header.items() if not _is_owned(key)},
    )


def content_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 (lowercase hex) of the tensors alone: sorted keys, shapes and float32 little-endian bytes.

    Metadata has no part in it, so that retitling a file does not change its identity.
    """
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{key}\0{','.join(map(str, tensor.shape))}\0".encode())
        digest.update(tensor.numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def standard_widths(family: str, widths: Mapping[str, int]) -> bool:
    """Whether these widths are the family's own, so that `apl.widths` need not be written."""
    return family in FAMILIES and dict(FAMILIES[family].widths) == dict(widths)
