"""Settings beyond the paper: its numbers stay what they are, each switch does its part, all resume bit for bit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fakes import tiny_models as tiny

from apl_core.errors import ConfigError, DatasetError, ModelError, PrefixFileError, TrainingError, TrainingStopped
from apl_core.prefix import load_prefix

pytest.importorskip("diffusers")

from apl_train.datasets.dataset import problems, read_dataset
from apl_train.model.backend import Backend
from apl_train.model.files import read_parts
from apl_train.seeds import seed_of, step_generator
from apl_train.training.bank import TargetBank, add_noise, draw_rows, draw_scales
from apl_train.training.config import TrainConfig, from_dict, preset
from apl_train.training.pseudo_identity import Inversion, add_words, invert, make_pseudo, noun_in, read_words, word_of
from apl_train.training.samples import TrainingSet
from apl_train.training.trainer import Trainer

WORLD = tuple[Path, Backend, TrainingSet]


def _sets(root: Path, backend: Backend, pseudo: Path | None = None) -> TrainingSet:
    return TrainingSet(backend, read_dataset(root / "id", expect="id"), read_dataset(root / "reg", expect="reg"),
                       root / "cache", pseudo=read_dataset(pseudo, expect="id") if pseudo else None)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> WORLD:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("world")
    backend = Backend(read_parts(tiny.write_checkpoint(root)))
    tiny.write_set(root / "id", [("ab cd", "photo of ab cd", "a man", "id"), ("ef gh", "ef gh", "a boy", "id")])
    tiny.write_set(root / "reg", [("", "a tree", "", "nonface"), ("", "a man with hats", "", "face"),
                                  ("", "a lady", "", "face")])
    return root, backend, _sets(root, backend)


@pytest.fixture(scope="module")
def pseudo(world: WORLD) -> tuple[Path, TrainingSet]:
    root, backend, _ = world
    make_pseudo(backend, read_dataset(root / "reg", expect="reg"), root / "pseudo", count=2,
                settings=Inversion(steps=2, batch_size=2, start="ab"))
    add_words(backend.text, read_words(root / "pseudo"))
    return root / "pseudo", _sets(root, backend, root / "pseudo")


@pytest.fixture(scope="module")
def second(world: WORLD, tmp_path_factory: pytest.TempPathFactory) -> tuple[Backend, TrainingSet]:
    """A fine-tune: the same model with other weights in the UNet."""
    parts = read_parts(tiny.write_checkpoint(tmp_path_factory.mktemp("second")))
    with torch.no_grad():
        for weight in parts.unet.parameters():
            weight.mul_(1.05)
    backend = Backend(parts)
    backend.sha256 = "f" * 64
    return backend, _sets(world[0], backend)


def trainer(world: WORLD, run: Path, data: TrainingSet | None = None, second=None, **changes) -> Trainer:
    config = TrainConfig(**{"num_tokens": 3, "batch_size": 4, "steps": 6, "levels_every": 0, "save_every": 2,
                            "learning_rate": 0.01, **changes})
    run.mkdir(parents=True, exist_ok=True)
    return Trainer(world[1], data or world[2], config, run, second=second)


def test_the_papers_training_is_what_it_was(world: WORLD, tmp_path: Path) -> None:
    """Three steps of the preset `paper`, one sample at a time, against a loop that knows no other setting."""
    _, backend, data = world
    paper = from_dict(preset("paper") | {"num_tokens": 3, "batch_size": 2, "save_every": 100})
    run = Trainer(backend, data, paper, tmp_path)
    g = torch.Generator().manual_seed(seed_of("apl-init", 0))
    ids = torch.randint(512, 49406, (3,), generator=g)
    vectors = torch.nn.Parameter(backend.text.embedding_table()[ids].clone())
    assert torch.equal(run.vectors["emb_params"], vectors)
    adam = torch.optim.Adam([vectors], lr=1e-3)
    for step in range(3):
        g = step_generator(0, step)
        share = 0.5 * 2
        n_id = int(share) + int(torch.rand((), generator=g) < share - int(share))
        share = (2 - n_id) / 2  # the other half is of S_Reg: unnamed persons and things in equal parts
        faces = int(share) + int(torch.rand((), generator=g) < share - int(share))
        pools = [data.id_rows] * n_id + [data.face_rows] * faces + [data.nonface_rows] * (2 - n_id - faces)
        rows = [int(pool[int(torch.randint(len(pool), (), generator=g))]) for pool in pools]
        times = torch.randint(0, 1000, (2,), generator=g)
        noise = torch.randn(2, *data.latents.shape[1:], generator=g)
        loss = torch.zeros(())
        for i, row in enumerate(rows):
            a = backend.alphas_bar[times[i]]
            x_t = (a.sqrt() * data.latents[row] + (1 - a).sqrt() * noise[i])[None]

            def eps(prompt: str, prefix=None, x_t: torch.Tensor = x_t, t: torch.Tensor = times[i : i + 1]):
                return backend.predict(x_t, t, backend.encode([prompt], prefix))

            with torch.no_grad():
                e1, e2 = eps(data.c1[row]), eps(data.c2[row])
            found = eps(data.c1[row], {"emb_params": vectors})
            loss = loss + (found - (2 * e2 - e1)).square().mean() / 2
        adam.zero_grad()
        loss.backward()
        adam.step()
        assert run.one_step()["loss"] == pytest.approx(float(loss.detach()), rel=1e-3)
    # Adam's first steps are the gradient's sign: elements whose gradient is next to nothing may go either way
    off = (run.vectors["emb_params"] - vectors).abs()
    assert float(off.median()) < 1e-5 and float((off > 1e-4).float().mean()) < 0.02


SWITCHES = {
    "suffix": {"placement": "suffix"}, "both": {"placement": "both"}, "uniform": {"init": "uniform"},
    "separability": {"timesteps": "separability", "bank": 64}, "guided": {"guided_share": 0.5},
    "names": {"name_noise": 0.8}, "null": {"alpha": -1.0}, "pseudo": {"pseudo_share": 0.5},
    "pseudo with bank": {"pseudo_share": 0.5, "bank": 64, "timesteps": "separability"}, "joint": {},
    "joint with bank": {"bank": 64},
}


@pytest.fixture(scope="module")
def plain(world: WORLD, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    return trainer(world, tmp_path_factory.mktemp("plain")).fit().vectors()


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_resumes_bit_for_bit(name: str, world: WORLD, pseudo, second, plain, tmp_path: Path) -> None:
    options = {"data": pseudo[1] if "pseudo" in name else None, "second": second if "joint" in name else None,
               **SWITCHES[name]}
    straight = trainer(world, tmp_path / "a", **options)
    straight.fit()
    first = trainer(world, tmp_path / "b", **options)
    first._stop = lambda: first.step >= 3
    with pytest.raises(TrainingStopped):
        first.fit()
    resumed = trainer(world, tmp_path / "b", **options)
    resumed.restore()
    prompt = resumed.fit()
    assert torch.equal(resumed.vectors["emb_params"], straight.vectors["emb_params"])
    assert not torch.equal(prompt.vectors(), plain)
    saved = load_prefix(tmp_path / "b" / "prefix" / "anonymize.safetensors", enforce=True)
    assert saved.meta.placement == prompt.meta.placement == SWITCHES[name].get("placement", "prefix")


def test_switches_leave_a_steps_pictures_times_and_noise_alone(world: WORLD, tmp_path: Path) -> None:
    plain = trainer(world, tmp_path / "a")._courses[0].targets.batch(4)
    other = trainer(world, tmp_path / "b", guided_share=1.0, name_noise=1.0, placement="both")
    batch = other._courses[0].targets.batch(4)
    assert torch.equal(plain.x_t, batch.x_t) and torch.equal(plain.eps_c1, batch.eps_c1)


def test_a_suffix_stands_behind_the_words_in_the_loop(world: WORLD, tmp_path: Path) -> None:
    _, backend, data = world
    t = trainer(world, tmp_path, placement="suffix", batch_size=2)
    batch = t._courses[0].targets.batch(0)
    losses = []
    for i, row in enumerate(batch.rows.tolist()):
        ids = backend.text.tokenize(data.c1[row])
        with torch.no_grad():
            table = backend.text.embedding_table()
            rows = torch.cat([table[[49406, *ids]], t.vectors["emb_params"], table[[49407] * (77 - 4 - len(ids))]])
            text = next(iter(backend.text.encoders.values()))
            handle = text.get_input_embeddings().register_forward_hook(lambda _m, _a, _o, rows=rows: rows[None])
            states = text(input_ids=torch.zeros(1, 77, dtype=torch.int64)).last_hidden_state
            handle.remove()
            found = backend.unet(batch.x_t[i : i + 1], batch.t[i : i + 1], encoder_hidden_states=states).sample
        losses.append((found - (2 * batch.eps_c2[i] - batch.eps_c1[i])).square().mean())
    assert t.one_step()["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-3)


def test_timesteps_follow_separability(world: WORLD, tmp_path: Path) -> None:
    _, backend, data = world
    config = TrainConfig(num_tokens=3, batch_size=64, steps=100, bank=512, timesteps="separability", time_floor=0.1)
    bank = TargetBank(backend, data, config, tmp_path)
    e1, e2 = (bank._tuples.take(k, bank._pools["id"]).float() for k in ("eps_c1", "eps_c2"))
    distance, bins = (e1 - e2).square().flatten(1).mean(1), bank._t[bank._pools["id"]] // 50
    means = torch.tensor([float(distance[bins == b].mean()) for b in range(20)])
    expected = 0.9 * means.sqrt() / means.sqrt().sum() + 0.1 / 20
    drawn = torch.cat([bank.batch(step).t for step in range(60)])
    share = torch.bincount(drawn // 50, minlength=20) / len(drawn)
    assert float((share - expected).abs().max()) < 0.02
    assert float(expected.max() / expected.min()) > 1.2  # else nothing was tested


def test_scales_are_one_or_within_the_range() -> None:
    config = TrainConfig(guided_share=0.25, guided_low=3.0, guided_high=12.0)
    drawn = torch.cat([draw_scales(config, step, 50) for step in range(80)])
    guided = drawn[drawn != 1]
    assert abs(len(guided) / len(drawn) - 0.25) < 0.03
    assert 3 <= float(guided.min()) < 3.2 and 11.8 < float(guided.max()) <= 12
    assert torch.equal(draw_scales(config, 7, 50), draw_scales(config, 7, 50))


def test_names_are_disturbed_where_the_settings_say(world: WORLD, tmp_path: Path) -> None:
    data = world[2]
    for share, low, high in ((0.0, 0, 0), (0.5, 8, 40), (1.0, 20, 60)):
        t = trainer(world, tmp_path / str(share), name_noise=share, batch_size=60)
        batch = t._courses[0].targets.batch(0)
        changed = [p != data.c1[r] for p, r in zip(t._prompts(data, batch), batch.rows.tolist(), strict=True)]
        assert low <= sum(changed[: batch.n_id]) <= high and not any(changed[batch.n_id :])


def test_models_take_turns(world: WORLD, second, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t = trainer(world, tmp_path, second=second)
    asked = []
    for name, backend in (("first", world[1]), ("second", second[0])):
        real = backend.encode
        monkeypatch.setattr(backend, "encode", lambda *a, real=real, name=name, **k: (
            asked.append(name) if len(a) > 1 and a[1] is t.vectors else None, real(*a, **k))[1])
    for _ in range(4):
        t.one_step()
    assert asked == ["first", "second"] * 2
    t.save()
    other = trainer(world, tmp_path, second=second)
    other.hashes["second_model"] = "0" * 64
    with pytest.raises(TrainingError, match="second_model changed"):
        other.restore()
    assert t.prompt().meta.extra["apl.second_model_sha256"] == "f" * 64


def test_two_models_of_different_width_are_refused(world: WORLD, tmp_path: Path) -> None:
    wide = SimpleNamespace(text=SimpleNamespace(widths={"emb_params": 64}))
    with pytest.raises(ConfigError, match="second_model"):
        trainer(world, tmp_path, second=(wide, world[2]))


def test_pseudo_identities_are_an_s_id_folder_with_words(world: WORLD, pseudo) -> None:
    backend, (folder, data) = world[1], pseudo
    words = read_words(folder)
    assert len(words) == 2 and all(word == word_of(v) and v.shape == (2, 32) for word, v in words.items())
    assert not problems(folder, "id", encoder_room=lambda text: 60 - len(backend.text.tokenize(text)))
    records = read_dataset(folder, expect="id").records
    assert [r.c2 for r in records] == ["a man with hats", "a lady"]  # the longest description first
    for record in records:
        ids = backend.text.tokenize(record.c1)
        before, after = (backend.text.tokenize(part) for part in record.c1.split(record.name))
        assert ids[: len(before)] == before and ids[len(before) + 2 :] == after
        assert torch.equal(backend.text.embedding_table()[ids[len(before) : len(before) + 2]], words[record.name])
    assert {r.c1.split(r.name)[1] for r in records} <= {"", " man", " woman"}
    assert [noun_in(t) for t in ("A female cook", "an old man", "two boys", "Women")] == [
        "woman", "man", "person", "person"]
    config = TrainConfig(pseudo_share=0.25, id_share=1.0, batch_size=400)
    rows = draw_rows(data, config, torch.Generator().manual_seed(0), 400).tolist()
    assert 60 < sum(data.kinds[r] == "pseudo" for r in rows) < 140 and data.count_id(torch.tensor(rows)) == 400
    with pytest.raises(ConfigError, match="already holds"):
        make_pseudo(backend, read_dataset(world[0] / "reg", expect="reg"), folder)


def test_inversion_learns_the_words_rows_alone(world: WORLD) -> None:
    """The table does not move, a second run is equal, and a sample of the pictures is predicted better than before."""
    backend, data = world[1], world[2]
    before = backend.text.embedding_table().clone()
    latents = [data.latents[0][None], data.latents[1][None]]
    settings = Inversion(vectors=2, steps=40, batch_size=8, learning_rate=0.05, start="ab")
    found, losses = invert(backend, latents, settings)
    assert found.shape == (2, 2, 32) and not torch.allclose(found[0], found[1], atol=0.05) and len(losses) == 40
    assert torch.equal(backend.text.embedding_table()[: len(before)], before)
    assert torch.equal(found, invert(backend, latents, settings)[0])
    g = torch.Generator().manual_seed(9)
    t, noise = torch.randint(1000, (64,), generator=g), torch.randn(64, *data.latents.shape[1:], generator=g)
    x_t = add_noise(latents[0].expand(64, -1, -1, -1), noise, t, backend.alphas_bar)
    start = before[(backend.text.tokenize("ab") * 2)[:2]]

    def error(name: str, vectors: torch.Tensor) -> float:
        backend.text.learn({name: vectors})
        with torch.no_grad():
            return float((backend.predict(x_t, t, backend.encode([f"A photo of {name}"] * 64)) - noise).square().mean())

    assert error("<after>", found[0]) < error("<before>", start)


def test_words_of_another_model_or_under_a_wrong_name_are_refused(world: WORLD, pseudo, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(PrefixFileError, match="wide"):
        world[1].text.learn({"<x>": torch.zeros(1, 7)})
    with pytest.raises(DatasetError, match="apl pseudo"):
        read_words(tmp_path)
    save_file({"<face-000000000000>": torch.zeros(2, 32)}, tmp_path / "words.safetensors")
    with pytest.raises(DatasetError, match="not named after"):
        read_words(tmp_path)
    (tmp_path / "words.safetensors").write_bytes(b"nothing of use")
    with pytest.raises(DatasetError, match="cannot be read"):
        read_words(tmp_path)


def test_words_need_a_model_with_one_encoder() -> None:
    from apl_train.model.text import TextStack

    stack = TextStack.__new__(TextStack)
    stack.encoders = {"clip_l": None, "clip_g": None}
    with pytest.raises(ModelError, match="several"):
        stack.learn({"<x>": torch.zeros(1, 7)})
