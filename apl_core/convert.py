"""Embeddings of other tools into prefix files and back. The only place where a foreign pickle is read.

A pickle is read with `torch.load(weights_only=True)`, which builds tensors and plain containers and calls nothing
else. Hosts never call this module on their own; `apl convert` does, in its own process.
"""

from __future__ import annotations

import io
import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .atomic import write_bytes
from .errors import ModelError, PrefixFileError
from .families import FAMILIES, family_of_architecture, supported_layouts
from .metadata import PrefixMetadata, content_hash, parse_header, standard_widths
from .prefix import (
    SUFFIX,
    AnonymizationPrompt,
    parse_tensors,
    read_header,
    read_limited,
    to_bytes,
)

TARGETS = ("a1111", "diffusers", "kohya", "forge-flux")
_IMAGE_STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"\xff\x0a", b"\x00\x00\x00\x0cJXL")
_ALIASES = {"t5": "t5xxl", "emp_params": "emb_params"}
_TRAINERS = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "numpy.", "_codecs.encode")
_log = logging.getLogger("apl")


def read_foreign(path: str | Path) -> AnonymizationPrompt:
    """Read an embedding of another tool, or one of ours exported for it.

    Understood: AUTOMATIC1111 `.pt` (`string_to_param`), the `.pt` of the paper's code (`string_to_param["alz"]`),
    kohya, OneTrainer and diffusers safetensors, diffusers `.bin`.

    Returns:
        The prefix; float32, its family taken from the file's metadata or else from the widths.

    Raises:
        PrefixFileError: unreadable, unsafe, an image, no embedding, or of no supported family.
    """
    path = Path(path)
    data = read_limited(path)
    if data.startswith(_IMAGE_STARTS) or path.suffix.lower() in (".png", ".webp", ".jxl", ".avif", ".jpg", ".jpeg"):
        raise PrefixFileError(
            f"{path.name} is an image; embeddings hidden in pictures are not read.",
            "Ask for the embedding as a .safetensors or .pt file.",
            field="path",
        )
    if len(data) > 8 and data[8:9] == b"{":
        header, _ = read_header(data, path.name)
        raw: dict[str, Any] = parse_tensors(data, path.name)
        meta = parse_header(header)
        architecture = header.get("modelspec.architecture", "")
    else:
        raw, title = _unpacked(_unpickle(data, path.name), path.name)
        meta, architecture = PrefixMetadata(title=title), ""
    tensors = _renamed(_tensors_only(raw, path.name), path.name)
    family = _family(tensors, meta, architecture)
    if len(tensors) == 1 and list(FAMILIES[family].widths) == ["emb_params"]:
        tensors = {"emb_params": next(iter(tensors.values()))}
    return AnonymizationPrompt(family, tensors, meta.with_fields(title=meta.title or path.stem))


def _unpickle(data: bytes, name: str) -> Any:
    try:
        # Older WebUI files and the paper's own hold their tensors in a ParameterDict; it only stores them.
        with torch.serialization.safe_globals([torch.nn.ParameterDict, set]):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "Unsupported" in str(error):
            raise PrefixFileError(
                f"{name} asks to run code of its own when it is read; it was not run.",
                "Do not open this file with other tools. Ask for the embedding as .safetensors.",
                field="path",
            ) from error
        raise _unreadable(name, error) from error
    except Exception as error:  # a hostile pickle can make the reader fail in any way
        raise _unreadable(name, error) from error


class _Ignored:
    """Stands where a checkpoint keeps its trainer's own objects: it takes anything and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


def read_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a whole model in a pickle (`.ckpt`), by name; nothing in it is run.

    Trainers keep objects of their own beside the weights; those of known makers are passed over, others refused.

    Raises:
        ModelError: it cannot be read, asks to run code, or holds no named tensors.
    """
    path = Path(path)
    hint = "Get the model as .safetensors; do not open this file with other tools."
    try:
        asked = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        if strange := [name for name in asked if not name.startswith(_TRAINERS)]:
            raise ModelError(f"{path.name} asks to run code of its own ({strange[0]}); it was not run.", hint,
                             field="base_model")
        with torch.serialization.safe_globals([(_Ignored, name) for name in asked]):
            value = torch.load(path, map_location="cpu", weights_only=True)
    except ModelError:
        raise
    except OSError as error:
        raise ModelError(f"Cannot read {path}: {error.strerror or error}.", "Check the path.",
                         field="base_model") from error
    except Exception as error:  # a hostile pickle can make the reader fail in any way
        first = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise ModelError(f"{path.name} is no readable checkpoint: {first}", hint, field="base_model") from error
    inner = value.get("state_dict", value) if isinstance(value, Mapping) else {}
    found = {str(key): item for key, item in inner.items() if isinstance(item, torch.Tensor)}
    if not found:
        raise ModelError(f"{path.name} holds no named tensors.", "Use a whole model.", field="base_model")
    return found


def _unreadable(name: str, error: Exception) -> PrefixFileError:
    first = (str(error).splitlines() or [type(error).__name__])[0][:160]
    return PrefixFileError(
        f"{name} is neither safetensors nor a readable pickle: {first}",
        "Use a .safetensors, .pt or .bin embedding; if it is one, download it again.",
        field="path",
    )


