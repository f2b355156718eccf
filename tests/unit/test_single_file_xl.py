"""SDXL's single file holds what diffusers' own converters read back, under the names that web interfaces know."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from fakes import tiny_models as tiny
from safetensors.torch import load_file

from apl_core.errors import ModelError
from apl_train.miniworld.sdxl_file import NAME, SD1, sdxl_checkpoint, write_parts
from apl_train.model.single_file_xl import CLIP_G, CLIP_L, own_parts, sgm_config, to_sgm

pytest.importorskip("diffusers")


def real_shapes():
    """The published SDXL's modules, without numbers."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128, down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            block_out_channels=(320, 640, 1280), cross_attention_dim=2048, attention_head_dim=[5, 10, 20],
            transformer_layers_per_block=[1, 2, 10], use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816)
        vae = AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
                            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
                            scaling_factor=0.13025)
        small = CLIPTextModel(CLIPTextConfig(hidden_size=768, num_hidden_layers=12, intermediate_size=3072,
                                             num_attention_heads=12))
        large = CLIPTextModelWithProjection(CLIPTextConfig(
            hidden_size=1280, num_hidden_layers=32, intermediate_size=5120, num_attention_heads=20,
            projection_dim=1280, hidden_act="gelu"))
    return unet, vae, small, large


def test_names_are_those_of_stable_diffusion_xl() -> None:
    models = real_shapes()
    shapes = {key: tuple(value.shape) for key, value in to_sgm(*models).items()}
    # counts of sd_xl_base_1.0.safetensors, whose first text encoder also lists its position ids
    for start, count in (("model.diffusion_model.", 1680), ("first_stage_model.", 248), (CLIP_L, 196), (CLIP_G, 390)):
        assert sum(key.startswith(start) for key in shapes) == count, start
    for key, shape in {
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "model.diffusion_model.label_emb.0.2.bias": (1280,),
        "model.diffusion_model.input_blocks.4.1.proj_in.weight": (640, 640),
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight": (1280, 2048),
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight": (1280, 1280),
        "model.diffusion_model.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
        "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.weight": (5120, 1280),
        "conditioner.embedders.1.model.positional_embedding": (77, 1280),
        "conditioner.embedders.1.model.token_embedding.weight": (49408, 1280),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
        "conditioner.embedders.1.model.ln_final.weight": (1280,),
        "conditioner.embedders.1.model.logit_scale": (),
    }.items():
        assert shapes[key] == shape, key
    params = sgm_config(*models)["model"]["params"]
    # sd_xl_base.yaml
    assert params["network_config"]["params"].items() >= {
        "adm_in_channels": 2816, "num_classes": "sequential", "in_channels": 4, "model_channels": 320,
        "attention_resolutions": [2, 4], "num_res_blocks": 2, "channel_mult": [1, 2, 4], "num_head_channels": 64,
        "use_linear_in_transformer": True, "transformer_depth": [1, 2, 10], "context_dim": 2048}.items()
    assert params["scale_factor"] == 0.13025
    first, second, *sizes = params["conditioner_config"]["params"]["emb_models"]
    assert first["params"] == {"layer": "hidden", "layer_idx": 11}
    assert second["params"].items() >= {"arch": "ViT-bigG-14", "layer": "penultimate", "legacy": False}.items()
    assert [s["params"]["outdim"] for s in sizes] == [256] * 3


