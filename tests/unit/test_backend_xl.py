"""The SDXL model behind the verbs is diffusers': equal predictions and pictures, both halves of a prefix learn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fakes import tiny_models as tiny
from safetensors.torch import load_file
from torch import Tensor

from apl_core.atomic import write_safetensors
from apl_core.errors import ConfigError, ModelError
from apl_train.model.backend import Backend
from apl_train.model.files import Parts, read_parts
from apl_train.model.single_file_xl import sgm_config, to_sgm

pytest.importorskip("diffusers")

PROMPTS = ["a cat on a mat", "photo of k", "", "abcdefgh " * 10]  # the last one takes two chunks
SEEDS = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def models():
    return tiny.models_xl()


def tokenizers(folder: Path) -> None:
    tiny.write_tokenizer(folder / "tokenizer")
    tiny.write_tokenizer(folder / "tokenizer_2", pad_token="!")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, models) -> Path:
    folder = tmp_path_factory.mktemp("single")
    tokenizers(folder)
    write_safetensors(folder / "tiny-xl.safetensors", to_sgm(*models))
    (folder / "tiny-xl.yaml").write_text(yaml.safe_dump(sgm_config(*models)), "utf-8")
    return folder / "tiny-xl.safetensors"


@pytest.fixture
def folder(tmp_path: Path, models) -> Path:
    from diffusers import EulerDiscreteScheduler

    folder = tmp_path / "tiny-xl"
    tokenizers(folder)
    for name, model in zip(("unet", "vae", "text_encoder", "text_encoder_2"), models, strict=True):
        model.save_pretrained(folder / name)
    scheduler = EulerDiscreteScheduler(1000, 0.00085, 0.012, "scaled_linear", timestep_spacing="leading")
    scheduler.save_pretrained(folder / "scheduler")
    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": False}
    (folder / "model_index.json").write_text(json.dumps(index), "utf-8")
    return folder


@pytest.fixture(scope="module")
def backend(single: Path) -> Backend:
    return Backend.load(single)


def prefix(m: int = 3, seed: int = 4) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"clip_l": torch.randn(m, 32, generator=g), "clip_g": torch.randn(m, 48, generator=g)}


def noise(seed: int) -> Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator("cpu").manual_seed(seed))


def pipeline(backend: Backend, zeros: bool = True):
    """diffusers' own pipeline with a scheduler made by hand."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    scheduler = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, set_alpha_to_one=False,
                              steps_offset=1)
    text = backend.text
    pipe = StableDiffusionXLPipeline(
        backend.vae, text.encoders["clip_l"], text.encoders["clip_g"], text.tokenizers["clip_l"],
        text.tokenizers["clip_g"], backend.unet, scheduler, force_zeros_for_empty_prompt=zeros, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_facts(backend: Backend) -> None:
    assert (backend.name, backend.family, backend.size) == ("tiny-xl", "sdxl", 64)
    assert backend.text.widths == {"clip_l": 32, "clip_g": 48} and backend.zeros_for_empty_prompt
    assert backend.text.tokenizers["clip_g"].pad_token_id == 0
    assert not any(p.requires_grad for m in (backend.unet, backend.vae, *backend.text.encoders.values())
                   for p in m.parameters())


def test_predict_is_the_unet_told_pooled_text_and_sizes(backend: Backend, models) -> None:
    unet, _, small, large = models  # as they were before they went through the file
    x, t = torch.cat([noise(1), noise(2)]), torch.tensor([10, 900])
    vectors = {key: value.requires_grad_() for key, value in prefix().items()}
    encoded = backend.encode(PROMPTS[:2], vectors)
    eps = backend.predict(x, t, encoded)
    for told, sizes in ((backend, (64, 64, 0, 0, 64, 64)), (None, (100, 50, 8, 4, 64, 64))):
        told = told or Backend(Parts(*models[:3], backend.text.tokenizers["clip_l"], {}, "x", "", large,
                                     backend.text.tokenizers["clip_g"]), sizes=sizes)
        with torch.no_grad():
            expected = unet(x, t, encoder_hidden_states=encoded.states, added_cond_kwargs={
                "text_embeds": encoded.pooled, "time_ids": torch.tensor([sizes] * 2)}).sample
            found = told.predict(x, t, encoded)
        # channels_last sums convolutions in another order
        assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert float((found - eps.detach()).abs().max()) > 1e-4  # sizes have a say
    eps.square().mean().backward()
    for key in ("clip_l", "clip_g"):
        assert bool(vectors[key].grad.abs().sum(1).gt(0).all())
    assert all(p.grad is None for m in (backend.unet, small, large) for p in m.parameters())


def test_gradient_reaches_the_second_half_through_the_pooled_text_too(backend: Backend) -> None:
    vectors = {key: value.requires_grad_() for key, value in prefix().items()}
    encoded = backend.encode(PROMPTS[:1], vectors)
    without = type(encoded)(encoded.states.detach(), encoded.pooled)
    backend.predict(noise(1), torch.tensor([500]), without).square().mean().backward()
    assert vectors["clip_l"].grad is None and bool(vectors["clip_g"].grad.abs().sum(1).gt(0).all())


@pytest.mark.parametrize("negative", ["", "mat"])
def test_sample_is_diffusers_pipeline_from_plain_prompts(backend: Backend, negative: str) -> None:
    found = backend.sample(PROMPTS[:1], [5], steps=3, guidance=3.0, negative=negative)
    pipe = pipeline(backend)
    options = {"latents": noise(5), "num_inference_steps": 3, "guidance_scale": 3.0, "height": 64, "width": 64,
               "negative_prompt": negative or None}
    latents = pipe(PROMPTS[0], output_type="latent", **options).images
    assert torch.equal(found.latents, latents)
    picture = np.asarray(pipe(PROMPTS[0], **options).images[0])
    assert found.images.shape == (1, 64, 64, 3) and np.array_equal(found.images[0], picture)


def test_an_empty_negative_prompt_is_encoded_where_the_model_says_so(backend: Backend, folder: Path) -> None:
    other = Backend.load(folder)
    assert not other.zeros_for_empty_prompt and other.sha256 != backend.sha256
    options = {"latents": noise(5), "num_inference_steps": 2, "guidance_scale": 3.0, "height": 64, "width": 64}
    found = [b.sample(["k"], [5], steps=2, decode=False).latents for b in (backend, other)]
    for one, zeros in zip(found, (True, False), strict=True):
        expected = pipeline(other, zeros)("k", output_type="latent", **options).images
        assert torch.allclose(one, expected, atol=1e-5)
    assert not torch.allclose(*found, atol=1e-3)


def test_sample_with_prefix_is_the_pipeline_with_its_states(backend: Backend) -> None:
    found = backend.sample(PROMPTS[:1], [5], vectors=prefix(), steps=2, negative="mat", decode=False)
    plain = backend.sample(PROMPTS[:1], [5], steps=2, negative="mat", decode=False)
    on, off = backend.encode(PROMPTS[:1], prefix()), backend.encode(["mat"])
    latents = pipeline(backend)(
        prompt_embeds=on.states, pooled_prompt_embeds=on.pooled, negative_prompt_embeds=off.states,
        negative_pooled_prompt_embeds=off.pooled, latents=noise(5), num_inference_steps=2, guidance_scale=3.0,
        height=64, width=64, output_type="latent").images
    assert torch.equal(found.latents, latents) and not torch.allclose(found.latents, plain.latents, atol=1e-3)


def test_neither_batch_nor_neighbours_matter(backend: Backend) -> None:
    together = backend.sample(PROMPTS, SEEDS, vectors=prefix(), steps=2, decode=False)
    again = backend.sample(PROMPTS, SEEDS, vectors=prefix(), steps=2, batch=1, decode=False)
    assert torch.allclose(again.latents, together.latents, atol=2e-4)


def test_negative_prompt_carries_the_prefix_only_where_it_adds(backend: Backend) -> None:
    def by_formula(guidance: float, against) -> Tensor:
        """One DDIM step from t = 1 to the end (alpha-bar of step 0, as set_alpha_to_one=False has it)."""
        t, bar = torch.tensor([1]), backend.alphas_bar
        with torch.no_grad():
            on = backend.predict(noise(3), t, backend.encode(["k"], prefix()))
            off = backend.predict(noise(3), t, against)
        eps = off + guidance * (on - off)
        x0 = (noise(3) - (1 - bar[1]).sqrt() * eps) / bar[1].sqrt()
        return bar[0].sqrt() * x0 + (1 - bar[0]).sqrt() * eps

    for guidance, vectors in ((0.5, prefix()), (-1.0, prefix()), (3.0, None)):
        found = backend.sample(["k"], [3], vectors=prefix(), steps=1, guidance=guidance, negative="mat", decode=False)
        assert torch.allclose(found.latents, by_formula(guidance, backend.encode(["mat"], vectors)), atol=1e-5)
    found = backend.sample(["k"], [3], vectors=prefix(), steps=1, guidance=0.5, decode=False)
    on = backend.encode(["k"])
    zeros = type(on)(torch.zeros_like(on.states), torch.zeros_like(on.pooled))
    assert torch.allclose(found.latents, by_formula(0.5, zeros), atol=1e-5)
    for negative in ("mat", "cat"):  # no part at 1
        found = backend.sample(["k"], [3], vectors=prefix(), steps=1, guidance=1.0, negative=negative, decode=False)
        assert torch.allclose(found.latents, by_formula(1.0, backend.encode(["mat"])), atol=1e-5)


def test_another_size_is_told(backend: Backend) -> None:
    found = backend.sample(["k"], [3], steps=2, size=32, negative="mat", decode=False)
    small = torch.randn(1, 4, 4, 4, generator=torch.Generator("cpu").manual_seed(3))
    latents = pipeline(backend)("k", latents=small, num_inference_steps=2, guidance_scale=3.0, height=32, width=32,
                                negative_prompt="mat", output_type="latent").images
    assert torch.equal(found.latents, latents)


def test_file_and_folder_give_the_same_model(backend: Backend, folder: Path) -> None:
    other = Backend.load(folder)
    assert other.family == "sdxl" and other.name == "tiny-xl"
    x, t = noise(1), torch.tensor([500])
    with torch.no_grad():
        a, b = (each.predict(x, t, each.encode(PROMPTS[:1], prefix())) for each in (backend, other))
    assert torch.equal(a, b)


def test_the_second_encoder_may_stand_under_transformers_names(single: Path, tmp_path: Path, models) -> None:
    start = "conditioner.embedders.1."
    tensors = {key: value for key, value in load_file(single).items() if not key.startswith(start)}
    tensors |= {f"{start}transformer.{key}": value for key, value in models[3].state_dict().items()}
    path = tmp_path / "plain.safetensors"
    write_safetensors(path, tensors)
    path.with_suffix(".yaml").write_bytes(single.with_suffix(".yaml").read_bytes())
    found = read_parts(path).text_encoder_2.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in models[3].state_dict().items())


