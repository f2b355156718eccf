"""From a prefix and a CLIP to a CLIP that carries the prefix in every chunk of every text encoder.

Step placement -> encoder. Two layers on a clone, both laid out by `apl_core.placement.plan`:

* the tokenizer chunks at 75 - m and puts the m rows in, so that ordinary prompts are split at the right words;
* `process_tokens` of each encoder, the last step before the transformer, puts them into every row that still lacks
  them: the empty row that emphasis weights are measured from, and tokens made by other packs.

No host module is imported: everything is reached through the CLIP object that the node is given.
"""

from __future__ import annotations

import copy
import logging
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ..apl_core.errors import ModelError, PlacementError
from ..apl_core.placement import capacity, plan
from ..apl_core.prefix import AnonymizationPrompt

OVERFLOWS = ("chunk", "trim", "error")
# A user token's place in its prompt is what `plan` moves about. It must look unlike any real id.
_FIRST_ITEM = 1 << 24
_SINGLE = ("clip_l", "clip_h")  # encoders whose prefix file has the one tensor "emb_params" (SD1, SD2)
_log = logging.getLogger("apl")


@dataclass(frozen=True, eq=False)
class Layout:
    """How one encoder's rows are laid out: float32 [width] prefix rows, special token ids, where and what on overflow.

    Attributes:
        rows: the m prefix rows, each a 1-D tensor: hosts take one token a position.
        start, end, pad: ids of the tokenizer's special tokens.
        length: positions of one chunk.
        position: "prefix", "suffix" or "both".
        overflow: "chunk", "trim" or "error".
    """

    rows: tuple[torch.Tensor, ...]
    start: int
    end: int
    pad: int
    length: int
    position: str
    overflow: str

    @property
    def room(self) -> int:
        """User tokens that fit in one chunk."""
        return capacity(len(self.rows), self.length)

    def place(self, items: Sequence[Any], length: int, overflow: str) -> list[Any]:
        """One chunk's entries: `items` as they are where the user's tokens go, ids and prefix rows elsewhere.

        Raises:
            PlacementError: they do not fit and `overflow` is not "trim".
        """
        tokens = [_FIRST_ITEM + index for index in range(len(items))]
        chunk = plan(tokens, len(self.rows), position=self.position, bos=self.start, eos=self.end, pad=self.pad,
                     length=length, overflow="trim" if overflow == "trim" else "error")[0]
        return [
            self.rows[-row - 1] if row < 0 else items[row - _FIRST_ITEM] if row >= _FIRST_ITEM else row
            for row in chunk.rows
        ]

    def carries(self, row: Sequence[Any]) -> bool:
        """Whether a row of tokens has exactly this prefix where it belongs."""
        end = _index_of(self.end, row)
        user = end - 1 - len(self.rows)
        if user < 0 or len(row) <= len(self.rows) + 2:
            return False
        places = _prefix_positions(user, len(self.rows), self.position, len(row))
        return all(_same(row[at], self.rows[index]) for at, index in places)


@lru_cache(maxsize=256)
def _prefix_positions(user: int, num_prefix: int, position: str, length: int) -> tuple[tuple[int, int], ...]:
    """(position, prefix row) in a chunk of `user` tokens. Kept, since every row of every encode asks for it."""
    return plan([_FIRST_ITEM] * user, num_prefix, position=position, length=length)[0].prefix_positions


def _index_of(token: int, row: Sequence[Any]) -> int:
    """Place of the first such id, or -1. Tensors are passed over: comparing one with an id would compare its values."""
    return next((at for at, entry in enumerate(row) if isinstance(entry, numbers.Integral) and entry == token), -1)


def _same(entry: Any, row: torch.Tensor) -> bool:
    if isinstance(entry, dict):
        entry = entry.get("data")
    if entry is row:
        return True
    if not torch.is_tensor(entry) or entry.numel() != row.numel():
        return False
    return torch.equal(entry.detach().reshape(-1).to("cpu", torch.float32), row)


class Anonymizing:
    """Mixed into the class of one of the host's tokenizers; its instances are copies that know their `apl_layout`.

    A subclass's method and not an attribute of the instance: other packs set, and then delete, attributes of this
    name. `max_length` still says 77, by which other packs shape what they get.
    """

    apl_layout: Layout
    apl_plain: Any  # the tokenizer this is a copy of
    apl_inner: Any  # the same with a max_length that leaves room for the prefix

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> list[list[tuple]]:
        """The host's chunks of (token, weight[, word id]), the prefix in each. Prefix rows weigh 1, word id 0.

        Raises:
            PlacementError: the prompt needs more than one chunk and overflow is "error".
        """
        layout = self.apl_layout
        chunks = self.apl_inner.tokenize_with_weights(text, True, **kwargs)
        parts = [(user_part(chunk, layout), len(chunk) + len(layout.rows)) for chunk in chunks]
        if len(parts) > 1 and layout.overflow != "chunk":
            items = [item for part, _ in parts for item in part]
            if layout.overflow == "trim":
                _log.warning("The prompt has %d tokens; the last %d are left out: %d fit beside the prefix.",
                             len(items), len(items) - layout.room, layout.room)
            parts = [(items, layout.length)]
        placed = [layout.place(part, length, layout.overflow) for part, length in parts]
        whole = [[entry if isinstance(entry, tuple) else (entry, 1.0, 0) for entry in chunk] for chunk in placed]
        return whole if return_word_ids else [[entry[:2] for entry in chunk] for chunk in whole]

    def untokenize(self, token_weight_pair: Sequence[tuple]) -> list[tuple]:
        """(entry, its text); the host's own knows no tensors and fails at the first."""
        names = self.apl_plain.inv_vocab
        return [(entry, "" if torch.is_tensor(entry[0]) else names[entry[0]]) for entry in token_weight_pair]


