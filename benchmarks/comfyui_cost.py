"""What the node pack costs in ComfyUI: `python benchmarks/comfyui_cost.py`, where tests/comfy finds a ComfyUI.

Import of the pack into a running host; an encode with the prefix beside one without, at equal chunks, by a text encoder
of CLIP-L's real size; sampling by the host's KSampler with one conditioning beside the other, by the miniature.
Ratios within one run, in turn; recorded as claims.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests" / "comfy"
sys.path[:0] = [str(ROOT), str(TESTS)]
ROUNDS = 25


def ratio(one: Callable[[], Any], other: Callable[[], Any], rounds: int) -> float:
    """CPU time of `one` over that of `other`: the median of the rounds' ratios, each doing both."""
    found = []
    for index in range(rounds):
        spent = {}
        for work in ((one, other) if index % 2 else (other, one)):
            start = time.process_time()
            work()
            spent[work] = time.process_time() - start
        found.append(spent[one] / spent[other])
    return sorted(found)[len(found) // 2]


def import_cost() -> tuple[float, list[str]]:
    """(milliseconds of CPU, least of five; packages of others that came along) of loading the pack into this host."""
    import asyncio

    import in_host

    least, foreign = float("inf"), set()
    for _ in range(5):
        for name in [name for name in sys.modules if name.startswith(in_host.PACK)]:
            del sys.modules[name]
        before, start = set(sys.modules), time.process_time()
        assert asyncio.run(in_host.nodes.load_custom_node(str(ROOT)))
        least = min(least, time.process_time() - start)
        foreign |= {name.split(".")[0] for name in set(sys.modules) - before if not name.startswith(in_host.PACK)}
    return least * 1e3, sorted(foreign - set(sys.stdlib_module_names))


def encode_ratio() -> float:
    """Encode with the prefix over encode without, one chunk each; CLIP-L 768 wide, 12 layers, random weights."""
    import comfy.sd
    import in_host
    import torch
    from comfy import sd1_clip, supported_models_base

    clip = comfy.sd.CLIP(supported_models_base.ClipTarget(sd1_clip.SD1Tokenizer, sd1_clip.SD1ClipModel),
                         model_options={"dtype": torch.float32})
    prefix = in_host.core["prefix"].AnonymizationPrompt("sd1", {"emb_params": torch.randn(10, 768)}, in_host.AP1.meta)
    on = sys.modules[f"{in_host.PACK}.comfy_nodes.clip_patch"].anonymize(clip, prefix)
    text = "a photo of a (person:1.2) " + "in a garden " * 10
    shapes = {given.encode_from_tokens(given.tokenize(text)).shape for given in (clip, on)}
    assert len(shapes) == 1, f"the UNet would work more: {shapes}"

    def encode(given: Any) -> None:
        tokens = given.tokenize(text)
        assert len(tokens["l"]) == 1
        given.cond_stage_model.encode_token_weights(tokens)

    # the host patches the model as the CLIP in use changes, which is no part of an encode: both go through the patch
    on.encode_from_tokens(on.tokenize(text))
    guarded = on.patcher.model.clip_l.process_tokens
    plain = guarded.apl_plain

    def without() -> None:
        on.patcher.model.clip_l.process_tokens = plain
        encode(clip)

    def with_prefix() -> None:
        on.patcher.model.clip_l.process_tokens = guarded
        encode(on)

    return ratio(with_prefix, without, ROUNDS)


def in_the_host() -> None:
    import torch

    logging.disable(logging.WARNING)
    with torch.inference_mode():
        milliseconds, foreign = import_cost()
        sys.stdout.write("\n" + json.dumps({"import_ms": milliseconds, "foreign": foreign,
                                            "encode": encode_ratio()}) + "\n")


def sampling_ratio(host: Path) -> float:
    """Sampling with the prefix in the conditioning over sampling without: six steps of the host's own sampler."""
    import tempfile

    import draw_in_host

    with tempfile.TemporaryDirectory(prefix="apl-comfy-") as scratch:
        base = Path(scratch)
        for name in ("models/checkpoints", "models/anonymization_prompts", "custom_nodes", "input", "output", "temp"):
            (base / name).mkdir(parents=True)
        model_file = ROOT / "apl_train/miniworld/assets/model/miniature-sd1.safetensors"
        (base / "models/checkpoints/mini.safetensors").symlink_to(model_file)
        nodes, _kept = draw_in_host.start(host, ROOT, base)
        import nodes as host_nodes
        import torch

        logging.disable(logging.WARNING)
        with torch.inference_mode():
            model, clip, _ = nodes["CheckpointLoaderSimple"]().load_checkpoint("mini.safetensors")
            prefix = nodes["APL_LoadAnonymizationPrompt"].execute("anonymize-miniature", 0).args[0]
            on = nodes["APL_Anonymize"].execute(clip, prefix, True, "chunk").args[0]
            encode = nodes["CLIPTextEncode"]().encode
            (negative,), (without,), (with_prefix,) = (encode(each, text) for each, text in (
                (clip, ""), (clip, "a photo of a dog"), (on, "a photo of a dog")))
            assert without[0][0].shape == with_prefix[0][0].shape, "the UNet would work more"
            assert not torch.equal(without[0][0], with_prefix[0][0])
            latent = {"samples": torch.zeros(1, 4, 16, 16)}

            def sample(positive: Any) -> None:
                host_nodes.common_ksampler(model, 1, 6, 3.0, "ddim", "ddim_uniform", positive, negative, latent)

            sample(without)
            return ratio(lambda: sample(with_prefix), lambda: sample(without), ROUNDS)


def main() -> int:
    from comfy_host import host_folder, host_python

    from apl_train import claims

    host = host_folder()
    if host is None:
        sys.stderr.write("There is no ComfyUI: set COMFYUI_DIR (tests/comfy/README.md).\n")
        return 1
    found: dict[str, Any] = {}
    for part in ("--in-host", "--sampling"):
        done = subprocess.run([host_python(host), __file__, str(host), str(ROOT), part], cwd=host, check=False,
                              stdout=subprocess.PIPE, text=True)
        if done.returncode:
            return done.returncode
        found |= json.loads(done.stdout.strip().splitlines()[-1])
    sys.stdout.write(json.dumps(found) + "\n")
    claims.record({"comfy-import": (found["import_ms"], None, 5), "comfy-encode": (found["encode"], None, ROUNDS),
                   "comfy-sampling": (found["sampling"], None, ROUNDS),
                   "comfy-foreign": (float(len(found["foreign"])), None, 1)})
    return 0


if __name__ == "__main__":
    if "--in-host" in sys.argv:
        in_the_host()
    elif "--sampling" in sys.argv:
        sys.stdout.write("\n" + json.dumps({"sampling": sampling_ratio(Path(sys.argv[1]))}) + "\n")
    else:
        sys.exit(main())
