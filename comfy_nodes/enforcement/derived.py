"""Conditioning that a pack worked out from what this server encoded, told from conditioning of another origin.

Packs with their own ideas of weights encode a text several times and add up the results. The sums are new tensors, but
each of their rows is a weighted sum of rows that a text encoder gave out here, at the same position, with the prefix in
front. That can be checked afterwards, whatever the pack did in between: the part of a row that is no such sum is its
distance to a linear space, and a row from elsewhere lies far outside of it.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .guard import TAG, Encoder, Guard

MAX_ROWS = 256
_FAR = 1e-3
"""Largest part of a row, by its norm, that rounding may account for."""
_LOST = 3e-6
"""The same by the norm of what was summed up, where the sum nearly vanishes."""
_FLAT = 1e-7
"""Directions this much smaller than the largest are rounding, in float64 of float32 rows."""
_ORDERS = (("clip_l",), ("clip_g",), ("clip_l", "clip_g"))


class Workings:
    """What the text encoders gave out while the present node runs; per thread, and nothing once the node has ended."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self._local = threading.local()

    def record(self, model: Any, outputs: Any, agreed: frozenset[int]) -> None:
        """Remember what a CLIP text model gave out for rows that were verified, but for the `agreed` ones.

        Args:
            model: the host's `CLIPTextModel_`.
            outputs: (last layer [rows, positions, width], the layer asked for or None, pooled [rows, width]).
            agreed: rows of persons who agreed, which have no prefix.
        """
        tag = getattr(model, TAG, None)
        if not self.guard.policy.strict or self.guard.is_plain or not isinstance(tag, Encoder) or tag.problem:
            return
        states = outputs[1] if outputs[1] is not None else outputs[0]
        node = _running_node()
        if getattr(self._local, "node", None) != node or not hasattr(self._local, "rows"):
            self._local.node, self._local.rows, self._local.pooled = node, defaultdict(list), []
        rows = [at for at in range(len(states)) if at not in agreed]
        # Too many can explain nothing: they need not be kept.
        if states.ndim != 3 or not rows or len(self._local.rows[tag.key]) > MAX_ROWS:
            return
        kept = states.detach()[rows].float()
        self._local.rows[tag.key] += kept.unbind(0)
        self._local.pooled.append((self.guard.projections.get(model), outputs[2].detach()[rows], kept[:, -1]))

    def forget(self) -> None:
        """The node has ended."""
        self._local.__dict__.clear()

    def explain(self, cond: Any, extra: Mapping[str, Any]) -> bool:
        """Whether a conditioning consists of weighted sums of this node's encodes, and of plain values."""
        rows = getattr(self._local, "rows", None)
        if not rows or not torch.is_tensor(cond) or cond.ndim != 3 or not _plain(extra):
            return False
        pooled = extra.get("pooled_output")
        if pooled is not None and not (torch.is_tensor(pooled) and self._explains_pooled(pooled)):
            return False
        return any(self._explains_states(cond, [rows[key] for key in order]) for order in _ORDERS
                   if all(rows.get(key) for key in order))

    def _explains_pooled(self, pooled: torch.Tensor) -> bool:
        known = []
        for projection, before, last in self._local.pooled:
            # Some packs take the last position for the pooled text.
            found = [before.float(), last]
            if projection is not None and (layer := projection()) is not None:
                found.append(layer(before).float())
            # Checkpoints without a projection leave whatever was in the memory.
            known += [row[None] for each in found if each.shape[-1] == pooled.shape[-1] for row in each.unbind(0)
                      if bool(torch.isfinite(row).all())]
        return _spanned(pooled.reshape(-1, 1, pooled.shape[-1]), known)

    @staticmethod
    def _explains_states(cond: torch.Tensor, encoders: Sequence[Sequence[torch.Tensor]]) -> bool:
        widths = [int(rows[0].shape[-1]) for rows in encoders]
        length = int(encoders[0][0].shape[0])
        if sum(widths) != cond.shape[-1] or cond.shape[1] % length or cond.shape[1] == 0:
            return False
        return all(_spanned(part.reshape(-1, length, part.shape[-1]), rows)
                   for part, rows in zip(cond.split(widths, dim=-1), encoders, strict=True))


def _spanned(found: torch.Tensor, rows: Sequence[torch.Tensor]) -> bool:
    """Whether each vector of `found` [N, positions, width] is a weighted sum of those of `rows` at its position."""
    # Half as many vectors as dimensions span nothing by chance; all of them would explain anything.
    if not 0 < len(rows) <= min(MAX_ROWS, found.shape[-1] // 2):
        return False
    if any(row.shape != found.shape[1:] for row in rows):
        return False
    target = found.detach().to("cpu", torch.float64).movedim(0, -1)
    basis = torch.stack([row.to("cpu", torch.float64) for row in rows], dim=-1)
    if not (bool(torch.isfinite(target).all()) and bool(torch.isfinite(basis).all())):
        return False
    directions, sizes, _ = torch.linalg.svd(basis, full_matrices=False)
    directions = directions * (sizes > sizes[..., :1] * _FLAT).unsqueeze(-2)
    rest = target - directions @ (directions.mT @ target)
    rounding = _LOST * basis.norm(dim=-2).amax(-1, keepdim=True)
    return bool((rest.norm(dim=-2) <= _FAR * target.norm(dim=-2) + rounding).all())


def _plain(value: Any, key: str = "") -> bool:
    """Numbers and words, but for the pooled text: a tensor or an object could carry anything."""
    if key == "pooled_output" or value is None or isinstance(value, bool | int | float | str):
        return True
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _plain(each, name) for name, each in value.items())
    return isinstance(value, list | tuple) and all(map(_plain, value))


def _running_node() -> Any:
    """Which node of which graph runs; None where the host does not say, or outside of nodes."""
    try:
        from comfy_execution.utils import get_executing_context
    except ImportError:
        return None
    context = get_executing_context()
    return (context.prompt_id, context.node_id) if context is not None else None
