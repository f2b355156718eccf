"""From the host's chunks of 75 tokens to chunks that carry the prefix: the host counts to 75 - m, `plan` does the rest.

The host's own way of putting textual inversions into a chunk (a "fix" at an offset) carries the rows; placement,
which rows go where, is `apl_core.placement.plan`'s alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from ..apl_core.errors import PlacementError
from ..apl_core.placement import LENGTH, plan
from ..apl_core.prefix import AnonymizationPrompt

# A token's place in its chunk is what `plan` moves about. It must look unlike any real id.
_FIRST = 1 << 24
NAME = "APL "
"""What the names of prefixes begin with where a host prints the embeddings that it used."""


class Piece:
    """Some rows of a prefix, in the shape of the host's textual-inversion objects: it is asked for what stands here.

    Attributes:
        vec: embedding key to float32 [n, width].
        name: what hosts print of it.
        vectors: n, the positions it takes.
        shorthash: None, which keeps it out of the host's list of used embeddings.
    """

    shorthash = None

    def __init__(self, vec: dict[str, torch.Tensor], name: str) -> None:
        self.vec, self.name = vec, name
        self.vectors = int(next(iter(vec.values())).shape[0])

    def checksum(self) -> str:
        """Nothing: the host shows it beside the name."""
        return ""


class Injection:
    """A prefix made ready for one text encoder.

    Args:
        prefix: the prefix.
        tensor: its tensor for the encoder.
        key: the encoder's embedding key in the host.
        device: where the host keeps embeddings.
    """

    def __init__(self, prefix: AnonymizationPrompt, tensor: str, key: str, device: Any = "cpu") -> None:
        self.prefix, self.key, self.count = prefix, key, prefix.num_tokens
        self.placement = prefix.meta.placement
        self.rows = prefix.vectors(tensor).to(device)
        self.room = LENGTH - 2 - self.count
        self._pieces: dict[tuple[int, ...], Piece] = {}

    def piece(self, rows: tuple[int, ...]) -> Piece:
        """The rows of the prefix with these numbers; the same object each time."""
        if rows not in self._pieces:
            self._pieces[rows] = Piece({self.key: self.rows[list(rows)]}, NAME + self.prefix.name.replace(",", " "))
        return self._pieces[rows]

    def owns(self, embedding: Any) -> bool:
        """Whether an embedding of a chunk is this prefix's."""
        return any(embedding is piece for piece in self._pieces.values())

    def carry(self, chunk: Any, start: int, end: int, fix: type) -> Any:
        """A chunk of 77 - m tokens that the host made, with the prefix in it: 77 tokens.

        Args:
            chunk: has `tokens`, `multipliers` and `fixes` (offset, embedding), without the prefix.
            start, end: ids of the tokenizer's special tokens.
            fix: the host's class of fixes.

        Raises:
            PlacementError: the host made a chunk of another length.
        """
        if len(chunk.tokens) != LENGTH - self.count or len(chunk.multipliers) != len(chunk.tokens):
            raise PlacementError(f"The host made a chunk of {len(chunk.tokens)} tokens where {LENGTH - self.count} "
                                 "leave room for the prefix.", "Another extension may interfere: turn it off.",
                                 field="tokens")
        used = len(chunk.tokens) - 2
        if self.placement != "prefix":  # behind the user's tokens, so the padding has to be known
            while used and chunk.tokens[used] == end:
                used -= 1
        rows, pieces = _layout(used, self.count, self.placement)
        tokens, multipliers, moved = [], [], {}
        for position, row in enumerate(rows):
            at = row - _FIRST + 1
            is_user = row >= _FIRST
            tokens.append(chunk.tokens[at] if is_user else 0 if row < 0 else start if position == 0 else end)
            multipliers.append(chunk.multipliers[at] if is_user else 1.0)
            if is_user:
                moved[at - 1] = position - 1
        fixes = [fix(offset, self.piece(which)) for offset, which in pieces]
        chunk.fixes = fixes + [fix(moved[offset], embedding) for offset, embedding in chunk.fixes]
        chunk.tokens, chunk.multipliers = tokens, multipliers
        return chunk

    def missing_in(self, fixes: Sequence[Any] | None) -> bool:
        """Whether a chunk's fixes lack a row of the prefix."""
        found = [offset + index for offset, embedding in fixes or () if self.owns(embedding)
                 for index in range(embedding.vectors)]
        return len(found) != self.count or len(set(found)) != self.count

    def verified(self, embedded: torch.Tensor, batch_fixes: Sequence[Sequence[Any]] | None) -> bool:
        """Whether the rows that go into the transformer are the prefix's, in every line of the batch.

        Args:
            embedded: [batch, 77, width], what the host's embedding layer returned.
            batch_fixes: the fixes it was given.
        """
        if batch_fixes is None or len(batch_fixes) != len(embedded):
            return False
        for line, fixes in zip(embedded, batch_fixes, strict=True):
            if self.missing_in(fixes):
                return False
            for offset, embedding in fixes:
                if self.owns(embedding):
                    got = line[offset + 1 : offset + 1 + embedding.vectors]
                    want = embedding.vec[self.key].to(got)
                    # Half precision rounds; anything else would be another vector.
                    if got.shape != want.shape or not torch.allclose(got, want, rtol=1e-2, atol=1e-4):
                        return False
        return True


@lru_cache(maxsize=512)
def _layout(
    used: int, count: int, placement: str
) -> tuple[tuple[int, ...], tuple[tuple[int, tuple[int, ...]], ...]]:
    """`plan`'s rows of a chunk with `used` user tokens, and its runs of prefix rows as (offset of the host, rows)."""
    chunk = plan([_FIRST + index for index in range(used)], count, position=placement, overflow="error")[0]
    runs: list[tuple[int, list[int]]] = []
    for position, row in chunk.prefix_positions:
        if runs and runs[-1][0] + 1 + len(runs[-1][1]) == position:
            runs[-1][1].append(row)
        else:
            runs.append((position - 1, [row]))
    return chunk.rows, tuple((offset, tuple(rows)) for offset, rows in runs)


def clipped(embedding: Any, room: int) -> Any:
    """A textual inversion cut to the room beside the prefix; popular ones have 75 vectors, a whole chunk's."""
    if embedding is None or int(embedding.vectors) <= room:
        return embedding
    vec = embedding.vec
    cut = {key: value[:room] for key, value in vec.items()} if isinstance(vec, dict) else vec[:room]
    short = Piece(cut if isinstance(cut, dict) else {"": cut}, embedding.name)
    # Forge's have no such thing.
    short.vec, short.shorthash = cut, getattr(embedding, "shorthash", None)  # type: ignore[misc]
    return short
