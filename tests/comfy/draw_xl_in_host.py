"""The miniature SDXL by the host's own nodes, in its interpreter: `draw_xl_in_host.py HOST REPOSITORY JOB.json OUT`.

The job and OUT are those of `draw_in_host.py`; `on` says which of the predictions are made with the prefix.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from draw_in_host import draw, start


def predict(model: Any, clips: list[Any], latents: Any, steps: list[int], prompts: list[str]) -> Any:
    """epsilon of x_t at timestep t, by the host's `apply_model`: float32 [M, 4, h, w]; a CLIP for every prompt.

    The host's x is x_t / sqrt(abar) and it answers with x_0, so epsilon = (x - x_0) / sigma.
    """
    import comfy.model_management
    import torch

    comfy.model_management.load_models_gpu([model])
    inner, found = model.model, []
    height, width = (8 * edge for edge in latents.shape[2:])
    for clip, x_t, t, prompt in zip(clips, latents, steps, prompts, strict=True):
        states, pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
        vector = inner.encode_adm(pooled_output=pooled, width=width, height=height, device=torch.device("cpu"))
        sigma = inner.model_sampling.sigmas[t].reshape(1)
        x = x_t[None] * (1 + sigma**2).sqrt()
        found.append((x - inner.apply_model(x, sigma, c_crossattn=states, y=vector)) / sigma)
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
            model, off, _ = nodes["CheckpointLoaderSimple"]().load_checkpoint("mini.safetensors")
            prefix = nodes["APL_LoadAnonymizationPrompt"].execute("given", 0).args[0]
            on = nodes["APL_Anonymize"].execute(off, prefix, True, "chunk").args[0]
            clips = [on if is_on else off for is_on in wanted["on"]]
            tensors["noise"] = predict(model, clips, load_file(wanted["latents"])["x_t"], wanted["timesteps"],
                                       wanted["prompts"])
        save_file({key: value.contiguous() for key, value in tensors.items()}, out)


if __name__ == "__main__":
    main()
