"""What a training step costs beside the paper's code, diffusers' example and the floor.

    python benchmarks/step_cost.py flops      SD1.5 at 512 px, counted on the meta device: no weights, a minute
    python benchmarks/step_cost.py seconds    the miniature checkpoint, CPU seconds of one thread, all ways in turns

`flops` counts every preset for SD1.5 by what its settings do: steps, batch, bank, share of S_ID. docs/performance.md
derives the floor. With APL_RECORD_CLAIMS=1 the figures become rows of benchmarks/claims.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from other_ways import LENGTH, VECTORS, inversion_step, paper_step
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from apl_train import claims, shipped
from apl_train.model.files import Parts, read_parts
from apl_train.training import config

PICTURES = 800
"""Distinct pictures of the sets that `apl make` builds: four of each of 100 persons, and 400 that name nobody."""
FAST = "sd15-fast"


def sd15() -> Parts:
    """Stable Diffusion 1.5's modules on the meta device: shapes without numbers."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    blocks = (320, 640, 1280, 1280)
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, in_channels=4, out_channels=4, layers_per_block=2, cross_attention_dim=768,
            block_out_channels=blocks, attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512)
        text = CLIPTextModel(CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12))
    return Parts(unet, vae, text, None, {})


def counted(work: Callable[[], Any]) -> float:
    """FLOPs of `work`, one multiplication with addition as two."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def pieces(parts: Parts) -> dict[str, float]:
    """FLOPs of everything that a step is made of, one sample each."""
    unet, vae, text = (m.requires_grad_(False) for m in (parts.unet, parts.vae, parts.text_encoder))
    width, edge = text.config.hidden_size, unet.config.sample_size

    def meta(*shape: int, **kind: Any) -> Tensor:
        return torch.empty(*shape, device="meta", **kind)

    t, ids = meta(1, dtype=torch.int64), meta(1, LENGTH, dtype=torch.int64)

    def predict(states: Tensor) -> Tensor:
        return unet(meta(1, 4, edge, edge), t, encoder_hidden_states=states, return_dict=False)[0]

    def encoded() -> Tensor:
        return text(input_ids=ids).last_hidden_state

    def learning(checkpointing: bool) -> Callable[[], None]:
        def work() -> None:
            unet.train(checkpointing)
            if checkpointing:
                unet.enable_gradient_checkpointing()
            vectors = meta(VECTORS, width).requires_grad_(True)
            handle = text.get_input_embeddings().register_forward_hook(
                lambda _m, _a, out: torch.cat([out[:, :1], vectors[None], out[:, 1 + VECTORS :]], 1))
            try:
                predict(encoded()).sum().backward()
            finally:
                handle.remove()
                if checkpointing:
                    unet.disable_gradient_checkpointing()
                    unet.eval()
        return work

    with torch.no_grad():
        found = {"text forward": counted(encoded), "UNet forward": counted(lambda: predict(meta(1, LENGTH, width))),
                 "VAE encode": counted(lambda: vae.encode(meta(1, 3, 8 * edge, 8 * edge)))}
    found["floor"] = counted(learning(False))
    found["floor, checkpointing"] = counted(learning(True))
    return found


def per_sample(c: config.TrainConfig, p: dict[str, float]) -> float:
    """FLOPs of one sample of a training with these settings: the step, and its part of what is computed once."""
    samples = c.steps * c.batch_size
    share = 1.0 if c.no_reg else c.id_share
    step = p["floor, checkpointing" if c.gradient_checkpointing else "floor"]
    # S_ID rows need eps(c1) and eps(c2), rows of S_Reg one of them; a bank is half of each
    targets = 1.5 * c.bank / samples if c.bank else 1 + share
    once = min(PICTURES, samples) / samples * (p["VAE encode"] + 2 * p["text forward"])
    return step + targets * p["UNet forward"] + once


def flops() -> dict[str, Any]:
    """TFLOPs of all ways, and their ratios."""
    parts = sd15()
    p = pieces(parts)
    pixels = torch.empty(1, 3, 512, 512, device="meta")
    ids = torch.empty(1, LENGTH, dtype=torch.int64, device="meta")
    found: dict[str, Any] = {"pieces": p, "floor": p["floor"]}
    found["paper's code"] = counted(paper_step(parts, pixels, ids, ids))
    parts.unet.requires_grad_(False)
    found["diffusers' textual_inversion"] = counted(inversion_step(parts, pixels, ids))
    for name in config.preset_names():
        if name.startswith("sd15"):
            found[name] = per_sample(config.from_dict(config.preset(name)), p)
    return found


class Ours:
    """Our own step on the miniature checkpoint, and CPU seconds of what it computes once."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        from apl_train.model.backend import Backend
        from apl_train.training.command import load_training_set
        from apl_train.training.trainer import Trainer

        self.config = config.from_dict(config.preset("fast") | {"base_model": "miniature"} | changes)
        backend = Backend.load(shipped.locate("base_model", "miniature"))
        began = time.process_time()
        data = load_training_set(backend, self.config, folder)
        folder.joinpath(f"run-{self.config.bank}").mkdir()
        self.trainer = Trainer(backend, data, self.config, folder / f"run-{self.config.bank}", cache=folder)
        self.once = (time.process_time() - began) / (self.config.steps * self.config.batch_size)


