"""Token-embedding tables of text encoders, read by name from model files; nothing else of a model is loaded.

Step model file -> table. Transfer between families (APL sec. 4.1) needs the tables alone: of a checkpoint of 7 GB it
reads a quarter of one. Understood names: LDM's and sgm's single files, open_clip's and transformers' text encoders.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .errors import ModelError

_LEAF = "token_embedding.weight"
_CLIP = f"text_model.embeddings.{_LEAF}"
_SINGLE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("emb_params", (f"cond_stage_model.transformer.{_CLIP}", f"cond_stage_model.transformer.embeddings.{_LEAF}",
                    f"cond_stage_model.model.{_LEAF}")),
    ("clip_l", (f"conditioner.embedders.0.transformer.{_CLIP}",
                f"conditioner.embedders.0.transformer.embeddings.{_LEAF}")),
    ("clip_g", (f"conditioner.embedders.1.model.{_LEAF}", f"conditioner.embedders.1.transformer.{_CLIP}",
                f"conditioner.embedders.1.transformer.embeddings.{_LEAF}")),
)
"""Prefix file's key -> names under which a whole model's file has its table: LDM (older transformers too), sgm."""
_BARE = (_CLIP, f"embeddings.{_LEAF}", _LEAF, f"transformer.{_CLIP}", f"model.{_LEAF}")
_REFINER = f"conditioner.embedders.0.model.{_LEAF}"
_FOLDERS = (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g"))
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
SUPPORTED = ("Supported: a Stable Diffusion 1.x, 2.x or XL model as one .safetensors file or a diffusers folder, or a "
             "CLIP text encoder's own file or folder.")


@dataclass(frozen=True, eq=False)
class TokenTable:
    """One text encoder's token embeddings, row i for token id i.

    Attributes:
        vectors: float32 [vocabulary, width].
        name: where it comes from, for people.
        stored: dtype that the file has it in; two files of one table may differ in it.

    Raises:
        ModelError: it is not [vocabulary, width] finite floating-point numbers.
    """

    vectors: torch.Tensor
    name: str = "table"
    stored: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or not self.vectors.is_floating_point() or not self.vectors.numel():
            raise ModelError(f"{self.name}: the token table is {list(self.vectors.shape)}, "
                             f"{str(self.vectors.dtype).removeprefix('torch.')}.",
                             "It must be [vocabulary, width] of floating-point numbers.", field="token_table")
        ready = self.vectors.detach().to("cpu", torch.float32).contiguous()
        object.__setattr__(self, "vectors", ready)
        # a norm of anything that is not finite is not finite either, and all of them are needed anyway; that of finite
        # numbers may overflow, so it is no proof by itself
        if not (bool(torch.isfinite(self.lengths).all()) or bool(torch.isfinite(ready).all())):
            raise ModelError(f"{self.name}: the token table holds NaN or infinity.",
                             "The model is damaged: get it again.", field="token_table")

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return int(self.vectors.shape[0])

    @property
    def width(self) -> int:
        """Numbers of one token's embedding."""
        return int(self.vectors.shape[1])

    @cached_property
    def lengths(self) -> torch.Tensor:
        """Norms of the rows, float32 [vocabulary]."""
        return self.vectors.norm(dim=1)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of shape and float32 little-endian bytes, lowercase hex."""
        digest = hashlib.sha256(f"{self.vocabulary},{self.width}\0".encode())
        digest.update(memoryview(self.vectors.numpy().astype("<f4", copy=False)).cast("B"))
        return digest.hexdigest()

    def agrees_with(self, other: TokenTable) -> bool:
        """Whether both are one table: bit for bit, or once rounded to the half precision that a file keeps it in."""
        if self.vectors.shape != other.vectors.shape:
            return False
        if torch.equal(self.vectors, other.vectors):
            return True
        halves = {table.stored for table in (self, other) if torch.finfo(table.stored).bits == 16}
        return any(torch.equal(self.vectors.to(half), other.vectors.to(half)) for half in halves)


def _names(path: Path) -> set[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"Cannot read {path.name}: {error}", "The file is damaged or incomplete: copy it again.",
                         field="path") from error


def _read(path: Path, name: str, label: str) -> TokenTable:
    try:
        with safe_open(path, framework="pt") as file:
            value = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"Cannot read {name} of {path.name}: {error}",
                         "The file is damaged or incomplete: copy it again.", field="path") from error
    return TokenTable(value, label, value.dtype)


def _first(names: set[str], wanted: Sequence[str]) -> str:
    return next((name for name in wanted if name in names), "")


def _files(folder: Path) -> list[Path]:
    """A part's weight files, those in full precision first."""
    return sorted(folder.glob("*.safetensors"), key=lambda path: (".fp16" in path.name, path.name))


