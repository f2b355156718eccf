"""The attribute reader against onnxruntime by hand, and Attr-ACC against figures worked out by hand."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

from apl_core.errors import ScoreError
from apl_train.scoring.attributes import AttributeReader, attr_acc

HEADS = {"gender": ["female", "male"], "hair": ["short", "curly", "long"]}
WEIGHTS = {"gender": np.array([[3, 0], [0, 3], [1, 1]], np.float32), "hair": np.eye(3, dtype=np.float32)}


def model(folder: Path, **changes: object) -> Path:
    """Means of the three colours -> logits of each head."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    make, kind = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [make.make_node("GlobalAveragePool", ["x"], ["p"]), make.make_node("Flatten", ["p"], ["f"])]
    nodes += [make.make_node("MatMul", ["f", f"w_{head}"], [head]) for head in HEADS]
    graph = make.make_graph(
        nodes, "g", [make.make_tensor_value_info("x", kind, ["n", 3, 32, 32])],
        [make.make_tensor_value_info(head, kind, ["n", len(HEADS[head])]) for head in reversed(HEADS)],
        [onnx.numpy_helper.from_array(WEIGHTS[head], f"w_{head}") for head in HEADS])
    made = make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8)
    onnx.save(made, folder / "attributes.onnx")
    values = {"model": "attributes.onnx", "frame": 32, "heads": HEADS} | changes
    (folder / "attributes.json").write_text(json.dumps(values))
    return folder / "attributes.json"


def test_classes_equal_those_by_hand(tmp_path: Path) -> None:
    reader = AttributeReader(model(tmp_path))
    images = np.random.default_rng(3).integers(0, 256, (70, 32, 32, 3), dtype=np.uint8)
    images = (images * np.random.default_rng(4).uniform(0, 1, (70, 1, 1, 3))).astype(np.uint8)
    means = ((images.astype(np.float64) - 127.5) / 127.5).mean(axis=(1, 2))
    expected = [{head: HEADS[head][int((m @ WEIGHTS[head]).argmax())] for head in HEADS} for m in means]
    assert reader.read(images) == expected
    assert len({tuple(sorted(e.items())) for e in expected}) > 2  # the pictures do differ
    assert reader.read(list(images.repeat(2, 1).repeat(2, 2))) == expected
    assert reader.read([]) == []
    assert reader.sha256 == hashlib.sha256((tmp_path / "attributes.onnx").read_bytes()).hexdigest()


@pytest.mark.parametrize(("changes", "field"), [
    ({"heads": {"gender": ["female"]}}, "heads.gender"),
    ({"heads": {"gender": ["a", "a"]}}, "heads.gender"),
    ({"heads": {"gender": ["a", "b", "c"]}}, "heads"),
    ({"heads": {"glasses": ["none", "some"]}}, "heads"),
    ({"heads": {}}, "heads"),
    ({"frame": "32"}, "frame"),
    ({"model": "../attributes.onnx"}, "model"),
])
def test_wrong_fields_are_named(tmp_path: Path, changes: dict, field: str) -> None:
    with pytest.raises(ScoreError) as caught:
        AttributeReader(model(tmp_path, **changes))
    assert caught.value.field == field


def test_a_frame_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    reader = AttributeReader(model(tmp_path, frame=16))
    with pytest.raises(ScoreError, match="16 x 16"):
        reader.read(np.zeros((1, 16, 16, 3), np.uint8))


def test_attr_acc_by_hand() -> None:
    truth = [{"gender": "female", "hair": "long"}] * 4
    said = [{"gender": "female", "hair": "long"}, {"gender": "male", "hair": "long"}, None,
            {"gender": "male", "hair": "x"}]
    assert attr_acc(said, truth) == pytest.approx((1 + 0.5 + 0) / 3)


def test_attr_acc_skips_heads_nobody_knows() -> None:
    said = [{"gender": "male", "hair": "long"}, {"gender": "male"}]
    # the second picture has no head to compare
    assert attr_acc(said, [{"gender": "male", "glasses": "none"}, {"hair": "long"}]) == 1
    assert math.isnan(attr_acc([None], [{"gender": "male"}]))
    assert math.isnan(attr_acc([], []))
    with pytest.raises(ScoreError):
        attr_acc([None], [])
