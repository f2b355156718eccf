"""Blending a null prefix and a learned one, and the file that comes out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from apl_core.errors import ConfigError, PrefixFileError
from apl_core.metadata import PrefixMetadata
from apl_core.prefix import AnonymizationPrompt, load_prefix, save_prefix
from apl_core.strength import blend


def prompt(seed: int, m: int = 3, **changes) -> AnonymizationPrompt:
    vectors = torch.randn(m, 768, generator=torch.Generator().manual_seed(seed))
    meta = PrefixMetadata(title=f"p{seed}", family="sd1", alpha=1.0, base_model="m", base_model_sha256="ab",
                          scores={"x": 1}).with_fields(**changes)
    return AnonymizationPrompt("sd1", {"emb_params": vectors}, meta)


@pytest.mark.parametrize("s", [0, 0.25, 1, 1.5])
def test_a_straight_line_in_numpy(s: float, tmp_path: Path) -> None:
    null, learned = prompt(1), prompt(2)
    mixed = blend(null, learned, s)
    a, b = null.vectors().double().numpy(), learned.vectors().double().numpy()
    assert np.allclose(mixed.vectors().numpy(), a + s * (b - a), atol=1e-5)
    save_prefix(mixed, tmp_path / "m.safetensors")
    again = load_prefix(tmp_path / "m.safetensors", enforce=True)
    assert torch.equal(again.vectors(), mixed.vectors())
    assert not again.meta.scores and again.meta.base_model_sha256 == "ab" and again.name == f"p2 at {s:g}"
    assert float(again.meta.extra["apl.strength"]) == s and again.meta.extra["apl.null_sha256"] == null.content_hash


def test_the_ends_are_exact() -> None:
    null, learned = prompt(1), prompt(2)
    assert blend(null, learned, 0).content_hash == null.content_hash
    assert blend(null, learned, 1).content_hash == learned.content_hash


@pytest.mark.parametrize("s", [-0.1, 2.1, float("nan"), float("inf"), True, "0.5", None])
def test_a_wrong_strength_is_named(s: object) -> None:
    with pytest.raises(ConfigError, match="strength is") as caught:
        blend(prompt(1), prompt(2), s)  # type: ignore[arg-type]
    assert caught.value.field == "strength"


@pytest.mark.parametrize("other", [
    lambda: prompt(1, m=4), lambda: prompt(1, placement="suffix"), lambda: prompt(1, base_model_sha256="cd"),
])
def test_prefixes_that_do_not_belong_together(other) -> None:
    with pytest.raises(PrefixFileError, match="null prefix's"):
        blend(other(), prompt(2), 0.5)
