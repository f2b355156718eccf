"""Several processes on one task, as `accelerate launch` starts them, on several GPUs, CPUs or machines.

accelerate and torch.distributed do the work; here is what this project asks of them: a fair division of a list, sums
that come out equal to the last bit on every process, one process that writes, and a clear end when one is lost.
What is exchanged is small (a prefix's gradient has 7,680 numbers), so it goes over gloo wherever the model is: gloo
notices at once when a process died, where others wait for minutes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from apl_core.errors import APLError, TrainingError

T = TypeVar("T")
PATIENCE = timedelta(hours=2)
"""How long one process waits for another that is busy; one that died is noticed at once."""


class ProcessLost(TrainingError):
    """Another process of this command ended or cannot be reached."""


class Processes:
    """A single process; see `Together` for several.

    Attributes:
        index: of this process, from 0.  local_index: the same among those of this machine.  count: of all.
    """

    index, local_index, count = 0, 0, 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.index == 0

    def own_device(self) -> str | None:
        """The GPU of this process where several share a machine with GPUs; else None: what the settings say."""
        several = self.count > 1 and torch.cuda.is_available()
        return f"cuda:{self.local_index % torch.cuda.device_count()}" if several else None

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of a list: every `count`-th item. All parts together are the list, none twice."""
        return list(items[self.index :: self.count])

    def total(self, values: Tensor) -> Tensor:
        """Sum over the processes, in their order and in float64: equal to the last bit on all. float64, same shape."""
        return values.double()

    def everyone(self, value: T) -> list[T]:
        """Every process's value, by index; it must be small and can be pickled."""
        return [value]

    def from_main(self, value: T) -> T:
        """The main process's value."""
        return value

    def wait(self) -> None:
        """Until all are here."""

    def once(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises (an APLError) in the main process, for all; the others do not do it."""
        result, failure = None, None
        if self.main:
            try:
                result = work()
            except APLError as error:
                failure = error
        result, failure = self.from_main((result, failure))
        if failure is not None:
            raise failure
        return result

    def merge(self, parts: Sequence[T]) -> list[T]:
        """The whole list again from every process's results for its `share`, in the list's order."""
        shares = self.everyone(list(parts))
        whole: list[Any] = [None] * sum(map(len, shares))
        for index, part in enumerate(shares):
            whole[index :: self.count] = part
        return whole


class Together(Processes):
    """One of several processes. Every method is called by all of them, in the same order."""

    def __init__(self) -> None:
        from accelerate import PartialState

        on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") or not torch.cuda.is_available()
        state = PartialState(cpu=on_cpu, timeout=PATIENCE)
        import torch.distributed as dist

        self._dist = dist
        self.index, self.local_index, self.count = state.process_index, state.local_process_index, state.num_processes
        self._group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=PATIENCE)

    def _try(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except RuntimeError as error:  # torch has no narrower type for a peer that is gone
            raise ProcessLost("Another process of this command ended or cannot be reached: "
                              f"{str(error).splitlines()[0][:200]}",
                              "See its own message. What was saved is kept.", field="processes") from error

    def total(self, values: Tensor) -> Tensor:
        mine = values.detach().double().cpu().contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.count)]
        self._try(lambda: self._dist.all_gather(parts, mine, group=self._group))
        return torch.stack(parts).sum(0)

    def everyone(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.count
        self._try(lambda: self._dist.all_gather_object(values, value, group=self._group))
        return values

    def from_main(self, value: T) -> T:
        values = [value if self.main else None]
        self._try(lambda: self._dist.broadcast_object_list(values, src=0, group=self._group))
        return values[0]

    def wait(self) -> None:
        self._try(lambda: self._dist.barrier(group=self._group))


@cache
def this_process() -> Processes:
    """What `accelerate launch` said this process is; alone where nothing was said.

    Raises:
        TrainingError: the processes cannot be joined.
    """
    if int(os.environ.get("WORLD_SIZE", "1") or 1) < 2:
        return Processes()
    try:
        return Together()
    except (RuntimeError, ValueError, ImportError) as error:
        raise TrainingError(f"The processes of this command cannot be joined: {error}",
                            "Start it with `accelerate launch -m apl_train ...`, or without accelerate.",
                            field="processes") from error
