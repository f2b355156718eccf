"""The stages of the miniature world: one loop that resumes exactly, the noise schedule, latents of unit size, and the
recogniser's blindfold."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import tiny_models as tiny
from torch import nn

from apl_train.miniworld.autoencoder import to_pixels
from apl_train.miniworld.card import verification
from apl_train.miniworld.denoiser import SCALING, SCHEDULE, alphas_bar, new_unet, normalise_latents, ready_to_compile
from apl_train.miniworld.fit import fit
from apl_train.miniworld.recogniser import Recogniser, Shape, blindfold, embed

STEPS = 10
X = torch.randn(64, 3, generator=torch.Generator().manual_seed(5))


class Stop(Exception):
    """The process is killed here."""


def network() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))


def train(folder: Path, *, stop: int | None = None, ema: float = 0.9, spoil: int | None = None, steps: int = STEPS,
          **options: float) -> nn.Module:
    """Fits a sum of squares; `stop`: ends as if killed before that step, `spoil`: NaN there."""
    model = network()

    def step(i: int, g: torch.Generator) -> dict[str, torch.Tensor]:
        if i == stop:
            raise Stop
        x = X[torch.randint(64, (8,), generator=g)]
        loss = (model(x) - x.square().sum(1, keepdim=True)).square().mean()
        return {"loss": loss * float("nan") if i == spoil else loss}

    fit("net", folder, {"net": model}, step, steps=steps, lr=0.05, warmup=3, ema=ema, save_minutes=0.0,
        weight_decay=0.01, **options)
    return model


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_weights_that_no_gradient_reaches_are_told_of(tmp_path: Path) -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 1), "cut": nn.Linear(3, 1)})

    def step(_: int, __: torch.Generator) -> dict[str, torch.Tensor]:
        return {"loss": (model["used"](X) + 0 * model["cut"](X)).square().mean()}

    with pytest.raises(RuntimeError, match=r"no gradient reaches 2 of the weights, such as net.cut.weight"):
        fit("net", tmp_path, {"net": model}, step, steps=2, lr=0.1)


def test_weights_behind_a_start_of_zeros_are_reached_in_time(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    nn.init.zeros_(model[1].weight)  # as from_sd1 begins with

    def step(_: int, __: torch.Generator) -> dict[str, torch.Tensor]:
        return {"loss": (model(X) - 1).square().mean()}

    fit("net", tmp_path, {"net": model}, step, steps=3, lr=0.1)


def test_a_unet_made_ready_to_compile_is_the_same_one() -> None:
    torch.manual_seed(0)
    unet = new_unet()
    ready = ready_to_compile(copy.deepcopy(unet))
    assert list(ready.state_dict()) == list(unet.state_dict())
    assert not any(type(module).__name__ == "Upsample2D" for module in ready.modules())
    given = torch.randn(2, 4, 16, 16), torch.tensor([20, 700]), torch.randn(2, 77, 96)
    for some in (unet, ready):
        some(*given).sample.square().mean().backward()
    for (name, one), two in zip(unet.named_parameters(), ready.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_ten_steps_are_five_and_five(tmp_path: Path, ema: float) -> None:
    straight = train(tmp_path / "a", ema=ema)
    with pytest.raises(Stop):
        train(tmp_path / "b", ema=ema, stop=5)
    assert equal(train(tmp_path / "b", ema=ema), straight)
    assert not equal(straight, network())


def test_a_state_newer_than_the_log_counts(tmp_path: Path) -> None:
    """Killed between the two writes."""
    straight = train(tmp_path / "a")
    with pytest.raises(Stop):
        train(tmp_path / "b", stop=5)
    log = tmp_path / "b" / "net.log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    assert equal(train(tmp_path / "b"), straight)


def test_a_finished_stage_is_read_back(tmp_path: Path) -> None:
    first = train(tmp_path)
    assert equal(train(tmp_path, stop=0), first)  # not one step more


def test_time_ends_a_stage_and_the_next_call_goes_on(tmp_path: Path) -> None:
    straight = train(tmp_path / "a")
    for _ in range(3):
        train(tmp_path / "b", minutes=0.0)  # one step each
    assert equal(train(tmp_path / "b", stop=None), straight)


def test_the_average_lags_behind_the_weights(tmp_path: Path) -> None:
    plain, averaged = train(tmp_path / "a", ema=0.0), train(tmp_path / "b", ema=0.9)
    assert not torch.equal(plain[0].weight, averaged[0].weight)
    assert torch.equal(plain[1].running_mean, averaged[1].running_mean)  # statistics are copied, not averaged


def test_the_rate_rises_then_falls_as_a_cosine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    real = torch.optim.AdamW.step

    def step(self, *args: object) -> object:
        seen.append(self.param_groups[0]["lr"])
        return real(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train(tmp_path)
    expected = [0.05 * max(min(1, (i + 1) / 3) * (1 + math.cos(math.pi * i / STEPS)) / 2, 0.02) for i in range(STEPS)]
    assert seen == pytest.approx(expected)


def test_nan_stops_and_the_last_good_state_stays(tmp_path: Path) -> None:
    straight = train(tmp_path / "a")
    with pytest.raises(FloatingPointError, match="the loss is not finite at step 4"):
        train(tmp_path / "b", spoil=4)
    assert equal(train(tmp_path / "b"), straight)


def test_schedule_is_scaled_linear() -> None:
    betas = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
    assert alphas_bar().shape == (1000,) and alphas_bar().dtype == torch.float32
    assert np.allclose(alphas_bar().numpy(), np.cumprod(1 - betas), rtol=1e-4)


def test_schedule_is_diffusers_own() -> None:
    diffusers = pytest.importorskip("diffusers")
    assert torch.allclose(alphas_bar(), diffusers.DDIMScheduler(**SCHEDULE).alphas_cumprod, rtol=1e-4)


@torch.no_grad()
def test_latents_get_mean_0_and_deviation_1_and_pictures_stay() -> None:
    pytest.importorskip("diffusers")
    vae = tiny.vae()
    pixels = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels += torch.linspace(-1, 1, 40)[:, None, None, None]
    before = vae.encode(pixels).latent_dist
    mean, deviation, picture = before.mean, before.std, vae.decode(before.mean[:2]).sample
    normalise_latents(vae, pixels)
    after = vae.encode(pixels).latent_dist
    scaled = (after.mean * SCALING).numpy()
    assert np.allclose(scaled.mean((0, 2, 3)), 0, atol=1e-3) and np.allclose(scaled.std((0, 2, 3)), 1, atol=1e-3)
    mu, sd = mean.mean((0, 2, 3)), mean.std((0, 2, 3))
    factor = (1 / (sd * SCALING))[:, None, None]
    assert torch.allclose(after.mean, (mean - mu[:, None, None]) * factor, atol=1e-2, rtol=1e-3)
    assert torch.allclose(after.std, deviation * factor, rtol=1e-3)
    assert torch.allclose(vae.decode(after.mean[:2]).sample, picture, atol=1e-3)


def test_pixels() -> None:
    picture = np.array([[[[0, 255, 51]]]], np.uint8)
    assert to_pixels(picture).flatten().tolist() == pytest.approx([-1, 1, -0.6])
    assert to_pixels(np.zeros((2, 4, 6, 3), np.uint8)).shape == (2, 3, 4, 6)


def faces() -> tuple[Recogniser, np.ndarray, list[dict]]:
    """A random recogniser, pictures of noise on three colours, and rows that call the colours groups."""
    torch.manual_seed(0)
    model = Recogniser(Shape("tiny", (8, 8, 8, 8), 1, 0)).eval().requires_grad_(False)
    rng = np.random.default_rng(1)
    pictures = rng.integers(0, 90, (30, 128, 128, 3), np.uint8)
    groups = [("female", "white"), ("male", "white"), ("male", "black")]
    for i in range(30):
        pictures[i, ..., i % 3] += 150
    return model, pictures, [{"attributes": {"gender": groups[i % 3][0], "race": groups[i % 3][1]}} for i in range(30)]


def test_the_blindfold_is_a_projection_that_takes_out_group_means() -> None:
    model, pictures, rows = faces()
    p = blindfold(model, pictures, rows).numpy().astype(np.float64)
    assert p.shape == (128, 128)
    assert np.allclose(p, p.T, atol=1e-6) and np.allclose(p @ p, p, atol=1e-5)
    assert np.trace(p) == pytest.approx(128 - 3, abs=1e-3)
    z = embed(model, pictures).astype(np.float64)
    means = np.stack([z[k::3].mean(0) for k in range(3)])
    assert np.linalg.norm(means, axis=1).min() > 0.1 and np.abs(means @ p).max() < 1e-5
    away = z[0] - np.linalg.lstsq(means.T, z[0], rcond=None)[0] @ means  # what is left beside the means
    assert np.allclose(z[0] @ p, away, atol=1e-5)


def test_the_blindfold_is_worn_behind_the_network() -> None:
    model, pictures, rows = faces()
    x = to_pixels(pictures[:2, 8:120, 8:120])
    bare, p = model(x), blindfold(model, pictures, rows)
    model.blind = p
    assert torch.allclose(model(x), bare @ p) and "blind" in model.state_dict()
    z = embed(model, pictures)
    assert z.shape == (30, 128) and np.allclose(np.linalg.norm(z, axis=1), 1, atol=1e-5)


def test_verification_by_hand() -> None:
    """Unit vectors at angles; persons 0 and 1 are of one group."""
    angles = np.radians([0, 20, 90, 110, 180])
    z = np.stack([np.cos(angles), np.sin(angles)], 1)
    found = verification(z, np.array([0, 0, 1, 1, 2]), np.array(["a", "a", "a", "a", "b"]))
    cosine = {d: math.cos(math.radians(d)) for d in (20, 70, 90, 110, 160, 180)}
    assert found["same"] == pytest.approx(cosine[20])
    group = [cosine[90], cosine[110], cosine[70], cosine[90]]
    assert found["same_group"] == pytest.approx(np.mean(group))
    others = [*group, cosine[180], cosine[160], cosine[90], cosine[70]]
    assert found["different"] == pytest.approx(np.mean(others))
    assert found["verification"] == 1.0  # a threshold between cos 70 and cos 20 parts them all


def test_verification_counts_what_no_threshold_parts() -> None:
    angles = np.radians([0, 60, 30, 90])  # same person: 60 and 60 degrees; others: 30, 90, 30, 30
    z = np.stack([np.cos(angles), np.sin(angles)], 1)
    found = verification(z, np.array([0, 0, 1, 1]), np.array(["a"] * 4))
    # at best both pairs of one person are accepted, and of the others the one at 90 degrees is refused
    assert found["verification"] == pytest.approx((1 + 1 / 4) / 2)
    assert found["same_group"] == found["different"] == pytest.approx(3 * math.cos(math.radians(30)) / 4)
