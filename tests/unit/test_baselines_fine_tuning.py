"""ESD, Concept Ablation and Forget-Me-Not: their losses by hand, what learns, and that the model itself never does."""

from __future__ import annotations

from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from fakes import tiny_models as tiny

from apl_core.errors import ConfigError, TrainingError
from apl_train.baselines import BASELINES
from apl_train.baselines.concept_ablation import ablation_loss
from apl_train.baselines.esd import erased_target
from apl_train.baselines.fine_tuning import Student, draws, predicted, states_of
from apl_train.baselines.forget_me_not import Watched, attention_to
from apl_train.model.backend import Backend
from apl_train.model.edited import cross_attentions, ddim_step, schedule

pytest.importorskip("diffusers")
PEOPLE = [SimpleNamespace(name="ab cd", description="x y z"), SimpleNamespace(name="efg", description="q")]
QUICK = {"esd": {"iterations": 3, "batch": 2, "sampling_steps": 2}, "ca": {"iterations": 3, "batch": 2},
         "fmn": {"iterations": 3, "batch": 2}}


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Backend:
    return Backend.load(tiny.write_checkpoint(tmp_path_factory.mktemp("tiny")))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_esd_aims_away_from_the_name() -> None:
    null, c = torch.tensor([1.0, 2.0]), torch.tensor([4.0, 0.0])
    assert erased_target(null, c, 0.0).tolist() == [1, 2]
    assert erased_target(null, c, 1.0).tolist() == [-2, 4]
    assert erased_target(null, c, 3.0).tolist() == [-8, 8]


def test_ablation_moves_the_name_and_not_the_anchor() -> None:
    anchor, name = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([0.0, 4.0], requires_grad=True)
    loss = ablation_loss(anchor, name)
    loss.backward()
    assert float(loss.detach()) == pytest.approx((1 + 4) / 2)
    assert anchor.grad is None and name.grad.tolist() == [-1, 2]  # 2 (name - anchor) / 2


def test_ddim_steps_are_diffusers_own(backend: Backend) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, set_alpha_to_one=False,
                              steps_offset=1)
    scheduler.set_timesteps(7)
    x = noise(2, 4, 8, 8)
    steps = list(schedule(backend, 7))
    assert [t for t, _, _ in steps] == scheduler.timesteps.tolist()
    for k, (t, bar, after) in enumerate(steps):
        eps = noise(2, 4, 8, 8, seed=k + 1)
        expected = scheduler.step(eps, t, x).prev_sample
        assert torch.allclose(ddim_step(x, eps, bar, after), expected, atol=1e-4)
        x = expected


def test_the_watched_attention_is_diffusers_own(backend: Backend) -> None:
    _, attention = cross_attentions(backend.unet)[0]
    width = attention.to_q.in_features
    places, text = noise(2, 9, width), noise(2, 77, 32, seed=1)
    expected = attention(places, encoder_hidden_states=text)
    ordinary, watcher = attention.processor, Watched()
    attention.set_processor(watcher)
    found = attention(places, encoder_hidden_states=text)
    attention.set_processor(ordinary)
    assert torch.allclose(found, expected, atol=1e-5)
    assert watcher.maps.shape == (2, attention.heads, 9, 77)
    assert torch.allclose(watcher.maps.sum(-1), torch.ones(2, attention.heads, 9), atol=1e-5)


def test_attention_to_a_name_by_hand() -> None:
    one = torch.tensor([[[[0.5, 0.3, 0.2], [0.1, 0.9, 0.0]]]])  # one sample, one head, two places, three tokens
    two = torch.tensor([[[[0.4, 0.4, 0.2]]]])
    columns = torch.tensor([[False, True, True]])
    assert float(attention_to([one], columns)) == pytest.approx((0.09 + 0.04 + 0.81) / 4)
    assert float(attention_to([one, two], columns)) == pytest.approx((0.09 + 0.04 + 0.81) / 4 + (0.16 + 0.04) / 2)


def test_everybody_is_drawn_before_anybody_twice() -> None:
    batches = list(islice(draws(5, 2, torch.Generator().manual_seed(3)), 5))
    everyone = torch.cat(batches)
    assert sorted(everyone[:5].tolist()) == sorted(everyone[5:].tolist()) == list(range(5))
    again = torch.cat(list(islice(draws(5, 2, torch.Generator().manual_seed(3)), 5)))
    assert torch.equal(everyone, again)


@pytest.mark.parametrize(("method", "parts"), [("esd", "q k v out"), ("ca", "k v"), ("fmn", "q k v out")])
def test_only_the_papers_weights_of_a_copy_learn(backend: Backend, method: str, parts: str) -> None:
    before = {k: v.clone() for k, v in backend.unet.state_dict().items()}
    processors = [type(m.processor) for _, m in cross_attentions(backend.unet)]
    prepared = BASELINES[method].prepare(backend, PEOPLE, QUICK[method], seed=5)
    assert all(torch.equal(v, before[k]) for k, v in backend.unet.state_dict().items())
    assert not any(p.requires_grad for p in (*backend.unet.parameters(), *prepared.backend.unet.parameters()))
    changed = {k for k, v in prepared.backend.unet.state_dict().items() if not torch.equal(v, before[k])}
    allowed = {f"{name}.to_{part}." for name, _ in cross_attentions(backend.unet) for part in parts.split()}
    assert changed and all(any(k.startswith(a) for a in allowed) for k in changed)
    assert {k.split(".to_")[1].split(".")[0] for k in changed} <= set(parts.split())
    assert [type(m.processor) for _, m in cross_attentions(prepared.backend.unet)] == processors
    assert prepared.notes["steps"] == 3 and prepared.notes["loss_first"] > 0
    twin = BASELINES[method].prepare(backend, PEOPLE, QUICK[method], seed=5)
    same = zip(prepared.backend.unet.parameters(), twin.backend.unet.parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in same)
    assert prepared.sha256 == twin.sha256 != BASELINES[method].prepare(backend, PEOPLE[:1], QUICK[method]).sha256


def test_ablation_brings_the_name_nearer_to_its_anchor(backend: Backend) -> None:
    settings = {"iterations": 25, "batch": 4, "learning_rate": 1e-3, "anchor_weight": 0.0}
    prepared = BASELINES["ca"].prepare(backend, PEOPLE[1:], settings)
    x, t = noise(4, 4, 8, 8), torch.tensor([100, 300, 600, 900])
    name, anchor = (states_of(backend, [w]).expand(4, -1, -1) for w in ("efg", "q"))
    with torch.no_grad():
        apart = [float((predicted(b, x, t, name) - predicted(b, x, t, anchor)).square().mean())
                 for b in (backend, prepared.backend)]
    assert apart[1] < 0.7 * apart[0]


def test_forgetting_lowers_the_attention_to_the_name(backend: Backend) -> None:
    settings = {"iterations": 20, "batch": 4, "learning_rate": 3e-3}
    notes = BASELINES["fmn"].prepare(backend, PEOPLE, settings).notes
    assert notes["loss_last"] < 0.9 * notes["loss_first"]


def test_a_diverging_training_is_told(backend: Backend) -> None:
    with pytest.raises(TrainingError, match="at step 0"):
        Student(backend, 1e-3).learn(torch.tensor(float("nan")))
    with pytest.raises(ConfigError) as caught:
        BASELINES["esd"].prepare(backend, PEOPLE, {"learning_rate": 0})
    assert caught.value.field == "learning_rate"
