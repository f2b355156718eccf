"""Checkpoints are told apart by names and shapes: SD1 with or without a yaml goes on, other kinds are named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from fakes import tiny_models as tiny
from safetensors.torch import save_file

from apl_core.errors import ModelError
from apl_train.model.base_model import kind_of
from apl_train.model.checkpoint import open_checkpoint, schedule
from apl_train.model.files import find_model, read_parts
from apl_train.model.single_file import ldm_config, to_ldm

pytest.importorskip("diffusers")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def models():
    """As wide as Stable Diffusion 1 where its shapes are told from, and small elsewhere: two levels, one text head."""
    return (tiny.unet(width=64, channels=(320, 320), attention_head_dim=8), tiny.vae(channels=(32, 32, 64, 64)),
            tiny.text_encoder(width=64, heads=1, layers=2))


@pytest.fixture(scope="module")
def tensors(models) -> dict[str, torch.Tensor]:
    return {key: value.contiguous() for key, value in to_ldm(*models).items()}


def saved(folder: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, folder / "model.safetensors", metadata)
    return folder / "model.safetensors"


def same(found, models) -> bool:
    return all(torch.equal(value, new.state_dict()[key]) for old, new in
               zip(models, (found.unet, found.vae, found.text_encoder), strict=True)
               for key, value in old.state_dict().items())


def test_a_file_alone_is_read_as_with_its_yaml(tmp_path: Path, models, tensors) -> None:
    alone = saved(tmp_path, tensors)
    found = read_parts(alone)
    assert same(found, models) and found.schedule["prediction_type"] == "epsilon"
    unet, vae, text = found.unet.config, found.vae.config, found.text_encoder.config
    assert unet.sample_size == 64 and unet.attention_head_dim == 8 and vae.scaling_factor == 0.18215
    assert text.num_attention_heads == 1 and text.hidden_act == "quick_gelu" and text.eos_token_id == 49407
    config = ldm_config(*models)
    config["model"]["params"]["image_size"] = 64
    alone.with_suffix(".yaml").write_text(yaml.safe_dump(config), "utf-8")
    beside = read_parts(alone)
    assert {k: v for k, v in unet.items() if k != "_use_default_values"} == {
        k: v for k, v in beside.unet.config.items() if k != "_use_default_values"}


def test_shapes_of_stable_diffusion_1_give_its_published_configuration() -> None:
    """Against v1-inference.yaml's numbers."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from apl_train.model.checkpoint import config_from_shapes

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        vae = AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
                            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4)
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, num_hidden_layers=12, intermediate_size=3072,
                                            num_attention_heads=12))
    shapes = {key: tuple(value.shape) for key, value in to_ldm(unet, vae, text).items()}
    params = config_from_shapes(shapes, "x")["model"]["params"]
    found = params["unet_config"]["params"]
    assert sorted(found.pop("attention_resolutions")) == [1, 2, 4]
    assert found.items() >= {"model_channels": 320, "num_res_blocks": 2, "channel_mult": [1, 2, 4, 4], "num_heads": 8,
                             "context_dim": 768, "in_channels": 4, "out_channels": 4}.items()
    assert params["first_stage_config"]["params"]["ddconfig"].items() >= {
        "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "z_channels": 4, "resolution": 512}.items()


def test_merges_keep_old_names_averages_and_half_precision(tmp_path: Path, models, tensors) -> None:
    old = {key.replace("transformer.text_model.", "transformer."): value.half() for key, value in tensors.items()}
    old |= {"model_ema.diffusion_modelout2weight": torch.ones(2), "global_step": torch.ones(1),
            "cond_stage_model.transformer.embeddings.position_ids": torch.zeros(1, 77)}
    found = read_parts(saved(tmp_path, old))
    halved = tuple(m.to(torch.float32) for m in models)
    assert all(torch.equal(value.half().float(), found.unet.state_dict()[key])
               for key, value in halved[0].state_dict().items())
    assert next(found.text_encoder.parameters()).dtype == torch.float32


@pytest.mark.parametrize(("extra", "header", "beside", "prediction", "zero_snr"), [
    ({}, {}, None, "epsilon", False),
    ({"v_pred": torch.ones(1)}, {}, None, "v_prediction", False),
    ({"v_pred": torch.ones(1), "ztsnr": torch.ones(1)}, {}, None, "v_prediction", True),
    ({}, {"modelspec.prediction_type": "v"}, None, "v_prediction", False),
    ({}, {"modelspec.prediction_type": "epsilon"}, None, "epsilon", False),
    ({}, {}, "v", "v_prediction", False),
    ({"v_pred": torch.ones(1)}, {}, "eps", "epsilon", False),
])
def test_prediction_type(
    tmp_path: Path, models, tensors, extra: dict, header: dict, beside: str | None, prediction: str, zero_snr: bool
) -> None:
    path = saved(tmp_path, tensors | extra, header or None)
    if beside:
        config = ldm_config(*models)
        config["model"]["params"]["parameterization"] = beside
        path.with_suffix(".yaml").write_text(yaml.safe_dump(config), "utf-8")
    found = schedule(open_checkpoint(path))
    assert found["prediction_type"] == prediction and found.get("rescale_betas_zero_snr", False) == zero_snr


X = (4, 4)
UNET_IN, CLIP = "model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.text_model."
MANY = {f"m.{i}": (4, 4, 3) for i in range(9)}
KINDS = {
    "an empty file": {},
    "a LoRA": {"lora_unet_down_blocks_0.lora_down.weight": X},
    "a LoRA, by peft": {"unet.down_blocks.0.lora_A.weight": X},
    "a ControlNet": MANY | {"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)},
    "an embedding": {"emb_params": (10, 768)},
    "a Stable Diffusion 3 model": MANY | {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": X},
    "a Flux model": MANY | {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": X},
    "the refiner of Stable Diffusion XL": MANY | {"conditioner.embedders.0.model.ln_final.bias": X, UNET_IN: (384, 4)},
    "a Stable Diffusion 2.x model": MANY | {"cond_stage_model.model.ln_final.weight": (1024,), UNET_IN: (320, 4)},
    "an inpainting model": MANY | {UNET_IN: (320, 9, 3, 3), f"{CLIP}x": X},
    "an InstructPix2Pix model": MANY | {UNET_IN: (320, 8, 3, 3), f"{CLIP}x": X},
    "a VAE alone": MANY | {"first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3)},
    "one part of a diffusers folder": MANY | {"down_blocks.0.resnets.0.conv1.weight": X},
    "no Stable Diffusion model": MANY,
    "a model of another architecture": MANY | {"model.diffusion_model.x_embedder.proj.weight": X, f"{CLIP}x": X},
    "has no CLIP text encoder": MANY | {UNET_IN: (320, 4, 3, 3)},
}


@pytest.mark.parametrize("label", KINDS)
def test_other_kinds_are_named_with_what_is_supported(label: str) -> None:
    with pytest.raises(ModelError) as caught:
        kind_of(KINDS[label], {}, "file.safetensors")
    assert label.split(",")[0] in caught.value.message and "file.safetensors" in caught.value.message
    assert "Stable Diffusion 1.x" in caught.value.hint and caught.value.field == "base_model"


def test_a_vae_from_elsewhere_takes_the_place_of_the_models_own(tmp_path: Path, models, tensors) -> None:
    path = saved(tmp_path, tensors)
    other = tiny.vae(seed=9, channels=(32, 64, 64, 64))
    named = {k: v.contiguous() for k, v in to_ldm(models[0], other, models[2]).items() if k.startswith("first_stage")}
    save_file(named, tmp_path / "vae.safetensors")
    save_file({k.removeprefix("first_stage_model."): v for k, v in named.items()}, tmp_path / "bare.safetensors")
    other.save_pretrained(tmp_path / "folder")
    hashes = {read_parts(path).sha256}
    for name in ("vae.safetensors", "bare.safetensors", "folder"):
        found = read_parts(path, vae=tmp_path / name)
        assert all(torch.equal(v, found.vae.state_dict()[k]) for k, v in other.state_dict().items()), name
        assert found.sha256 not in hashes
        hashes.add(found.sha256)
    bare = {k: v for k, v in tensors.items() if not k.startswith("first_stage")}
    with pytest.raises(ModelError, match="has no VAE of its own"):
        read_parts(saved(tmp_path, bare))
    assert read_parts(path, vae=tmp_path / "vae.safetensors").vae is not None
    for wrong, words in (("gone.safetensors", "no .safetensors file"), ("model.safetensors", "is no VAE")):
        with pytest.raises(ModelError, match=words):
            read_parts(path, vae=tmp_path / wrong)


def test_shapes_without_weights(tmp_path: Path, models, tensors) -> None:
    found = read_parts(saved(tmp_path, tensors), meta=True, dtype=torch.bfloat16)
    for module, own in zip((found.unet, found.vae, found.text_encoder), models, strict=True):
        assert {k: tuple(v.shape) for k, v in module.state_dict().items()} == {
            k: tuple(v.shape) for k, v in own.state_dict().items()}
        assert all(p.is_meta for p in module.parameters())
    assert found.sha256 == "" and next(found.unet.parameters()).dtype == torch.bfloat16


def hub_cache(root: Path, name: str, tensors: dict[str, torch.Tensor]) -> Path:
    """A hub cache as huggingface_hub lays it out, with one snapshot."""
    repo = root / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    save_file(tensors, snapshot / "model.safetensors")
    return snapshot


BLOCKED = """
import socket, sys
def refuse(*args, **kwargs):
    print("ASKED THE NETWORK", args, flush=True)
    raise OSError("there is no network here")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.create_connection = refuse
from apl_train.model.backend import Backend
found = [Backend.load(source) for source in sys.argv[1:]]
assert [b.name for b in found] == ["model", "folder", "tiny-sd"], [b.name for b in found]
import torch
vectors = {"emb_params": torch.ones(3, 64)}
states = [b.encode(["a photo of a cat"], vectors).states for b in found]
assert all(torch.equal(s, states[0]) for s in states) and states[0].shape == (1, 77, 64)
print("read", len(found))
"""


def test_nothing_asks_the_network(tmp_path: Path, models, tensors) -> None:
    """In a fresh process without any of the variables that switch hubs off: a file alone, a folder, a hub id."""
    from diffusers import PNDMScheduler

    path, folder, cache = saved(tmp_path, tensors), tmp_path / "folder", tmp_path / "cache"
    for module, name in zip(models, ("unet", "vae", "text_encoder"), strict=True):
        module.save_pretrained(folder / name)
    PNDMScheduler(1000, 0.00085, 0.012, "scaled_linear", skip_prk_steps=True).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    hub_cache(cache, "someone/tiny-sd", tensors)
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HUB_CACHE": str(cache), "PYTHONPATH": str(ROOT),
           "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", BLOCKED, str(path), str(folder), "someone/tiny-sd"], env=env,
                          cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["read", "3"]


def test_a_hub_id_that_is_not_here_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="neither a file here nor a hub model") as caught:
        find_model("someone/nothing")
    assert "hf download someone/nothing" in caught.value.hint
    with pytest.raises(ModelError, match="does not exist"):
        find_model("no-such-folder")
