"""The model behind the verbs is diffusers': equal predictions, equal pictures, whatever the batch; read safely."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fakes import tiny_models as tiny
from safetensors.torch import load_file, save_file
from torch import Tensor

from apl_core.atomic import write_safetensors
from apl_core.errors import ConfigError, DatasetError, ModelError, PrefixFileError
from apl_train.model.backend import Backend
from apl_train.model.files import Parts
from apl_train.model.single_file import ldm_config, to_ldm

pytest.importorskip("diffusers")

PROMPTS = ["a cat on a mat", "photo of k", "", "abcdefgh " * 10]  # the last one takes two chunks
SEEDS = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def models():
    return tiny.unet(), tiny.vae(), tiny.text_encoder()


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, models) -> Path:
    folder = tmp_path_factory.mktemp("single")
    tiny.write_tokenizer(folder / "tokenizer")
    write_safetensors(folder / "tiny.safetensors", to_ldm(*models))
    (folder / "tiny.yaml").write_text(yaml.safe_dump(ldm_config(*models)), "utf-8")
    return folder / "tiny.safetensors"


@pytest.fixture
def folder(tmp_path: Path, models) -> Path:
    return saved(tmp_path / "tiny-sd", models)


def saved(folder: Path, models, **variant: str) -> Path:
    from diffusers import PNDMScheduler

    unet, vae, text = models
    tiny.write_tokenizer(folder / "tokenizer")
    unet.save_pretrained(folder / "unet", **variant)
    vae.save_pretrained(folder / "vae", **variant)
    text.save_pretrained(folder / "text_encoder", **variant)
    PNDMScheduler(1000, 0.00085, 0.012, "scaled_linear", skip_prk_steps=True).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}), "utf-8")
    return folder


@pytest.fixture(scope="module")
def backend(single: Path) -> Backend:
    return Backend.load(single)


def prefix(m: int = 3, seed: int = 4) -> dict[str, Tensor]:
    return {"emb_params": torch.randn(m, 32, generator=torch.Generator().manual_seed(seed))}


def noise(seed: int) -> Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator("cpu").manual_seed(seed))


def pipeline(backend: Backend):
    """diffusers' own pipeline with a scheduler made by hand."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    scheduler = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, set_alpha_to_one=False,
                              steps_offset=1)
    text = backend.text
    pipe = StableDiffusionPipeline(backend.vae, text.encoders["emb_params"], text.tokenizers["emb_params"],
                                   backend.unet, scheduler, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_facts(backend: Backend, single: Path) -> None:
    from diffusers import DDIMScheduler

    assert (backend.name, backend.family, backend.size) == ("tiny", "sd1", 64)
    assert backend.sha256 == hashlib.sha256(single.read_bytes()).hexdigest()
    assert backend.alphas_bar.dtype == torch.float32 and backend.alphas_bar.shape == (1000,)
    assert torch.equal(backend.alphas_bar, DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear").alphas_cumprod)
    assert not any(p.requires_grad for m in (backend.unet, backend.vae, *backend.text.encoders.values())
                   for p in m.parameters())
    assert not backend.unet.training and not backend.vae.training


def test_predict_is_the_unet_and_its_gradient_reaches_the_prefix_only(backend: Backend, models) -> None:
    unet, _, text = models  # as they were before they went through the file
    x, t = torch.cat([noise(1), noise(2)]), torch.tensor([10, 900])
    vectors = {key: value.requires_grad_() for key, value in prefix().items()}
    encoded = backend.encode(PROMPTS[:2], vectors)
    eps = backend.predict(x, t, encoded)
    with torch.no_grad():
        expected = unet(x, t, encoder_hidden_states=encoded.states).sample
    assert eps.shape == x.shape and eps.dtype == torch.float32
    # channels_last sums convolutions in another order
    assert float((eps.detach() - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    eps.square().mean().backward()
    assert bool(vectors["emb_params"].grad.abs().sum(1).gt(0).all())
    assert all(p.grad is None for m in (backend.unet, text) for p in m.parameters())


def test_each_row_has_its_own_timestep(backend: Backend) -> None:
    x, t, encoded = torch.cat([noise(1), noise(1)]), torch.tensor([10, 900]), backend.encode(["k", "k"])
    both = backend.predict(x, t, encoded)
    one = backend.predict(x[:1], t[1:], backend.encode(["k"]))
    assert torch.allclose(both[1:], one, atol=1e-5) and not torch.allclose(both[0], both[1], atol=1e-3)


def test_latents_are_the_posterior_mode_scaled_and_decode_is_the_pipelines(backend: Backend, models) -> None:
    vae = models[1]
    pictures = np.random.default_rng(0).integers(0, 256, (18, 32, 64, 3), dtype=np.uint8)  # more than one pass
    latents = backend.to_latents(pictures)
    assert latents.shape == (18, 4, 4, 8) and latents.dtype == torch.float32
    pixels = torch.tensor(pictures).permute(0, 3, 1, 2).float() / 255 * 2 - 1
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.mean * 0.18215
        shown = vae.decode(expected / 0.18215).sample
    assert torch.allclose(latents, expected, atol=1e-5)
    decoded = backend.decode(expected)
    assert decoded.dtype == np.uint8 and decoded.shape == pictures.shape
    by_diffusers = pipeline(backend).image_processor.postprocess(shown, output_type="pil")
    assert int(np.abs(decoded.astype(int) - np.stack([np.asarray(p) for p in by_diffusers]).astype(int)).max()) <= 1
    assert backend.to_latents(pictures[:0]).shape == (0, 4, 4, 8)
    assert backend.decode(latents[:0]).shape == (0, 32, 64, 3)


@pytest.mark.parametrize("pictures", [
    np.zeros((1, 30, 32, 3), np.uint8), np.zeros((1, 32, 32, 3), np.float32), np.zeros((32, 32, 3), np.uint8),
    np.zeros((1, 32, 32, 4), np.uint8), np.zeros((1, 0, 32, 3), np.uint8),
])
def test_pictures_of_another_form_are_refused(backend: Backend, pictures: np.ndarray) -> None:
    with pytest.raises(DatasetError, match="The pictures are") as caught:
        backend.to_latents(pictures)
    assert caught.value.field == "image" and "multiples of 8" in caught.value.hint


def test_sample_is_diffusers_pipeline(backend: Backend) -> None:
    found = backend.sample(PROMPTS[:1], [5], steps=3, guidance=3.0, negative="mat")
    pipe = pipeline(backend)
    options = {"latents": noise(5), "num_inference_steps": 3, "guidance_scale": 3.0, "negative_prompt": "mat"}
    latents = pipe(PROMPTS[0], output_type="latent", **options).images
    assert found.latents.dtype == torch.float32 and torch.equal(found.latents, latents)
    picture = np.asarray(pipe(PROMPTS[0], **options).images[0])
    assert found.images.dtype == np.uint8 and found.images.shape == (1, 64, 64, 3)
    assert np.array_equal(found.images[0], picture)


def test_sample_with_prefix_is_the_pipeline_with_its_states(backend: Backend) -> None:
    found = backend.sample(PROMPTS[:1], [5], vectors=prefix(), steps=2, decode=False)
    plain = backend.sample(PROMPTS[:1], [5], steps=2, decode=False)
    latents = pipeline(backend)(
        prompt_embeds=backend.encode(PROMPTS[:1], prefix()).states, negative_prompt_embeds=backend.encode([""]).states,
        latents=noise(5), num_inference_steps=2, guidance_scale=3.0, output_type="latent").images
    assert torch.equal(found.latents, latents) and not torch.allclose(found.latents, plain.latents, atol=1e-3)
    assert found.images.shape == (0, 64, 64, 3)


def test_batches_abreast_are_those_one_by_one(backend: Backend) -> None:
    threads, seen = torch.get_num_threads(), []
    try:
        torch.set_num_threads(1)
        alone = backend.sample([*PROMPTS] * 2, range(2 * len(PROMPTS)), steps=2, batch=1)
        torch.set_num_threads(3)
        abreast = backend.sample([*PROMPTS] * 2, range(2 * len(PROMPTS)), steps=2, batch=1,
                                 progress=lambda done, total: seen.append((done, total)))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert torch.allclose(abreast.latents, alone.latents, atol=1e-5)
    assert int(np.abs(abreast.images.astype(int) - alone.images.astype(int)).max()) <= 1
    assert [done for done, _ in seen] == list(range(1, 2 * len(PROMPTS) + 1))
    assert not abreast.latents.requires_grad


def test_neither_batch_nor_neighbours_nor_global_state_matter(backend: Backend) -> None:
    together = backend.sample(PROMPTS, SEEDS, vectors=prefix(), steps=2)
    torch.manual_seed(99)
    for batch in (1, 2):
        again = backend.sample(PROMPTS, SEEDS, vectors=prefix(), steps=2, batch=batch)
        assert torch.allclose(again.latents, together.latents, atol=2e-4)
        assert int(np.abs(again.images.astype(int) - together.images.astype(int)).max()) <= 2
    alone = backend.sample(PROMPTS[1:2], SEEDS[1:2], vectors=prefix(), steps=2)  # without its neighbour of two chunks
    assert torch.allclose(alone.latents, together.latents[1:2], atol=2e-4)
    other = backend.sample(PROMPTS[1:2], [123], vectors=prefix(), steps=2)
    assert not torch.allclose(other.latents, alone.latents, atol=0.1)


def test_negative_prompt_carries_the_prefix_only_where_it_adds(backend: Backend) -> None:
    def by_formula(guidance: float, against: Tensor) -> Tensor:
        """One DDIM step from t = 1 to the end (alpha-bar of step 0, as set_alpha_to_one=False has it)."""
        positive = backend.encode(["k"], prefix())
        t, bar = torch.tensor([1]), backend.alphas_bar
        with torch.no_grad():
            on = backend.predict(noise(3), t, positive)
            off = backend.predict(noise(3), t, type(positive)(against))
        eps = off + guidance * (on - off)
        x0 = (noise(3) - (1 - bar[1]).sqrt() * eps) / bar[1].sqrt()
        return bar[0].sqrt() * x0 + (1 - bar[0]).sqrt() * eps

    for guidance, vectors in ((0.5, prefix()), (-1.0, prefix()), (3.0, None)):
        found = backend.sample(["k"], [3], vectors=prefix(), steps=1, guidance=guidance, negative="mat", decode=False)
        assert torch.allclose(found.latents, by_formula(guidance, backend.encode(["mat"], vectors).states), atol=1e-5)
    for negative in ("mat", "cat"):
        found = backend.sample(["k"], [3], vectors=prefix(), steps=1, guidance=1.0, negative=negative, decode=False)
        assert torch.allclose(found.latents, by_formula(1.0, backend.encode(["mat"]).states), atol=1e-5)


def test_a_long_negative_prompt_widens_every_row(backend: Backend) -> None:
    found = backend.sample(["k"], [3], steps=1, negative=PROMPTS[3], decode=False)
    latents = pipeline(backend)(
        prompt_embeds=backend.encode(["k"], chunks=2).states, negative_prompt_embeds=backend.encode(PROMPTS[3:]).states,
        latents=noise(3), num_inference_steps=1, guidance_scale=3.0, output_type="latent").images
    assert torch.equal(found.latents, latents)


def test_size_and_progress(backend: Backend) -> None:
    calls: list[tuple[int, int]] = []
    found = backend.sample(PROMPTS, SEEDS, steps=1, size=32, batch=2, progress=lambda *call: calls.append(call))
    assert found.images.shape == (4, 32, 32, 3) and found.latents.shape == (4, 4, 4, 4)
    assert calls == [(2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(("options", "field"), [
    ({"steps": 0}, "steps"), ({"steps": 1.5}, "steps"), ({"batch": 0}, "batch"), ({"size": 60}, "size"),
    ({"size": True}, "size"), ({"seeds": [1, 2]}, "seeds"), ({"prompts": []}, "prompts"), ({"prompts": "k"}, "prompts"),
])
def test_sampling_settings_are_checked(backend: Backend, options: dict, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        backend.sample(**{"prompts": ["k"], "seeds": [1], "steps": 1} | options)
    assert caught.value.field == field and caught.value.hint


def test_a_prefix_of_another_width_is_refused(backend: Backend) -> None:
    with pytest.raises(PrefixFileError, match="this model's text encoder is 32 wide"):
        backend.sample(["k"], [1], vectors={"emb_params": torch.zeros(3, 768)})


def test_a_folder_gives_the_same_model(backend: Backend, folder: Path) -> None:
    state = torch.get_rng_state()
    other = Backend.load(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert (other.name, other.family, other.size) == ("tiny-sd", "sd1", 64)
    data = b"".join((folder / part).read_bytes() for part in (
        "text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors"))
    assert other.sha256 == hashlib.sha256(data).hexdigest()
    assert torch.equal(other.alphas_bar, backend.alphas_bar)
    a, b = (each.sample(PROMPTS[:2], SEEDS[:2], vectors=prefix(), steps=2) for each in (backend, other))
    assert torch.equal(a.latents, b.latents) and np.array_equal(a.images, b.images)
    modules = (other.unet, other.vae, *other.text.encoders.values())
    assert not any(p.requires_grad for m in modules for p in m.parameters())


def test_a_folder_in_half_precision_only(tmp_path: Path, models) -> None:
    halves = [m.half() for m in (tiny.unet(), tiny.vae(), tiny.text_encoder())]
    found = Backend.load(saved(tmp_path / "half", halves, variant="fp16"))
    assert (tmp_path / "half/unet/diffusion_pytorch_model.fp16.safetensors").exists()
    for old, new in zip(models, (found.unet, found.vae, found.text.encoders["emb_params"]), strict=True):
        tensors = new.state_dict()
        assert all(torch.equal(value.half().float(), tensors[key]) for key, value in old.state_dict().items())


def test_another_dtype(single: Path, backend: Backend) -> None:
    found = Backend.load(single, dtype=torch.bfloat16)
    assert {p.dtype for m in (found.unet, found.vae) for p in m.parameters()} == {torch.bfloat16}
    x, t = noise(1), torch.tensor([500])
    with torch.no_grad():
        rough, exact = (b.predict(x, t, b.encode(["k"], prefix())) for b in (found, backend))
    assert rough.dtype == torch.float32 and torch.allclose(rough, exact, atol=0.1 * float(exact.abs().max()))
    assert found.sample(["k"], [1], steps=1).latents.dtype == torch.float32


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was read",))


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin", "MODEL.CKPT", "model.pth"])
def test_pickles_are_refused_unread(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelError, match="pickle, which can run code") as caught:
        Backend.load(tmp_path / name)
    assert "apl convert" in caught.value.hint and caught.value.exit_code == 6


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_folders_with_pickled_weights_are_refused_unread(folder: Path, part: str) -> None:
    weights = next((folder / part).glob("*.safetensors"))
    weights.unlink()
    (weights.with_suffix(".bin")).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelError, match="only a pickle") as caught:
        Backend.load(folder)
    assert "apl convert" in caught.value.hint and caught.value.field == part


def replaced(path: str, data: bytes):
    return lambda folder: (folder / path).write_bytes(data)


def without_a_weight(folder: Path) -> None:
    path = next((folder / "text_encoder").glob("*.safetensors"))
    tensors = load_file(path)
    del tensors[next(key for key in tensors if key.endswith("final_layer_norm.weight"))]
    save_file(tensors, path, {"format": "pt"})


def rescheduled(**changes: object):
    def change(folder: Path) -> None:
        path = folder / "scheduler/scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")
    return change


@pytest.mark.parametrize(("damage", "words"), [
    (replaced("model_index.json", b'{"_class_name": "StableDiffusionUpscalePipeline"}'),
     "is a StableDiffusionUpscalePipeline"),
    (replaced("model_index.json", b'{"_class_name": "StableDiffusionXLPipeline"}'), "text_encoder_2 has no .safetens"),
    (replaced("model_index.json", b"{"), "Cannot read .*model_index.json"),
    (replaced("model_index.json", b"[]"), "not a JSON object"),
    (lambda folder: (folder / "model_index.json").unlink(), "Cannot read .*model_index.json"),
    (lambda folder: next((folder / "unet").glob("*.safetensors")).unlink(), "unet has no .safetensors file"),
    (replaced("vae/diffusion_pytorch_model.safetensors", b"\0" * 100), "Cannot read .*vae"),
    (replaced("unet/config.json", b"{"), "Cannot read .*unet"),
    (without_a_weight, "lacks 1 weights, .*final_layer_norm.weight first"),
    (rescheduled(prediction_type="sample"), "predicts sample"),
    (rescheduled(num_train_timesteps=500), "500 timesteps"),
    (replaced("tokenizer/vocab.json", b"{"), "Cannot read .*tokenizer"),
])
def test_unsound_folders_are_refused(folder: Path, damage, words: str) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=words) as caught:
        Backend.load(folder)
    assert caught.value.hint and caught.value.field


@pytest.mark.parametrize(("name", "words"), [
    ("gone.safetensors", "does not exist"), ("model.onnx", "not a model of a known"),
])
def test_what_is_no_model_is_refused(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(ModelError, match=words) as caught:
        Backend.load(tmp_path / name)
    assert "Stable Diffusion 1.x" in caught.value.hint


@pytest.mark.parametrize("form", ["single", "folder"])
def test_without_a_tokenizer_clips_own_is_taken(form: str, tmp_path: Path, models, folder: Path) -> None:
    path = folder
    if form == "single":
        path = tmp_path / "tiny.safetensors"
        write_safetensors(path, to_ldm(*models))
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(ldm_config(*models)), "utf-8")
    else:
        (folder / "tokenizer").rename(folder / "else")
    # ids of CLIP's published vocabulary
    assert Backend.load(path).text.tokenize("a photo of a cat") == [320, 1125, 539, 320, 2368]


def test_a_model_that_predicts_velocity_gives_the_same_noise(models, single: Path) -> None:
    """The UNet's output read as v: eps by the definition of v, and pictures as diffusers' own scheduler makes them."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    plain = Backend.load(single)
    parts = Parts(*models, plain.text.tokenizers["emb_params"], {**plain._scheduler.config, "prediction_type":
                                                                 "v_prediction", "rescale_betas_zero_snr": True})
    found = Backend(parts)
    x, t, encoded = torch.cat([noise(1), noise(2)]), torch.tensor([10, 999]), found.encode(["k", "cat"])
    with torch.no_grad():
        eps, v = found.predict(x, t, encoded), found.unet(x, t, encoder_hidden_states=encoded.states).sample
    scheduler = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, set_alpha_to_one=False,
                              steps_offset=1, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    bar = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    x0 = bar.sqrt() * x - (1 - bar).sqrt() * v
    assert torch.allclose(bar.sqrt() * x0 + (1 - bar).sqrt() * eps, x, atol=1e-5)
    pipe = StableDiffusionPipeline(found.vae, found.text.encoders["emb_params"], found.text.tokenizers["emb_params"],
                                   found.unet, scheduler, None, None, requires_safety_checker=False)
    expected = pipe("k", latents=noise(3), num_inference_steps=3, guidance_scale=3.0, output_type="latent").images
    assert torch.allclose(found.sample(["k"], [3], steps=3, decode=False).latents, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_single_and_the_prefix_learns_in_it(single: Path, backend: Backend, dtype) -> None:
    found = Backend.load(single, dtype=dtype)
    assert next(found.text.encoders["emb_params"].parameters()).dtype == torch.float32
    x, t, grads = torch.cat([noise(1), noise(2)]), torch.tensor([10, 900]), []
    for each in (backend, found):
        vectors = {key: value.requires_grad_() for key, value in prefix().items()}
        eps = each.predict(x, t, each.encode(PROMPTS[:2], vectors))
        assert eps.dtype == torch.float32
        (eps.square().mean() / 4096).backward()  # small enough to vanish in fp16 by itself
        grads.append(vectors["emb_params"].grad)
    cosine = torch.nn.functional.cosine_similarity(*(g.flatten() for g in grads), dim=0)
    assert float(cosine) > (0.97 if dtype == torch.bfloat16 else 0.999)
    assert 0.9 < float(grads[1].norm() / grads[0].norm()) < 1.1
    assert found.sample(PROMPTS[:1], [5], steps=2).images.shape == (1, 64, 64, 3)


def test_checkpointing_and_offload_change_nothing_but_memory(single: Path, backend: Backend) -> None:
    found = Backend.load(single, checkpointing=True, offload="all")
    x, t, grads = noise(1), torch.tensor([500]), []
    for each in (backend, found):
        vectors = {key: value.requires_grad_() for key, value in prefix().items()}
        each.predict(x, t, each.encode(PROMPTS[:1], vectors)).square().mean().backward()
        grads.append(vectors["emb_params"].grad)
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-9)
    assert any(m.gradient_checkpointing for m in found.unet.modules() if hasattr(m, "gradient_checkpointing"))
    picture = np.zeros((1, 64, 64, 3), np.uint8)
    assert torch.equal(found.to_latents(picture), backend.to_latents(picture))


def test_parts_that_do_not_fit_are_refused(backend: Backend) -> None:
    tokenizer = backend.text.tokenizers["emb_params"]
    for unet, encoder, words in (
        (tiny.unet(width=64), tiny.text_encoder(), "attends to states 64 wide; the text encoder is 32 wide"),
        (tiny.unet(in_channels=9), tiny.text_encoder(), "takes 9 channels"),
    ):
        with pytest.raises(ModelError, match=words):
            Backend(Parts(unet, tiny.vae(), encoder, tokenizer, {}))


def test_a_device_that_is_not_there(single: Path) -> None:
    with pytest.raises(ModelError, match="Cannot put tiny on the device 'cuda:99'"):
        Backend.load(single, device="cuda:99")
