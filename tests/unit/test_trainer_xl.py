"""The loop on a tiny random SDXL: both halves of the prefix learn by equations 5-7, caches keep the pooled text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from fakes import tiny_models as tiny

from apl_core.atomic import write_safetensors
from apl_core.prefix import load_prefix

pytest.importorskip("diffusers")

from apl_train.datasets.dataset import read_dataset
from apl_train.model.backend import Backend
from apl_train.model.files import read_parts
from apl_train.model.single_file_xl import sgm_config, to_sgm
from apl_train.seeds import step_generator
from apl_train.training.bank import TargetBank, add_noise, draw_rows
from apl_train.training.config import TrainConfig, from_dict, preset
from apl_train.training.memory import estimate
from apl_train.training.preflight import dry_run
from apl_train.training.samples import TrainingSet
from apl_train.training.trainer import Trainer

HALVES = ("clip_l", "clip_g")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, models = tmp_path_factory.mktemp("model"), tiny.models_xl()
    tiny.write_tokenizer(folder / "tokenizer")
    write_safetensors(folder / "tiny-xl.safetensors", to_sgm(*models))
    (folder / "tiny-xl.yaml").write_text(yaml.safe_dump(sgm_config(*models)), "utf-8")
    return folder / "tiny-xl.safetensors"


@pytest.fixture(scope="module")
def world(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Backend, TrainingSet]:
    root = tmp_path_factory.mktemp("world")
    backend = Backend.load(checkpoint)
    s_id = tiny.write_set(root / "id", [("ab", "photo of ab", "a man", "id"), ("cd", "photo of cd", "a lady", "id")])
    s_reg = tiny.write_set(root / "reg", [("", "a tree", "", "nonface"), ("", "a man", "", "face")])
    data = TrainingSet(backend, read_dataset(s_id, expect="id"), read_dataset(s_reg, expect="reg"), root / "cache")
    return backend, data


def trainer(world, run: Path, **changes) -> Trainer:
    config = TrainConfig(**{"num_tokens": 3, "batch_size": 4, "steps": 4, "levels_every": 2, "save_every": 2,
                            "learning_rate": 0.01, **changes})
    run.mkdir(parents=True, exist_ok=True)
    return Trainer(*world, config, run)


def test_one_step_is_equations_5_to_7_for_both_halves(world, tmp_path: Path) -> None:
    backend, data = world
    t = trainer(world, tmp_path, alpha=2.0)
    start = {key: t.vectors[key].detach().clone() for key in HALVES}
    g = step_generator(0, 0)
    rows = draw_rows(data, t.config, g, 4)
    times = torch.randint(0, 1000, (4,), generator=g)
    x_t = add_noise(data.latents[rows], torch.randn(data.latents[rows].shape, generator=g), times, backend.alphas_bar)
    vectors = {key: value.clone().requires_grad_() for key, value in start.items()}
    losses = []
    for i, row in enumerate(rows.tolist()):
        def eps(prompt: str, prefix=None, i: int = i) -> torch.Tensor:
            """The UNet itself, told the pooled text and the size of the pictures."""
            words = backend.encode([prompt], prefix)
            return backend.unet(x_t[i : i + 1], times[i : i + 1], encoder_hidden_states=words.states,
                                added_cond_kwargs={"text_embeds": words.pooled,
                                                   "time_ids": torch.tensor([[64, 64, 0, 0, 64, 64]])}).sample

        with torch.no_grad():
            e1, e2 = eps(data.c1[row]), eps(data.c2[row])
        losses.append((eps(data.c1[row], vectors) - (3 * e2 - 2 * e1)).square().mean())
    loss = torch.stack(losses).mean()
    loss.backward()
    torch.optim.Adam(vectors.values(), lr=0.01).step()
    assert t.one_step()["loss"] == pytest.approx(float(loss.detach()), rel=1e-3)
    for key in HALVES:
        # Adam divides by the gradient's size, so an element near zero may go either way; the rest moves as by hand
        large = vectors[key].grad.abs() > 1e-3 * vectors[key].grad.abs().max()
        assert large.float().mean() > 0.9
        assert torch.allclose(t.vectors[key][large], vectors[key][large], atol=2e-4)
        assert not torch.allclose(t.vectors[key], start[key], atol=1e-3)


def test_cached_captions_keep_the_pooled_text(world) -> None:
    backend, data = world
    found, fresh = data.plain_states(["a man", "photo of cd"]), backend.encode(["a man", "photo of cd"])
    assert found.pooled.shape == (2, 40)
    assert torch.allclose(found.states, fresh.states, atol=1e-5)
    assert torch.allclose(found.pooled, fresh.pooled, atol=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one(world, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = trainer(world, tmp_path / "whole").fit()
        first = trainer(world, tmp_path / "cut")
        first.save()
        first.one_step(), first.one_step()
        first.save()
        again = trainer(world, tmp_path / "cut")
        again.restore()
        assert again.step == 2
        cut = again.fit()
    finally:
        torch.set_num_threads(threads)
    assert whole.family == "sdxl" and set(whole.tensors) == set(HALVES)
    assert all(torch.equal(whole.tensors[key], cut.tensors[key]) for key in HALVES)
    file = load_prefix(tmp_path / "whole" / "prefix" / "anonymize.safetensors")
    assert file.family == "sdxl" and file.widths == {"clip_l": 32, "clip_g": 48}
    assert file.meta.base_model_sha256 == world[0].sha256


def test_a_bank_belongs_to_the_sizes_that_were_told(world, checkpoint: Path, tmp_path: Path) -> None:
    backend, data = world
    config = TrainConfig(bank=32, steps=8, batch_size=4)
    other = Backend.load(checkpoint, sizes=[48, 64, 0, 0, 64, 64])
    banks = [TargetBank(b, data, config, tmp_path) for b in (backend, other)]
    assert banks[0].folder != banks[1].folder
    a, b = (bank.batch(0) for bank in banks)
    assert torch.equal(a.x_t, b.x_t) and not torch.equal(a.eps_c1, b.eps_c1)


def test_dry_run_and_estimate_know_both_encoders(world, checkpoint: Path) -> None:
    config = TrainConfig(device="cpu", num_tokens=3, batch_size=2)
    assert dry_run(world[0], config).step_seconds > 0
    parts = read_parts(checkpoint)
    modules = (parts.unet, parts.vae, parts.text_encoder, parts.text_encoder_2)
    sizes = [sum(t.numel() * t.element_size() for t in [*m.parameters(), *m.buffers()]) for m in modules]
    found = estimate(checkpoint, config)
    assert found.weights == sum(sizes) and found.train > found.weights
    offloaded = estimate(checkpoint, TrainConfig(device="cpu", num_tokens=3, batch_size=2, offload="all"))
    assert offloaded.weights == sizes[0]


def test_the_fast_preset_draws_targets_from_a_bank() -> None:
    """What its share of the paper's work rests on (benchmarks/step_cost_sdxl.py): every target is drawn 15 times."""
    config = from_dict(preset("sdxl-fast"))
    assert config.steps * config.batch_size / config.bank == 15 and not config.gradient_checkpointing
    assert config.steps * config.batch_size < from_dict(preset("sdxl-paper")).steps


@pytest.mark.parametrize("name", ["sdxl-paper", "miniature-sdxl"])
def test_presets_are_settings(name: str) -> None:
    config = from_dict(preset(name))
    if name == "sdxl-paper":  # sec. 4.1
        assert (config.steps, config.batch_size, config.learning_rate, config.schedule) == (20_000, 1, 1e-3, "constant")
        assert config.num_tokens == 10 and config.alpha == 1.0
    else:  # its twin, on another model
        twin = from_dict(preset("miniature")).to_dict()
        assert config.to_dict() == twin | {"base_model": "miniature-sdxl"}


def test_sizes_in_settings(tmp_path: Path) -> None:
    config = from_dict({"size_conditioning": [1024, 1024, 0, 0, 1024, 1024]})
    again = json.loads(json.dumps(config.to_dict()))
    assert from_dict(again) == config and from_dict({}).size_conditioning is None
