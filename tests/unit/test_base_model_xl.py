"""SDXL checkpoints: told from their shapes alone, by a published yaml or by ours; relatives are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fakes import tiny_models as tiny
from safetensors.torch import save_file
from test_single_file_xl import real_shapes

from apl_core.errors import ModelError
from apl_train.model.base_model import kind_of
from apl_train.model.checkpoint import config_from_shapes, open_checkpoint, schedule
from apl_train.model.checkpoint_xl import read_sgm
from apl_train.model.files import read_parts
from apl_train.model.single_file import to_ldm
from apl_train.model.single_file_xl import sgm_config, to_sgm

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def models():
    """As wide as SDXL where its shapes are told from, and small elsewhere: two levels, one text head each."""
    unet = tiny.unet_xl(width=128, pooled=64, channels=(320, 320), attention_head_dim=[5, 5], sample_size=128,
                        addition_time_embed_dim=256, projection_class_embeddings_input_dim=64 + 6 * 256,
                        transformer_layers_per_block=[1, 2])
    vae = tiny.vae()
    vae.register_to_config(scaling_factor=0.13025)
    return (unet, vae, tiny.text_encoder(5, 64, 2, 1), tiny.text_encoder(6, 64, 2, 1, "gelu", projection=64))


@pytest.fixture(scope="module")
def tensors(models) -> dict[str, torch.Tensor]:
    return {key: value.contiguous() for key, value in to_sgm(*models).items()}


def saved(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Path:
    path = folder / "model.safetensors"
    save_file(tensors, path)
    if config:
        path.with_suffix(".yaml").write_text(yaml.safe_dump(config), "utf-8")
    return path


def settings(module) -> dict[str, Any]:
    return {key: value for key, value in module.config.items() if not key.startswith("_")}


def published(config: dict[str, Any]) -> dict[str, Any]:
    """A yaml as others write it: nothing beside `params`, the unused second class of a refiner's yaml left out."""
    params = config["model"]["params"]
    for name in ("network_config", "conditioner_config"):
        params[name] = {"target": params[name]["target"], "params": params[name]["params"]}
    for stage in params["conditioner_config"]["params"]["emb_models"]:
        stage.pop("text_config", None)
    return config


def test_a_file_alone_or_with_a_published_yaml_is_read_as_with_ours(tmp_path: Path, models, tensors) -> None:
    ours = read_parts(saved(tmp_path, tensors, sgm_config(*models)))
    names = ("unet", "vae", "text_encoder", "text_encoder_2")
    for name, before in zip(names, models, strict=True):
        after = getattr(ours, name).state_dict()
        assert all(torch.equal(value, after[key]) for key, value in before.state_dict().items()), name
    assert ours.vae.config.scaling_factor == 0.13025 and ours.family == "sdxl" and ours.zeros_for_empty_prompt
    assert ours.tokenizer_2.pad_token_id == 0 and ours.tokenizer.pad_token_id == 49407
    for config in (None, published(sgm_config(*models))):
        (tmp_path / "model.yaml").unlink()
        found = read_parts(saved(tmp_path, tensors, config))
        assert settings(found.unet) == settings(ours.unet) and found.unet.config.sample_size == 128
        assert settings(found.vae)["scaling_factor"] == 0.13025
        for name in ("text_encoder", "text_encoder_2"):
            theirs, own = getattr(found, name), getattr(ours, name)
            ids = torch.tensor([[tiny.BOS, 5, 9, *[tiny.EOS] * 74]])
            assert torch.equal(theirs(ids).last_hidden_state, own(ids).last_hidden_state)
        if config is None:
            saved(tmp_path, tensors, published(sgm_config(*models)))


def test_shapes_of_stable_diffusion_xl_give_its_published_configuration() -> None:
    """Against the numbers of sd_xl_base.yaml and of the diffusers folder's config.json."""
    from diffusers.loaders import single_file_utils as convert

    models = real_shapes()
    shapes = {key: tuple(value.shape) for key, value in to_sgm(*models).items()}
    config = config_from_shapes(shapes, "x", "sdxl")
    params = config["model"]["params"]
    found = dict(params["network_config"]["params"])
    assert sorted(found.pop("attention_resolutions")) == [2, 4]
    assert found.items() >= {"model_channels": 320, "num_res_blocks": 2, "channel_mult": [1, 2, 4],
                             "num_head_channels": 64, "transformer_depth": [1, 2, 10], "context_dim": 2048,
                             "adm_in_channels": 2816, "num_classes": "sequential"}.items()
    assert params["scale_factor"] == 0.13025
    made = convert.create_unet_diffusers_config_from_ldm(config, {})
    assert made["attention_head_dim"] == [5, 10, 20] and made["transformer_layers_per_block"] == [1, 2, 10]
    assert made["addition_embed_type"] == "text_time" and made["up_block_types"][-1] == "UpBlock2D"


