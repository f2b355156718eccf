"""YuNet + SFace through OpenCV's own classes, on tiny networks made here with the same inputs and outputs."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest

from apl_core import identity
from apl_core.errors import ScoreError

cv2 = pytest.importorskip("cv2")
onnx = pytest.importorskip("onnx")
if not hasattr(cv2, "FaceRecognizerSF"):
    pytest.skip("this OpenCV has no FaceRecognizerSF", allow_module_level=True)

EDGE = 320
POINTS = np.array([[130, 130], [190, 130], [160, 165], [135, 195], [185, 195]], np.float32)
WEIGHTS = np.random.default_rng(2).normal(size=(147, 128)).astype(np.float32)


def floats(name: str, *shape: int) -> object:
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(shape))


def save(path: Path, nodes: list, inputs: list, outputs: list, constants: dict[str, np.ndarray]) -> None:
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs, tensors)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 11)], ir_version=6), str(path))


def yunet(path: Path, boxes: list[tuple[float, float, float, float, float]], dark: float = 300.0) -> None:
    """Constant (x, y, width, height, score) with `POINTS`, as long as the picture's mean is below `dark`."""
    node, nodes, outputs = onnx.helper.make_node, [], []
    constants = {"k": np.array([[[[-1.0]]]], np.float32), "b": np.array([[[[dark]]]], np.float32),
                 "shape": np.array([1, 1, 1], np.int64), "ones": np.full((1, 3, 1, 1), 1 / 3, np.float32)}
    # the sigmoid of dark - mean, as good as 0 or 1
    nodes += [node("GlobalAveragePool", ["input"], ["p"]), node("Conv", ["p", "ones"], ["m"]),
              node("Mul", ["m", "k"], ["neg"]), node("Add", ["neg", "b"], ["d"]), node("Sigmoid", ["d"], ["g4"]),
              node("Reshape", ["g4", "shape"], ["gate"])]
    for stride in (8, 16, 32):
        side = EDGE // stride
        score, box, kps = (np.zeros((1, side * side, w), np.float32) for w in (1, 4, 10))
        if stride == 32:
            for i, (x, y, w, h, s) in enumerate(boxes):
                row, column = 5, 3 + i
                cell = row * side + column
                score[0, cell] = s
                box[0, cell] = ((x + w / 2) / 32 - column, (y + h / 2) / 32 - row, math.log(w / 32), math.log(h / 32))
                kps[0, cell] = (POINTS / 32 - [column, row]).reshape(-1)
        for name, value in (("cls", score), ("obj", score), ("bbox", box), ("kps", kps)):
            constants[f"c_{name}_{stride}"] = value
    for name, width in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10)):
        for stride in (8, 16, 32):
            nodes.append(node("Mul", [f"c_{name}_{stride}", "gate"], [f"{name}_{stride}"]))
            outputs.append(floats(f"{name}_{stride}", 1, (EDGE // stride) ** 2, width))
    save(path, nodes, [floats("input", 1, 3, EDGE, EDGE)], outputs, constants)


def sface(path: Path) -> None:
    """[1, 3, 112, 112] -> means of 16 x 16 blocks -> 128 numbers."""
    node = onnx.helper.make_node
    save(path, [node("AveragePool", ["data"], ["p"], kernel_shape=[16, 16], strides=[16, 16]),
                node("Flatten", ["p"], ["f"]), node("MatMul", ["f", "w"], ["fc1"])],
         [floats("data", 1, 3, 112, 112)], [floats("fc1", 1, 128)], {"w": WEIGHTS})


def models(root: Path, boxes: list, dark: float = 300.0) -> Path:
    folder = root / "models" / "sface"
    folder.mkdir(parents=True)
    yunet(folder / "face_detection_yunet_2023mar.onnx", boxes, dark)
    sface(folder / "face_recognition_sface_2021dec.onnx")
    return folder


def picture(edge: int = EDGE, low: int = 0) -> np.ndarray:
    return np.random.default_rng(1).integers(low, 256, (edge, edge, 3), dtype=np.uint8)


def by_hand(image: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Similarity transform to SFace's five points, block means, projection: numpy and one warp."""
    target = np.array([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655],
                       [70.7299, 92.2041]])
    a = np.concatenate([np.column_stack([points[:, 0], -points[:, 1], np.ones(5), np.zeros(5)]),
                        np.column_stack([points[:, 1], points[:, 0], np.zeros(5), np.ones(5)])])
    c, s, tx, ty = np.linalg.lstsq(a, np.concatenate([target[:, 0], target[:, 1]]), rcond=None)[0]
    crop = cv2.warpAffine(image, np.array([[c, -s, tx], [s, c, ty]]), (112, 112))
    means = crop.astype(np.float64).reshape(7, 16, 7, 16, 3).mean(axis=(1, 3)).transpose(2, 0, 1).reshape(-1)
    y = means @ WEIGHTS
    return y / np.linalg.norm(y)


def test_faces_embeddings_and_order(tmp_path: Path) -> None:
    folder = models(tmp_path, [(140, 140, 40, 40, 0.9), (100, 90, 120, 140, 0.8)])
    embedder = identity.load_embedder("sface", tmp_path, det_size=EDGE)
    assert isinstance(embedder, identity.FaceEmbedder)
    file = folder / "face_recognition_sface_2021dec.onnx"
    assert embedder.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert embedder.settings["det_size"] == EDGE
    image = picture()
    faces = embedder.faces(image)
    assert [f.box for f in faces] == [pytest.approx((100, 90, 220, 230), abs=0.1),
                                      pytest.approx((140, 140, 180, 180), abs=0.1)]
    assert [f.score for f in faces] == pytest.approx([0.8, 0.9], abs=1e-3)
    assert faces[0].embedding.shape == (128,)
    # `alignCrop` solves for the transform by another method (with an SVD): equal up to the last bits of a warp
    assert float(faces[0].embedding @ by_hand(image, POINTS)) > 0.9995
    assert faces[0].embedding == pytest.approx(embedder.faces_of([image])[0][0].embedding)


def test_boxes_of_a_larger_picture_are_in_its_own_pixels(tmp_path: Path) -> None:
    models(tmp_path, [(100, 90, 120, 140, 0.8)])
    embedder = identity.load_embedder("sface", tmp_path, det_size=EDGE)
    assert embedder.faces(picture(640))[0].box == pytest.approx((200, 180, 440, 460), abs=0.2)


def test_a_close_up_is_tried_again_with_a_border(tmp_path: Path) -> None:
    models(tmp_path, [(80, 80, 160, 160, 0.9)], dark=100.0)  # found only where much of the picture is black
    embedder = identity.load_embedder("sface", tmp_path, det_size=EDGE)
    found = embedder.faces(picture(EDGE, low=120))
    # 320 px with a border of 160 is 640, at half size 320: the middle half is the whole original picture
    assert [f.box for f in found] == [pytest.approx((0, 0, 320, 320), abs=0.5)]
    models(tmp_path / "none", [])
    assert identity.load_embedder("sface", tmp_path / "none", det_size=EDGE).faces(picture()) == []


def test_missing_and_damaged_files_name_licence_and_command(tmp_path: Path) -> None:
    with pytest.raises(ScoreError) as caught:
        identity.load_embedder("sface", tmp_path)
    for word in ("hf download opencv/face_detection_yunet", "hf download opencv/face_recognition_sface", "Apache-2.0",
                 "MIT", str(tmp_path)):
        assert word in caught.value.hint
    folder = models(tmp_path, [])
    (folder / "face_recognition_sface_2021dec.onnx").write_bytes(b"no model")
    with pytest.raises(ScoreError, match="cannot be loaded"):
        identity.load_embedder("sface", tmp_path)
