"""The text tower's last lesson: where the states of a prompt are to be met, and what a short training makes of them."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from apl_train.miniworld import build, steady
from apl_train.miniworld.captions import Captioner
from apl_train.miniworld.people import Attributes, Person


@pytest.fixture(scope="module")
def tower() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(vocab_size=49408, eos_token_id=49407, bos_token_id=49406, **shape)).eval()


class Words:
    """A tokenizer with one id a word."""

    def __init__(self) -> None:
        self.known = {f"filler{c}</w>": i for i, c in enumerate("abcdefgh")}

    def get_vocab(self) -> dict[str, int]:
        return self.known

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        ids = [self.known.setdefault(f"{word}</w>", 100 + len(self.known)) for word in text.lower().split()]
        return SimpleNamespace(input_ids=ids)


@pytest.fixture
def captioner() -> Captioner:
    who = Attributes("male", "white", "hockey player", "curly", "black", "beard", "none", "cap")
    return Captioner(Words(), [Person(who, {}, "boris marfield", "train")], ["red apple", "bus"])


def test_states_move_on_behind_what_stands_ahead() -> None:
    plain = torch.arange(2 * 77, dtype=torch.float32).reshape(2, 77, 1)
    target, met = steady.unmoved(plain, [3, 0])
    assert target[0, 4, 0] == plain[0, 1, 0] and target[0, 76, 0] == plain[0, 73, 0]
    assert torch.equal(target[1], plain[1])
    assert met[0].tolist() == [False] * 4 + [True] * 73 and met[1].tolist() == [False] + [True] * 76


def test_a_row_is_what_the_encoder_is_given(tower: nn.Module) -> None:
    """Without rows ahead, the states are those of transformers' own call with token ids."""
    table = tower.get_input_embeddings().weight.detach()
    ids = [320, 1125, 539]
    whole = torch.full((1, 77), steady.EOS)
    whole[0, : len(ids) + 1] = torch.tensor([steady.BOS, *ids])
    with torch.no_grad():
        found = steady.encoded(tower, steady.row(table, table[:0], ids)[None])
        want = tower(input_ids=whole).last_hidden_state
        assert torch.equal(found, want)
        assert torch.equal(steady.encoded(tower, steady.row(table, table[[320]], [1125, 539])[None]), want)
    long = steady.row(table, table[:10], list(range(500, 600)))
    assert len(long) == 77 and torch.equal(long[-1], table[steady.EOS]) and torch.equal(long[75], table[564])


def test_captions_alone_are_neither_dressed_nor_related(captioner: Captioner) -> None:
    rng, alone = random.Random(0), captioner.alone()
    texts = {tuple(alone.thing(rng, 1)[0]) for _ in range(200)}
    assert len(texts) <= 8 * 3 and max(map(len, texts)) <= 6
    assert any(len(captioner.thing(rng, 1)[0]) > 6 for _ in range(50))


def test_a_short_training_steadies_prompts_that_name_nobody(tower: nn.Module, captioner: Captioner,
                                                            tmp_path: Path) -> None:
    text, table = copy.deepcopy(tower), tower.get_input_embeddings().weight.detach()
    steady.train_steady(tmp_path, captioner, text, steps=40)
    assert torch.equal(text.get_input_embeddings().weight, table)
    rows, ids = steady.Ahead(captioner, table).like_prefix(random.Random(5)), captioner.ids("a photo of bus")
    with torch.no_grad():
        plain = steady.encoded(tower, steady.row(table, table[:0], ids)[None])
        target, met = steady.unmoved(plain, [len(rows)])
        moved = steady.row(table, rows, ids)[None]
        before, after = (float((steady.encoded(t, moved) - target)[met].square().mean()) for t in (tower, text))
    assert after < 0.7 * before
    assert not any(p.requires_grad for p in text.parameters())


def test_a_build_teaches_the_tower_after_the_unet(tower: nn.Module, captioner: Captioner, tmp_path: Path) -> None:
    asked = []

    class Part(build.Build):
        text = (copy.deepcopy(tower), None, None)
        pairs = SimpleNamespace(captioner=captioner)

        @property
        def unet(self) -> None:
            asked.append("unet")

    made = Part(tmp_path, build.Lengths(steady=2))
    assert made.tower is Part.text[0] and asked == ["unet"]
    assert (tmp_path / "fit" / "steady.safetensors").exists()
