"""What a training step is made of: which pictures, which timesteps, which noise, and the frozen targets of equation 5.

eps(c1) and eps(c2) do not depend on the prefix. `FreshTargets` computes them every step; `TargetBank` computes them
once for a fixed set of (picture, timestep, noise) tuples, stores both (so alpha stays free) and shares them between
runs: sweeps over m, alpha, learning rate and seed then pay for the prefixed prediction only.

Under `accelerate launch` every process draws the same global batch and keeps its own rows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from apl_core.errors import ConfigError
from apl_train.model.backend import Backend
from apl_train.processes import Processes, this_process
from apl_train.seeds import seed_of, step_generator
from apl_train.training.config import TrainConfig
from apl_train.training.samples import TrainingSet
from apl_train.training.shards import SIZE, Progress, Rows, ShardStore, fingerprint
from apl_train.training.timesteps import apart, bins_of, chances, separability, tuple_weights

VERSION = 1
_PASS = 8 * 64 * 64
"""Latent places in one pass of the bank: eight pictures of 512 x 512, which fit beside the model in 8 GB."""


@dataclass(frozen=True)
class Batch:
    """One optimizer step's input; the first `n_id` rows are of S_ID.

    rows: indices into the training set, int64 [N];  t: int64 [N];  x_t: noisy latents float32 [N, 4, h, w];
    eps_c1, eps_c2: frozen predictions without prefix, float32 [N, 4, h, w] (equal for S_Reg rows);
    total: rows of the step over all processes, N where there is one.
    """

    rows: Tensor
    t: Tensor
    x_t: Tensor
    eps_c1: Tensor
    eps_c2: Tensor
    n_id: int
    total: int


def draw_rows(data: TrainingSet, config: TrainConfig, g: torch.Generator, count: int) -> Tensor:
    """`count` sample indices, S_ID rows first: a share `id_share` of S_ID; of the rest a share `face_share` shows
    unnamed persons, the other things (a set of faces alone would let the prefix mean "face", Fig. 7)."""
    def exactly(share: float, of: int) -> int:
        # exact counts with a random remainder: the mix of a batch does not fluctuate more than it must
        whole = int(share * of)
        return whole + int(torch.rand((), generator=g) < share * of - whole)

    n_id = count if config.no_reg else exactly(config.id_share, count)
    pools = [data.id_rows] * n_id
    if len(data.pseudo_rows):
        pools = [data.pseudo_rows if float(torch.rand((), generator=g)) < config.pseudo_share else p for p in pools]
    n_reg = count - n_id
    faces = exactly(config.face_share if len(data.nonface_rows) else 1.0, n_reg) if len(data.face_rows) else 0
    pools += [data.face_rows] * faces + [data.nonface_rows] * (n_reg - faces)
    return torch.tensor([int(p[int(torch.randint(len(p), (), generator=g))]) for p in pools], dtype=torch.int64)


def draw_times(config: TrainConfig, g: torch.Generator, count: int) -> Tensor:
    """Timesteps, uniform over [low_t, high_t] (paper: uniform over all): int64 [count]."""
    return torch.randint(config.low_t, config.high_t + 1, (count,), generator=g)


def draw_scales(config: TrainConfig, step: int, count: int) -> Tensor:
    """Guidance scales of a step's samples, float32 [count]: 1, or uniform over [guided_low, guided_high] for a share.

    From a generator of its own: the pictures, timesteps and noise of a step do not change when this is switched on.
    """
    g = step_generator(seed_of("apl-guidance", config.seed), step)
    chosen, place = torch.rand(2, count, generator=g)
    scales = config.guided_low + place * (config.guided_high - config.guided_low)
    return torch.where(chosen < config.guided_share, scales, torch.ones(count))


class Targets(Protocol):
    """Gives the batch of every optimizer step, the same one whenever it is asked."""

    def batch(self, step: int) -> Batch: ...


def add_noise(latents: Tensor, noise: Tensor, t: Tensor, alphas_bar: Tensor) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (DDPM forward process). float32 [N, 4, h, w]."""
    a = alphas_bar[t].view(-1, 1, 1, 1)
    return a.sqrt() * latents + (1 - a).sqrt() * noise


@torch.no_grad()
def frozen_predictions(
    backend: Backend, data: TrainingSet, rows: Tensor, t: Tensor, x_t: Tensor
) -> tuple[Tensor, Tensor]:
    """eps(c1) and eps(c2) without prefix, both from one batch; rows with c1 = c2 are predicted once."""
    twice = torch.tensor([i for i, r in enumerate(rows.tolist()) if data.c1[r] != data.c2[r]], dtype=torch.int64)
    states = data.plain_states([data.c1[r] for r in rows] + [data.c2[int(rows[i])] for i in twice])
    eps = backend.predict(torch.cat([x_t, x_t[twice]]), torch.cat([t, t[twice]]), states).float()
    first, second = eps[: len(rows)], eps[: len(rows)].clone()
    second[twice] = eps[len(rows):]
    return first, second


class FreshTargets:
    """New pictures, timesteps and noise every step, from the step's own generator."""

    def __init__(self, backend: Backend, data: TrainingSet, config: TrainConfig, *,
                 processes: Processes | None = None) -> None:
        self._backend, self._data, self._config = backend, data, config
        self._processes = processes or this_process()

    def batch(self, step: int) -> Batch:
        g = step_generator(self._config.seed, step)
        rows = draw_rows(self._data, self._config, g, self._config.batch_size)
        t = draw_times(self._config, g, len(rows))
        noise = torch.randn((len(rows), *self._data.latents.shape[1:]), generator=g)
        mine = torch.tensor(self._processes.share(range(len(rows))))
        rows, t, total = rows[mine], t[mine], len(rows)
        x_t = add_noise(self._data.latents[rows], noise[mine], t, self._backend.alphas_bar)
        e1, e2 = frozen_predictions(self._backend, self._data, rows, t, x_t)
        return Batch(rows, t, x_t, e1, e2, self._data.count_id(rows), total)


