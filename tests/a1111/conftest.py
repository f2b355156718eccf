"""Hosts for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_host import Host, fake_host

from apl_core.metadata import PrefixMetadata
from apl_core.prefix import AnonymizationPrompt, save_prefix


def make_prefix(folder: Path, name: str = "test", *, seed: int = 0, placement: str = "prefix", family: str = "sd1",
                widths: dict[str, int] | None = None, count: int = 10) -> AnonymizationPrompt:
    """A prefix of random rows in a library's folder."""
    widths = widths or {"emb_params": 96}
    generator = torch.Generator().manual_seed(seed)
    tensors = {key: torch.randn(count, width, generator=generator) for key, width in widths.items()}
    prefix = AnonymizationPrompt(family, tensors, PrefixMetadata(title=name, placement=placement))
    folder.mkdir(parents=True, exist_ok=True)
    save_prefix(prefix, folder / f"{name}.safetensors")
    return prefix


@pytest.fixture(params=["a1111", "forge"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Host]:
    """A fake host of each shape with a prefix "test" and an SD1 model of width 96."""
    made = make_prefix(tmp_path / "prefixes")
    make_prefix(tmp_path / "prefixes", "test.step-400", seed=1)
    with fake_host(request.param, tmp_path) as running:
        running.prefix = made
        running.use(running.encoder())
        yield running
