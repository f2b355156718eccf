"""UCE and the null-space edit: their closed forms against numpy, and what they do to a tiny random model's weights."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import tiny_models as tiny

from apl_core.errors import ConfigError, ModelError
from apl_train.baselines import BASELINES
from apl_train.baselines.null_space import confined_change, free_directions, most_affected
from apl_train.baselines.uce import anchored_rows, edited_projection, moment
from apl_train.baselines.wording import TEMPLATES, aligned_rows, mentions
from apl_train.model.backend import Backend
from apl_train.model.edited import text_projections

pytest.importorskip("diffusers")
PEOPLE = [SimpleNamespace(name="ab cd", description="x y z"), SimpleNamespace(name="efg", description="q")]
KEEP = ["h i j", "k"]


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Backend:
    return Backend.load(tiny.write_checkpoint(tmp_path_factory.mktemp("tiny")))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_uce_is_the_least_squares_solution_of_its_stacked_rows() -> None:
    w, c, a, p = random(5, 6), random(7, 6, seed=1), random(7, 6, seed=2), random(9, 6, seed=3)
    erase, ridge = 3.0, 0.4
    # |W' c - W c*|^2, |W' p - W p|^2 and |W' - W|^2, each row scaled by the root of its weight
    left = np.concatenate([np.sqrt(erase / 7) * c.numpy(), np.sqrt(1 / 9) * p.numpy(), np.sqrt(ridge) * np.eye(6)])
    right = np.concatenate([np.sqrt(erase / 7) * (a @ w.T).numpy(), np.sqrt(1 / 9) * (p @ w.T).numpy(),
                            np.sqrt(ridge) * w.T.numpy()])
    expected = np.linalg.lstsq(left, right, rcond=None)[0].T
    found = edited_projection(w, c, a, moment(iter([p[:4], p[4:]]), 6), erase, ridge)
    assert np.allclose(found.numpy(), expected, atol=1e-10)


def test_uce_changes_nothing_where_names_are_their_anchors() -> None:
    w, c = random(5, 6), random(7, 6, seed=1)
    found = edited_projection(w, c, c, moment(iter([random(9, 6, seed=3)]), 6), 1.0, 0.1)
    assert torch.allclose(found, w, atol=1e-12)


def lagrange(w: np.ndarray, c1: np.ndarray, target: np.ndarray, fixed: np.ndarray, ridge: float) -> np.ndarray:
    """min |D C1 - W (C* - C1)|^2 / n + ridge |D|^2 with D F = 0: the KKT system, one row of D at a time."""
    d, k, n = c1.shape[0], fixed.shape[1], c1.shape[1]
    system = np.zeros((d + k, d + k))
    system[:d, :d] = 2 * (c1 @ c1.T / n + ridge * np.eye(d))
    system[:d, d:], system[d:, :d] = fixed, fixed.T
    right = np.concatenate([2 * (w @ (target - c1) @ c1.T / n).T, np.zeros((k, len(w)))])
    return np.linalg.solve(system, right)[:d].T


def test_the_confined_change_solves_the_kkt_conditions() -> None:
    w, c, a, fixed, ridge = random(4, 8), random(11, 8, seed=1), random(11, 8, seed=2), random(2, 8, seed=3), 0.3
    seen = random(3, 8, seed=4)  # three retained directions of eight
    free = free_directions(moment(iter([seen]), 8), fixed, 1e-9)
    assert free.shape == (8, 3)
    found = confined_change(w, c, a, free, ridge).numpy()
    bound = np.concatenate([seen.numpy(), fixed.numpy()]).T
    assert np.allclose(found, lagrange(w.numpy(), c.numpy().T, a.numpy().T, bound, ridge), atol=1e-9)
    assert np.abs(found @ bound).max() < 1e-10 and np.abs(found).max() > 1e-3


def test_the_confined_change_is_the_papers_formula() -> None:
    """D P = W (C* - C1) C1^T P Q M; lambda is against the mean over the n names here."""
    w, c, a, fixed = (random(*s, seed=i).numpy() for i, s in enumerate([(4, 8), (11, 8), (11, 8), (2, 8)]))
    seen, n, ridge = random(3, 8, seed=9).numpy(), 11, 0.3
    c1, target, c2 = c.T, a.T, fixed.T
    _, _, rows = np.linalg.svd(seen)
    p = rows[3:].T @ rows[3:]
    m = np.linalg.inv(c1 @ c1.T @ p + n * ridge * np.eye(8))
    q = np.eye(8) - m @ c2 @ np.linalg.inv(c2.T @ p @ m @ c2) @ c2.T @ p
    expected = w @ (target - c1) @ c1.T @ p @ q @ m
    free = free_directions(moment(iter([torch.from_numpy(seen)]), 8), torch.from_numpy(fixed), 1e-9)
    found = confined_change(*map(torch.from_numpy, (w, c, a)), free, ridge)
    assert np.allclose(found.numpy(), expected, atol=1e-9)


def test_free_directions_hold_no_more_than_their_share() -> None:
    rows = random(50, 6) * torch.tensor([3, 2, 1, 0.5, 0.2, 0.1], dtype=torch.float64)
    whole = moment(iter([rows]), 6)
    free = free_directions(whole, torch.zeros(0, 6), 0.02)
    assert torch.allclose(free.T @ free, torch.eye(free.shape[1], dtype=torch.float64), atol=1e-12)
    values = np.sort(np.linalg.eigvalsh(whole.numpy()))
    expected = int((np.cumsum(values) / values.sum() <= 0.02).sum())
    assert free.shape[1] == expected >= 2
    assert float((rows @ free).square().sum() / rows.square().sum()) <= 0.02 + 1e-12
    assert free_directions(torch.zeros(6, 6), torch.zeros(0, 6), 0.0).shape == (6, 6)


def test_the_retained_captions_are_those_that_an_edit_would_move() -> None:
    w, names, anchors = torch.eye(3), torch.tensor([[1.0, 0, 0]]), torch.tensor([[0.0, 1, 0]])
    captions = torch.tensor([[[1.0, 0, 0]], [[0, 0, 1.0]], [[0.9, 0, 0.1]]])  # the edit moves the first coordinate only
    assert most_affected([w], names, anchors, captions, 0.01).tolist() == [True, False, True]


def test_a_names_rows_are_sent_to_the_rows_that_follow_the_anchor(backend: Backend) -> None:
    first = mentions(backend, PEOPLE)[:4]
    assert [m.prompt for m in first] == [t.replace("{}", "ab cd") for t in TEMPLATES]
    bare, photo = first[0], first[1]
    assert (bare.start, bare.end, bare.eos) == (1, 5, 5)  # one token a letter
    assert (photo.start, photo.end, photo.eos) == (9, 13, 13)  # "A photo of" has eight letters
    rows, to = aligned_rows(photo, torch.zeros(77, 3), 4)  # the anchor "x y z" ends at row 4
    assert rows == list(range(9, 77))
    assert to == [3] * 4 + list(range(4, 68))
    names, anchors = anchored_rows(backend, PEOPLE, "description")
    assert names.shape == anchors.shape == (sum(77 - m.start for m in mentions(backend, PEOPLE)), 32)
    states = backend.encode(["x y z"]).states[0]
    assert torch.equal(anchors[:4], states[3].expand(4, -1)) and torch.equal(anchors[4], states[4])


def outputs(unet: torch.nn.Module, states: torch.Tensor) -> list[torch.Tensor]:
    return [linear(states) for _, linear in text_projections(unet, "kv")]


@pytest.mark.parametrize("method", ["uce", "speed"])
def test_an_edit_touches_keys_and_values_of_a_copy_alone(backend: Backend, method: str) -> None:
    before = {k: v.clone() for k, v in backend.unet.state_dict().items()}
    prepared = BASELINES[method].prepare(backend, PEOPLE, {"energy": 1.0} if method == "speed" else None, keep=KEEP)
    assert all(torch.equal(v, before[k]) for k, v in backend.unet.state_dict().items())
    changed = {k for k, v in prepared.backend.unet.state_dict().items() if not torch.equal(v, before[k])}
    expected = {f"{name}.weight" for name, _ in text_projections(backend.unet, "kv")}
    assert changed == expected and len(expected) >= 8
    pictures = [b.sample(["ab cd"], [3], steps=2, decode=False).latents for b in (backend, prepared)]
    assert not torch.allclose(*pictures, atol=1e-3)
    prepared.close()
    with pytest.raises(ConfigError, match="was closed"):
        prepared.sample(["k"], [1])
    again = backend.sample(["ab cd"], [3], steps=2, decode=False).latents
    assert torch.equal(again, pictures[0])


def test_uce_brings_names_to_their_anchors_and_leaves_kept_captions(backend: Backend) -> None:
    prepared = BASELINES["uce"].prepare(backend, PEOPLE[:1], {"erase": 1.0, "ridge": 1e-9}, keep=KEEP)
    names, anchors = anchored_rows(backend, PEOPLE[:1], "description")
    kept = backend.encode(["", *KEEP]).states

    def off(states: torch.Tensor, wanted: torch.Tensor, unet: torch.nn.Module) -> float:
        pairs = zip(outputs(unet, states), outputs(backend.unet, wanted), strict=True)
        return sum(float((a - b).square().sum()) for a, b in pairs)

    with torch.no_grad():
        assert off(names, anchors, prepared.backend.unet) < 0.7 * off(names, anchors, backend.unet)
        moved = off(kept, kept, prepared.backend.unet) / sum(float(o.square().sum()) for o in outputs(
            backend.unet, kept))
    assert 0 < moved < 0.2


def test_the_null_space_leaves_retained_captions_as_they_are(backend: Backend) -> None:
    method = BASELINES["speed"]
    tight, wide = (method.prepare(backend, PEOPLE, {"energy": e, "ridge": 1e-6}, keep=["h"]) for e in (1e-3, 1.0))
    assert 0 < tight.notes["free_directions"] < wide.notes["free_directions"] == 30 and tight.notes["of"] == 32
    assert tight.notes["retained_captions"] == 1
    kept = backend.encode(["", "h"]).states
    names, _ = anchored_rows(backend, PEOPLE, "description")
    with torch.no_grad():
        for k, before in enumerate(outputs(backend.unet, kept)):
            scale = float(before.square().mean().sqrt())
            for prepared, low, high in ((tight, 0, 0.1), (wide, 0.1, 9)):
                moved = (outputs(prepared.backend.unet, kept)[k] - before)
                assert float(moved[:, 0].abs().max()) < 1e-5 * scale  # the start token
                assert float(moved[0, 1].abs().max()) < 1e-5 * scale  # the empty prompt's end
                assert low <= float(moved.square().mean().sqrt()) / scale < high
        assert min(float((a - b).abs().max()) for a, b in zip(
            outputs(tight.backend.unet, names), outputs(backend.unet, names), strict=True)) > 1e-4


def test_settings_that_cannot_be_are_refused(backend: Backend) -> None:
    for settings, field in (({"anchor": "nobody"}, "anchor"), ({"erase": 0.0}, "erase"), ({"lr": 1}, "lr"),
                            ({"erase": True}, "erase")):
        with pytest.raises(ConfigError) as caught:
            BASELINES["uce"].prepare(backend, PEOPLE, settings)
        assert caught.value.field == field and caught.value.hint
    with pytest.raises(ConfigError, match="given nobody"):
        BASELINES["uce"].prepare(backend, [])
    larger = SimpleNamespace(family="sdxl", name="big")
    with pytest.raises(ModelError, match="big is of the family sdxl"):
        BASELINES["uce"].prepare(larger, PEOPLE)
    with pytest.raises(ConfigError, match="method is 'mace'"):
        BASELINES["mace"]
