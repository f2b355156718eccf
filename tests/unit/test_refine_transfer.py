"""Refining a carried prefix by the text encoders alone, against transformers and numpy by hand, on tiny encoders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import tiny_models

from apl_core.errors import ConfigError, DatasetError, ModelError
from apl_core.metadata import PrefixMetadata
from apl_core.prefix import AnonymizationPrompt
from apl_core.transfer import RECORD
from apl_train.model.text import TextStack
from apl_train.refine_transfer import RHO, Behaviour, refine

WIDTHS = {"clip_l": 16, "clip_g": 24}
CAPTIONS = [" ".join(chr(97 + (i * (i + 1) + j) % 26) for j in range(2 + i % 5)) for i in range(60)]
M = 3


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> TextStack:
    folder = tmp_path_factory.mktemp("tokenizers")
    return TextStack("sdxl", {"clip_l": tiny_models.write_tokenizer(folder / "l"),
                              "clip_g": tiny_models.write_tokenizer(folder / "g", "!")},
                     {"clip_l": tiny_models.text_encoder(1, WIDTHS["clip_l"], layers=2),
                      "clip_g": tiny_models.text_encoder(2, WIDTHS["clip_g"], layers=2, projection=8)})


def prefix(**meta: object) -> AnonymizationPrompt:
    g = torch.Generator().manual_seed(4)
    return AnonymizationPrompt("sdxl", {key: torch.randn(M, width, generator=g) for key, width in WIDTHS.items()},
                               PrefixMetadata(title="tried", widths=WIDTHS, extra={RECORD: '{"clip_g": {}}'}, **meta))


def states(stack: TextStack, key: str, caption: str, vectors: torch.Tensor | None) -> np.ndarray:
    """Penultimate states [77, width]: the vectors are rows that the encoder's table really has."""
    encoder, tokenizer = stack.encoders[key], stack.tokenizers[key]
    rows = [] if vectors is None else [49408 + i for i in range(len(vectors))]
    ids = [tokenizer.bos_token_id, *rows, *tokenizer(caption, add_special_tokens=False).input_ids,
           tokenizer.eos_token_id]
    ids += [tokenizer.pad_token_id] * (77 - len(ids))
    table = encoder.get_input_embeddings()
    own = table.weight
    try:
        if vectors is not None:
            table.weight = torch.nn.Parameter(torch.cat([own, vectors]), requires_grad=False)
        with torch.no_grad():
            found = encoder(input_ids=torch.tensor([ids]), output_hidden_states=True)
        return found.hidden_states[-2][0].double().numpy()
    finally:
        table.weight = own


def test_the_loss_by_hand(stack: TextStack) -> None:
    behaviour, tried = Behaviour(stack, CAPTIONS, M), prefix()
    left, right = [], []
    for caption in behaviour.train:
        n = len(stack.tokenize(caption)) + 2
        left.append(states(stack, "clip_l", caption, None)[:n])
        right.append(states(stack, "clip_g", caption, None)[:n])
    x, y = np.concatenate(left), np.concatenate(right)
    mx, my = x.mean(0), y.mean(0)
    gram = (x - mx).T @ (x - mx)
    fitted = np.linalg.solve(gram + RHO * np.trace(gram) / len(gram) * np.eye(len(gram)), (x - mx).T @ (y - my))
    errors = []
    some = behaviour.aside[:5]
    for caption in some:
        n = len(stack.tokenize(caption)) + 1  # words and EOS
        l0, g0 = (states(stack, key, caption, None) for key in WIDTHS)
        l1, g1 = (states(stack, key, caption, tried.vectors(key)) for key in WIDTHS)
        for i in range(1, n + 1):
            errors.append(np.mean(((l1[M + i] - l0[i]) @ fitted - (g1[M + i] - g0[i])) ** 2))
        for i in range(1, M + 1):
            errors.append(np.mean(((l1[i] - mx) @ fitted + my - g1[i]) ** 2))
    wanted = np.mean(errors) / np.mean((y - my) ** 2)
    assert float(behaviour.loss(some, tried.tensors)) == pytest.approx(wanted, rel=1e-3)


def test_refining_lowers_the_loss_on_captions_it_did_not_learn_from(stack: TextStack) -> None:
    start = prefix()
    found = refine(stack, start, CAPTIONS, steps=50)
    assert found.after < 0.9 * found.before
    assert torch.equal(found.prefix.vectors("clip_l"), start.vectors("clip_l"))
    assert not torch.equal(found.prefix.vectors("clip_g"), start.vectors("clip_g"))
    behaviour = Behaviour(stack, CAPTIONS, M)
    assert not set(behaviour.aside) & set(behaviour.train)
    with torch.no_grad():
        again = float(behaviour.loss(behaviour.aside, found.prefix.tensors))
    assert again == pytest.approx(found.after, rel=0.05)  # there by parts of different lengths
    record = json.loads(found.prefix.meta.extra[RECORD])
    assert record["refined"]["steps"] == 50 and record["clip_g"] == {}


def test_what_is_refused(stack: TextStack, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="steps"):
        refine(stack, prefix(), CAPTIONS, steps=0)
    with pytest.raises(ConfigError, match="suffix"):
        refine(stack, prefix(placement="suffix"), CAPTIONS)
    with pytest.raises(DatasetError, match="different ones"):
        refine(stack, prefix(), CAPTIONS[:3])
    one = TextStack("sd1", {"emb_params": tiny_models.write_tokenizer(tmp_path)},
                    {"emb_params": tiny_models.text_encoder(1, 16, layers=2)})
    with pytest.raises(ModelError, match="sd1"):
        Behaviour(one, CAPTIONS, M)
