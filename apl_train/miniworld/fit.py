"""The loop that every part of the miniature world is trained with: seeded, resumable, one line of log a minute.

A stage is `fit(name, modules, step, steps, ...)`; `step(i, generator)` returns a dict of losses whose "loss" entry
is minimised. Under torchrun (gloo) every process draws its own batch and gradients are averaged: on two cores two
processes of one thread do 1.5 times the work of one process of two. State (weights, Adam moments, step) is one
safetensors file, written atomically every `save_minutes`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from apl_core.atomic import write_safetensors


def fast_dtype() -> torch.dtype:
    """bfloat16 where this processor multiplies it faster than float32, else float32 (old AVX2 machines: 10x slower)."""
    x = torch.randn(512, 512)
    y = x.to(torch.bfloat16)

    def clock(a: Tensor) -> float:
        a @ a
        start = time.perf_counter()
        for _ in range(8):
            a @ a
        return time.perf_counter() - start

    return torch.bfloat16 if clock(y) < 0.8 * clock(x) else torch.float32


def _state(modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"{m}|{k}": v for m, module in modules.items() for k, v in module.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam|{i}|{k}": torch.as_tensor(v) for k, v in state.items()}
    return {k: v.detach().clone().contiguous() for k, v in tensors.items()}


def _restore(path: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
    tensors = load_file(path)
    for name, module in modules.items():
        module.load_state_dict({k.split("|", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{name}|")})
    adam: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("adam|"):
            _, i, k = key.split("|")
            adam.setdefault(int(i), {})[k] = value
    full = optimizer.state_dict()
    full["state"] = adam
    optimizer.load_state_dict(full)


def fit(
    name: str,
    folder: Path,
    modules: dict[str, nn.Module],
    step: Callable[[int, torch.Generator], dict[str, Tensor]],
    *,
    steps: int,
    lr: float,
    warmup: int = 60,
    weight_decay: float = 0.0,
    ema: float = 0.0,
    save_minutes: float = 3.0,
    seed: int = 0,
    minutes: float | None = None,
) -> None:
    """Trains in place; when `ema` > 0 the modules end with the averaged weights. A finished stage returns at once.

    minutes: give up after so long (the state stays, the next call goes on).

    Raises:
        FloatingPointError: the loss is not finite.
        RuntimeError: no gradient reaches some of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, log = folder / f"{name}.safetensors", folder / f"{name}.log.jsonl"
    parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
    average = {k: _copy(m) for k, m in modules.items()} if ema else {}
    everything = {**modules, **{f"ema-{k}": m for k, m in average.items()}}
    first = 0
    if path.exists():
        _restore(path, everything, optimizer)
        with safe_open(path, "pt") as state:  # not from the log, which a crash may leave one save behind
            first = int(state.metadata()["step"])
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    began = saved = time.monotonic()
    sums: dict[str, float] = {}
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=name, mininterval=5, disable=rank > 0)
    for i in bar:
        share = min(1.0, (i + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * i / steps))
        for group in optimizer.param_groups:
            group["lr"] = max(lr * share, lr * 0.02)
        draw = i * world + rank
        losses = step(draw, torch.Generator().manual_seed(seed * 1_000_003 + draw))
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        if i == 1:  # not at 0: what stands before weights that begin as zeros is reached from the second step on
            _check_reached(name, modules)
        if world > 1:
            _average_gradients(parameters, world)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(ema, (i + 1) / (i + 10))
        for key, module in average.items():
            with torch.no_grad():
                torch._foreach_lerp_(list(module.parameters()), list(modules[key].parameters()), 1 - decay)
                for a, b in zip(module.buffers(), modules[key].buffers(), strict=True):
                    a.copy_(b)
        for k, v in losses.items():
            sums[k] = 0.98 * sums.get(k, float(v.detach())) + 0.02 * float(v.detach())
        if not math.isfinite(sums["loss"]):
            raise FloatingPointError(f"{name}: the loss is not finite at step {i}; the last good state is {path}")
        bar.set_postfix({k: f"{v:.4f}" for k, v in sums.items()}, refresh=False)
        now = time.monotonic()
        over = minutes is not None and now - began > 60 * minutes
        if rank == 0 and (now - saved > 60 * save_minutes or i + 1 == steps or over):
            write_safetensors(path, _state(everything, optimizer), {"step": str(i + 1)})
            with log.open("a", encoding="utf-8") as out:
                out.write(json.dumps({"step": i + 1, **{k: round(v, 6) for k, v in sums.items()}}) + "\n")
            saved = now
        if over:
            break
    for key, module in average.items():
        modules[key].load_state_dict(module.state_dict())


def _check_reached(name: str, modules: dict[str, nn.Module]) -> None:
    """Training looks healthy with most of a model standing still, which a faulty compiled backward has done to one."""
    lost = [f"{m}.{k}" for m, module in modules.items() for k, p in module.named_parameters()
            if p.requires_grad and (p.grad is None or not bool(p.grad.count_nonzero()))]
    if lost:
        raise RuntimeError(f"{name}: no gradient reaches {len(lost)} of the weights, such as {', '.join(lost[:3])}")


def _average_gradients(parameters: list[nn.Parameter], world: int) -> None:
    """One all-reduce for all gradients; a parameter that a batch did not reach has none and gets zeros."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= world
    start = 0
    for p in parameters:
        p.grad = flat[start : start + p.numel()].view_as(p)
        start += p.numel()


def _copy(module: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(module).requires_grad_(False)