def _bare(files: Sequence[Path], label: str) -> TokenTable | None:
    for path in files:
        if name := _first(_names(path), _BARE):
            return _read(path, name, label)
    return None


def _checked(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".safetensors"):
        return path
    if path.suffix.lower() in _PICKLES:
        raise ModelError(f"{path.name} is a pickle, which can run code when it is read.",
                         f"Make a safe file of it once: apl convert {path} --out {path.stem}.safetensors", field="path")
    state = "is not a model of a known kind" if path.exists() else "does not exist"
    raise ModelError(f"{path} {state}.", SUPPORTED, field="path")


def read_tables(path: str | Path) -> dict[str, TokenTable]:
    """The tables of a model by the keys of prefix files: `emb_params`, or `clip_l` and `clip_g`.

    Args:
        path: a single .safetensors file, a diffusers folder, or a bare text encoder (file or folder), whose one table
            comes as `emb_params`.

    Raises:
        ModelError: there is no such file, it is damaged, or holds no table under a known name.
    """
    path = _checked(path)
    if path.is_dir():
        return _of_folder(path)
    names = _names(path)
    found = {key: name for key, wanted in _SINGLE if (name := _first(names, wanted))}
    if not found and _REFINER in names:
        raise ModelError(f"{path.name} is a refiner: it has one of Stable Diffusion XL's text encoders only.",
                         "Name the base model.", field="path")
    if len(found.keys() & {"clip_l", "clip_g"}) == 1:
        raise ModelError(f"{path.name} has one of Stable Diffusion XL's two text encoders only.",
                         "Use a whole model.", field="path")
    if not found and (table := _bare([path], path.stem)) is not None:
        return {"emb_params": table}
    if not found:
        raise ModelError(f"{path.name} holds no token table under a known name.", SUPPORTED, field="path")
    return {key: _read(path, name, f"{path.stem}: {key}") for key, name in found.items()}


def _of_folder(folder: Path) -> dict[str, TokenTable]:
    label = folder.resolve().name
    found: dict[str, TokenTable] = {}
    for part, key in _FOLDERS:
        table = _bare(_files(folder / part), f"{label}: {key}") if (folder / part).is_dir() else None
        if table is not None:
            found[key] = table
    if not found and (table := _bare(_files(folder), label)) is not None:
        return {"emb_params": table}
    if not found:
        raise ModelError(f"{folder} holds no text encoder as .safetensors.", SUPPORTED, field="path")
    return found if len(found) > 1 else {"emb_params": next(iter(found.values()))}


def read_table(path: str | Path) -> TokenTable:
    """The only table of a model with one text encoder; of an XL model, CLIP-L's.

    Raises:
        ModelError: as `read_tables`.
    """
    found = read_tables(path)
    return found["emb_params"] if "emb_params" in found else found["clip_l"]


def check_same_vocabulary(tables: Mapping[str, TokenTable]) -> None:
    """Raises ModelError where tables have different numbers of rows: their ids then mean different tokens."""
    rows = {name: table.vocabulary for name, table in tables.items()}
    if len(set(rows.values())) > 1:
        shown = ", ".join(f"{name}: {count}" for name, count in rows.items())
        raise ModelError(f"The token tables have different numbers of tokens ({shown}).",
                         "Vectors can be carried over between models with one tokenizer only.", field="token_table")
