"""The shipped miniature SDXL in a real WebUI, over HTTP, beside diffusers' pipeline: predictions and pictures.

The conditioning is the one that the host's own jobs sample with, without and with a prefix. With `APL_RECORD_CLAIMS=1`
the figures become claims, and `APL_PICTURES=FOLDER` keeps the pictures.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fakes import miniature_xl as mini
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from setup_host import text_folder
from webui_host import Server, host_folder, running

from apl_core.prefix import AnonymizationPrompt
from apl_train import claims, shipped
from apl_train.model.backend import Backend

PROMPTS = ["A close-up portrait of otis kelzan", "A photo of arthur malket", "a red bicycle", "a woman with long hair"]
SEEDS, STEPS, GUIDANCE = [1, 2, 3, 4], 20, 3.0
NEGATIVE = " "
"""No words, but not empty: an empty negative prompt is zeros to this host, and the miniature learned its encoding."""
pytestmark = [
    pytest.mark.world,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(host_folder() is None, reason="no WebUI: set WEBUI_DIR (tests/a1111/README.md)"),
    pytest.mark.skipif(not mini.HALF.exists(), reason=mini.WHY_NOT),
]


@pytest.fixture(scope="module")
def backend() -> Backend:
    return Backend.load(shipped.locate("base_model", "miniature-sdxl"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with a yaml that names its text encoders, and a prefix."""
    folder = tmp_path_factory.mktemp("xl")
    whole = shipped.locate("base_model", "miniature-sdxl")
    config = yaml.safe_load(whole.with_suffix(".yaml").read_text("utf-8"))
    first, second, *_ = config["model"]["params"]["conditioner_config"]["params"]["emb_models"]
    first["params"] |= {"version": str(text_folder(folder, first["text_config"])), "device": "cpu"}
    second["params"]["device"] = "cpu"
    sizes = second["text_config"]
    arch = {"embed_dim": sizes["projection_dim"], "text_cfg": {
        "context_length": 77, "vocab_size": sizes["vocab_size"], "width": sizes["hidden_size"],
        "heads": sizes["num_attention_heads"], "layers": sizes["num_hidden_layers"]},
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}}
    (folder / "arch").mkdir()
    (folder / "arch" / f"{second['params']['arch']}.json").write_text(json.dumps(arch), "utf-8")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / whole.name).symlink_to(whole)
    (folder / "checkpoints" / f"{whole.stem}.yaml").write_text(yaml.safe_dump(config, sort_keys=False), "utf-8")
    (folder / "prefixes").mkdir()
    return folder


@pytest.fixture(scope="module")
def prefix(folder: Path) -> AnonymizationPrompt:
    return mini.write_prefix(folder / "prefixes" / "mini-xl.safetensors")


@pytest.fixture(scope="module")
def server(folder: Path, prefix: AnonymizationPrompt) -> Iterator[Server]:
    name = "miniature-sdxl.safetensors"
    with running("--ckpt", str(folder / "checkpoints" / name), "--ckpt-dir", str(folder / "checkpoints"),
                 "--apl-dir", str(folder / "prefixes"), environ={"APL_OPEN_CLIP": str(folder / "arch")},
                 options={"sd_model_checkpoint": name}) as host:
        yield host


def draw(server: Server, prompt: str, seed: int, size: int, on: bool) -> NDArray[np.uint8]:
    status, answer = server.txt2img(
        prompt=prompt, negative_prompt=NEGATIVE, seed=seed, steps=STEPS, cfg_scale=GUIDANCE, width=size, height=size,
        sampler_name="DDIM", alwayson_scripts={"anonymize": {"args": [{"enabled": on, "prefix": "mini-xl"}]}})
    assert status == 200, answer
    return np.array(Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))).convert("RGB"))


@pytest.mark.parametrize("on", [False, True], ids=["off", "on"])
def test_predictions_are_those_of_diffusers(server: Server, backend: Backend, prefix: AnonymizationPrompt, on: bool,
                                            tmp_path: Path) -> None:
    x_t, steps, prompts, _ = mini.latents(backend.size // 8)
    worst = apart = 0.0
    for i, prompt in enumerate(prompts[:4]):
        server.clear()
        draw(server, prompt, 1, backend.size, on)
        (held,) = server.conds()
        encoded = backend.encode([prompt], prefix.tensors if on else None)
        crossattn, vector = held["c.0.0.0.crossattn"][None], held["c.0.0.0.vector"][None]
        assert float(held["u.0.0.crossattn"].abs().max()) > 0  # the negative prompt is encoded
        apart = max(apart, float((crossattn - encoded.states).abs().max()),
                    float((vector[:, : encoded.pooled.shape[1]] - encoded.pooled).abs().max()))
        for k in (i, i + 4):
            save_file({"latent": x_t[k : k + 1], "timestep": torch.tensor(steps[k : k + 1]),
                       "crossattn": crossattn.contiguous(), "vector": vector.contiguous()}, tmp_path / "in.safetensors")
            status, answer = server.call("/test/predict_xl", {"file": str(tmp_path / "in.safetensors"),
                                                              "out": str(tmp_path / "out.safetensors")})
            assert status == 200, answer
            with torch.no_grad():
                noise = backend.predict(x_t[k : k + 1], torch.tensor(steps[k : k + 1]), encoded)
            worst = max(worst, float((load_file(tmp_path / "out.safetensors")["noise"] - noise).abs().max()))
    print(f"largest difference of conditioning {apart:.2g}, of noise {worst:.2g}")  # noqa: T201
    if os.environ.get("APL_RECORD_CLAIMS"):
        claims.record({f"webui-sdxl-noise-{'on' if on else 'off'}": (worst, None, 8)})
    assert worst <= 1e-4 and apart <= 1e-4, (worst, apart)


def test_pictures_are_those_of_the_diffusers_pipeline(server: Server, backend: Backend,
                                                      prefix: AnonymizationPrompt) -> None:
    host = np.stack([[draw(server, p, s, backend.size, on) for p, s in zip(PROMPTS, SEEDS, strict=True)]
                     for on in (False, True)])
    here = np.stack([backend.sample(PROMPTS, SEEDS, vectors=v, steps=STEPS, guidance=GUIDANCE).images
                     for v in (None, prefix.tensors)])
    apart = np.abs(host.astype(float) - here).mean((2, 3, 4))
    moved = np.abs(here[0].astype(float) - here[1]).mean((1, 2, 3))
    print(f"mean difference of a picture, of 255: {apart.max():.2f} at most; the prefix moves by {moved.mean():.2f}")  # noqa: T201
    if out := os.environ.get("APL_PICTURES"):
        Path(out).mkdir(parents=True, exist_ok=True)
        lines = [np.concatenate(list(side), axis=1) for state in (0, 1) for side in (host[state], here[state])]
        Image.fromarray(np.concatenate(lines)).save(Path(out) / "webui-sdxl.png")
    if os.environ.get("APL_RECORD_CLAIMS"):
        claims.record({"webui-sdxl-pictures": (float(apart.max()), None, apart.size)})
    assert apart.max() <= 2.0, apart
    assert moved[:2].mean() > 2 * apart.max()
