"""What ships as ONNX is half as large and says what torch says; pictures pack to the same bytes."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from apl_core.errors import ModelError
from apl_train.miniworld import tokens
from apl_train.miniworld.export import _Named, write_onnx
from apl_train.miniworld.picture_tower import write_clip
from apl_train.miniworld.presence import Looker
from apl_train.miniworld.recogniser import Recogniser, Shape
from apl_train.miniworld.set_files import write_pictures, write_table
from apl_train.miniworld.text_tower import Head, Look

HEADS = {"gender": 2, "race": 4}


def livened(module: nn.Module) -> nn.Module:
    """Normalisation away from its neat start, so that a mixed-up one shows; in eval mode."""
    g = torch.Generator().manual_seed(2)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1, generator=g)
            part.running_var.uniform_(0.5, 1.5, generator=g)
    return module.eval().requires_grad_(False)


def looker() -> tuple[nn.Module, int, list[str]]:
    torch.manual_seed(0)
    return _Named(livened(Looker(HEADS, (16, 24, 32, 48, 64))), list(HEADS)), 128, list(HEADS)


def recogniser() -> tuple[nn.Module, int, list[str]]:
    torch.manual_seed(1)
    model = Recogniser(Shape("tiny", (16, 24, 32, 48), 1, 0))
    model.blind = torch.eye(128) - torch.full((128, 128), 1 / 128)
    return livened(model), 112, ["embedding"]


@pytest.mark.parametrize("make", [looker, recogniser])
def test_onnx_says_what_torch_says(make, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    module, edge, outputs = make()
    path = tmp_path / "model.onnx"
    write_onnx(path, module, edge, outputs)
    session = runtime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    assert [o.name for o in session.get_outputs()] == outputs
    (entry,) = session.get_inputs()
    assert entry.name == "input" and entry.type == "tensor(float)" and entry.shape[1:] == [3, edge, edge]
    for n in (1, 3):
        x = torch.rand(n, 3, edge, edge, generator=torch.Generator().manual_seed(n)) * 2 - 1
        expected = module(x)
        for found, wanted in zip(session.run(None, {"input": x.numpy()}),
                                 expected if isinstance(expected, tuple) else (expected,), strict=True):
            assert found.dtype == np.float32 and found.shape == tuple(wanted.shape)
            assert np.abs(found - wanted.numpy()).max() < 2e-3 * max(1.0, float(wanted.abs().max()))
            assert wanted.std() > 1e-3
    whole = 4 * sum(p.numel() for p in [*module.parameters(), *module.buffers()])
    assert 0.45 * whole < path.stat().st_size < 0.6 * whole


def test_only_large_weights_are_halved(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    module, edge, outputs = looker()
    write_onnx(tmp_path / "model.onnx", module, edge, outputs)
    graph = onnx.load(tmp_path / "model.onnx").graph
    for tensor in graph.initializer:
        size = int(np.prod(tensor.dims))
        if tensor.data_type == onnx.TensorProto.FLOAT16:
            assert tensor.name.endswith(".half") and size > 256
        elif tensor.data_type == onnx.TensorProto.FLOAT:
            assert size <= 256
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)


def test_the_clip_in_bytes_says_what_torch_says(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(3)
    look, head = livened(Look()), Head().eval().requires_grad_(False)
    write_clip(tmp_path, look, head)
    states = torch.randn(3, head.project.in_features, 1, 1, generator=torch.Generator().manual_seed(4))
    pictures = torch.rand(3, 3, 128, 128, generator=torch.Generator().manual_seed(5)) * 2 - 1
    for name, given, wanted in (("clip", pictures, look(pictures)),
                                ("clip_text", states, head.project(states.flatten(1)))):
        session = runtime.InferenceSession((tmp_path / f"{name}.onnx").read_bytes(),
                                           providers=["CPUExecutionProvider"])
        (found,) = session.run(["embedding"], {"input": given.numpy()})
        assert found.shape == tuple(wanted.shape)
        cosine = torch.nn.functional.cosine_similarity(torch.from_numpy(found), wanted)
        assert float(cosine.min()) > 0.999


def test_the_vocabulary_is_the_shipped_one_or_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens.provide_tokenizer(tmp_path / "copied")
    for name in tokens.FILES:
        assert (tmp_path / "copied" / name).read_bytes() == (tokens.SHIPPED / name).read_bytes()
    if importlib.util.find_spec("open_clip") is not None:
        tokens.provide_tokenizer(tmp_path / "made", shipped=tmp_path / "gone")
        for name in tokens.FILES:
            made, copied = ((tmp_path / where / name).read_text("utf-8") for where in ("made", "copied"))
            assert made == copied if name == "merges.txt" else json.loads(made) == json.loads(copied)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="vocabulary") as error:
        tokens.provide_tokenizer(tmp_path / "none", shipped=tmp_path / "gone")
    assert "--no-deps open-clip-torch" in error.value.hint and not (tmp_path / "none").exists()


def smooth(seed: int) -> np.ndarray:
    """uint8 [24, 32, 3]; a slope, which WebP keeps well."""
    y, x = np.mgrid[:24, :32]
    return np.stack([4 * y + seed, 4 * x, 3 * (x + y)], -1).astype(np.uint8)


def test_the_same_pictures_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [("Ada Quill/0.webp", smooth(0)), ("b.webp", smooth(40))]
    write_pictures(tmp_path / "a.zip", iter(pictures), 90)
    monkeypatch.setattr("time.time", lambda: 2e9)
    write_pictures(tmp_path / "b.zip", pictures, 90)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.namelist() == [name for name, _ in pictures]
        for info, (_, picture) in zip(archive.infolist(), pictures, strict=True):
            assert info.compress_type == zipfile.ZIP_STORED  # WebP is packed already
            with Image.open(BytesIO(archive.read(info))) as found:
                assert found.format == "WEBP"
                assert np.abs(np.asarray(found).astype(int) - picture).mean() < 6


def test_tables_are_quoted_where_needed(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", ("name", "text"), [("Ada", 'a, b and "c"'), ("Ödön", "")])
    assert (tmp_path / "t.csv").read_bytes().decode("utf-8") == 'name,text\nAda,"a, b and ""c"""\nÖdön,\n'
