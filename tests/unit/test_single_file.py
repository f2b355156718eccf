"""A single file holds what diffusers' own converter reads back, under the names that web interfaces know."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from fakes import tiny_models as tiny
from safetensors.torch import load_file

from apl_core.atomic import write_safetensors
from apl_core.errors import ModelError
from apl_train.model.checkpoint import Checkpoint, open_checkpoint, read_ldm, schedule
from apl_train.model.single_file import ldm_config, to_ldm

pytest.importorskip("diffusers")


def written(folder: Path, unet, vae, text, change=lambda config: None, dtype=torch.float32) -> Path:
    path = folder / "model.safetensors"
    write_safetensors(path, {key: value.to(dtype) for key, value in to_ldm(unet, vae, text).items()})
    config = ldm_config(unet, vae, text)
    change(config)
    path.with_suffix(".yaml").write_text(yaml.safe_dump(config), "utf-8")
    return path


def read(path: Path):
    return read_ldm(open_checkpoint(path))


@pytest.fixture(scope="module")
def models():
    return tiny.unet(), tiny.vae(), tiny.text_encoder()


SHAPES = [
    ({"channels": (96, 96, 96)}, {"channels": (64, 64, 64, 64)}),
    ({"channels": (64, 128, 192)}, {"channels": (32, 64, 64, 32)}),
    # SD1's own block types: the coarsest level without attention, two layers a block
    ({"channels": (32, 64), "layers_per_block": 2, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
      "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}, {"channels": (32, 32, 64, 64), "layers": 2}),
]


@pytest.mark.parametrize(("unet", "vae"), SHAPES)
def test_round_trip_gives_equal_outputs(tmp_path: Path, unet: dict, vae: dict) -> None:
    before = tiny.unet(**unet), tiny.vae(**vae), tiny.text_encoder()
    state = torch.get_rng_state()
    after = read(written(tmp_path, *before))
    assert torch.equal(torch.get_rng_state(), state)  # reading draws nothing from the caller's random numbers
    for old, new in zip(before, after, strict=True):
        tensors = new.state_dict()
        assert all(torch.equal(value, tensors[key]) for key, value in old.state_dict().items())
        assert not new.training and next(new.parameters()).dtype == torch.float32
    x, t, states = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 77, 32)
    pixels, ids = torch.rand(1, 3, 32, 32), torch.tensor([[tiny.BOS, 5, *[tiny.EOS] * 75]])
    for run in (
        lambda m: m[0](x, t, encoder_hidden_states=states).sample,
        lambda m: m[1].decode(x[:1]).sample,
        lambda m: m[1].encode(pixels).latent_dist.mode(),
        lambda m: m[2](ids).last_hidden_state,
    ):
        with torch.no_grad():
            assert float((run(before) - run(after)).abs().max()) <= 1e-6
    assert after[0].config.sample_size == 8 and after[1].config.scaling_factor == before[1].config.scaling_factor


def test_names_are_those_of_stable_diffusion_1() -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    down, up = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)  # otherwise diffusers' defaults are SD1's
        vae = AutoencoderKL(down_block_types=down, up_block_types=up, block_out_channels=(128, 256, 512, 512),
                            layers_per_block=2, latent_channels=4)
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, num_hidden_layers=12, intermediate_size=3072,
                                            num_attention_heads=12))
    shapes = {key: tuple(value.shape) for key, value in to_ldm(unet, vae, text).items()}
    # counts of v1-5-pruned-emaonly.safetensors, whose text encoder also lists its position ids
    for start, count in (("model.diffusion_model.", 686), ("first_stage_model.", 248), ("cond_stage_model.", 196)):
        assert sum(key.startswith(start) for key in shapes) == count
    for key, shape in {
        "model.diffusion_model.time_embed.0.weight": (1280, 320),
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "model.diffusion_model.input_blocks.11.0.emb_layers.1.weight": (1280, 1280),
        "model.diffusion_model.middle_block.1.proj_in.weight": (1280, 1280, 1, 1),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.11.1.proj_out.weight": (320, 320, 1, 1),
        "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
        "first_stage_model.encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "first_stage_model.decoder.mid.attn_1.proj_out.bias": (512,),
        "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
        "cond_stage_model.transformer.text_model.final_layer_norm.bias": (768,),
    }.items():
        assert shapes[key] == shape
    params = ldm_config(unet, vae, text)["model"]["params"]
    # v1-inference.yaml
    assert params["unet_config"]["params"].items() >= {
        "model_channels": 320, "attention_resolutions": [1, 2, 4], "num_res_blocks": 2, "channel_mult": [1, 2, 4, 4],
        "num_heads": 8, "context_dim": 768, "use_spatial_transformer": True, "legacy": False}.items()
    assert params["first_stage_config"]["params"]["ddconfig"].items() >= {
        "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "z_channels": 4, "resolution": 512}.items()
    assert params["scale_factor"] == 0.18215 and params["image_size"] == 64


def test_half_precision_files_are_read_as_float32(tmp_path: Path, models) -> None:
    path = written(tmp_path, *models, dtype=torch.float16)
    for old, new in zip(models, read(path), strict=True):
        tensors = new.state_dict()
        assert all(torch.equal(value.half().float(), tensors[key]) for key, value in old.state_dict().items())


def test_schedule_is_ldms(tmp_path: Path, models) -> None:
    from diffusers import DDIMScheduler

    path = written(tmp_path, *models, lambda c: c["model"]["params"].update(linear_start=0.001, linear_end=0.02))
    found = DDIMScheduler(**schedule(open_checkpoint(path))).alphas_cumprod
    betas = torch.linspace(0.001**0.5, 0.02**0.5, 1000, dtype=torch.float64) ** 2  # ldm: make_beta_schedule("linear")
    assert torch.allclose(found.double(), torch.cumprod(1 - betas, 0), rtol=1e-4)


def test_text_config_may_stand_in_params_or_be_told_from_shapes(tmp_path: Path) -> None:
    wide = tiny.text_encoder(width=64, heads=1)
    models = tiny.unet(width=64), tiny.vae(), wide
    ids = torch.tensor([[tiny.BOS, 5, *[tiny.EOS] * 75]])

    def inside(config: dict) -> None:
        stage = config["model"]["params"]["cond_stage_config"]
        stage["params"] = {"text_config": stage.pop("text_config")}

    def absent(config: dict) -> None:
        del config["model"]["params"]["cond_stage_config"]["text_config"]

    for change in (inside, absent):
        found = read(written(tmp_path, *models, change))[2]
        assert torch.equal(found(ids).last_hidden_state, wide(ids).last_hidden_state)
        assert found.config.eos_token_id == 49407


def drop(start: str):
    def change(path: Path) -> None:
        write_safetensors(path, {key: value for key, value in load_file(path).items() if not key.startswith(start)})
    return change


def setting(value: object, *keys: str):
    def change(path: Path) -> None:
        config = yaml.safe_load(path.with_suffix(".yaml").read_text("utf-8"))
        inner = config["model"]["params"]
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        path.with_suffix(".yaml").write_text(yaml.safe_dump(config), "utf-8")
    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.with_suffix(".yaml").unlink(), "no yaml beside it, and is 32 wide"),
        (lambda path: path.with_suffix(".yaml").write_text("a: [", "utf-8"), "model.yaml is not YAML"),
        (lambda path: path.with_suffix(".yaml").write_text("- 1", "utf-8"), "has no model.params.unet_config.params"),
        (setting(None, "cond_stage_config"), "has no model.params.cond_stage_config"),
        (setting("x0", "parameterization"), "parameterization: x0"),
        (setting([1, 2, 2], "unet_config", "params", "channel_mult"), "do not fit the UNet"),
        (setting("x", "unet_config", "params", "num_res_blocks"), "does not describe a UNet"),
        (setting(2, "first_stage_config", "params", "ddconfig", "num_res_blocks"), "do not fit the VAE"),
        (setting({"hidden_size": "x"}, "cond_stage_config", "text_config"), "does not describe a text encoder"),
        (setting({"hidden_size": 40, "num_attention_heads": 4}, "cond_stage_config", "text_config"),
         "do not fit the text encoder"),
        (setting(None, "cond_stage_config", "text_config"), "32 wide, from which its number of heads cannot be told"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "Cannot read model.safetensors"),
        (drop("cond_stage_model."), "no CLIP text encoder"),
        (drop("first_stage_model."), "no VAE of its own"),
        (drop("model.diffusion_model.out.2"), "conv_out.weight is missing"),
        (drop("first_stage_model.decoder.mid.attn_1.q"), "to_q.weight is missing"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, models, damage, words: str) -> None:
    path = written(tmp_path, *models)
    damage(path)
    with pytest.raises(ModelError, match=words) as caught:
        read(path)
    assert caught.value.hint and caught.value.field


@pytest.mark.parametrize("value", ["x", None])
def test_schedule_of_no_numbers(value: object) -> None:
    with pytest.raises(ModelError, match="not made of numbers"):
        schedule(Checkpoint(Path("x"), {"model": {"params": {"linear_start": value}}}, None, {}, {}))


def test_other_kinds_are_not_written(models) -> None:
    from diffusers import AutoencoderTiny

    unet, vae, text = models
    with pytest.raises(ModelError, match="VAE is not of Stable Diffusion 1's kind"):
        to_ldm(unet, AutoencoderTiny(), text)
    with pytest.raises(ModelError, match=r"4 of [0-9]+ tensors of UNet2DConditionModel have no LDM name"):
        to_ldm(tiny.unet(addition_embed_type="text_time", addition_time_embed_dim=8,
                         projection_class_embeddings_input_dim=32), vae, text)
    with pytest.raises(ModelError, match="block_out_channels is"):
        ldm_config(tiny.unet(channels=(64, 96)), vae, text)