X = (4, 4)
MANY = {f"m.{i}": (4, 4, 3) for i in range(9)}
UNET, L = "model.diffusion_model.", "conditioner.embedders.0.transformer.text_model."
G = "conditioner.embedders.1.model."
WHOLE = MANY | {f"{UNET}input_blocks.0.0.weight": (320, 4, 3, 3), f"{L}x": X, f"{G}x": X,
                f"{UNET}middle_block.1.transformer_blocks.0.attn1.to_q.weight": (1280, 1280)}


def without(start: str) -> dict:
    return {key: value for key, value in WHOLE.items() if not key.startswith(start)}


@pytest.mark.parametrize(("shapes", "words"), [
    (MANY | {"conditioner.embedders.0.model.x": X, f"{UNET}input_blocks.0.0.weight": (384, 4, 3, 3)}, "the refiner of"),
    (WHOLE | {f"{UNET}input_blocks.0.0.weight": (320, 9, 3, 3)}, "an inpainting model"),
    (WHOLE | {f"{UNET}input_blocks.0.0.weight": (320, 8, 3, 3)}, "an InstructPix2Pix model"),
    (WHOLE | {"edm_mean": (4,), "edm_std": (4,)}, "EDM's noise schedule"),
    (WHOLE | {"edm_vpred.sigma_max": ()}, "EDM's noise schedule"),
    (without(f"{UNET}middle_block"), "a smaller relative of Stable Diffusion XL"),
    (without(L), r"no CLIP text encoder \(conditioner\.embedders\.0"),
    (without(G), r"no CLIP text encoder \(conditioner\.embedders\.1"),
])
def test_relatives_are_refused_by_name(shapes: dict, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        kind_of(shapes, {}, "file.safetensors")
    assert "Stable Diffusion XL for text to image" in caught.value.hint


@pytest.mark.parametrize(("extra", "scaling", "prediction"), [
    ({}, None, "epsilon"), ({"v_pred": ()}, None, "v_prediction"), ({"v_pred": ()}, "EpsScaling", "epsilon"),
    ({}, "VScaling", "v_prediction"),
])
def test_prediction_type(tmp_path: Path, models, tensors, extra: dict, scaling: str | None, prediction: str) -> None:
    config = sgm_config(*models)
    denoiser = config["model"]["params"]["denoiser_config"]["params"]
    if scaling:
        denoiser["scaling_config"]["target"] = f"sgm.modules.diffusionmodules.denoiser_scaling.{scaling}"
    denoiser["discretization_config"]["params"] = {"linear_start": 0.001, "num_timesteps": 1000}
    small = {key: value[:0] if "transformer" not in key and value.ndim > 1 and "embedders" in key else value
             for key, value in tensors.items()}
    path = saved(tmp_path, small | {key: torch.ones(1) for key in extra}, config if scaling else None)
    found = schedule(open_checkpoint(path))
    assert found["prediction_type"] == prediction and found["beta_start"] == (0.001 if scaling else 0.00085)


def changed(*keys: str, value: Any = None) -> Callable[[dict], None]:
    def change(config: dict) -> None:
        inner = config["model"]["params"]
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
    return change


@pytest.mark.parametrize(("change", "words"), [
    (changed("network_config"), r"has no model\.params\.network_config\.params"),
    (changed("conditioner_config", "params"), r"has no model\.params\.conditioner_config\.params"),
    (changed("conditioner_config", "params", "emb_models", value=[]), "conditioner has 0 text encoders"),
    (changed("network_config", "params", "channel_mult", value=[1, 2]), "do not fit the UNet"),
    (changed("network_config", "params", "transformer_depth", value=1), "do not fit the UNet"),
    (changed("denoiser_config", "params", "scaling_config", "target", value="sgm.EDMScaling"), "EDMScaling"),
])
def test_a_yaml_that_does_not_fit_is_refused(tmp_path: Path, models, tensors, change, words: str) -> None:
    config = sgm_config(*models)
    change(config)
    with pytest.raises(ModelError, match=words):
        read_sgm(open_checkpoint(saved(tmp_path, tensors, config)), meta=True)


def test_a_vae_from_elsewhere_keeps_the_models_scale(tmp_path: Path, models, tensors) -> None:
    other = tiny.vae(seed=9, channels=(32, 64, 64, 64))
    named = {k: v.contiguous() for k, v in to_ldm(tiny.unet(), other, models[2]).items() if k.startswith("first_stage")}
    save_file(named, tmp_path / "vae.safetensors")
    found = read_parts(saved(tmp_path, tensors), vae=tmp_path / "vae.safetensors")
    assert found.vae.config.scaling_factor == 0.13025
    assert all(torch.equal(v, found.vae.state_dict()[k]) for k, v in other.state_dict().items())


def test_forks_names_of_the_first_encoder_are_known(tmp_path: Path, models, tensors) -> None:
    bare = {key.replace("embedders.0.transformer.text_model.", "embedders.0.transformer."): value
            for key, value in tensors.items()}
    bare |= {"conditioner.embedders.0.transformer.embeddings.position_ids": torch.zeros(1, 77)}
    found = read_parts(saved(tmp_path, bare)).text_encoder.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in models[2].state_dict().items())