def _unpacked(value: Any, name: str) -> tuple[dict[str, Any], str]:
    """The tensors of an unpickled file, and the title it carries."""
    if not isinstance(value, Mapping):
        raise PrefixFileError(
            f"{name} holds a {type(value).__name__}, not named tensors.",
            "Use the embedding file itself, not a checkpoint or a training state.",
            field="path",
        )
    title = value.get("name")
    title = title if isinstance(title, str) else ""
    if "string_to_param" not in value:
        return {str(key): item for key, item in value.items()}, title
    params = value["string_to_param"]
    inner = params if isinstance(params, Mapping) else _parameter_dict(params)
    return {str(key): item for key, item in inner.items()}, title


def _parameter_dict(params: Any) -> dict[str, Any]:
    # Read past the class's own methods: what an old file put into the object fits an old class.
    state = getattr(params, "__dict__", {})
    stored = dict(state.get("_parameters") or {})
    stored |= {key: item for key, item in state.items() if isinstance(item, torch.Tensor)}
    return stored


def _tensors_only(raw: Mapping[str, Any], name: str) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for key, value in raw.items():
        if not isinstance(value, torch.Tensor):
            continue
        if key.endswith("_out"):
            # OneTrainer's second set acts behind the text encoder; an anonymization prompt has no such part.
            _log.warning("%s: the output embedding %r is left out; only input vectors are carried over.", name, key)
            continue
        value = value.detach()
        if not value.is_floating_point():
            raise PrefixFileError(
                f"Tensor {key!r} of {name} holds {str(value.dtype).removeprefix('torch.')}.",
                "An embedding holds floating-point numbers; use the embedding file itself.",
                field=key,
            )
        tensors[key] = (value.unsqueeze(0) if value.dim() == 1 else value).float()
    return tensors


def _renamed(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    if not tensors:
        raise PrefixFileError(
            f"{name} holds no embedding.", f"Supported: {supported_layouts()}.", field="tensors"
        )
    if len(tensors) == 1:
        key, value = next(iter(tensors.items()))
        return {key if key in ("clip_l", "clip_g", "t5xxl") else "emb_params": value}
    renamed = {_ALIASES.get(key, key): value for key, value in tensors.items()}
    known = {key for family in FAMILIES.values() for key in family.widths}
    if unknown := sorted(set(renamed) - known):
        raise PrefixFileError(
            f"{name} holds several tensors, among them {unknown[0][:80]!r}.",
            "Convert one embedding at a time; a checkpoint or a LoRA is no embedding.",
            field=unknown[0],
        )
    return renamed


def _family(tensors: Mapping[str, torch.Tensor], meta: PrefixMetadata, architecture: str) -> str:
    widths = {key: int(value.shape[-1]) for key, value in tensors.items()}
    named = family_of_architecture(architecture)
    if named is not None and meta.widths and sorted(meta.widths.values()) == sorted(widths.values()):
        return named.name  # an encoder of another width, declared by the file
    if len(widths) == 1 and (key := next(iter(widths))) in ("emb_params", "clip_l"):
        widths = {"emb_params": widths[key]}  # Forge wants a lone CLIP-L tensor under this key
    for family in FAMILIES.values():
        if dict(family.widths) == widths:
            return family.name
    shown = ", ".join(f"{key}: {width}" for key, width in sorted(widths.items()))
    raise PrefixFileError(
        f"The vectors ({shown}) fit no supported family.", f"Supported: {supported_layouts()}.", field="widths"
    )


def export(prefix: AnonymizationPrompt, path: str | Path, to: str = "a1111", *, token: str | None = None) -> None:
    """Write a prefix the way another tool reads it; always safetensors, metadata kept.

    Args:
        prefix: what to write.
        path: a .safetensors path.
        to: "a1111" and "kohya" (one `emb_params`, or `clip_l` and `clip_g`), "diffusers" (one tensor keyed by its
            token; `clip_l` and `clip_g` for SDXL, loaded one encoder at a time), "forge-flux" (CLIP-L alone).
        token: the token for diffusers; "<title>" without spaces when left out.

    Raises:
        PrefixFileError: the tool does not read this family, or the name does not end in .safetensors.
        StorageError: the file cannot be written.
    """
    path = Path(path)
    if to not in TARGETS:
        raise PrefixFileError(f"{to!r} is no export target.", f"Use one of: {', '.join(TARGETS)}.", field="to")
    if path.suffix != SUFFIX:
        raise PrefixFileError(
            f"{path.name} does not end in {SUFFIX}.", f"Name it {path.stem}{SUFFIX}: other kinds are not written.",
            field="path",
        )
    families = ("flux",) if to == "forge-flux" else ("sd1", "sd2", "sdxl")
    if prefix.family not in families:
        raise PrefixFileError(
            f"{to} reads no embedding of the family {prefix.family}.",
            f"It reads: {', '.join(families)}.",
            field="to",
        )
    tensors = dict(prefix.tensors)
    if to == "forge-flux":
        tensors = {"clip_l": prefix.vectors("clip_l")}
    elif to == "diffusers" and len(tensors) == 1:
        tensors = {token or f"<{'-'.join(prefix.name.split())}>": prefix.vectors()}
    meta = prefix.meta
    if not standard_widths(prefix.family, prefix.widths):
        meta = meta.with_fields(widths={key: int(value.shape[1]) for key, value in tensors.items()})
    write_bytes(path, to_bytes(tensors, meta.to_header(content_hash(tensors))))
