"""What a training step is made of: which pictures, which timesteps, which noise, and the frozen targets of equation 5.

eps(c1) and eps(c2) do not depend on the prefix. `FreshTargets` computes them every step; `TargetBank` computes them
once for a fixed set of (picture, timestep, noise) tuples, stores both (so alpha stays free) and shares them between
runs: sweeps over m, alpha, learning rate and seed then pay for the prefixed prediction only.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from apl_core.atomic import write_safetensors
from apl_train.backend import Backend
from apl_train.config import TrainConfig
from apl_train.samples import TrainingSet
from apl_train.state import seed_of, step_generator

_log = logging.getLogger("apl.bank")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Batch:
    """One optimizer step's input; the first `n_id` rows are of S_ID.

    rows: indices into the training set, int64 [N];  t: int64 [N];  x_t: noisy latents float32 [N, 4, h, w];
    eps_c1, eps_c2: frozen predictions without prefix, float32 [N, 4, h, w] (equal for S_Reg rows).
    """

    rows: Tensor
    t: Tensor
    x_t: Tensor
    eps_c1: Tensor
    eps_c2: Tensor
    n_id: int


def draw_rows(data: TrainingSet, config: TrainConfig, g: torch.Generator, count: int) -> Tensor:
    """`count` sample indices, S_ID rows first: each is of S_ID with probability `id_share`; S_Reg rows are things and
    unnamed persons in equal parts (a set of faces alone would let the prefix mean "face", Fig. 7)."""
    share = 1.0 if config.no_reg else config.id_share
    # exact counts with a random remainder: the mix of a batch does not fluctuate more than it must
    exact = share * count
    n_id = int(exact) + int(torch.rand((), generator=g) < exact - int(exact))
    pools = [data.id_rows] * n_id
    kinds = [p for p in (data.face_rows, data.nonface_rows) if len(p)]
    for k in range(count - n_id):
        pools.append(kinds[(k + int(torch.randint(len(kinds), (), generator=g))) % len(kinds)])
    return torch.tensor([int(p[int(torch.randint(len(p), (), generator=g))]) for p in pools], dtype=torch.int64)


def draw_times(config: TrainConfig, g: torch.Generator, count: int) -> Tensor:
    """Timesteps, uniform over [low_t, high_t] (paper: uniform over all): int64 [count]."""
    return torch.randint(config.low_t, config.high_t + 1, (count,), generator=g)


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
    states = data.plain_states(backend, [data.c1[r] for r in rows] + [data.c2[int(rows[i])] for i in twice])
    eps = backend.predict(torch.cat([x_t, x_t[twice]]), torch.cat([t, t[twice]]), states).float()
    first, second = eps[: len(rows)], eps[: len(rows)].clone()
    second[twice] = eps[len(rows):]
    return first, second


class FreshTargets:
    """New pictures, timesteps and noise every step, from the step's own generator."""

    def __init__(self, backend: Backend, data: TrainingSet, config: TrainConfig) -> None:
        self._backend, self._data, self._config = backend, data, config

    def batch(self, step: int) -> Batch:
        g = step_generator(self._config.seed, step)
        rows = draw_rows(self._data, self._config, g, self._config.batch_size)
        t = draw_times(self._config, g, len(rows))
        x0 = self._data.latents[rows]
        x_t = add_noise(x0, torch.randn(x0.shape, generator=g), t, self._backend.alphas_bar)
        e1, e2 = frozen_predictions(self._backend, self._data, rows, t, x_t)
        return Batch(rows, t, x_t, e1, e2, self._data.count_id(rows))


class TargetBank:
    """A stored set of tuples; a step draws from it. The file is keyed by everything that its content depends on."""

    def __init__(self, backend: Backend, data: TrainingSet, config: TrainConfig, folder: Path,
                 progress: Progress | None = None) -> None:
        self._backend, self._data, self._config = backend, data, config
        key = [backend.sha256, data.sha256, config.bank, config.low_t, config.high_t, list(data.latents.shape[1:])]
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]
        self.path = folder / f"bank-{name}.safetensors"
        self._content = self._load() or self._build(progress)
        allowed = set(data.id_rows.tolist())
        rows = self._content["rows"].tolist()
        kinds = [data.kinds[r] for r in rows]
        every = torch.arange(len(rows))
        self._pools = {k: every[[kind == k for kind in kinds]] for k in ("face", "nonface")}
        self._pools["id"] = every[[kind == "id" and r in allowed for kind, r in zip(kinds, rows, strict=True)]]

    def _load(self) -> dict[str, Tensor] | None:
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                return {k: file.get_tensor(k) for k in ("rows", "t", "seeds", "eps_c1", "eps_c2")}
        except (SafetensorError, OSError) as error:
            _log.warning("%s is damaged (%s); it is built again", self.path.name, error)
            return None

    def _noise(self, seeds: list[int]) -> Tensor:
        shape = self._data.latents.shape[1:]
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])

    def _build(self, progress: Progress | None) -> dict[str, Tensor]:
        total, parts = self._config.bank, {k: [] for k in ("rows", "t", "seeds", "eps_c1", "eps_c2")}
        for start in range(0, total, 32):
            count = min(32, total - start)
            g = step_generator(seed_of("bank") % 2**31, start)
            # half S_ID, half S_Reg whatever a run's own share is; every person of S_ID, whatever a run's subset is
            pools = [self._data.every_id_row if i % 2 else (self._data.face_rows, self._data.nonface_rows)[i // 2 % 2]
                     for i in range(count)]
            pools = [p if len(p) else self._data.every_id_row for p in pools]
            rows = torch.tensor([int(p[int(torch.randint(len(p), (), generator=g))]) for p in pools])
            t = draw_times(self._config, g, count)
            seeds = torch.tensor([seed_of("bank-noise", start + i) for i in range(count)])
            x_t = add_noise(self._data.latents[rows], self._noise(seeds.tolist()), t, self._backend.alphas_bar)
            e1, e2 = frozen_predictions(self._backend, self._data, rows, t, x_t)
            for k, v in (("rows", rows), ("t", t), ("seeds", seeds), ("eps_c1", e1.half()), ("eps_c2", e2.half())):
                parts[k].append(v)
            if progress:
                progress(min(total, start + 32), total)
        content = {k: torch.cat(v) for k, v in parts.items()}
        write_safetensors(self.path, content)
        return content

    def batch(self, step: int) -> Batch:
        g = step_generator(self._config.seed, step)
        wanted = draw_rows(self._data, self._config, g, self._config.batch_size)
        picks = []
        for row in wanted.tolist():
            pool = self._pools[self._data.kinds[row]]
            picks.append(int(pool[int(torch.randint(len(pool), (), generator=g))]))
        b, pick = self._content, torch.tensor(picks)
        rows, t = b["rows"][pick], b["t"][pick]
        x_t = add_noise(self._data.latents[rows], self._noise(b["seeds"][pick].tolist()), t, self._backend.alphas_bar)
        return Batch(rows, t, x_t, b["eps_c1"][pick].float(), b["eps_c2"][pick].float(), self._data.count_id(rows))
