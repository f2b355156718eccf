"""Memory of one training step at SD1.5's full size beside the paper's code and diffusers' example.

    python benchmarks/step_memory.py

What tensors take at the highest moment of a step of one 512 px sample in float32, weights included, counted on the meta
device by the ledger behind `apl train --dry-run` (attention as a fused kernel has it). With APL_RECORD_CLAIMS=1 the
ratios become rows of benchmarks/claims.json.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from other_ways import LENGTH, VECTORS, inversion_step, paper_step
from step_cost import sd15

from apl_train import claims
from apl_train.training.memory import GIB, _bytes, _peak_of


def our_step(parts: Any) -> Callable[[], None]:
    """The preset sd15-paper's step: both frozen predictions at once, then the prefixed one; the VAE has no part."""
    unet, text = (m.requires_grad_(False) for m in (parts.unet, parts.text_encoder))
    width, edge = text.config.hidden_size, unet.config.sample_size

    def predict(n: int, states: torch.Tensor) -> torch.Tensor:
        x, t = (torch.empty(n, *rest, device="meta", dtype=kind) for rest, kind in (
            ((4, edge, edge), torch.float32), ((), torch.int64)))
        return unet(x, t, encoder_hidden_states=states, return_dict=False)[0]

    def work() -> None:
        with torch.no_grad():
            frozen = predict(2, torch.empty(2, LENGTH, width, device="meta"))
        vectors = torch.empty(VECTORS, width, device="meta", requires_grad=True)
        handle = text.get_input_embeddings().register_forward_hook(
            lambda _m, _a, out: torch.cat([out[:, :1], vectors[None], out[:, 1 + VECTORS :]], 1))
        try:
            states = text(input_ids=torch.empty(1, LENGTH, dtype=torch.int64, device="meta")).last_hidden_state
        finally:
            handle.remove()
        (predict(1, states) - frozen[:1]).square().mean().backward()

    return work


def counted() -> dict[str, int]:
    """Bytes at the highest moment of each way's step."""
    pixels = torch.empty(1, 3, 512, 512, device="meta")
    ids = torch.empty(1, LENGTH, dtype=torch.int64, device="meta")
    found = {}
    for name, make in (("paper's code", lambda p: paper_step(p, pixels, ids, ids)),
                       ("diffusers' textual_inversion", lambda p: inversion_step(p, pixels, ids)),
                       ("ours", our_step)):
        parts = sd15()
        weights = _bytes(parts.unet, parts.text_encoder, *(() if name == "ours" else (parts.vae,)))
        found[name] = weights + _peak_of(make(parts))
    return found


def main() -> None:
    found = counted()
    ours = found["ours"]
    for name, size in found.items():
        sys.stdout.write(f"{name:32}{size / GIB:8.2f} GiB{size / ours:10.3f} x ours\n")
    if os.environ.get("APL_RECORD_CLAIMS"):
        claims.record({"memory-paper": (ours / found["paper's code"], None, 1),
                       "memory-inversion": (ours / found["diffusers' textual_inversion"], None, 1)})


if __name__ == "__main__":
    main()
