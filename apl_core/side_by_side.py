"""Independent pieces of work at once, each on its share of torch's threads.

Eigenvectors of some hundred rows use a second core badly; those of several matrices side by side use it well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TypeVar

import torch

Item = TypeVar("Item")
Found = TypeVar("Found")
_ALONE = Lock()
"""torch hands its number of threads on to threads that start, so only one caller at a time may change it."""


def side_by_side(work: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
    """work(item) of every item, in their order; one by one where torch has one thread.

    Work should release the interpreter, as torch's products and decompositions do, and change nothing that others read.
    The first error is raised once all that had begun is done.
    """
    with _ALONE:
        threads = torch.get_num_threads()
        workers = min(threads, len(items))
        if workers > 1:
            try:
                with ThreadPoolExecutor(workers, "apl-work", torch.set_num_threads, (threads // workers,)) as pool:
                    return list(pool.map(work, items))
            finally:
                torch.set_num_threads(threads)
    return [work(item) for item in items]
