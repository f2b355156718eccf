"""The prefix in every row that a text encoder reads: put in by the tokenizer, completed and verified further down."""

from __future__ import annotations

import copy
import logging
import numbers
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...apl_core.errors import PlacementError
from ..clip_patch import Layout, carry, user_part
from .derived import Workings
from .guard import Encoder, Guard, width_of

_EMBEDDING = re.compile(r"embedding:\s*([^\s,:()\[\]<>]+)")
_PARALLEL = 0.99
_log = logging.getLogger("apl")


def hooked_tokenize(guard: Guard) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For `SDTokenizer.tokenize_with_weights`: chunks of 75 - m words, the prefix in each."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def tokenize_with_weights(self: Any, text: str, return_word_ids: bool = False, *args: Any,
                                  **kwargs: Any) -> Any:
            _check_embeddings(guard, text)
            encoder = guard.encoder_of(self, self.embedding_size, self.embedding_key)
            if getattr(self, "apl_bare", False) or encoder.problem:  # the encoder itself says no, in `process_tokens`
                return original(self, text, return_word_ids, *args, **kwargs)
            if agreements := guard.policy.consent.match(text):
                chunks = original(self, text, return_word_ids, *args, **kwargs)
                row = [entry[0] for entry in chunks[0]]
                if len(chunks) == 1 and all(type(token) is int for token in row):
                    guard.agree(row)
                    guard.count("consented")
                    _log.info("A prompt names only persons who agreed (%s): no prefix.", ", ".join(agreements))
                    return chunks
            layout = guard.layout(encoder, self.start_token, self.end_token, self.pad_token, self.max_length)
            inner = copy.copy(self)
            inner.max_length -= len(layout.rows)
            inner.apl_bare = True
            return [_with_prefix(chunk, layout, return_word_ids)
                    for chunk in original(inner, text, True, *args, **kwargs)]

        return tokenize_with_weights

    return make


def _with_prefix(chunk: Sequence[tuple], layout: Layout, word_ids: bool) -> list[tuple]:
    placed = layout.place(user_part(chunk, layout), len(chunk) + len(layout.rows), "error")
    whole = [entry if isinstance(entry, tuple) else (entry, 1.0, 0) for entry in placed]
    return whole if word_ids else [entry[:2] for entry in whole]


def _check_embeddings(guard: Guard, text: Any) -> None:
    """Refuse `embedding:NAME` where the deny-list has "embedding:NAME"."""
    if not guard.policy.deny or not isinstance(text, str) or "embedding:" not in text:
        return
    for match in _EMBEDDING.finditer(text):
        if guard.policy.denies(f"embedding:{match[1]}"):
            guard.count("denied")
            raise guard.refuse(f"This server does not offer the embedding {match[1]}.", "Leave it out of the prompt.",
                               "text")


def hooked_process_tokens(guard: Guard) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For `SDClipModel.process_tokens`, where rows of tokens from anywhere become vectors."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def process_tokens(self: Any, tokens: Sequence[Sequence[Any]], *args: Any, **kwargs: Any) -> Any:
            guard.check()
            encoder = guard.encoder_of(self, width_of(self))
            if guard.is_plain or guard.unprotected(encoder):
                return original(self, tokens, *args, **kwargs)
            special = self.special_tokens
            layout = guard.layout(encoder, special["start"], special["end"], special["pad"], self.max_length)
            agreed = frozenset(at for at, row in enumerate(tokens) if guard.is_agreed(row))
            rows = [list(row) if at in agreed else _carrying(guard, row, layout, encoder)
                    for at, row in enumerate(tokens)]
            result = original(self, rows, *args, **kwargs)
            if agreed:
                guard.excuse(self.transformer.text_model, result[0], agreed)
            return result

        return process_tokens

    return make


