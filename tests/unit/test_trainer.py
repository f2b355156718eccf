"""The loop on a tiny random model: losses by hand, frozen weights, stored targets, stopping, resuming, failing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import tiny_models as tiny

from apl_core.errors import ConfigError, TrainingError, TrainingStopped
from apl_core.library import PrefixLibrary
from apl_core.prefix import load_prefix

pytest.importorskip("diffusers")

from apl_train.datasets.dataset import read_dataset
from apl_train.model.backend import Backend
from apl_train.model.files import read_parts
from apl_train.seeds import step_generator
from apl_train.training.bank import TargetBank, add_noise, draw_rows
from apl_train.training.config import TrainConfig
from apl_train.training.events import read_events
from apl_train.training.samples import TrainingSet
from apl_train.training.trainer import Trainer, initial_vectors


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Backend, TrainingSet]:
    root = tmp_path_factory.mktemp("world")
    backend = Backend(read_parts(tiny.write_checkpoint(root)))
    s_id = tiny.write_set(root / "id", [("ab", "photo of ab", "a man", "id"), ("cd", "photo of cd", "a lady", "id"),
                                   ("ef", "ef", "a boy", "id")])
    s_reg = tiny.write_set(root / "reg", [("", "a tree", "", "nonface"), ("", "a man", "", "face"),
                                     ("", "a car", "", "nonface")])
    data = TrainingSet(backend, read_dataset(s_id, expect="id"), read_dataset(s_reg, expect="reg"), root / "cache")
    return backend, data


def trainer(world, run: Path, **changes) -> Trainer:
    config = TrainConfig(**{"num_tokens": 3, "batch_size": 4, "steps": 6, "levels_every": 2, "save_every": 2,
                            "learning_rate": 0.01, **changes})
    run.mkdir(parents=True, exist_ok=True)
    return Trainer(*world, config, run)


def test_one_step_is_equations_5_to_7_by_hand(world, tmp_path: Path) -> None:
    backend, data = world
    t = trainer(world, tmp_path, alpha=2.0)
    start = t.vectors["emb_params"].detach().clone()
    g = step_generator(0, 0)
    rows = draw_rows(data, t.config, g, 4)
    times = torch.randint(0, 1000, (4,), generator=g)
    noise = torch.randn(data.latents[rows].shape, generator=g)
    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)[times].view(4, 1, 1, 1)
    x_t = abar.sqrt() * data.latents[rows] + (1 - abar).sqrt() * noise
    vectors = start.clone().requires_grad_()
    losses = []
    for i, row in enumerate(rows.tolist()):  # one by one: batching may not change anything
        def eps(prompt: str, prefix=None, i: int = i) -> torch.Tensor:
            return backend.predict(x_t[i : i + 1], times[i : i + 1], backend.encode([prompt], prefix))

        with torch.no_grad():
            e1, e2 = eps(data.c1[row]), eps(data.c2[row])
        target = 3 * e2 - 2 * e1
        losses.append((eps(data.c1[row], {"emb_params": vectors}) - target).square().mean())
    loss = torch.stack(losses).mean()
    loss.backward()
    adam = torch.optim.Adam([vectors], lr=0.01)
    adam.step()
    seen = t.one_step()
    assert seen["loss"] == pytest.approx(float(loss), rel=1e-3)
    assert torch.allclose(t.vectors["emb_params"], vectors, atol=2e-4)
    assert not torch.allclose(t.vectors["emb_params"], start, atol=1e-3)
    assert all(not p.requires_grad and p.grad is None for m in (backend.unet, backend.vae) for p in m.parameters())


def test_vectors_start_at_token_embeddings(world) -> None:
    backend, _ = world
    table = backend.text.embedding_table("emb_params")
    made = initial_vectors(backend, TrainConfig(num_tokens=5, seed=3))["emb_params"]
    assert all(bool((table == row).all(1).any()) for row in made)
    words = initial_vectors(backend, TrainConfig(num_tokens=4, init="text", init_text="ab"))["emb_params"]
    ids = backend.text.tokenize("ab")
    assert torch.equal(words, table[(ids * 4)[:4]])


def test_bank_holds_the_frozen_predictions(world, tmp_path: Path) -> None:
    backend, data = world
    config = TrainConfig(num_tokens=3, batch_size=4, bank=12)
    bank = TargetBank(backend, data, config, tmp_path)
    batch = bank.batch(5)
    for i, row in enumerate(batch.rows.tolist()):
        for eps, prompt in ((batch.eps_c1[i], data.c1[row]), (batch.eps_c2[i], data.c2[row])):
            with torch.no_grad():
                again = backend.predict(batch.x_t[i : i + 1], batch.t[i : i + 1], backend.encode([prompt]))[0]
            assert torch.allclose(eps, again, atol=5e-3)  # stored as float16
    (shard,) = bank.folder.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-9])
    assert torch.equal(TargetBank(backend, data, config, tmp_path).batch(5).eps_c1, batch.eps_c1)


def test_a_short_training_builds_no_more_targets_than_it_has_samples(world, tmp_path: Path) -> None:
    made = [TargetBank(*world, TrainConfig(num_tokens=3, batch_size=4, steps=steps, bank=500), tmp_path / str(steps))
            for steps in (2, 20)]
    assert [len(bank._rows) for bank in made] == [32, 80]
    assert torch.equal(made[0]._tuples.take("eps_c1", range(32)), made[1]._tuples.take("eps_c1", range(32)))


def test_noise_follows_ddpm(world) -> None:
    x0, noise, t = torch.ones(2, 4, 1, 1), torch.full((2, 4, 1, 1), 2.0), torch.tensor([0, 999])
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = np.cumprod(1 - betas)
    found = add_noise(x0, noise, t, world[0].alphas_bar)[:, 0, 0, 0].numpy()
    assert np.allclose(found, [np.sqrt(abar[k]) + 2 * np.sqrt(1 - abar[k]) for k in (0, 999)], rtol=1e-4)


def test_straight_run_equals_stop_and_resume(world, tmp_path: Path) -> None:
    straight = trainer(world, tmp_path / "a")
    straight.fit()
    first = trainer(world, tmp_path / "b")
    first._stop = lambda: first.step >= 3
    with pytest.raises(TrainingStopped) as caught:
        first.fit()
    assert "apl resume" in caught.value.hint
    second = trainer(world, tmp_path / "b")
    second.restore()
    assert second.step == 3
    second.fit()
    assert torch.equal(second.vectors["emb_params"], straight.vectors["emb_params"])
    steps = [e["step"] for e in read_events(tmp_path / "b") if e["event"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_levels_are_whole_prefix_files(world, tmp_path: Path) -> None:
    trainer(world, tmp_path, name="mine").fit()
    (entry,) = PrefixLibrary([tmp_path / "prefix"]).entries()
    assert (entry.name, entry.levels, entry.num_tokens, entry.problem) == ("mine", (2, 4), 3, None)
    level = load_prefix(tmp_path / "prefix" / "mine.step-2.safetensors", enforce=True)
    assert level.meta.level == 2 and level.meta.base_model_sha256 == world[0].sha256


def test_nan_stops_and_keeps_the_last_good_state(world, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t = trainer(world, tmp_path)
    real = world[0].predict
    monkeypatch.setattr(world[0], "predict", lambda *a: real(*a) * (float("nan") if t.step >= 3 else 1.0))
    with pytest.raises(TrainingError, match="loss is nan at step 3") as caught:
        t.fit()
    assert "learning_rate" in caught.value.hint
    assert torch.isfinite(t.vectors["emb_params"]).all()
    monkeypatch.setattr(world[0], "predict", real)
    again = trainer(world, tmp_path)
    again.restore()
    assert again.step == 2


def test_a_changed_model_is_refused_on_resume(world, tmp_path: Path) -> None:
    trainer(world, tmp_path).save()
    t = trainer(world, tmp_path)
    t.hashes = {**t.hashes, "model": "other"}
    with pytest.raises(TrainingError, match="model changed"):
        t.restore()
    t.restore(allow_changed=True)


def test_no_reg_draws_persons_only_and_the_mix_is_as_asked(world) -> None:
    _, data = world
    g = torch.Generator().manual_seed(0)
    alone = draw_rows(data, TrainConfig(no_reg=True), g, 50)
    assert {data.kinds[r] for r in alone.tolist()} == {"id"}
    mixed = [data.kinds[r] for r in draw_rows(data, TrainConfig(id_share=0.25), g, 400).tolist()]
    assert mixed.count("id") == 100
    assert mixed.count("face") == mixed.count("nonface") == 150
    faces = draw_rows(data, TrainConfig(id_share=0.25, face_share=0.6), g, 400).tolist()
    assert [data.kinds[r] for r in faces].count("face") == 180
    one = [data.kinds[int(draw_rows(data, TrainConfig(id_share=0.0, face_share=0.9), g, 1))] for _ in range(200)]
    assert 160 < one.count("face") < 200 and one.count("id") == 0  # a batch of one takes turns by chance


def test_more_persons_than_there_are_is_refused(world, tmp_path: Path) -> None:
    backend, data = world
    with pytest.raises(ConfigError, match="persons is 9"):
        TrainingSet(backend, read_dataset(_folder_of(data, tmp_path), expect="id"), None, tmp_path / "cache", persons=9)


def _folder_of(_data, tmp_path: Path) -> Path:
    return tiny.write_set(tmp_path / "id", [("ab", "photo of ab", "a man", "id")])