class TargetBank:
    """A stored set of tuples; a step draws from it. Its folder is keyed by everything that the content depends on."""

    def __init__(self, backend: Backend, data: TrainingSet, config: TrainConfig, cache: Path, *,
                 progress: Progress | None = None, stop: Callable[[], bool] | None = None,
                 processes: Processes | None = None) -> None:
        """Raises TrainingStopped when `stop()` said so; what was computed until then is kept."""
        self._backend, self._data, self._config = backend, data, config
        self._processes = processes or this_process()
        made_by = fingerprint(VERSION, backend.sha256, str(getattr(backend, "dtype", torch.float32)), data.sha256,
                              config.low_t, config.high_t, list(data.latents.shape[1:]),
                              *([backend.sizes] if backend.sizes else []))
        # a short trial needs no more targets than it has samples
        size = min(config.bank, max(SIZE, config.steps * config.batch_size))
        whole = -(-size // SIZE) * SIZE  # whole shards, so that a larger bank begins like a smaller one
        self.folder = cache / "bank" / made_by
        self._tuples: Rows = ShardStore(self.folder).rows(
            [f"{i}" for i in range(whole)], self._make, progress=progress, stop=stop, processes=self._processes)
        every = torch.arange(size)
        self._rows, self._t, self._seeds = (self._tuples.take(name, every) for name in ("rows", "t", "seeds"))
        allowed = set(data.id_rows.tolist())
        rows = self._rows.tolist()
        kinds = [data.kinds[r] for r in rows]
        self._pools = {k: every[[kind == k for kind in kinds]] for k in ("face", "nonface", "pseudo")}
        self._pools["id"] = every[[kind == "id" and r in allowed for kind, r in zip(kinds, rows, strict=True)]]
        for pool in (data.id_rows, data.pseudo_rows, data.face_rows, data.nonface_rows):
            kind = data.kinds[int(pool[0])] if len(pool) else ""
            if kind and not len(self._pools[kind]) and (kind in ("id", "pseudo") or not config.no_reg):
                raise ConfigError(f"A bank of {size} tuples is too small to hold one of each kind.",
                                  "Use 1000 or more.", field="bank")
        self._weights = self._by_separability() if config.timesteps == "separability" else None

    def _by_separability(self) -> dict[str, Tensor]:
        """Weight of every tuple of each pool: timesteps at which S_ID's two targets differ are drawn more often."""
        bins = bins_of(self._t, self._config.low_t, self._config.high_t)
        of_id = self._pools["id"]
        # in parts: a full-size model's bank is larger than memory should be
        distances = torch.cat([apart(*(self._tuples.take(name, some) for name in ("eps_c1", "eps_c2")))
                               for some in of_id.split(64)])
        chance = chances(separability(bins[of_id], distances), self._config.time_floor)
        return {kind: tuple_weights(bins[pool], chance) for kind, pool in self._pools.items() if len(pool)}

    def _noise(self, seeds: Sequence[int]) -> Tensor:
        shape = self._data.latents.shape[1:]
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])

    def _make(self, positions: Sequence[int]) -> dict[str, Tensor]:
        """One shard, from the generator of its first tuple: a rebuilt one equals the lost one."""
        start, count = positions[0], len(positions)
        g = step_generator(seed_of("bank") % 2**31, start)
        # half S_ID, half S_Reg whatever a run's own share is; every person of S_ID, whatever a run's subset is
        pools = [self._data.every_id_row if i % 2 else (self._data.face_rows, self._data.nonface_rows)[i // 2 % 2]
                 for i in range(count)]
        if len(self._data.pseudo_rows):  # a quarter of S_ID's half
            pools = [self._data.pseudo_rows if i % 8 == 1 else p for i, p in enumerate(pools)]
        pools = [p if len(p) else self._data.every_id_row for p in pools]
        rows = torch.tensor([int(p[int(torch.randint(len(p), (), generator=g))]) for p in pools])
        t = draw_times(self._config, g, count)
        seeds = torch.tensor([seed_of("bank-noise", start + i) for i in range(count)])
        x_t = add_noise(self._data.latents[rows], self._noise(seeds.tolist()), t, self._backend.alphas_bar)
        step = max(1, _PASS // x_t[0, 0].numel())
        parts = [frozen_predictions(self._backend, self._data, rows[i : i + step], t[i : i + step], x_t[i : i + step])
                 for i in range(0, count, step)]
        e1, e2 = (torch.cat(eps) for eps in zip(*parts, strict=True))
        return {"rows": rows, "t": t, "seeds": seeds, "eps_c1": e1.half(), "eps_c2": e2.half()}

    def batch(self, step: int) -> Batch:
        g = step_generator(self._config.seed, step)
        wanted = draw_rows(self._data, self._config, g, self._config.batch_size)
        picks = []
        for row in wanted.tolist():
            kind = self._data.kinds[row]
            pool = self._pools[kind]
            at = (torch.randint(len(pool), (), generator=g) if self._weights is None
                  else torch.multinomial(self._weights[kind], 1, generator=g))
            picks.append(int(pool[int(at)]))
        pick = torch.tensor(self._processes.share(picks))
        rows, t = self._rows[pick], self._t[pick]
        x_t = add_noise(self._data.latents[rows], self._noise(self._seeds[pick].tolist()), t, self._backend.alphas_bar)
        e1, e2 = (self._tuples.take(name, pick).float() for name in ("eps_c1", "eps_c2"))
        return Batch(rows, t, x_t, e1, e2, self._data.count_id(rows), len(picks))
