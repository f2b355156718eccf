"""Where tokens and prefix rows stand, against an oracle that is written by hand and in another way."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apl_core.errors import PlacementError
from apl_core.placement import Chunk, capacity, count_label, negative_needs_prefix, plan

BOS, EOS = 49406, 49407


def oracle(tokens: list[tuple[int, float]], m: int, position: str, breaks: set[int], pad: int) -> list[dict]:
    """Walk the prompt token by token, closing a chunk when it is full or a break is due."""
    groups: list[list[tuple[int, float]]] = [[]]
    for index, token in enumerate(tokens):
        if groups[-1] and (index in breaks or len(groups[-1]) + m == 75):
            groups.append([])
        groups[-1].append(token)
    result = []
    for group in groups:
        line: list = [None] * 77
        line[0] = (BOS, 1.0)
        ahead = m if position == "prefix" else 0 if position == "suffix" else math.ceil(m / 2)
        for row in range(m):
            line[1 + row if row < ahead else 1 + row + len(group)] = (-1 - row, 1.0)
        for offset, token in enumerate(group):
            line[1 + ahead + offset] = token
        line[1 + m + len(group)] = (EOS, 1.0)
        line = [(pad, 1.0) if cell is None else cell for cell in line]
        result.append({"line": line, "eos": 1 + m + len(group)})
    return result


weighted = st.tuples(st.integers(0, 49405), st.floats(0.1, 2.0))


@given(
    st.lists(weighted, max_size=240), st.integers(0, 74), st.sampled_from(["prefix", "suffix", "both"]),
    st.sets(st.integers(0, 240), max_size=4), st.sampled_from([0, EOS]),
)
def test_plan_agrees_with_the_oracle(tokens, m, position, breaks, pad) -> None:
    inside = {index for index in breaks if index <= len(tokens)}
    chunks = plan(tokens, m, position=position, breaks=tuple(inside), pad=pad)
    wanted = oracle(tokens, m, position, inside, pad)
    assert [list(zip(chunk.rows, chunk.weights, strict=True)) for chunk in chunks] == [c["line"] for c in wanted]
    assert [chunk.eos_index for chunk in chunks] == [c["eos"] for c in wanted]


@given(st.lists(st.integers(0, 49405), max_size=200), st.integers(0, 74))
def test_every_chunk_is_whole(tokens, m) -> None:
    chunks = plan(tokens, m)
    assert chunks
    for chunk in chunks:
        assert len(chunk.rows) == len(chunk.weights) == 77
        assert chunk.rows[0] == BOS and chunk.rows[chunk.eos_index] == EOS
        assert [row for _, row in chunk.prefix_positions] == list(range(m))
        assert [position for position, _ in chunk.prefix_positions] == list(range(1, m + 1))
    assert [row for chunk in chunks for row in chunk.rows[m + 1 : chunk.eos_index]] == tokens


def test_a_short_prompt_by_hand() -> None:
    (chunk,) = plan([320, (1125, 1.2)], 3)
    assert chunk == Chunk(
        (BOS, -1, -2, -3, 320, 1125, EOS) + (EOS,) * 70, (1.0,) * 5 + (1.2,) + (1.0,) * 71, 6
    )
    assert plan([320, 1125], 3, position="suffix")[0].rows[:7] == (BOS, 320, 1125, -1, -2, -3, EOS)
    assert plan([320, 1125], 3, position="both")[0].rows[:7] == (BOS, -1, -2, 320, 1125, -3, EOS)


def test_an_empty_prompt_still_carries_the_prefix() -> None:
    (chunk,) = plan([], 10)
    assert chunk.rows[:12] == (BOS, *range(-1, -11, -1), EOS) and chunk.eos_index == 11


def test_without_a_prefix_the_layout_is_the_hosts_own() -> None:
    (chunk,) = plan([7] * 75, 0)
    assert chunk.rows == (BOS, *[7] * 75, EOS)


@pytest.mark.parametrize(("count", "chunks"), [(0, 1), (64, 1), (65, 1), (66, 2), (130, 2), (131, 3)])
def test_chunk_boundaries(count: int, chunks: int) -> None:
    assert len(plan([5] * count, 10)) == chunks


def test_overflow() -> None:
    assert plan([5] * 66, 10, overflow="trim") == plan([5] * 65, 10)
    assert len(plan([5] * 65, 10, overflow="error")) == 1
    with pytest.raises(PlacementError, match="66 tokens; 65 fit"):
        plan([5] * 66, 10, overflow="error")
    assert len(plan([5] * 100, 10, overflow="error", breaks=(50,))) == 2


def test_breaks_at_the_ends_open_nothing() -> None:
    assert plan([5, 6], 2, breaks=(0, 2, 2)) == plan([5, 6], 2)
    assert [chunk.rows[3] for chunk in plan([5, 6], 2, breaks=(1,))] == [5, 6]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"tokens": [1], "num_prefix": 75}, "num_prefix"), ({"tokens": [1], "num_prefix": -1}, "num_prefix"),
        ({"tokens": [1], "num_prefix": True}, "num_prefix"), ({"tokens": [1], "num_prefix": 1.0}, "num_prefix"),
        ({"tokens": ["a"], "num_prefix": 1}, "tokens"), ({"tokens": [1.5], "num_prefix": 1}, "tokens"),
        ({"tokens": [-3], "num_prefix": 1}, "tokens"), ({"tokens": [True], "num_prefix": 1}, "tokens"),
        ({"tokens": [(1, math.nan)], "num_prefix": 1}, "tokens"),
        ({"tokens": [(1, math.inf)], "num_prefix": 1}, "tokens"), ({"tokens": [(1, "x")], "num_prefix": 1}, "tokens"),
        ({"tokens": [1], "num_prefix": 1, "breaks": (2,)}, "breaks"),
        ({"tokens": [1], "num_prefix": 1, "breaks": (-1,)}, "breaks"),
        ({"tokens": [1], "num_prefix": 1, "position": "middle"}, "position"),
        ({"tokens": [1], "num_prefix": 1, "overflow": "drop"}, "overflow"),
    ],
)
def test_refusals_name_the_field_and_the_way_out(arguments: dict, field: str) -> None:
    with pytest.raises(PlacementError) as caught:
        plan(**arguments)
    assert caught.value.field == field and caught.value.hint


def test_other_encoder_lengths() -> None:
    (chunk,) = plan([5], 2, length=16, bos=1, eos=2, pad=0)
    assert chunk.rows == (1, -1, -2, 5, 2) + (0,) * 11
    with pytest.raises(PlacementError):
        plan([5], 14, length=16)


def test_capacity_and_label() -> None:
    assert capacity(10) == 65 and capacity(0) == 75 and capacity(74) == 1
    assert count_label(12, 10) == "12/65" and count_label(0, 10) == "0/65"
    assert count_label(65, 10) == "65/65" and count_label(70, 10) == "70/130"


@pytest.mark.parametrize(
    ("cfg", "weight_sum", "needed"),
    [(7.5, 1.0, False), (1.0, 1.0, False), (0.99, 1.0, True), (0.0, 1.0, True), (1.5, 0.5, True), (-1.0, 1.0, True)],
)
def test_negative_prompt_is_prefixed_exactly_when_it_adds(cfg: float, weight_sum: float, needed: bool) -> None:
    assert negative_needs_prefix(cfg, weight_sum) is needed


def test_guidance_must_be_finite() -> None:
    with pytest.raises(PlacementError):
        negative_needs_prefix(math.nan)
