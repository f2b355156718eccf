"""tau([AP] (+) c) of the paper's equation 3: prompts, with the prefix ahead, to what the UNet attends to.

The reference that every host is held to: prefix rows take the place of token embeddings, before position embeddings
are added; where they stand is `apl_core.placement.plan`'s business alone. transformers' own modules do the rest.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apl_core.errors import ConfigError, ModelError, PlacementError, PrefixFileError
from apl_core.families import family_named
from apl_core.placement import LENGTH, Chunk, plan
from apl_core.prefix import AnonymizationPrompt

_SUPPORTED = ("sd1", "sdxl")
_HARMLESS = 0
"""Token id that stands in for a prefix row: below every special id, so that no search for EOS can find it."""

Vectors = Mapping[str, Tensor] | AnonymizationPrompt


@dataclass(frozen=True)
class Encoded:
    """Prompts as the UNet sees them.

    Attributes:
        states: float [N, 77 * chunks, W], cross-attention states (SDXL: CLIP-L's and CLIP-G's side by side).
        pooled: float [N, P], CLIP-G's projected EOS state of the first chunk; None but for SDXL.
    """

    states: Tensor
    pooled: Tensor | None = None


def _inner(encoder: nn.Module) -> nn.Module:
    """The module with embeddings and layers: transformers 5 flattened CLIPTextModel, not its projecting sister."""
    return getattr(encoder, "text_model", encoder)


@contextlib.contextmanager
def _rows_replaced(embedding: nn.Module, rows: Tensor, vectors: Tensor | None) -> Iterator[Tensor]:
    """Ids to call the encoder with, while its token embedding gives `vectors[i]` wherever `rows` is -(i + 1).

    rows: int64 [B, L], token ids or prefix rows as `placement.Chunk.rows` has them; vectors: [m, width] or None.
    """
    inserted = rows < 0
    ids = rows.masked_fill(inserted, _HARMLESS)
    if vectors is None:
        yield ids
        return
    index = (-rows - 1).clamp(min=0)

    def replace(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        # `where` rather than an in-place write: gradient reaches the vectors, and only them
        return torch.where(inserted[..., None], vectors.to(output)[index], output)

    handle = embedding.register_forward_hook(replace)
    try:
        yield ids
    finally:
        handle.remove()


class TextStack:
    """Tokenizers and text encoders of one model, frozen.

    Args:
        family: "sd1" or "sdxl".
        tokenizers, encoders: transformers' CLIPTokenizer and CLIPTextModel (CLIP-G: CLIPTextModelWithProjection) by
            the tensor keys of prefix files: "emb_params", or "clip_l" and "clip_g". The encoders are set to eval mode
            and frozen in place.

    Attributes:
        plain_pooled: SDXL: take the pooled state of the prompt without the prefix; False as hosts do. CLIP-G reads it
            at EOS, behind the prefix, so that one moves too.

    Raises:
        ModelError: the family is not supported here, or the encoders are not those of the family.
    """

    def __init__(self, family: str, tokenizers: Mapping[str, Any], encoders: Mapping[str, nn.Module]) -> None:
        if family not in _SUPPORTED:
            raise ModelError(f"family is {family!r}; text encoders of {' and '.join(_SUPPORTED)} are supported.",
                             "Use a Stable Diffusion 1.x or XL model.", field="family")
        keys = tuple(family_named(family).widths)
        for name, given in (("tokenizers", tokenizers), ("encoders", encoders)):
            if set(given) != set(keys):
                found = ", ".join(sorted(given)) or "nothing"
                raise ModelError(f"{name} has {found}; {family} needs {', '.join(keys)}.",
                                 "Name them as prefix files do.", field=name)
        self.family, self.plain_pooled = family, False
        self._known: dict[tuple[str, str], list[int]] = {}
        self._words: dict[str, list[int]] = {}
        self.tokenizers = {key: tokenizers[key] for key in keys}
        self.encoders = {key: encoders[key].eval().requires_grad_(False) for key in keys}
        for key, encoder in self.encoders.items():
            positions = encoder.config.max_position_embeddings
            if positions != LENGTH:
                raise ModelError(f"The text encoder {key} has {positions} positions, not {LENGTH}.",
                                 "Use a model with CLIP text encoders.", field=key)
            rows, eos = len(_inner(encoder).embeddings.token_embedding.weight), self.tokenizers[key].eos_token_id
            if eos is None or eos >= rows:
                raise ModelError(f"The tokenizer of {key} ends prompts with {eos}; its encoder knows {rows} tokens.",
                                 "Use the tokenizer that belongs to the model.", field=key)
        if family == "sdxl" and not hasattr(self.encoders["clip_g"], "text_projection"):
            raise ModelError("The text encoder clip_g has no projection for pooled states.",
                             "Load it as CLIPTextModelWithProjection.", field="clip_g")

    @property
    def widths(self) -> dict[str, int]:
        """Token-embedding width by tensor key."""
        return {key: self.embedding_table(key).shape[1] for key in self.encoders}

    def embedding_table(self, key: str | None = None) -> Tensor:
        """Token embeddings [vocabulary, width] of one encoder; `key` may be left out where there is only one.

        Raises:
            ModelError: there is no such encoder, or several and no key.
        """
        if key is None and len(self.encoders) == 1:
            key = next(iter(self.encoders))
        if key not in self.encoders:
            raise ModelError(
                f"The model has no text encoder {key!r}." if key else "The model has several text encoders.",
                f"Ask for one of: {', '.join(self.encoders)}.", field="key",
            )
        return _inner(self.encoders[key]).embeddings.token_embedding.weight

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text` without BOS, EOS, padding and truncation; SDXL: those of CLIP-L's tokenizer."""
        return self._ids(text, next(iter(self.tokenizers)))

    def remember(self, ids: Mapping[str, Sequence[int]]) -> None:
        """Token ids of texts, as `tokenize` gives them, that need not be found again.

        Texts with a learned word are passed over: the ids of such words depend on what was learned before them.
        """
        first = next(iter(self.tokenizers))
        self._known |= {(text, first): list(of_text) for text, of_text in ids.items()
                        if not any(word in text for word in self._words)}

    def learn(self, words: Mapping[str, Tensor]) -> None:
        """New words with vectors of their own, such as textual inversion finds; known ones are left as they are.

        words: such as "<face-1a2b3c4d>", to float [k, width] in token-embedding space; k tokens stand for the word.

        Raises:
            ModelError: the model has several text encoders. PrefixFileError: the vectors have another width.
        """
        table = self.embedding_table()
        embedding = next(iter(self.encoders.values())).get_input_embeddings()
        for word, vectors in words.items():
            if word in self._words:
                continue
            if vectors.ndim != 2 or vectors.shape[1] != table.shape[1]:
                raise PrefixFileError(f"The vectors of {word} are {list(vectors.shape)}; the model's are "
                                      f"{table.shape[1]} wide.", "Learn the word on this model.", field="words")
            table = torch.cat([table.detach(), vectors.detach().to(table)])
            self._words[word] = list(range(len(table) - len(vectors), len(table)))
        embedding.weight = nn.Parameter(table, requires_grad=False)
        embedding.num_embeddings = len(table)
        self._known = {place: ids for place, ids in self._known.items() if not any(word in place[0] for word in words)}

    def _ids(self, text: str, key: str) -> list[int]:
        if (known := self._known.get((text, key))) is not None:
            return list(known)
        if self._words:
            parts = re.split(f"({'|'.join(map(re.escape, self._words))})", text)
            if len(parts) > 1:
                return [i for part in parts if part.strip() for i in self._words.get(part) or self._ids(part, key)]
        # verbose=False: a prompt of several chunks is no reason for the tokenizer's warning about its length
        return list(self.tokenizers[key](text, add_special_tokens=False, truncation=False, verbose=False).input_ids)

    def chunks_of(self, prompt: str, num_prefix: int = 0, *, overflow: str = "chunk") -> int:
        """Runs of the text encoder that a prompt takes beside `num_prefix` rows. Raises PlacementError."""
        # the longer of SDXL's two: CLIP-G's tokenizer takes every "!" of a prompt for its padding, one by one
        return len(next(iter(self._plans([prompt], num_prefix, overflow=overflow).values()))[0])

    def encode(
        self,
        prompts: Sequence[str],
        vectors: Vectors | None = None,
        *,
        position: str | None = None,
        clip_skip: int = 1,
        chunks: int | None = None,
        overflow: str = "chunk",
    ) -> Encoded:
        """Encode prompts, with the prefix in every chunk where there is one (paper sec. 3.3).

        Args:
            prompts: N texts.
            vectors: tensor key to float [m, width] in token-embedding space; gradient flows to them, nothing else.
            position: as in `placement.plan`; by default a loaded prefix's own placement, else "prefix".
            clip_skip: layers counted from the end, as the web interfaces do. SD1: 1 is the last layer; the final norm
                follows any. SDXL: 1 is the penultimate layer, without norm.
            chunks: pad every prompt with empty chunks (prefix included) to so many; by default to the longest of N.
            overflow: as in `placement.plan`.

        Raises:
            PrefixFileError: a tensor is missing, left over, or of the wrong width or number of rows.
            PlacementError: a prompt does not fit.
            ConfigError: clip_skip is out of range, or there is no prompt.
        """
        if isinstance(prompts, str) or not prompts:
            raise ConfigError(f"prompts is {prompts!r}.", "Give a list of at least one text.", field="prompts")
        layers = min(encoder.config.num_hidden_layers for encoder in self.encoders.values())
        if isinstance(clip_skip, bool) or not isinstance(clip_skip, int) or not 1 <= clip_skip <= layers:
            raise ConfigError(f"clip_skip is {clip_skip!r}; this model allows 1 to {layers}.", "Use 1 for none.",
                              field="clip_skip")
        if position is None:
            position = vectors.meta.placement if isinstance(vectors, AnonymizationPrompt) else "prefix"
        given = self._checked(vectors)
        m = self.num_prefix(given or None)
        plans = self._plans(prompts, m, chunks, position=position, overflow=overflow)
        found = [self._run(key, plans[key], given.get(key), clip_skip) for key in self.encoders]
        pooled = found[-1][1] if self.family == "sdxl" else None
        if pooled is not None and given and self.plain_pooled:
            pooled = self._run("clip_g", self._plans(prompts, 0, overflow=overflow)["clip_g"], None, clip_skip)[1]
        return Encoded(torch.cat([states for states, _ in found], dim=-1), pooled)

    def num_prefix(self, vectors: Vectors | None) -> int:
        """m, the rows that a prefix takes of every chunk; 0 for None. Raises PrefixFileError when it does not fit."""
        return len(next(iter(self._checked(vectors).values()))) if vectors is not None else 0

    def _checked(self, vectors: Vectors | None) -> dict[str, Tensor]:
        """The tensors of a prefix, once they fit this model; none for None."""
        if vectors is None:
            return {}
        tensors = dict(vectors.tensors if isinstance(vectors, AnonymizationPrompt) else vectors)
        wanted = self.widths
        shown = ", ".join(f"{key}: {width}" for key, width in wanted.items())
        way_out = f"Use a prefix made for this model ({shown})"
        for key in (*tensors, *wanted):
            if key not in wanted:
                raise PrefixFileError(f"The prefix has a tensor {key}, for which this model has no text encoder.",
                                      f"{way_out}.", field=key)
            if key not in tensors:
                raise PrefixFileError(f"The prefix has no tensor {key}.",
                                      f"{way_out}, or carry it over with `apl transfer`.", field=key)
            shape = tuple(tensors[key].shape)
            if len(shape) != 2 or shape[0] < 1 or shape[1] != wanted[key]:
                raise PrefixFileError(
                    f"Tensor {key} is {list(shape)}; this model's text encoder is {wanted[key]} wide.",
                    f"{way_out}, or carry it over with `apl transfer`.", field=key,
                )
        rows = {key: len(tensor) for key, tensor in tensors.items()}
        if len(set(rows.values())) > 1:
            raise PrefixFileError(f"The tensors have different numbers of vectors: {rows}.",
                                  "Every text encoder needs the same number of vectors.", field="num_tokens")
        return tensors

    def _plans(
        self, prompts: Sequence[str], m: int, chunks: int | None = None, **layout: str
    ) -> dict[str, list[tuple[Chunk, ...]]]:
        """Every prompt's chunks for every encoder, all of one number."""
        plans, empty = {}, {}
        for key, tokenizer in self.tokenizers.items():
            special = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
            plans[key] = [plan(self._ids(prompt, key), m, **special, **layout) for prompt in prompts]
            empty[key] = plan([], m, **special, **layout)
        longest = max(len(each) for of_key in plans.values() for each in of_key)
        if chunks is not None and longest > chunks:
            raise PlacementError(f"A prompt takes {longest} chunks; chunks is {chunks}.",
                                 "Shorten the prompt or allow more chunks.", field="chunks")
        number = chunks or longest
        return {key: [each + empty[key] * (number - len(each)) for each in plans[key]] for key in plans}

    def _run(
        self, key: str, plans: Sequence[tuple[Chunk, ...]], vectors: Tensor | None, clip_skip: int
    ) -> tuple[Tensor, Tensor | None]:
        """(states [N, 77 * chunks, width], pooled [N, P] or None) of one encoder."""
        encoder = self.encoders[key]
        inner = _inner(encoder)
        embedding = inner.embeddings.token_embedding
        device = embedding.weight.device
        every = [chunk.rows for chunks in plans for chunk in chunks]
        if vectors is not None:
            vectors = vectors.to(device)
        with _rows_replaced(embedding, torch.tensor(every, device=device), vectors) as ids:
            out = encoder(input_ids=ids, output_hidden_states=True, return_dict=True)
        if self.family == "sdxl":
            states = out.hidden_states[-1 - clip_skip]
        elif clip_skip == 1:
            states = out.last_hidden_state
        else:
            states = inner.final_layer_norm(out.hidden_states[-clip_skip])
        states = states.unflatten(0, (len(plans), -1)).flatten(1, 2)
        if key != "clip_g":
            return states, None
        # found here, not by transformers: it takes the highest id where an old config says eos_token_id 2
        eos = self.tokenizers[key].eos_token_id
        first = torch.tensor([chunks[0].rows.index(eos) for chunks in plans], device=device)
        last = out.last_hidden_state.unflatten(0, (len(plans), -1))[:, 0]
        return states, encoder.text_projection(last[torch.arange(len(plans), device=device), first])
