"""Work at once: results in order, errors handed on, torch's number of threads as it was."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from apl_core.side_by_side import side_by_side


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def in_a_new_thread() -> int:
    """torch's number of threads for a thread that has just started."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_results_are_in_order_and_threads_shared() -> None:
    barrier = threading.Barrier(2, timeout=30)

    def work(number: int) -> tuple[int, int]:
        barrier.wait()  # passes only where two run at once
        return number, torch.get_num_threads()

    assert side_by_side(work, [3, 1]) == [(3, 2), (1, 2)]
    assert torch.get_num_threads() == 4 and in_a_new_thread() == 4


def test_an_error_is_handed_on_and_threads_are_given_back() -> None:
    def work(number: int) -> int:
        if number == 2:
            raise ValueError("two")
        return number

    with pytest.raises(ValueError, match="two"):
        side_by_side(work, [1, 2, 3])
    assert torch.get_num_threads() == 4 and in_a_new_thread() == 4
    assert side_by_side(work, [1, 3]) == [1, 3]


def test_one_thread_or_one_item_is_done_here() -> None:
    here = threading.get_ident()
    assert side_by_side(lambda _: threading.get_ident(), [1]) == [here]
    assert side_by_side(lambda _: threading.get_ident(), []) == []
    torch.set_num_threads(1)
    assert side_by_side(lambda _: threading.get_ident(), [1, 2]) == [here, here]