def test_the_second_encoders_names_are_open_clips() -> None:
    """Run by open_clip's arithmetic, by hand: blocks with one fused attention each, text_projection at the end."""
    model = tiny.text_encoder(6, 48, 2, 6, "gelu", projection=40)
    held = {key.removeprefix(CLIP_G): value for key, value in own_parts(tiny.unet_xl(), model).items()
            if key.startswith(CLIP_G)}
    ids = torch.tensor([[tiny.BOS, 5, 9, tiny.EOS] + [0] * 73])
    x = held["token_embedding.weight"][ids] + held["positional_embedding"]
    for i in range(2):
        b = f"transformer.resblocks.{i}"
        block = {key.removeprefix(f"{b}."): value for key, value in held.items() if key.startswith(f"{b}.")}
        attention = torch.nn.MultiheadAttention(48, 6, batch_first=True)
        attention.load_state_dict({key.removeprefix("attn."): v for key, v in block.items() if key.startswith("attn.")})
        y = torch.nn.functional.layer_norm(x, (48,), block["ln_1.weight"], block["ln_1.bias"])
        x = x + attention(y, y, y, attn_mask=torch.full((77, 77), float("-inf")).triu(1), need_weights=False)[0]
        y = torch.nn.functional.layer_norm(x, (48,), block["ln_2.weight"], block["ln_2.bias"])
        y = torch.nn.functional.gelu(y @ block["mlp.c_fc.weight"].T + block["mlp.c_fc.bias"])
        x = x + y @ block["mlp.c_proj.weight"].T + block["mlp.c_proj.bias"]
    x = torch.nn.functional.layer_norm(x, (48,), held["ln_final.weight"], held["ln_final.bias"])
    with torch.no_grad():
        assert torch.allclose(x[:, 3] @ held["text_projection"], model(ids).text_embeds, atol=1e-4)


def test_other_kinds_are_not_written() -> None:
    unet, vae, small, large = tiny.models_xl()
    with pytest.raises(ModelError, match="second text encoder is not of Stable Diffusion XL's kind"):
        to_sgm(unet, vae, small, tiny.text_encoder(width=48))
    with pytest.raises(ModelError, match="UNet is not of Stable Diffusion XL's kind"):
        to_sgm(tiny.unet(), vae, small, large)
    with pytest.raises(ModelError, match="heads of several widths"):
        sgm_config(tiny.unet_xl(attention_head_dim=[2, 8]), vae, small, large)


@pytest.fixture(scope="module")
def miniature():
    """The shape of the shipped miniature SDXL, random."""
    text = tiny.text_encoder(7, 128, 5, 4, "gelu", projection=128)
    return tiny.unet_xl(width=224, pooled=128, channels=(64, 128), sample_size=16, addition_time_embed_dim=256,
                        projection_class_embeddings_input_dim=128 + 6 * 256), text


def test_the_miniature_is_put_together_from_two_files(tmp_path: Path, miniature) -> None:
    unet, second = miniature
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    write_parts(parts, unet, second)
    own = load_file(parts / f"{NAME}.safetensors")
    assert {key.split(".")[0] for key in own} == {"model", "conditioner"}
    assert {value.dtype for value in own.values()} == {torch.float16}
    path = sdxl_checkpoint(whole, parts=parts)
    found, sd1 = load_file(path), load_file(SD1)
    assert path.parent == whole and all(torch.equal(found[key], value) for key, value in own.items())
    shared = {key: value for key, value in found.items() if key not in own}
    assert len(shared) == sum(not key.startswith("model.") for key in sd1)
    for key, value in shared.items():
        there = key.replace("conditioner.embedders.0.transformer", "cond_stage_model.transformer")
        assert torch.equal(value, sd1[there])
    config = yaml.safe_load(path.with_suffix(".yaml").read_text("utf-8"))["model"]["params"]
    assert config["network_config"]["image_size"] == 16 and config["scale_factor"] == 0.18215
    assert config["conditioner_config"]["zeros_for_empty_prompt"] is False
    before = path.stat().st_mtime_ns
    assert sdxl_checkpoint(whole, parts=parts).stat().st_mtime_ns == before  # nothing changed
    half = path.read_bytes()[:1000]
    path.unlink()  # its pages are still mapped here
    path.write_bytes(half)
    assert len(load_file(sdxl_checkpoint(whole, parts=parts))) == len(found)  # a damaged one is made again
    with torch.no_grad():
        unet.conv_in.bias.add_(1)
    write_parts(parts, unet, second)
    changed = load_file(sdxl_checkpoint(whole, parts=parts))
    name = "model.diffusion_model.input_blocks.0.0.bias"
    assert not torch.equal(changed[name], found[name])


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"miniature-sdxl\.safetensors is not in this installation"):
        sdxl_checkpoint(tmp_path, parts=tmp_path)
