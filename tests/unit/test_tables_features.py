"""Features of pictures: the layer ahead of a model's heads, and clean-fid's Inception with a stub of its shape."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from apl_core.errors import ScoreError
from apl_train import shipped
from apl_train.scoring.attributes import AttributeReader
from apl_train.tables import features

HAS_ONNX = all(importlib.util.find_spec(m) for m in ("onnx", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="onnx and onnxruntime are not installed")
needs_cleanfid = pytest.mark.skipif(importlib.util.find_spec("cleanfid") is None, reason="clean-fid is not installed")


def torchvision_fits() -> bool:
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        return False
    return True


def pictures(n: int, edge: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, edge, edge, 3), np.uint8)


@needs_onnx
def test_features_times_the_heads_are_the_models_own_logits() -> None:
    """The shipped attribute model: numpy takes its last step, and every class comes out as the model says it."""
    import onnx
    from onnx import numpy_helper

    path = shipped.locate("attributes", "miniature")
    graph = onnx.load(str(path.with_name("attributes.onnx"))).graph
    known = {t.name: numpy_helper.to_array(t).astype(np.float32) for t in graph.initializer}
    for node in graph.node:  # weights that are stored as halves
        if node.op_type == "Cast" and node.input[0] in known:
            known[node.output[0]] = known[node.input[0]]
    images = pictures(6, 128, 1)
    found = features.Penultimate(path).features(images)
    reader = AttributeReader(path)
    said = reader.read(images)
    for node in [n for n in graph.node if n.op_type == "Gemm"]:
        weight, bias = known[node.input[1]], known[node.input[2]]
        classes = (found @ weight.T + bias).argmax(1)
        head = node.output[0]
        assert [reader.heads[head][c] for c in classes] == [row[head] for row in said]
    assert found.shape[0] == 6 and found.dtype == np.float32 and found.std() > 0


@needs_onnx
@pytest.mark.parametrize(("build", "says"), [
    ("two trunks", "2 layers"), ("no linear head", "not made by a linear layer")])
def test_models_without_one_trunk_are_refused(build: str, says: str) -> None:
    from onnx import TensorProto, helper

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    outs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 2]) for n in ("a", "b")]
    w = helper.make_tensor("w", TensorProto.FLOAT, [4, 2], [0.0] * 8)
    if build == "two trunks":
        nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("MatMul", ["x", "w"], ["a"]),
                 helper.make_node("MatMul", ["r", "w"], ["b"])]
    else:
        nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Relu", ["m"], ["a"]),
                 helper.make_node("MatMul", ["x", "w"], ["b"])]
    with pytest.raises(ScoreError, match=says):
        features.last_layer(helper.make_graph(nodes, "g", [x], outs, [w]))


def test_average_cosine_by_hand() -> None:
    rows = np.array([[3.0, 4.0], [0.0, 2.0], [-1.0, 0.0], [0.0, 0.0]])
    found = features.average_cosine(rows, np.array([0.0, 5.0]))
    assert found[:3] == pytest.approx([0.8, 1.0, 0.0]) and np.isnan(found[3])


class _Layers(torch.nn.Module):
    """Stands for Inception's trunk: 299 px, already normalised, to 2048 features."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = torch.nn.functional.adaptive_avg_pool2d(x, (26, 26)).flatten(1)
        return torch.cat([pooled, torch.zeros(len(x), 2048 - pooled.shape[1])], 1)


class _Stub(torch.nn.Module):
    """The TorchScript file's contract: `.layers`, and the whole with `return_features`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = _Layers()

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return self.layers(torch.nn.functional.interpolate(x, (299, 299)) / 128 - 1)


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / features.INCEPTION
    torch.jit.script(_Stub()).save(str(path))
    return path


@needs_cleanfid
def test_inception_takes_clean_fids_resizing_and_range(stub: Path) -> None:
    """By hand: Pillow's bicubic in float, clipped to 0..255, (x - 128) / 128."""
    images = pictures(3)
    found = features.Inception(stub).features(images)
    assert found.shape == (3, 2048) and found.dtype == np.float32
    for image, row in zip(images, found, strict=True):
        channels = [np.asarray(Image.fromarray(image[..., c].astype(np.float32)).resize((299, 299), Image.BICUBIC))
                    for c in range(3)]
        x = torch.from_numpy(np.stack(channels).clip(0, 255))[None]
        assert np.allclose(_Layers()((x - 128) / 128)[0].numpy(), row, atol=1e-5)


@needs_cleanfid
def test_the_other_mode_lets_the_network_resize(stub: Path) -> None:
    images = pictures(2)
    found = features.Inception(stub, "legacy_tensorflow").features(images)
    want = _Stub()(torch.from_numpy(images).permute(0, 3, 1, 2).float()).numpy()
    assert np.allclose(found, want, atol=1e-5)


@needs_cleanfid
@pytest.mark.skipif(not torchvision_fits(), reason="no torchvision that belongs to this torch")
def test_a_folder_through_clean_fid_gives_what_arrays_give(stub: Path, tmp_path: Path) -> None:
    """clean-fid's own way from files to a distance, with the same extractor, against ours from arrays."""
    from cleanfid import fid as theirs
    from cleanfid.inception_torchscript import InceptionV3W

    from apl_train.tables import frechet

    sets = [pictures(12, 48, seed) for seed in (1, 2)]
    for name, images in zip("ab", sets, strict=True):
        (tmp_path / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / name / f"{i:02d}.png")
    model = InceptionV3W(str(stub.parent), download=False)
    want = theirs.compute_fid(str(tmp_path / "a"), str(tmp_path / "b"), mode="clean", num_workers=0, batch_size=4,
                              device=torch.device("cpu"), custom_feat_extractor=model, verbose=False,
                              use_dataparallel=False)
    inception = features.Inception(stub)
    ours = frechet.fid(*(inception.features(images) for images in sets))
    assert ours == pytest.approx(float(want), rel=1e-4)


@pytest.mark.parametrize(("name", "mode", "says"), [
    ("missing/" + features.INCEPTION, "clean", "is not a file"), ("other.pt", "clean", "is not a file"),
    (features.INCEPTION, "legacy_pytorch", "mode is 'legacy_pytorch'")])
def test_what_inception_refuses(tmp_path: Path, name: str, mode: str, says: str) -> None:
    (tmp_path / features.INCEPTION).write_bytes(b"")
    (tmp_path / "other.pt").write_bytes(b"")
    with pytest.raises(ScoreError, match=says):
        features.Inception(tmp_path / name, mode)
