"""What a prefix keeps on other models: ratios of drops, against numpy by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fakes import tiny_models as tiny

from apl_core.atomic import write_safetensors
from apl_train.miniworld.carried import SecondAlone, _shares, kept, nearest_tokens, table


def test_kept_is_the_ratio_of_mean_drops_and_its_interval_holds_it() -> None:
    rng = np.random.default_rng(0)
    off = 0.6 + 0.1 * rng.standard_normal(40)
    native, ours = off * 0.3, off * 0.4 + 0.02 * rng.standard_normal(40)
    value, interval = kept(off, ours, off, native)
    assert value == pytest.approx((off - ours).mean() / (off - native).mean())
    assert interval[0] < value < interval[1]
    picks = np.random.default_rng(0).integers(0, 40, size=(4000, 40))
    draws = [(off - ours)[p].mean() / (off - native)[p].mean() for p in picks]
    assert interval == pytest.approx(np.percentile(draws, (2.5, 97.5)).tolist())


def test_between_models_drops_are_shares_of_what_each_knew() -> None:
    value, _ = kept([0.8, 0.8, 0.8], [0.4, 0.4, 0.4], [0.4, 0.4, 0.4], [0.2, 0.2, 0.2], relative=True)
    assert value == pytest.approx(1.0)


def test_a_person_without_a_face_is_left_out_of_both_sides() -> None:
    value, _ = kept([0.8, 0.6, 0.9], [0.4, 0.3, math.nan], [0.8, 0.6, 0.9], [0.2, 0.1, 0.1])
    assert value == pytest.approx((0.4 + 0.3) / (0.6 + 0.5))
    assert math.isnan(kept([0.5], [0.1], [0.5], [0.1])[0])


def test_nearest_tokens_are_nearest_by_cosine_not_by_length() -> None:
    table = torch.tensor([[1.0, 0.0], [0.0, 10.0], [0.7, 0.7]])
    found = nearest_tokens({"clip_l": torch.tensor([[0.1, 0.9], [5.0, 4.0]])}, {"clip_l": table})
    assert torch.equal(found["clip_l"], torch.tensor([[0.0, 10.0], [0.7, 0.7]]))


def test_with_the_first_encoder_deaf_only_the_second_one_says_anything(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from apl_train.model.backend import Backend
    from apl_train.model.single_file_xl import sgm_config, to_sgm

    models = tiny.models_xl()
    tiny.write_tokenizer(tmp_path / "tokenizer")
    tiny.write_tokenizer(tmp_path / "tokenizer_2", pad_token="!")
    write_safetensors(tmp_path / "xl.safetensors", to_sgm(*models))
    (tmp_path / "xl.yaml").write_text(yaml.safe_dump(sgm_config(*models)), "utf-8")
    backend = Backend.load(tmp_path / "xl.safetensors")
    alone = SecondAlone(backend)
    g = torch.Generator().manual_seed(0)
    vectors = {key: torch.randn(3, width, generator=g) for key, width in backend.text.widths.items()}
    wide = backend.text.encoders["clip_l"].config.hidden_size
    for prompts in (["a cat", "photo of k"], ["abcdefgh " * 10]):  # the last one takes two chunks
        found, whole = alone.encode(prompts, vectors), backend.encode(prompts, vectors)
        empty = backend.encode([""] * len(prompts), chunks=whole.states.shape[1] // 77).states
        assert torch.equal(found.states[..., :wide], empty[..., :wide])
        assert torch.equal(found.states[..., wide:], whole.states[..., wide:])
        assert torch.equal(found.pooled, whole.pooled)
    other = vectors | {"clip_l": vectors["clip_l"] + 1}
    assert torch.equal(alone.encode(["a cat"], other).states, alone.encode(["a cat"], vectors).states)
    pictures = [b.sample(["a cat"], [1], vectors=vectors, steps=2).latents for b in (alone, backend)]
    assert not torch.allclose(*pictures), "it is the deaf one that samples"
    assert alone.sha256 != backend.sha256


def test_a_prefix_under_which_no_face_is_drawn_has_no_share_and_still_has_a_line() -> None:
    def row(*by_person: float | None) -> dict:
        mean = None if None in by_person else sum(by_person) / len(by_person)
        return {"id_acc_mean": mean, "id_acc_max": mean, "attr_acc": mean, "ci95": [mean, mean], "by_person": by_person,
                "face_rate": 0.0 if mean is None else 1.0}

    rows = _shares({"off": row(0.6, 0.8), "native": row(0.2, 0.2), "ridge": row(None, None), "ptfer": row(0.3, 0.4)})
    assert rows["ridge"]["kept"] is None and rows["ridge"]["kept_ci95"] is None
    assert rows["ptfer"]["kept"] == pytest.approx((0.3 + 0.4) / (0.4 + 0.6))
    lines = table({"second_alone": rows}).splitlines()
    assert lines[3].split() == ["second", "encoder", "alone,", "ridge", "0.000"]
    assert "0.70" in lines[4]