def user_part(chunk: Sequence[tuple], layout: Layout) -> list[tuple]:
    """The entries between the start and the end token of a chunk that the host's tokenizer made."""
    end = _index_of(layout.end, [entry[0] for entry in chunk])
    return list(chunk[1 : end if end > 0 else len(chunk)])


def _wrapped(tokenizer: Any, layout: Layout) -> Any:
    inner = copy.copy(tokenizer)
    inner.max_length = layout.length - len(layout.rows)
    inner.apl_bare = True  # a host in enforced mode puts its prefix into every tokenizer but these
    outer = copy.copy(tokenizer)
    kind = type(tokenizer)
    outer.__class__ = type(f"Anonymizing{kind.__name__}", (Anonymizing, kind), {})
    outer.apl_layout, outer.apl_plain, outer.apl_inner = layout, tokenizer, inner
    return outer


def _guarded(process_tokens: Callable[..., Any], layout: Layout, encoder: str) -> Callable[..., Any]:
    def guarded(tokens: Sequence[Sequence[Any]], *args: Any, **kwargs: Any) -> Any:
        return process_tokens([carry(row, layout, encoder) for row in tokens], *args, **kwargs)

    guarded.apl_plain = process_tokens  # type: ignore[attr-defined]
    guarded.apl_layout = layout  # type: ignore[attr-defined]
    return guarded


def carry(row: Sequence[Any], layout: Layout, encoder: str) -> list[Any]:
    """A row of tokens with the prefix in it, put in where it was missing; of the same length."""
    row = list(row)
    if layout.carries(row):
        return row
    end = _index_of(layout.end, row)
    if end < 1 or _index_of(layout.start, row) != 0:
        raise PlacementError(
            f"A node gave {encoder} tokens without a start and an end, so the anonymization prompt has no place there.",
            "Encode the text with CLIP Text Encode, or with a node that starts from the CLIP's own tokenizer.",
            field="tokens",
        )
    room = capacity(len(layout.rows), len(row))
    if end - 1 > room and layout.overflow != "trim":
        raise PlacementError(
            f"A node gave {encoder} a chunk of {end - 1} tokens that it made by itself; {room} fit beside the "
            "anonymization prompt.",
            f"Shorten the text to {room} tokens a chunk, set overflow to trim, or encode it with CLIP Text Encode.",
            field="tokens",
        )
    return layout.place(row[1:end], len(row), "trim")


def _encoders(clip: Any) -> dict[str, tuple[Any, Any]]:
    """Name to (tokenizer, text encoder) of everything in the CLIP that reads text; None where one is missing."""
    tokenizers = {name: value for name, value in vars(clip.tokenizer).items()
                  if hasattr(value, "tokenize_with_weights") and hasattr(value, "max_length")}
    models = {name: value for name, value in clip.cond_stage_model.named_children()
              if hasattr(value, "process_tokens")}
    return {name: (tokenizers.get(name), models.get(name)) for name in sorted({*tokenizers, *models})}


def _plain(tokenizer: Any) -> Any:
    return tokenizer.apl_plain if isinstance(tokenizer, Anonymizing) else tokenizer


def _refuse(message: str, hint: str) -> ModelError:
    return ModelError(message, hint, field="clip")


def fitting_layouts(clip: Any, prefix: AnonymizationPrompt, overflow: str = "chunk") -> dict[str, Layout]:
    """The layout of every text encoder of a CLIP, by the encoder's name ("clip_l", "clip_g", "clip_h").

    Raises:
        ModelError: a text encoder has no vectors in the prefix, is of another width or of another kind.
        PlacementError: the prefix leaves no room, or `overflow` is unknown.
    """
    if overflow not in OVERFLOWS:
        raise PlacementError(f"overflow is {overflow!r}.", f"Use one of: {', '.join(OVERFLOWS)}.", field="overflow")
    if getattr(clip, "tokenizer", None) is None or getattr(clip, "cond_stage_model", None) is None:
        raise _refuse("There is no text encoder in this CLIP.", "Connect the CLIP output of a checkpoint loader.")
    found = _encoders(clip)
    if not found:
        raise _refuse("This model has no text encoder that an anonymization prompt can be put into.",
                      "Use a Stable Diffusion 1.x, 2.x or XL model.")
    keys = _keys(prefix, list(found))
    return {name: _layout(name, *found[name], prefix, key, overflow) for name, key in keys.items()}