def test_half_precision_stays_near_single_and_its_vae_is_single(single: Path, backend: Backend) -> None:
    found = Backend.load(single, dtype=torch.float16)
    assert {next(e.parameters()).dtype for e in found.text.encoders.values()} == {torch.float32}
    assert found.vae.dtype == torch.float32 and found.unet.dtype == torch.float16
    x, t, grads = torch.cat([noise(1), noise(2)]), torch.tensor([10, 900]), []
    for each in (backend, found):
        vectors = {key: value.requires_grad_() for key, value in prefix().items()}
        eps = each.predict(x, t, each.encode(PROMPTS[:2], vectors))
        (eps.square().mean() / 4096).backward()  # small enough to vanish in fp16 by itself
        grads.append(torch.cat([vectors[key].grad.flatten() for key in ("clip_l", "clip_g")]))
    assert float(torch.nn.functional.cosine_similarity(*grads, dim=0)) > 0.99
    assert found.sample(PROMPTS[:1], [5], steps=2).images.shape == (1, 64, 64, 3)


@pytest.mark.parametrize("sizes", [[1, 2, 3], [64, 64, 0, 0, 64, 0], [64, 64, -1, 0, 64, 64], [64.0] * 6])
def test_sizes_are_checked(models, backend: Backend, sizes: list) -> None:
    parts = Parts(*models[:3], backend.text.tokenizers["clip_l"], {}, "x", "", models[3],
                  backend.text.tokenizers["clip_g"])
    with pytest.raises(ConfigError, match="size_conditioning"):
        Backend(parts, sizes=sizes)


def test_parts_that_do_not_fit_are_refused(models, backend: Backend) -> None:
    _, vae, small, large = models
    tokens = backend.text.tokenizers
    for changed, second, words in (
        (tiny.unet_xl(width=64), large, "attends to states 64 wide; the text encoders are 32 and 48 wide"),
        (tiny.unet_xl(pooled=30), large, "takes 126 numbers of pooled text and sizes; .* make 136"),
        (tiny.unet(width=80), large, "conditioned on None"),
        (tiny.unet_xl(width=32), None, "takes more than one text encoder gives"),
        (tiny.unet_xl(in_channels=9), large, "takes 9 channels"),
        (tiny.unet_xl(time_cond_proj_dim=16), large, "LCM"),
    ):
        with pytest.raises(ModelError, match=words):
            Backend(Parts(changed, vae, small, tokens["clip_l"], {}, "x", "", second, tokens["clip_g"]))
