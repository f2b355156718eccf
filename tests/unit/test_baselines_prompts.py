"""Baselines without weight edits: whom a prompt names, negatives row by row, gates and safety terms by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import tiny_models as tiny

from apl_train.baselines import BASELINES
from apl_train.baselines.negative_prompt import GENERIC, negative_for
from apl_train.baselines.safe_guidance import STRENGTHS, Strength, _Safe, safety_term
from apl_train.baselines.semantic_surgery import gate, presence, shifted
from apl_train.baselines.wording import named_in
from apl_train.model.backend import Backend

pytest.importorskip("diffusers")
PEOPLE = [SimpleNamespace(name="ab cd", description="x y z"), SimpleNamespace(name="efg", description="q")]
PROMPTS, SEEDS = ["A photo of ab cd", "a cat", "efg and ab cd", "efgh"], [1, 2, 3, 4]


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Backend:
    return Backend.load(tiny.write_checkpoint(tmp_path_factory.mktemp("tiny")))


def test_a_name_counts_as_whole_words_whatever_its_case() -> None:
    assert [[p.name for p in named_in(t, PEOPLE)] for t in PROMPTS] == [["ab cd"], [], ["ab cd", "efg"], []]
    assert named_in("AB  Cd's hat", PEOPLE) == (PEOPLE[0],)
    assert named_in("cab cd", PEOPLE) == () == named_in("ab c d", PEOPLE)
    assert named_in("a (b", [SimpleNamespace(name="a (b", description="")])  # no pattern of its own


def test_what_the_negative_prompt_says() -> None:
    assert [negative_for(t, PEOPLE, "mentioned") for t in PROMPTS] == ["ab cd", "", "ab cd, efg", ""]
    assert {negative_for(t, PEOPLE, "everyone") for t in PROMPTS} == {"ab cd, efg"}
    assert negative_for("a cat", PEOPLE, "generic") == GENERIC


def test_every_row_has_its_own_negative_and_its_own_place(backend: Backend) -> None:
    prepared = BASELINES["negative-prompt"].prepare(backend, PEOPLE)
    found = prepared.sample(PROMPTS, SEEDS, steps=2, negative="w")
    assert found.images.shape == (4, 64, 64, 3)
    for row, negative in enumerate(("w, ab cd", "w", "w, ab cd, efg", "w")):
        alone = backend.sample([PROMPTS[row]], [SEEDS[row]], steps=2, negative=negative)
        assert torch.allclose(found.latents[row], alone.latents[0], atol=1e-4)
    other = backend.sample(PROMPTS, SEEDS, steps=2, negative="w").latents
    assert not torch.allclose(found.latents[0], other[0], atol=1e-3)
    assert prepared.sample(PROMPTS, SEEDS, steps=2, decode=False).images.shape[0] == 0


def test_presence_and_gate_by_hand() -> None:
    neutral = torch.tensor([1.0, 1.0])
    states, concepts = torch.tensor([[3.0, 1.0], [1.0, 4.0]]), torch.tensor([[2.0, 1.0], [2.0, 2.0], [1.0, 0.0]])
    expected = [[1, 1 / math.sqrt(2), 0], [0, 1 / math.sqrt(2), -1]]
    assert np.allclose(presence(states, neutral, concepts).numpy(), expected, atol=1e-6)
    rho = gate(torch.tensor([0.5, 0.48, 0.54]), beta=0.5, gamma=0.02, tau=0.5)
    assert rho.tolist() == pytest.approx([0.5, 0.0, 1 / (1 + math.exp(-2))])


def test_rows_move_with_the_end_of_text_token() -> None:
    rows = torch.arange(6.0)[:, None].expand(-1, 2)
    assert shifted(rows, 2, 4)[:, 0].tolist() == [0, 1, 1, 1, 2, 3]
    assert shifted(rows, 4, 2)[:, 0].tolist() == [0, 3, 4, 5, 5, 5]
    assert torch.equal(shifted(rows, 3, 3), rows)


def test_surgery_cuts_listed_names_and_leaves_all_else(backend: Backend) -> None:
    """A random encoder reads a sentence with and without a name nearly alike: the gate stands at the name alone."""
    settings = {"beta": 0.999, "gamma": 1e-5, "tau": 0.5, "neutral": "description"}
    prepared = BASELINES["semantic-surgery"].prepare(backend, PEOPLE, settings)
    prompts = ["ab cd", "", "k l m n o p q r s t"]
    plain, cut = backend.encode(prompts).states, prepared.backend.encode(prompts).states
    assert torch.equal(cut[1:], plain[1:])
    # with rho = 1 and equal sentences, e - (e_c - e_0) is e_0: the description, moved to the name's end of text
    expected = shifted(backend.encode(["x y z"]).states[0], 4, 5)
    assert torch.allclose(cut[0], expected, atol=1e-4) and not torch.allclose(cut[0], plain[0], atol=1e-2)
    pictures = [b.sample(prompts, [1, 2, 3], steps=2, decode=False).latents for b in (backend, prepared)]
    moved = [not torch.allclose(a, b, atol=1e-4) for a, b in zip(*pictures, strict=True)]
    assert moved == [True, False, False]


def test_the_safety_term_by_hand() -> None:
    s = Strength(0, 10.0, 0.05, 0.5, 0.7)
    eps, null, unsafe = torch.tensor([1.0, 1.0, 1.0]), torch.zeros(3), torch.tensor([1.03, 2.0, 0.5])
    nu = torch.tensor([1.0, 0.0, 0.0])
    gamma, after = safety_term(eps, null, unsafe, nu, s)
    # |10 (1 - 1.03)| = 0.3; |10 (1 - 2)| capped at 1; 1 - 0.5 lies above the threshold: no push
    assert gamma.tolist() == pytest.approx([0.3 * 1.03 + 0.5, 2.0, 0.0], abs=1e-5)
    assert after.tolist() == pytest.approx([0.7 + 0.3 * (0.3 * 1.03 + 0.5), 0.6, 0.0], abs=1e-5)


def test_without_a_push_safe_guidance_is_ordinary_guidance(backend: Backend) -> None:
    idle = _Safe(backend, PEOPLE, "mentioned", Strength(0, 0.0, 1.0, 0.0, 0.0))
    assert torch.allclose(idle.sample(PROMPTS, SEEDS, steps=4, negative="w", decode=False).latents,
                          backend.sample(PROMPTS, SEEDS, steps=4, negative="w", decode=False).latents, atol=1e-3)
    late = _Safe(backend, PEOPLE, "mentioned", Strength(50, 5000.0, 1.0, 0.5, 0.7))  # warms up to the very end
    assert torch.allclose(late.sample(PROMPTS, SEEDS, steps=4, decode=False).latents,
                          backend.sample(PROMPTS, SEEDS, steps=4, decode=False).latents, atol=1e-3)


def test_safe_guidance_pushes_where_a_listed_name_stands(backend: Backend) -> None:
    prepared = BASELINES["sld"].prepare(backend, PEOPLE, {"strength": "max"})
    assert STRENGTHS["max"].threshold == 1.0 and prepared.notes["settings"]["which"] == "mentioned"
    told: list[tuple[int, int]] = []
    found = prepared.sample(PROMPTS, SEEDS, steps=4, batch=1, progress=lambda *a: told.append(a))
    plain = backend.sample(PROMPTS, SEEDS, steps=4)
    moved = [not torch.allclose(a, b, atol=1e-3) for a, b in zip(found.latents, plain.latents, strict=True)]
    assert moved == [True, False, True, False] and told == [(3, 4), (4, 4)]
    assert found.images.shape == plain.images.shape
    assert np.abs(found.images[1].astype(int) - plain.images[1]).max() <= 1


def test_the_registry_names_its_methods() -> None:
    assert "uce" in BASELINES and "base" not in BASELINES and len(BASELINES) == 8
    for name, method in BASELINES.items():
        assert method.name == name and method.title and "arXiv" in method.paper
        assert method.changes in ("weights", "prompt", "sampler")
        assert len(method.grid) >= 2 and all(set(point) <= set(method.defaults) for point in method.grid)