def _keys(prefix: AnonymizationPrompt, names: list[str]) -> dict[str, str]:
    """Encoder name to the prefix tensor that belongs to it. Every encoder needs one, every tensor an encoder."""
    keys = {name: name if name in prefix.tensors else "emb_params" if name in _SINGLE else "" for name in names}
    lacking = [name for name, key in keys.items() if key not in prefix.tensors]
    shown, held = ", ".join(names), ", ".join(sorted(prefix.tensors))
    if lacking:
        raise _refuse(
            f"This model reads text with {shown}; {prefix.name} ({prefix.family}: {held}) has nothing for "
            f"{', '.join(lacking)}.",
            "A text encoder without it would bring the likeness back. Load a prefix made for this model's family; "
            "models with T5 or a language model as text encoder are not supported.",
        )
    # The refiner reads with clip_g alone; everything else with fewer encoders is another family.
    if set(prefix.tensors) - set(keys.values()) and names != ["clip_g"]:
        raise _refuse(f"{prefix.name} was made for a model with {held}; this one reads text with {shown} only.",
                      f"Load a prefix made for this model's family; this one is for {prefix.family}.")
    return keys


def _layout(
    name: str, tokenizer: Any, model: Any, prefix: AnonymizationPrompt, key: str, overflow: str
) -> Layout:
    if tokenizer is None or model is None:
        raise _refuse(f"{name} has no {'tokenizer' if tokenizer is None else 'text encoder'} in this CLIP.",
                      "Load the whole checkpoint again.")
    tokenizer = _plain(tokenizer)
    special = getattr(tokenizer, "start_token", None), getattr(tokenizer, "end_token", None)
    if None in special or getattr(tokenizer, "pad_left", False) or getattr(model, "enable_attention_masks", False):
        raise _refuse(f"{name} of this model is not a text encoder of Stable Diffusion 1.x, 2.x or XL.",
                      "Anonymization prompts exist for those families only.")
    vectors = prefix.vectors(key)
    width = int(model.transformer.get_input_embeddings().weight.shape[-1])
    if vectors.shape[1] != width:
        raise _refuse(f"{prefix.name} has vectors of width {vectors.shape[1]} for {name}; this model's are {width} "
                      "wide.", f"Load a prefix made for this model's family; this one is for {prefix.family}.")
    capacity(prefix.num_tokens, tokenizer.max_length)
    return Layout(tuple(vectors.unbind(0)), special[0], special[1], tokenizer.pad_token, tokenizer.max_length,
                  prefix.meta.placement, overflow)


def anonymize(clip: Any, prefix: AnonymizationPrompt, overflow: str = "chunk") -> Any:
    """A clone of the CLIP that puts the prefix into whatever it encodes; the given CLIP stays as it is.

    Twice is once; another prefix takes the place of an earlier one, with a warning. LoRAs, hooks, clip skip and other
    packs' patches on the CLIP stay.

    Raises:
        ModelError: the prefix does not fit the model's text encoders.
        PlacementError: the prefix leaves no room, or `overflow` is unknown.
    """
    layouts = fitting_layouts(clip, prefix, overflow)
    anonymized = clip.clone()
    outer = copy.copy(anonymized.tokenizer)
    for name, layout in layouts.items():
        tokenizer = getattr(outer, name)
        if isinstance(tokenizer, Anonymizing) and not _same_rows(tokenizer.apl_layout, layout):
            _log.warning("%s takes the place of the anonymization prompt that this CLIP carried.", prefix.name)
        setattr(outer, name, _wrapped(_plain(tokenizer), layout))
        patched = f"{name}.process_tokens"
        current = anonymized.patcher.get_model_object(patched)
        anonymized.patcher.add_object_patch(patched, _guarded(_unguarded(current), layout, name))
    anonymized.tokenizer = outer
    _log.info("Anonymization prompt %s (%s) applied: %d tokens in every chunk of %s.", prefix.name, prefix.family,
              prefix.num_tokens, ", ".join(layouts))
    return anonymized


def _same_rows(one: Layout, other: Layout) -> bool:
    return len(one.rows) == len(other.rows) and all(map(_same, one.rows, other.rows))


def _unguarded(process_tokens: Callable[..., Any]) -> Callable[..., Any]:
    return getattr(process_tokens, "apl_plain", process_tokens)


def layouts_of(clip: Any) -> Mapping[str, Layout]:
    """The layouts of a CLIP that carries a prefix, by encoder; empty for a plain one."""
    return {name: tokenizer.apl_layout for name, tokenizer in vars(clip.tokenizer).items()
            if isinstance(tokenizer, Anonymizing)}
