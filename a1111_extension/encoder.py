"""The prefix in the host's text encoders: hooks on the encoders' classes, opened for one encode at a time.

Text -> the host's chunks -> chunks with the prefix -> the rows that the transformer gets, looked at once more.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch

from ..apl_core.errors import ModelError, PlacementError, PolicyError
from .chunks import NAME, Injection, clipped
from .hooks import Hooks
from .jobs import JOBS, Choice
from .models import embedding_layer, tensor_for

SHAPES = (
    # module, class, what an encode enters by, the embedding layer's module and class, textual inversions' module
    ("modules.sd_hijack_clip", "TextConditionalModel", "forward", "modules.sd_hijack", "EmbeddingsWithFixes",
     "modules.textual_inversion.textual_inversion"),
    ("modules.sd_hijack_clip", "FrozenCLIPEmbedderWithCustomWordsBase", "forward", "modules.sd_hijack",
     "EmbeddingsWithFixes", "modules.textual_inversion.textual_inversion"),
    ("backend.text_processing.classic_engine", "ClassicTextProcessingEngine", "__call__",
     "backend.text_processing.classic_engine", "CLIPEmbeddingForTextualInversion",
     "backend.text_processing.textual_inversion"),
)
_NEEDED = ("tokenize_line", "empty_chunk", "process_tokens")
_local = threading.local()
_log = logging.getLogger("apl")


class Scope:
    """One encode: the injection, and the fixes of the chunk that is on its way to the embedding layer."""

    def __init__(self, injection: Injection, *, counting: bool = False) -> None:
        self.injection, self.counting = injection, counting
        self.chunking = False


def scope() -> Scope | None:
    """This thread's. Another thread may count tokens with the same encoder meanwhile."""
    return getattr(_local, "scope", None)


@contextlib.contextmanager
def opened(new: Scope | None) -> Iterator[None]:
    """Hold a scope in this thread; None closes it for what runs inside."""
    before = scope()
    _local.scope = new
    try:
        yield
    finally:
        _local.scope = before


@contextlib.contextmanager
def _chunking(held: Scope) -> Iterator[None]:
    held.chunking = True
    try:
        yield
    finally:
        held.chunking = False


def _device() -> Any:
    """Where the host keeps embeddings; Forge moves them by itself."""
    try:
        from modules import devices
    except ImportError:
        return "cpu"
    return getattr(devices, "device", None) or "cpu"


_injections: dict[tuple[str, str, str, str], Injection] = {}


def injection_for(choice: Choice, encoder: Any) -> Injection:
    """The prefix made ready for an encoder; kept, since every chunk of every prompt asks.

    Raises:
        ModelError: the prefix does not fit the encoder.
    """
    tensor = tensor_for(choice.prefix, encoder)
    key, device = embedding_layer(encoder)[0], _device()
    cached = (choice.digest, tensor, key, str(device))
    if cached not in _injections:
        if len(_injections) > 32:
            _injections.clear()
        _injections[cached] = Injection(choice.prefix, tensor, key, device)
    return _injections[cached]


def wanted(texts: Any) -> Choice | None:
    """The prefix that these texts must carry. Only a prompt that is labelled as negative can go without.

    Raises:
        ModelError, PolicyError: enforced, and there is none for the model.
    """
    if JOBS.suspended and all(text == "" for text in texts):
        return None
    choice, known = JOBS.current(), JOBS.conditioning
    if choice is None:
        return None
    if getattr(texts, "is_negative_prompt", False) and not known.negative:
        return None
    return None if known.consented else choice


def _encode(original: Any, encoder: Any, texts: Any) -> Any:
    held = scope()
    if held is not None and not held.counting:  # entered already, through the class above
        return original(encoder, texts)
    choice = wanted(texts)
    if choice is None:
        with opened(None):
            return original(encoder, texts)
    with opened(Scope(injection_for(choice, encoder))):
        result = original(encoder, texts)
    _unlist(encoder)
    return result


def _unlist(encoder: Any) -> None:
    """Take the prefix out of Forge's list of textual inversions in the infotext: it is no word of the prompt."""
    listed = getattr(sys.modules.get(type(encoder).__module__), "last_extra_generation_params", None)
    if listed and "TI" in listed:
        kept = [name for name in listed["TI"].split(", ") if not name.startswith(NAME)]
        listed["TI"] = ", ".join(kept)
        if not kept:
            del listed["TI"]


def _encode_new_way(original: Any, encoder: Any, texts: Any) -> Any:
    """The same for the class that may take the host's old emphasis code, which knows nothing of chunks.

    Its parent's way is taken instead: same tokens, same weights, but for old-style nested brackets.
    """
    from modules import shared
    from modules.sd_hijack_clip import TextConditionalModel

    if getattr(shared.opts, "use_old_emphasis_implementation", False) and wanted(texts) is not None:
        return _encode(lambda this, lines: _forced_new(TextConditionalModel.forward, this, lines), encoder, texts)
    return _encode(original, encoder, texts)


def _forced_new(forward: Any, encoder: Any, texts: Any) -> Any:
    from modules import shared

    # The OpenCLIP encoders assert that the option is off, though they never looked at it.
    data = shared.opts.data
    before = data.get("use_old_emphasis_implementation")
    data["use_old_emphasis_implementation"] = False
    try:
        return forward(encoder, texts)
    finally:
        if before is None:
            data.pop("use_old_emphasis_implementation", None)
        else:
            data["use_old_emphasis_implementation"] = before


