"""Where prompt tokens and prefix rows stand in a text encoder's 77 positions (APL sec. 3.3). Pure: numbers in and out.

The layout is the hosts' own (BOS, up to 75 tokens, EOS, padding); the prefix takes m of the 75 in *every* chunk, for
a chunk without it would bring the likeness back.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .errors import PlacementError

LENGTH = 77
BOS = 49406
EOS = 49407
_POSITIONS = ("prefix", "suffix", "both")
_OVERFLOWS = ("chunk", "trim", "error")


@dataclass(frozen=True)
class Chunk:
    """One run of the text encoder.

    Attributes:
        rows: `length` entries; a token id where >= 0, otherwise -(i + 1) for row i of the prefix.
        weights: `length` emphasis weights, 1.0 everywhere but on user tokens.
        eos_index: position of the first EOS, where CLIP pools.
    """

    rows: tuple[int, ...]
    weights: tuple[float, ...]
    eos_index: int

    @property
    def prefix_positions(self) -> tuple[tuple[int, int], ...]:
        """(position, prefix row) for every prefix row in this chunk, by position."""
        return tuple((position, -row - 1) for position, row in enumerate(self.rows) if row < 0)


def _check_rows(num_prefix: int, length: int) -> int:
    if isinstance(num_prefix, bool) or not isinstance(num_prefix, int) or num_prefix < 0:
        raise PlacementError(
            f"num_prefix is {num_prefix!r}, not a whole number of at least 0.",
            "Give the number of vectors of the prefix.",
            field="num_prefix",
        )
    if num_prefix >= length - 2:
        raise PlacementError(
            f"num_prefix is {num_prefix}, which leaves no room for the prompt in {length} positions.",
            f"Use a prefix of at most {length - 3} vectors; 10 is the usual number.",
            field="num_prefix",
        )
    return num_prefix


def capacity(num_prefix: int, length: int = LENGTH) -> int:
    """User tokens that fit in one chunk beside `num_prefix` rows: 75 - m. Raises `PlacementError`."""
    return length - 2 - _check_rows(num_prefix, length)


def count_label(count: int, num_prefix: int) -> str:
    """A prompt's token count over the room in the chunks it takes: "12/65"; "70/130" once a second chunk opens."""
    room = capacity(num_prefix)
    return f"{count}/{max(1, math.ceil(count / room)) * room}"


def negative_needs_prefix(cfg: float, weight_sum: float = 1.0) -> bool:
    """Whether the negative prompt must carry the prefix too.

    Guidance gives the negative prediction the weight 1 - cfg * weight_sum, with `weight_sum` the sum of the weights of
    all positive prompts. Where that is above 0 the negative prompt *adds* its content, so a name in it would show.

    Raises:
        PlacementError: an argument is not a finite number.
    """
    for name, value in (("cfg", cfg), ("weight_sum", weight_sum)):
        if not math.isfinite(value):
            raise PlacementError(f"{name} is {value!r}.", "Use a finite number.", field=name)
    return cfg * weight_sum < 1.0


def _user_token(item: int | tuple[int, float], index: int) -> tuple[int, float]:
    token, weight = item if isinstance(item, tuple) and len(item) == 2 else (item, 1.0)
    try:
        if isinstance(token, bool):
            raise TypeError
        token = operator.index(token)
        weight = float(weight)
    except (TypeError, ValueError):
        token = -1
    if token < 0:
        raise PlacementError(
            f"tokens[{index}] is {item!r}, not a token id or a (token id, weight) pair.",
            "Tokenize the prompt first, without BOS, EOS and padding.",
            field="tokens",
        )
    if not math.isfinite(weight):
        raise PlacementError(
            f"tokens[{index}] has the weight {weight!r}.", "Use a finite emphasis weight.", field="tokens"
        )
    return token, weight


def _segments(
    tokens: list[tuple[int, float]], breaks: Sequence[int]
) -> Iterator[list[tuple[int, float]]]:
    for index in breaks:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index <= len(tokens):
            raise PlacementError(
                f"breaks holds {index!r}; the prompt has {len(tokens)} tokens.",
                "Give indices of user tokens at which a new chunk starts.",
                field="breaks",
            )
    # A break at either end asks for a chunk boundary that is already there.
    inner = sorted({index for index in breaks if 0 < index < len(tokens)})
    for start, end in zip([0, *inner], [*inner, len(tokens)], strict=True):
        yield tokens[start:end]


def plan(
    tokens: Sequence[int | tuple[int, float]],
    num_prefix: int,
    *,
    position: str = "prefix",
    bos: int = BOS,
    eos: int = EOS,
    pad: int = EOS,
    length: int = LENGTH,
    overflow: str = "chunk",
    breaks: Sequence[int] = (),
) -> tuple[Chunk, ...]:
    """Lay out a prompt with its prefix, chunk by chunk.

    Args:
        tokens: the user's token ids, or (id, emphasis weight) pairs, without BOS, EOS and padding.
        num_prefix: m, rows of the prefix; 0 gives the plain layout.
        position: "prefix" right after BOS (APL sec. 3.3); "suffix" after the chunk's user tokens, before EOS; "both"
            ceil(m / 2) rows ahead and the rest behind.
        bos, eos, pad: ids of the tokenizer (SD2 and CLIP-G pad with 0).
        length: positions of the encoder.
        overflow: what happens to tokens beyond a chunk's room: "chunk" opens the next chunk, "trim" drops them,
            "error" refuses. With `breaks` it holds for each part by itself.
        breaks: indices of user tokens at which a new chunk must start.

    Returns:
        At least one chunk, for an empty prompt too.

    Raises:
        PlacementError: m is out of range, a token or weight is wrong, or the prompt is too long for "error".
    """
    for name, value, allowed in (("position", position, _POSITIONS), ("overflow", overflow, _OVERFLOWS)):
        if value not in allowed:
            raise PlacementError(f"{name} is {value!r}.", f"Use one of: {', '.join(allowed)}.", field=name)
    room = capacity(num_prefix, length)
    ahead = {"prefix": num_prefix, "suffix": 0, "both": (num_prefix + 1) // 2}[position]
    before = [-(row + 1) for row in range(ahead)]
    behind = [-(row + 1) for row in range(ahead, num_prefix)]

    user = [_user_token(item, index) for index, item in enumerate(tokens)]
    chunks: list[Chunk] = []
    for segment in _segments(user, breaks):
        if len(segment) > room and overflow == "error":
            raise PlacementError(
                f"The prompt has {len(segment)} tokens; {room} fit beside the {num_prefix} vectors of the prefix.",
                "Shorten the prompt, or let it run over several chunks.",
                field="tokens",
            )
        stop = room if overflow == "trim" else max(1, len(segment))
        for start in range(0, stop, room):
            part = segment[start : start + room]
            rows = [bos, *before, *(token for token, _ in part), *behind, eos]
            weights = [1.0] * (1 + len(before)) + [weight for _, weight in part]
            chunks.append(
                Chunk(
                    rows=tuple(rows + [pad] * (length - len(rows))),
                    weights=tuple(weights + [1.0] * (length - len(weights))),
                    eos_index=len(rows) - 1,
                )
            )
    return tuple(chunks)