def _carrying(guard: Guard, row: Sequence[Any], layout: Layout, encoder: Encoder) -> list[Any]:
    row = list(row)
    if not row or not isinstance(row[0], numbers.Integral) or row[0] != layout.start:
        # Attention looks back only: what stood before the prefix would never see it.
        raise guard.refuse(f"A node gave {encoder.key} tokens that do not begin with the start token.",
                           "Encode the text with CLIP Text Encode.", "tokens")
    if not layout.carries(row):
        try:
            row = carry(row, layout, encoder.key)
        except PlacementError as error:
            raise guard.refuse(error.message, "Shorten the text, or encode it with CLIP Text Encode.",
                               "tokens") from error
        guard.count("inserted")
    _refuse_copies(guard, row[len(layout.rows) + 1 :], layout)
    return row


def _refuse_copies(guard: Guard, rest: Sequence[Any], layout: Layout) -> None:
    """Vectors of the prefix, or their mirror images, among the user's words: an attempt to undo it."""
    for entry in rest:
        if isinstance(entry, numbers.Integral):
            continue
        data = entry.get("data") if isinstance(entry, dict) else entry
        if not torch.is_tensor(data) or data.shape[-1] != layout.rows[0].numel():
            continue
        vectors = data.detach().reshape(-1, data.shape[-1]).to("cpu", torch.float32)
        if not bool(torch.isfinite(vectors).all()):
            raise guard.refuse("An embedding in the prompt holds NaN or infinity.", "Leave it out.", "tokens")
        prefix = torch.nn.functional.normalize(torch.stack(layout.rows), dim=-1)
        if float((torch.nn.functional.normalize(vectors, dim=-1) @ prefix.T).abs().max()) > _PARALLEL:
            raise guard.refuse("An embedding in the prompt repeats the anonymization prompt.",
                               "Leave it out: this server puts it into every prompt by itself.", "tokens")


def hooked_forward(guard: Guard, workings: Workings) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For `CLIPTextModel_.forward`: nothing enters the transformer that does not carry the prefix exactly."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: Any, input_tokens: Any = None, attention_mask: Any = None, embeds: Any = None,
                    *args: Any, **kwargs: Any) -> Any:
            agreed = verify(guard, self, attention_mask, embeds)
            outputs = original(self, input_tokens, attention_mask, embeds, *args, **kwargs)
            workings.record(self, outputs, agreed)
            return outputs

        return forward

    return make


def verify(guard: Guard, model: Any, attention_mask: Any, embeds: Any) -> frozenset[int]:
    """Raises `PolicyError` unless every row of `embeds` [rows, positions, width] may be read by this text encoder.

    Returns the rows that may go without the prefix since the persons they name agreed.
    """
    width = int(model.embeddings.position_embedding.weight.shape[-1])
    if guard.is_plain:
        guard.count("plain_negative_rows", len(embeds))
        return frozenset()
    allowed = guard.matrices(model, width, embeds.device if torch.is_tensor(embeds) else torch.device("cpu"))
    tag = getattr(model, "apl_encoder", None)
    if (not allowed or (isinstance(tag, Encoder) and tag.problem)) and guard.unprotected(
        tag or Encoder("", "", width, "A text encoder without an anonymization prompt was called.")
    ):
        guard.count("unprotected_rows", len(embeds) if torch.is_tensor(embeds) else 1)
        return frozenset()
    if torch.is_tensor(embeds) and embeds.ndim == 3 and embeds.shape[-1] == width:
        excused = guard.excused(model, embeds)
        for matrix in allowed:
            m = len(matrix)
            same = (embeds[:, 1 : 1 + m] == matrix).flatten(1).all(1) if embeds.shape[1] > m + 1 else None
            if same is None or not (bool(same.all()) or all(bool(ok) or at in excused for at, ok in enumerate(same))):
                continue
            if attention_mask is not None and not bool((attention_mask.reshape(len(embeds), -1)[:, : 1 + m] > 0).all()):
                continue
            guard.count("verified_rows", len(embeds) - len(excused))
            return excused
    raise guard.refuse("Text reached the text encoder without the anonymization prompt of this server.",
                       "Encode the text with CLIP Text Encode.", "embeds")


def hooked_clip_init(guard: Guard) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For `CLIP.__init__`: every CLIP that is loaded learns which prefix is its own."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            if getattr(self, "cond_stage_model", None) is not None:  # a clone gets its model only afterwards
                guard.adopt(self)

        return __init__

    return make