def _tokenize_line(original: Any, encoder: Any, line: str) -> Any:
    held = scope()
    if held is None or held.chunking:
        return original(encoder, line)
    with _chunking(held):
        chunks, count = original(encoder, line)
    if held.counting:
        return chunks, count
    return [_carried(held, encoder, chunk) for chunk in chunks], count


def _empty_chunk(original: Any, encoder: Any) -> Any:
    held = scope()
    if held is None or held.chunking or held.counting:
        return original(encoder)
    with _chunking(held):
        chunk = original(encoder)
    return _carried(held, encoder, chunk)


def _carried(held: Scope, encoder: Any, chunk: Any) -> Any:
    fix = _fix_class(type(encoder))
    return held.injection.carry(chunk, encoder.id_start, encoder.id_end, fix)


def _fix_class(kind: type) -> Any:
    for base in kind.__mro__[:-1]:
        found = getattr(importlib.import_module(base.__module__), "PromptChunkFix", None)
        if found is not None:
            return found
    raise ModelError(f"The text encoder {kind.__name__} has no PromptChunkFix.", "This host is not supported.",
                     field="model")


def _fixes_of(encoder: Any) -> Any:
    holder = getattr(encoder, "hijack", None) or getattr(encoder, "embeddings", None)
    return getattr(holder, "fixes", None)


def _process_tokens(original: Any, encoder: Any, tokens: Any, multipliers: Any) -> Any:
    held = scope()
    if held is None or held.counting:
        return original(encoder, tokens, multipliers)
    fixes = _fixes_of(encoder)
    if not fixes or len(fixes) != len(tokens) or any(held.injection.missing_in(each) for each in fixes):
        raise _refused("A chunk of the prompt reached the text encoder without the anonymization prompt.")
    before = JOBS.counters["verified_rows"]
    result = original(encoder, tokens, multipliers)
    if JOBS.counters["verified_rows"] - before < len(tokens):
        raise _refused("The text encoder did not take its rows through the host's embedding layer.")
    return result


def _embed(original: Any, layer: Any, input_ids: Any) -> Any:
    held = scope()
    if held is None or held.counting:
        return original(layer, input_ids)
    fixes = layer.embeddings.fixes
    embedded = original(layer, input_ids)
    if not held.injection.verified(embedded, fixes):
        raise _refused("Rows without the anonymization prompt were about to enter the text encoder.")
    JOBS.counters["verified_rows"] += int(embedded.shape[0]) if torch.is_tensor(embedded) else 0
    return embedded


def _refused(what: str) -> PlacementError | PolicyError:
    JOBS.counters["refused"] += 1
    hint = "Nothing was generated. Another extension replaces the text encoding: turn it off."
    return (PolicyError if JOBS.enforced else PlacementError)(what, hint, field="tokens")


def _find_embedding(original: Any, database: Any, tokens: Any, position: int) -> Any:
    embedding, length = original(database, tokens, position)
    held = scope()
    if held is None or not held.chunking or embedding is None or embedding.vectors <= held.injection.room:
        return embedding, length
    if not held.counting:
        _log.warning("The embedding %s has %d vectors; %d fit beside the anonymization prompt, the rest is left out.",
                     embedding.name, embedding.vectors, held.injection.room)
    return clipped(embedding, held.injection.room), length


def _room_property() -> property:
    """`chunk_length` as a property over the instance's own value: smaller while this thread cuts a line."""

    def read(encoder: Any) -> int:
        held = scope()
        full = encoder.__dict__["chunk_length"]
        # While tokens are counted, the host asks for the length outside of `tokenize_line` too.
        return full - held.injection.count if held is not None and (held.chunking or held.counting) else full

    def write(encoder: Any, value: int) -> None:
        encoder.__dict__["chunk_length"] = value

    return property(read, write)


def patch_encoders(hooks: Hooks) -> list[str]:
    """Place the hooks on every known encoder class of this host. Returns the classes' names.

    Raises:
        ModelError: there is none, or a known class has not the methods it is known by.
    """
    found = []
    for module_name, class_name, entry, layer_module, layer_class, inversions in SHAPES:
        try:
            kind = getattr(importlib.import_module(module_name), class_name)
        except (ImportError, AttributeError):
            continue
        lacking = [name for name in (*_NEEDED, entry) if not hasattr(kind, name)]
        if lacking:
            raise ModelError(f"The host's {class_name} has no {lacking[0]}.", "This version of the host is not known: "
                             "update the extension.", field="host")
        is_base = "chunk_length" not in {name for base in kind.__mro__[1:] for name in vars(base)}
        hooks.wrap(kind, entry, _encode_new_way if class_name.startswith("Frozen") else _encode)
        if is_base:
            hooks.wrap(kind, "tokenize_line", _tokenize_line)
            hooks.wrap(kind, "empty_chunk", _empty_chunk)
            hooks.wrap(kind, "process_tokens", _process_tokens)
            if not isinstance(vars(kind).get("chunk_length"), property):
                hooks.set(kind, "chunk_length", _room_property())
        hooks.wrap(getattr(importlib.import_module(layer_module), layer_class), "forward", _embed)
        hooks.wrap(importlib.import_module(inversions).EmbeddingDatabase, "find_embedding_at_position",
                   _find_embedding)
        found.append(class_name)
    if not found:
        raise ModelError("None of the text encoders that this extension knows is in this host.",
                         "AUTOMATIC1111, its forks and Forge are supported.", field="host")
    return found
