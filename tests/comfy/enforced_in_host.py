"""Enforced mode without a server: `python enforced_in_host.py HOST REPOSITORY FOLDER`, in the host's own interpreter.

FOLDER holds policy.json and prefixes/ (`enforced_server.write_policy`). First, without any hook, pictures are sampled
as someone would wire them by hand; then the policy is enforced and plain workflows are sampled. The last line printed
is JSON: largest differences of the latents, by name.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import run_host

HERE = Path(__file__).resolve().parent
NAMED = "a (photo:1.2) of zanthor quell in a garden"


def start(host: Path, root: Path, folder: Path, spy: bool = True) -> tuple[Any, object]:
    """A function that gives this repository's modules, and what must be kept alive. No hook of ours is placed."""
    os.environ["SPY_PREFIXES"] = str(folder / "prefixes")
    os.environ.pop("APL_POLICY", None)
    kept = run_host.fill_in()
    sys.path.insert(0, str(host))
    sys.argv = ["main.py", "--cpu", "--base-directory", str(folder / "base"), "--disable-api-nodes",
                "--use-pytorch-cross-attention"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import utils.extra_config  # noqa: F401 - first: `nodes` puts comfy/, and so comfy/utils.py, ahead on the path

    import nodes  # isort: skip

    for pack in (*([HERE / "enforcement_pack"] if spy else []), root):
        if not asyncio.run(nodes.load_custom_node(str(pack))):
            raise RuntimeError(f"the host refused {pack}")
    package = str(root).replace(".", "_x_")

    def module(name: str) -> Any:
        import importlib

        return importlib.import_module(f"{package}.{name}")

    return module, kept


def enforce(module: Any, folder: Path) -> Any:
    """Place every hook; returns the status object."""
    policy = module("apl_core.policy").load_policy(folder / "policy.json")
    return module("comfy_nodes.enforcement.start").enforce(policy)


def load() -> tuple[Any, Any]:
    """(model, clip) of the small checkpoint by the host's own loader."""
    import nodes

    model, clip, _ = nodes.CheckpointLoaderSimple().load_checkpoint("tiny.safetensors")
    return model, clip


def encode(clip: Any, text: str) -> Any:
    """The host's own CLIP Text Encode."""
    import nodes

    return nodes.CLIPTextEncode().encode(clip, text)[0]


def sample(model: Any, positive: Any, negative: Any, cfg: float) -> Any:
    """Latents [1, 4, 16, 16] of four steps of the host's own KSampler."""
    import nodes
    import torch

    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    return nodes.common_ksampler(model, 1, 4, cfg, "euler", "normal", positive, negative, latent)[0]["samples"].clone()


def by_hand(module: Any, folder: Path) -> dict[str, Any]:
    """What a user would wire: plain, prefix on the positive alone, prefix on both; at cfg 7 and, swapped, at cfg 0."""
    model, clip = load()
    prefix = module("apl_core.prefix").load_prefix(folder / "prefixes" / "a-sd1.safetensors")
    on = module("comfy_nodes.clip_patch").anonymize(clip, prefix)
    bad = "bad quality"
    return {
        "plain": sample(model, encode(clip, NAMED), encode(clip, bad), 7.0),
        "positive": sample(model, encode(on, NAMED), encode(clip, bad), 7.0),
        "both": sample(model, encode(on, NAMED), encode(on, bad), 7.0),
        "cfg 0 plain": sample(model, encode(on, "a garden"), encode(clip, NAMED), 0.0),
        "cfg 0 both": sample(model, encode(on, "a garden"), encode(on, NAMED), 0.0),
    }


def main() -> None:
    host, root, folder = map(Path, sys.argv[1:4])
    module, _kept = start(host, root, folder)
    import torch

    with torch.inference_mode():
        hand = by_hand(module, folder)
        status = enforce(module, folder)
        status.self_test = module("comfy_nodes.enforcement.selftest").run_self_test(status.guard)
        model, clip = load()
        enforced = sample(model, encode(clip, NAMED), encode(clip, "bad quality"), 7.0)
        swapped = sample(model, encode(clip, "a garden"), encode(clip, NAMED), 0.0)

        def off(one: Any, other: Any) -> float:
            return float((one - other).abs().max())

        found = {
            "enforced - prefix on the positive by hand": off(enforced, hand["positive"]),
            "enforced - plain": off(enforced, hand["plain"]),
            "enforced - prefix on both": off(enforced, hand["both"]),
            "cfg 0: enforced - prefix on both": off(swapped, hand["cfg 0 both"]),
            "cfg 0: enforced - name in a plain negative": off(swapped, hand["cfg 0 plain"]),
            "status": status.report()[0],
        }
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