def seconds(rounds: int, bank: int) -> dict[str, Any]:
    """CPU seconds a sample of all ways, the median of `rounds` turns; ours with its part of what is computed once."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)

    def others(n: int) -> tuple[Parts, Tensor, Tensor]:
        parts = read_parts(shipped.locate("base_model", "miniature"))
        edge = 8 * parts.unet.config.sample_size
        ids = torch.randint(512, 40000, (n, LENGTH), generator=generator)
        return parts, torch.rand(n, 3, edge, edge, generator=generator), ids

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fresh, banked = Ours(folder), Ours(folder, bank=bank)
        batch = fresh.config.batch_size
        one, many, inverted = others(1), others(batch), others(batch)
        ways: dict[str, tuple[Callable[[], Any], int, float]] = {
            "paper's code": (paper_step(*one, one[2]), 1, 0.0),
            f"paper's code, batch {batch}": (paper_step(*many, many[2]), batch, 0.0),
            f"diffusers' textual_inversion, batch {batch}": (inversion_step(*inverted), batch, 0.0),
            "ours, fresh targets": (fresh.trainer.one_step, batch, fresh.once),
            f"ours, a bank of {bank}": (banked.trainer.one_step, batch, banked.once),
        }
        spent: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(rounds + 1):
            for way, (step, samples, once) in ways.items():
                count = max(1, batch // samples)
                began = time.process_time()
                for _ in range(count):
                    step()
                if turn:  # the first one warms caches up
                    spent[way].append((time.process_time() - began) / (count * samples) + once)
    return {way: {"seconds": statistics.median(all_), "all": all_} for way, all_ in spent.items()}


def _record(found: dict[str, tuple[float, None, int]]) -> None:
    if os.environ.get("APL_RECORD_CLAIMS"):
        claims.record(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("flops", "seconds"))
    parser.add_argument("--rounds", type=int, default=15, help="turns of every way (seconds)")
    parser.add_argument("--bank", type=int, default=1024, help="tuples of the bank (seconds)")
    args = parser.parse_args()
    out = sys.stdout.write
    if args.what == "flops":
        found = flops()
        for name, value in found["pieces"].items():
            out(f"{name:34}{value / 1e12:8.3f} TFLOP\n")
        out(f"\n{'one sample':34}{'TFLOP':>8}{'/ paper':>10}{'/ floor':>10}\n")
        paper = found["paper's code"]
        for name, value in found.items():
            if name != "pieces":
                out(f"{name:34}{value / 1e12:8.3f}{value / paper:10.3f}{value / found['floor']:10.3f}\n")
        _record({"flops-paper": (found[FAST] / paper, None, 1),
                 "flops-floor": (found[FAST] / found["floor"], None, 1)})
    else:
        found = seconds(args.rounds, args.bank)
        for name, row in found.items():
            out(f"{name:44}{1000 * row['seconds']:9.2f} ms a sample\n")
        ours = [row for name, row in found.items() if name.startswith("ours")]
        paper, inversion = found["paper's code"], next(r for n, r in found.items() if n.startswith("diffusers"))
        for name, row in zip(("fresh targets", "bank"), ours, strict=True):
            for against, key, other in (("paper's code", "step-paper", paper),
                                        ("textual_inversion", "step-inversion", inversion)):
                ratios = [a / b for a, b in zip(row["all"], other["all"], strict=True)]
                out(f"ours with {name} / {against}: {statistics.median(ratios):.3f}  "
                    f"[{min(ratios):.3f}, {max(ratios):.3f}] over {len(ratios)} turns\n")
                if name == "fresh targets":  # what the preset does
                    _record({key: (statistics.median(ratios), None, len(ratios))})


if __name__ == "__main__":
    main()
