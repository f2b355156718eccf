"""Memory is counted on shapes: against sums by hand, and against what the settings must change."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch
from torch import nn

from apl_core.errors import ConfigError, TrainingError
from apl_train import shipped
from apl_train.model.precision import chosen
from apl_train.training.config import TrainConfig, from_dict, preset
from apl_train.training.memory import Ledger, estimate
from apl_train.training.preflight import PeakMemory, own_memory

pytest.importorskip("diffusers")
KB = 1024


def test_the_ledger_counts_what_is_alive() -> None:
    with Ledger() as ledger:
        a = torch.empty(256, dtype=torch.float32, device="meta")  # 1 KiB
        b = a * 2
        c = b.view(16, 16)  # the same storage
        assert ledger.live == 2 * KB
        del a
        assert ledger.live == KB
        del b, c
        assert ledger.live == 0 and ledger.peak == 2 * KB


def test_a_training_step_keeps_what_backward_needs() -> None:
    """Three layers of tanh on [64, 256] float32: 64 KiB each, kept until backward has used them."""
    layers = nn.Sequential(*(nn.Tanh() for _ in range(3)))
    x = torch.empty(64, 256, device="meta", requires_grad=True)
    with Ledger() as ledger:
        layers(x).sum().backward()
    # three outputs, then gradients beside them: one alive at the entry of a layer, one at its way out
    assert 3 * 64 * KB <= ledger.peak <= 6 * 64 * KB
    with Ledger() as ledger, torch.no_grad():
        layers(x)
    assert ledger.peak == 2 * 64 * KB


@pytest.fixture(scope="module")
def single() -> dict[str, object]:
    source = shipped.locate("base_model", "miniature")
    return {name: estimate(source, TrainConfig(device="cpu", batch_size=8, **settings)) for name, settings in {
        "fp32": {}, "bf16": {"dtype": "bf16"}, "checkpointing": {"gradient_checkpointing": True},
        "offload": {"offload": "all"}}.items()}


def test_estimates_follow_the_settings(single) -> None:
    from apl_train.model.files import read_parts

    parts = read_parts(shipped.locate("base_model", "miniature"))
    sizes = [sum(p.numel() for p in m.parameters()) for m in (parts.unet, parts.vae, parts.text_encoder)]
    unet, vae, text = sizes
    buffers = sum(b.numel() * b.element_size() for b in parts.text_encoder.buffers())
    assert single["fp32"].weights - buffers == 4 * sum(sizes)
    assert single["bf16"].weights - buffers == 2 * (unet + vae) + 4 * text
    assert single["offload"].weights == 4 * unet
    steps = {name: found.train - found.weights for name, found in single.items()}
    assert 0.4 < steps["bf16"] / steps["fp32"] < 0.75 and steps["checkpointing"] < 0.9 * steps["fp32"]
    for found in single.values():
        assert found.peak == max(found.train, found.encode, found.sample) + found.overhead
        assert found.text().startswith("memory on cpu") and found.to_dict()["peak"] == found.peak


@pytest.mark.parametrize("name", ["sd15-paper", "sd15-8gb", "sd15-fast"])
def test_presets_are_settings(name: str) -> None:
    config = from_dict(preset(name))
    assert config.num_tokens == 10 and config.alpha == 1.0
    if name == "sd15-paper":  # sec. 4.1
        assert (config.steps, config.batch_size, config.learning_rate, config.schedule) == (20_000, 1, 1e-3, "constant")


def fresh_memory(size: int) -> mmap.mmap:
    """`size` bytes of zeros that nobody had before."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return mmap.mmap(-1, size, **private)


def test_peak_memory_sees_what_is_held_for_a_moment() -> None:
    before = own_memory()
    with PeakMemory(torch.device("cpu"), every=0.001) as peak:
        # mapped anew: an allocator may hand out memory that this process holds already
        block = np.frombuffer(fresh_memory(64 * 2**20), np.float32)
        for _ in range(200):
            block += 1
        del block
    assert before is not None and 50 * 2**20 < peak.bytes - before < 120 * 2**20


@pytest.mark.parametrize(("device", "dtype", "offload", "field"), [
    ("cpu", "fp16", "none", "dtype"), ("cpu", "fp8", "none", "dtype"), ("gpu", "fp32", "none", "device"),
    ("cpu", "fp32", "unet", "offload"), ("mps" if not torch.backends.mps.is_available() else "gpu", "fp32", "none",
                                         "device"),
])
def test_what_cannot_be_is_refused(device: str, dtype: str, offload: str, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        chosen(device, dtype, offload=offload)
    assert caught.value.field == field and caught.value.hint


def test_out_of_memory_says_what_to_change() -> None:
    from types import SimpleNamespace

    from apl_train.training.preflight import dry_run

    def predict(*_: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    backend = SimpleNamespace(
        unet=SimpleNamespace(config=SimpleNamespace(sample_size=8, in_channels=4)), device=torch.device("cpu"),
        text=SimpleNamespace(widths={"emb_params": 8}), encode=lambda *_: None, predict=predict)
    with pytest.raises(TrainingError, match="does not fit into the memory") as caught:
        dry_run(backend, TrainConfig())
    assert "sd15-8gb" in caught.value.hint
