"""Pictures by the host's own nodes, in its interpreter: `python draw_in_host.py HOST REPOSITORY JOB.json OUT`.

The job names a checkpoint, a prefix, rows of (prompt, seed, whether the prefix is on) and noisy latents. OUT is a
safetensors file: `images` uint8 [N, H, W, 3], and `noise` float32 [M, 4, h, w], the UNet's predictions for the latents.
With a `policy`, it is enforced afterwards, and `enforced` holds the pictures of the rows that are on once more, drawn
by a plain workflow that knows nothing of prefixes.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import run_host

HERE = Path(__file__).resolve().parent


def start(host: Path, root: Path, base: Path) -> tuple[dict[str, Any], object]:
    """The host's nodes, with this repository and the miniature's classes loaded; and what must be kept alive."""
    kept = run_host.fill_in()
    sys.path.insert(0, str(host))
    sys.argv = ["main.py", "--cpu", "--base-directory", str(base), "--disable-api-nodes",
                "--use-pytorch-cross-attention"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import nodes

    logging.getLogger().setLevel(logging.WARNING)
    for pack in (HERE / "miniature_pack", root):
        if not asyncio.run(nodes.load_custom_node(str(pack))):
            raise RuntimeError(f"the host refused {pack}")
    return nodes.NODE_CLASS_MAPPINGS, kept


def predict(model: Any, clip: Any, latents: Any, steps: list[int], prompts: list[str]) -> Any:
    """epsilon of x_t at timestep t, by the host's `apply_model`: float32 [M, 4, h, w].

    The host's x is x_t / sqrt(abar) and it answers with x_0, so epsilon = (x - x_0) / sigma.
    """
    import comfy.model_management
    import torch

    comfy.model_management.load_models_gpu([model])
    inner, found = model.model, []
    for x_t, t, prompt in zip(latents, steps, prompts, strict=True):
        states = clip.encode_from_tokens(clip.tokenize(prompt))
        sigma = inner.model_sampling.sigmas[t].reshape(1)
        x = x_t[None] * (1 + sigma**2).sqrt()
        found.append((x - inner.apply_model(x, sigma, c_crossattn=states)) / sigma)
    return torch.cat(found).float()


def main() -> None:
    host, root, job, out = (Path(word) for word in sys.argv[1:5])
    wanted = json.loads(job.read_text("utf-8"))
    with tempfile.TemporaryDirectory(prefix="apl-comfy-") as scratch:
        base = Path(scratch)
        for name in ("models/checkpoints", "models/anonymization_prompts", "custom_nodes", "input", "output", "temp"):
            (base / name).mkdir(parents=True)
        (base / "models/checkpoints/mini.safetensors").symlink_to(wanted["checkpoint"])
        shutil.copyfile(wanted["prefix"], base / "models/anonymization_prompts/given.safetensors")
        nodes, _kept = start(host, root, base)
        import torch
        from safetensors.torch import load_file, save_file

        with torch.inference_mode():
            tensors = draw(nodes, wanted)
            if "latents" in wanted:
                model, clip, _ = nodes["CheckpointLoaderSimple"]().load_checkpoint("mini.safetensors")
                x_t = load_file(wanted["latents"])["x_t"]
                tensors["noise"] = predict(model, clip, x_t, wanted["timesteps"], wanted["prompts"])
            if "policy" in wanted:
                enforce(root, Path(wanted["policy"]))
                plain = [(prompt, seed, False) for prompt, seed, on in wanted["rows"] if on]
                tensors["enforced"] = draw(nodes, wanted | {"rows": plain})["images"]
        save_file({key: value.contiguous() for key, value in tensors.items()}, out)


def enforce(root: Path, policy: Path) -> None:
    """Place every hook of the enforced mode in this process, and test it as a starting server would."""
    def module(name: str) -> Any:
        return importlib.import_module(f"{str(root).replace('.', '_x_')}.{name}")

    status = module("comfy_nodes.enforcement.start").enforce(module("apl_core.policy").load_policy(policy))
    module("comfy_nodes.enforcement.selftest").run_self_test(status.guard)


def draw(nodes: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """The pictures of the job's rows, one KSampler run each, as a workflow would make them."""
    import torch

    model, clip, vae = nodes["CheckpointLoaderSimple"]().load_checkpoint("mini.safetensors")
    prefix = nodes["APL_LoadAnonymizationPrompt"].execute("given", 0).args[0]
    any_on = any(is_on for _, _, is_on in wanted["rows"])
    on = nodes["APL_Anonymize"].execute(clip, prefix, True, "chunk").args[0] if any_on else None
    encode, sample = nodes["CLIPTextEncode"]().encode, nodes["KSampler"]().sample
    (negative,) = encode(clip, "")
    images = []
    for prompt, seed, is_on in wanted["rows"]:
        (positive,) = encode(on if is_on else clip, prompt)
        latent = {"samples": torch.zeros(1, 4, wanted["size"] // 8, wanted["size"] // 8)}
        (drawn,) = sample(model, seed, wanted["steps"], wanted["guidance"], "ddim", "ddim_uniform", positive, negative,
                          latent, 1.0)
        (picture,) = nodes["VAEDecode"]().decode(vae, drawn)
        images.append((picture * 255).round().to(torch.uint8))
    return {"images": torch.cat(images)} if images else {}


if __name__ == "__main__":
    main()
