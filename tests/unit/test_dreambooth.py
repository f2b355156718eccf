"""DreamBooth on a tiny model: it learns its pictures on a copy, the same way every time, and refuses what is wrong."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from fakes import tiny_models as tiny

pytest.importorskip("diffusers")

from apl_core.errors import ConfigError, DatasetError, TrainingError
from apl_train.model.backend import Backend
from apl_train.model.files import read_parts
from apl_train.training.dreambooth import DreamBooth, Teaching, subject

SETTINGS = DreamBooth(token="v", template="photo of {}", learning_rate=2e-3, batch_size=4, prior_pictures=2)
HAS_PEFT = importlib.util.find_spec("peft") is not None


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Backend:
    return Backend(read_parts(tiny.write_checkpoint(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)


def weights(module: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    return [k for k, v in before.items() if not torch.equal(v, after[k])]


def test_the_copy_learns_and_the_model_stays(backend: Backend, pictures: np.ndarray) -> None:
    before = weights(backend.unet)
    teaching = Teaching(backend, pictures, "man", SETTINGS)
    teaching.teach(40)
    assert np.mean(teaching.losses[-10:]) < 0.8 * np.mean(teaching.losses[:10])
    assert not changed(before, weights(backend.unet)), "the model itself must not move"
    assert len(changed(before, weights(teaching.backend.unet))) == len(before), "the whole copy learns"
    assert not any(p.requires_grad for p in backend.unet.parameters())
    here, there = (b.sample(["photo of v man"], [1], steps=2).latents for b in (backend, teaching.backend))
    assert not torch.allclose(here, there), "it is the copy that samples"


def test_the_loss_is_equation_1_on_both_captions(backend: Backend, pictures: np.ndarray) -> None:
    """The first loss, step by step with the scheduler of diffusers."""
    from diffusers import DDPMScheduler

    from apl_train.seeds import seed_of, step_generator

    teaching = Teaching(backend, pictures, "man", SETTINGS)
    prior = teaching._prior
    scheduler = DDPMScheduler.from_config(backend._scheduler.config)
    g = step_generator(seed_of("dreambooth", 0) % 2**31, 0)
    total = 0.0
    for pool, caption in ((backend.to_latents(pictures), "photo of v man"), (prior, "photo of a man")):
        x0 = pool[torch.randint(len(pool), (4,), generator=g)]
        t = torch.randint(1000, (4,), generator=g)
        noise = torch.randn(x0.shape, generator=g)
        ids = backend.text.tokenizers["emb_params"]([caption] * 4, padding="max_length", max_length=77,
                                                    return_tensors="pt").input_ids
        with torch.no_grad():
            states = backend.text.encoders["emb_params"](input_ids=ids).last_hidden_state
            eps = backend.unet(scheduler.add_noise(x0, noise, t), t, encoder_hidden_states=states).sample
        total += float(((eps - noise) ** 2).mean())
    teaching.teach(1)
    assert teaching.losses[0] == pytest.approx(total, rel=1e-4)


def test_stops_and_goes_on_as_if_it_had_not(backend: Backend, pictures: np.ndarray) -> None:
    whole, parts = (Teaching(backend, pictures, "man", SETTINGS) for _ in range(2))
    whole.teach(6)
    for _ in range(3):
        parts.teach(2)
    assert parts.step == 6 and parts.losses == whole.losses
    assert not changed(weights(whole.backend.unet), weights(parts.backend.unet))
    parts.teach(5, stop=lambda: True)
    assert parts.step == 6


def test_without_prior_there_is_one_caption(backend: Backend, pictures: np.ndarray) -> None:
    teaching = Teaching(backend, pictures, "man", DreamBooth(token="v", template="photo of {}", prior_weight=0.0))
    assert len(teaching._states) == 1
    teaching.teach(1)
    assert 0 < teaching.losses[0] < 10


@pytest.mark.skipif(not HAS_PEFT, reason="peft is not installed")
def test_lora_leaves_the_copied_weights(backend: Backend, pictures: np.ndarray) -> None:
    settings = DreamBooth(method="lora", token="v", template="photo of {}", learning_rate=5e-3, batch_size=4, rank=4,
                          prior_pictures=2)
    teaching = Teaching(backend, pictures, "man", settings)
    names = [n for n, p in teaching.backend.unet.named_parameters() if p.requires_grad]
    assert names and all("lora" in n for n in names)
    frozen = {n: p.detach().clone() for n, p in teaching.backend.unet.named_parameters() if not p.requires_grad}
    before = teaching.backend.sample(["photo of v man"], [1], steps=2).latents
    plain = backend.sample(["photo of v man"], [1], steps=2).latents
    assert torch.allclose(before, plain, atol=1e-5), "fresh matrices do nothing"
    teaching.teach(15)
    after = dict(teaching.backend.unet.named_parameters())
    assert all(torch.equal(v, after[n]) for n, v in frozen.items())
    assert not torch.allclose(teaching.backend.sample(["photo of v man"], [1], steps=2).latents, before)


def test_lora_without_peft_says_so(backend: Backend, pictures: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ConfigError, match="peft is not installed") as error:
        Teaching(backend, pictures, "man", DreamBooth(method="lora"))
    assert "full" in error.value.hint


def test_a_loss_that_explodes_is_told(backend: Backend, pictures: np.ndarray) -> None:
    teaching = Teaching(backend, pictures, "man", SETTINGS)
    teaching._x0 = teaching._x0 * float("nan")
    with pytest.raises(TrainingError, match="at step 0"):
        teaching.teach(1)


@pytest.mark.parametrize(("values", "says"), [
    ({"method": "ti"}, "method is 'ti'"), ({"token": " "}, "token is"), ({"template": "x"}, "template"),
    ({"batch_size": 0}, "batch_size is 0"), ({"learning_rate": -1}, "learning_rate is -1"), ({"rank": 1.5}, "rank is"),
    ({"prior_weight": "much"}, "prior_weight is"), ({"prior_pictures": True}, "prior_pictures is True")])
def test_bad_settings(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DreamBooth(**values)


def test_no_picture(backend: Backend) -> None:
    with pytest.raises(DatasetError, match="no picture"):
        Teaching(backend, np.zeros((0, 64, 64, 3), np.uint8), "man", SETTINGS)


def test_the_subject_is_word_and_noun() -> None:
    assert subject(SETTINGS, "woman") == "v woman"
