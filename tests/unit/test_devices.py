"""What lies on which device; torch's meta device stands for the one that is not the CPU: what mixes the two raises."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes import tiny_models as tiny

pytest.importorskip("diffusers")

from apl_core.errors import TrainingError
from apl_train.datasets.dataset import read_dataset
from apl_train.model.backend import Backend
from apl_train.model.files import read_parts
from apl_train.processes import Processes
from apl_train.training.bank import frozen_predictions
from apl_train.training.config import TrainConfig
from apl_train.training.samples import TrainingSet
from apl_train.training.trainer import Trainer, initial_vectors


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Backend, TrainingSet]:
    """A model whose UNet alone is elsewhere, and a data set on the CPU."""
    root = tmp_path_factory.mktemp("world")
    file = tiny.write_checkpoint(root)
    s_id = tiny.write_set(root / "id", [("ab", "photo of ab", "a man", "id"), ("cd", "photo of cd", "a lady", "id")])
    s_reg = tiny.write_set(root / "reg", [("", "a tree", "", "nonface"), ("", "a man", "", "face")])
    data = TrainingSet(Backend(read_parts(file)), read_dataset(s_id, expect="id"), read_dataset(s_reg, expect="reg"),
                       root / "cache")
    return Backend(read_parts(file), device="meta", offload="all"), data


def test_mixing_the_devices_raises(world: tuple[Backend, TrainingSet]) -> None:
    """Else nothing here would prove anything."""
    backend, data = world
    with pytest.raises((RuntimeError, NotImplementedError)):
        backend.unet(data.latents[[0]], torch.tensor([5]), encoder_hidden_states=backend.encode(["a"]).states)


def test_frozen_predictions_are_made_where_the_model_is(world: tuple[Backend, TrainingSet]) -> None:
    backend, data = world
    rows, t = torch.tensor([0, 1, 2, 3]), torch.tensor([5, 500, 7, 9])
    first, second = frozen_predictions(backend, data, rows, t, data.latents[rows])
    assert {first.device.type, second.device.type} == {"meta"}
    assert first.shape == second.shape == data.latents[rows].shape and not first.requires_grad


def test_a_step_brings_its_parts_together_on_one_device(
    world: tuple[Backend, TrainingSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, torch.Tensor] = {}

    def together(_self: Trainer, l_id: torch.Tensor, l_reg: torch.Tensor, loss: torch.Tensor) -> dict[str, Any]:
        seen.update(l_id=l_id, l_reg=l_reg, loss=loss)
        return {"loss": float("nan")}  # ends the step: there are no numbers on the meta device

    monkeypatch.setattr(Trainer, "_together", together)
    monkeypatch.setattr(torch, "isfinite", lambda _loss: False)
    config = TrainConfig(num_tokens=3, batch_size=4, steps=6)
    trainer = Trainer(*world, config, tmp_path)
    with pytest.raises(TrainingError, match="The loss is nan"):
        trainer.one_step()
    assert {value.device.type for value in seen.values()} == {"meta"}
    assert len(seen["l_id"]) + len(seen["l_reg"]) == 4


def test_a_prefix_on_the_cpu_enters_an_encoder_elsewhere(tmp_path: Path) -> None:
    backend = Backend(read_parts(tiny.write_checkpoint(tmp_path)), device="meta")
    vectors = {"emb_params": torch.zeros(3, 32, requires_grad=True)}
    states = backend.encode(["a man", "a b c d e"], vectors).states
    assert states.device.type == "meta" and states.requires_grad


@pytest.mark.parametrize("init", ["vocabulary", "text"])
def test_the_prefix_is_learned_on_the_cpu(init: str) -> None:
    """State files, sums over processes and Adam's moments are there: all of them would meet a prefix elsewhere."""
    table = torch.empty(49408, 32, device="meta")
    text = SimpleNamespace(tokenize=lambda _text: [600, 700], widths={"emb_params": 32},
                           embedding_table=lambda _key: table)
    with pytest.raises(NotImplementedError, match="out of meta tensor"):  # a copy to the CPU is asked for
        initial_vectors(SimpleNamespace(text=text), TrainConfig(init=init, num_tokens=3))


def test_processes_of_one_machine_take_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    process = Processes()
    process.count = 4
    for available in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        found = []
        for process.local_index in range(4):
            found.append(process.own_device())
        assert found == (["cuda:0", "cuda:1", "cuda:0", "cuda:1"] if available else [None] * 4)
    process.count = 1
    assert process.own_device() is None
