"""The shipped miniature SDXL in a real ComfyUI, beside diffusers' pipeline: equal predictions, pictures that agree.

Stock Load Checkpoint, CLIP Text Encode and KSampler; same prompts, seeds, steps and guidance, without and with a
prefix. With `APL_RECORD_CLAIMS=1` the figures become claims, and `APL_PICTURES=FOLDER` keeps the pictures.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from comfy_host import ROOT, host_folder, host_python
from fakes import miniature_xl as mini
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from apl_train import claims, shipped
from apl_train.model.backend import Backend

PROMPTS = ["A close-up portrait of otis kelzan", "A photo of arthur malket", "a red bicycle", "a woman with long hair"]
SEEDS, STEPS, GUIDANCE = [1, 2, 3, 4], 20, 3.0
pytestmark = [
    pytest.mark.world,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(host_folder() is None, reason="no ComfyUI: set COMFYUI_DIR (tests/comfy/README.md)"),
    pytest.mark.skipif(not mini.HALF.exists(), reason=mini.WHY_NOT),
]


@dataclass(frozen=True)
class Both:
    """Pictures uint8 [2, prompts, H, W, 3], off first, and noise predictions [8, 4, h, w] of both sides."""

    host: NDArray[np.uint8]
    diffusers: NDArray[np.uint8]
    host_noise: torch.Tensor
    noise: torch.Tensor


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder = tmp_path_factory.mktemp("host")
    checkpoint = shipped.locate("base_model", "miniature-sdxl")
    backend = Backend.load(checkpoint)
    vectors = mini.write_prefix(folder / "prefix.safetensors").tensors
    x_t, steps, prompts, on = mini.latents(backend.size // 8)
    save_file({"x_t": x_t}, folder / "latents.safetensors")
    rows = [(p, s, is_on) for is_on in (False, True) for p, s in zip(PROMPTS, SEEDS, strict=True)]
    job = {"checkpoint": str(checkpoint), "prefix": str(folder / "prefix.safetensors"), "rows": rows, "steps": STEPS,
           "guidance": GUIDANCE, "size": backend.size, "latents": str(folder / "latents.safetensors"),
           "timesteps": steps, "prompts": prompts, "on": on}
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    host = host_folder()
    keep = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    script = Path(__file__).with_name("draw_xl_in_host.py")
    done = subprocess.run([host_python(host), str(script), str(host), str(ROOT), str(folder / "job.json"),
                           str(folder / "out.safetensors")], cwd=host, env=keep, capture_output=True, text=True,
                          timeout=3000, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = load_file(folder / "out.safetensors")
    with torch.no_grad():
        noise = torch.cat([backend.predict(x_t[i : i + 1], torch.tensor(steps[i : i + 1]),
                                           backend.encode([prompts[i]], vectors if on[i] else None))
                           for i in range(len(steps))])
    here = [backend.sample(PROMPTS, SEEDS, vectors=v, steps=STEPS, guidance=GUIDANCE).images for v in (None, vectors)]
    host_images = found["images"].numpy().reshape(2, len(PROMPTS), *here[0].shape[1:])
    if out := os.environ.get("APL_PICTURES"):
        from PIL import Image

        Path(out).mkdir(parents=True, exist_ok=True)
        lines = [np.concatenate(list(side), axis=1) for state in (0, 1) for side in (host_images[state], here[state])]
        Image.fromarray(np.concatenate(lines)).save(Path(out) / "comfy-sdxl.png")
    return Both(host_images, np.stack(here), found["noise"], noise)


def test_noise_predictions_are_those_of_diffusers_without_and_with_the_prefix(both: Both) -> None:
    difference = (both.host_noise - both.noise).abs().flatten(1).max(1).values
    print(f"largest difference: off {float(difference[:4].max()):.2g}, on {float(difference[4:].max()):.2g}")  # noqa: T201
    if os.environ.get("APL_RECORD_CLAIMS"):
        claims.record({"comfy-sdxl-noise": (float(difference.max()), None, len(difference))})
    assert both.noise.abs().max() > 0.5  # there is something to compare
    assert float(difference.max()) <= 1e-4


def test_pictures_are_those_of_the_diffusers_pipeline(both: Both) -> None:
    apart = np.abs(both.host.astype(float) - both.diffusers).mean((2, 3, 4))
    moved = np.abs(both.diffusers[0].astype(float) - both.diffusers[1]).mean((1, 2, 3))
    print(f"mean difference of a picture, of 255: {apart.max():.2f} at most; the prefix moves by {moved.mean():.2f}")  # noqa: T201
    if os.environ.get("APL_RECORD_CLAIMS"):
        claims.record({"comfy-sdxl-pictures": (float(apart.max()), None, apart.size)})
    assert apart.max() <= 2.0, apart
    assert moved[:2].mean() > 2 * apart.max()  # so the prefix is there on both sides
