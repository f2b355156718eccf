"""What an encode costs with the prefix in it, in the trainer's own encoder: CLIP-L at full size, random weights.

    python benchmarks/encode_cost.py

The prefix takes ten of 75 places of a chunk, so that a prompt of equal chunks costs as many multiplications; what may
cost more is where the rows come from. Both sides in turns, CPU seconds of one thread. diffusers' own `encode_prompt` of
the same modules stands beside them. The hosts measure theirs inside themselves: benchmarks/comfyui_cost.py and
benchmarks/webui_cost.py. With APL_RECORD_CLAIMS=1 the ratio becomes a row of benchmarks/claims.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from apl_train import claims, shipped

TEXT = "a photo of a person in a garden, " * 4


def modules() -> tuple[Any, Any]:
    """The miniature's tokenizer, which is CLIP's, and a text encoder of CLIP-L's size."""
    from transformers import CLIPTextConfig, CLIPTextModel

    from apl_train.model.files import read_parts

    tokenizer = read_parts(shipped.locate("base_model", shipped.MINIATURE)).tokenizer
    torch.manual_seed(0)
    return tokenizer, CLIPTextModel(CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        eos_token_id=49407, bos_token_id=49406, pad_token_id=1)).eval()


@torch.inference_mode()
def measure(rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each way, by turn."""
    from diffusers import StableDiffusionPipeline

    from apl_train.model.text import TextStack

    tokenizer, encoder = modules()
    text = TextStack("sd1", {"emb_params": tokenizer}, {"emb_params": encoder})
    prefix = {"emb_params": 0.01 * torch.randn(10, 768)}
    if text.chunks_of(TEXT) != 1 or text.chunks_of(TEXT, 10) != 1:
        raise SystemExit("the prompt takes more chunks with the prefix: nothing to compare")

    pipeline = SimpleNamespace(tokenizer=tokenizer, text_encoder=encoder, unet=None)
    ways: dict[str, Callable[[], Any]] = {
        "with the prefix": lambda: text.encode([TEXT], prefix), "without": lambda: text.encode([TEXT]),
        "diffusers' encode_prompt": lambda: StableDiffusionPipeline.encode_prompt(
            pipeline, TEXT, torch.device("cpu"), 1, False),
    }
    spent: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way, work in ways.items():
            began = time.process_time()
            work()
            if turn:  # the first one warms caches up
                spent[way].append(time.process_time() - began)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    torch.set_num_threads(1)
    spent = measure(args.rounds)
    for way, all_ in spent.items():
        sys.stdout.write(f"{way:28}{1000 * statistics.median(all_):8.1f} ms\n")
    # the fastest of many: a busy machine can only add
    ratio = min(spent["with the prefix"]) / min(spent["without"])
    turns = [a / b for a, b in zip(spent["with the prefix"], spent["without"], strict=True)]
    sys.stdout.write(f"with / without: {ratio:.3f} of the fastest, {statistics.median(turns):.3f} the median turn\n"
                     "in the hosts: python benchmarks/comfyui_cost.py, python benchmarks/webui_cost.py\n")
    if os.environ.get("APL_RECORD_CLAIMS"):
        claims.record({"encode-diffusers": (ratio, None, args.rounds)})


if __name__ == "__main__":
    main()
