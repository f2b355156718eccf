"""The face embedders against onnxruntime run by hand on tiny models made here."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from apl_core import identity, onnx_models
from apl_core.errors import ScoreError

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("insightface")

WEIGHTS = np.random.default_rng(5).normal(size=(147, 16)).astype(np.float32)


def save(path: Path, nodes: list, inputs: list, outputs: list, constants: dict[str, np.ndarray]) -> None:
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs, tensors)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(path))


def floats(name: str, *shape: int | str) -> object:
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(shape))


def recogniser(path: Path, batch: int | str = "n", first: str = "pool") -> None:
    """[N, 3, 112, 112] -> means of 16 x 16 blocks -> 16 numbers."""
    node = onnx.helper.make_node
    save(path, [
        node("AveragePool", ["x"], ["p"], name=first, kernel_shape=[16, 16], strides=[16, 16]),
        node("Flatten", ["p"], ["f"], name="flat"),
        node("MatMul", ["f", "w"], ["y"], name="project"),
    ], [floats("x", batch, 3, 112, 112)], [floats("y", batch, 16)], {"w": WEIGHTS})


def presence(path: Path) -> None:
    """A face is a picture whose red is above the middle: logit = 10 * mean of red."""
    node = onnx.helper.make_node
    save(path, [
        node("GlobalAveragePool", ["x"], ["p"], name="pool"),
        node("Flatten", ["p"], ["f"], name="flat"),
        node("MatMul", ["f", "w"], ["y"], name="project"),
    ], [floats("x", "n", 3, 128, 128)], [floats("y", "n", 1)], {"w": np.array([[10], [0], [0]], np.float32)})


DETECTOR = {"kind": "still", "presence": "presence.onnx", "crop": [8, 8, 120, 120], "frame": 128, "threshold": 0.5}


def still(folder: Path, batch: int | str = "n", first: str = "pool", **changes: object) -> Path:
    recogniser(folder / "recogniser.onnx", batch, first)
    presence(folder / "presence.onnx")
    values = {"name": "tiny", "recogniser": "recogniser.onnx", "detector": dict(DETECTOR)}
    for key, value in changes.items():
        (values["detector"] if key in DETECTOR else values)[key] = value
    (folder / "recogniser.json").write_text(json.dumps(values))
    return folder / "recogniser.json"


def pictures(count: int, edge: int = 128, seed: int = 0) -> np.ndarray:
    images = np.random.default_rng(seed).integers(0, 256, (count, edge, edge, 3), dtype=np.uint8)
    images[..., 0] = images[..., 0] // 2 + 120  # enough red for a face
    return images


def by_hand(crops: np.ndarray) -> np.ndarray:
    """float [N, 16]: uint8 [N, 112, 112, 3] RGB -> (x - 127.5) / 127.5 -> block means -> projection, in numpy."""
    x = (crops.astype(np.float64) - 127.5) / 127.5
    means = x.reshape(len(x), 7, 16, 7, 16, 3).mean(axis=(2, 4)).transpose(0, 3, 1, 2).reshape(len(x), -1)
    y = means @ WEIGHTS
    return y / np.linalg.norm(y, axis=1, keepdims=True)


def test_still_embeddings_equal_numpy_and_onnxruntime(tmp_path: Path) -> None:
    embedder = identity.load_embedder(still(tmp_path))
    assert isinstance(embedder, identity.FaceEmbedder)
    images = pictures(3)
    images[1, ..., 0] = 0  # no face
    found = embedder.faces_of(images)
    assert [len(faces) for faces in found] == [1, 0, 1]
    crops = images[[0, 2], 8:120, 8:120]
    got = np.stack([found[0][0].embedding, found[2][0].embedding])
    assert got.dtype == np.float32
    assert got == pytest.approx(by_hand(crops), abs=1e-5)
    session = ort.InferenceSession(str(tmp_path / "recogniser.onnx"), providers=["CPUExecutionProvider"])
    x = ((crops.astype(np.float32) - 127.5) / 127.5).transpose(0, 3, 1, 2)
    raw = session.run(None, {"x": np.ascontiguousarray(x)})[0]
    assert got == pytest.approx(raw / np.linalg.norm(raw, axis=1, keepdims=True), abs=1e-5)
    assert found[0][0].box == (8, 8, 120, 120)
    logit = 10 * (images[0, ..., 0].astype(float) - 127.5).mean() / 127.5
    assert found[0][0].score == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-5)


def test_still_name_hash_and_folder(tmp_path: Path) -> None:
    path = still(tmp_path)
    embedder = identity.load_embedder(tmp_path)
    assert embedder.name == "tiny"
    assert embedder.sha256 == hashlib.sha256((tmp_path / "recogniser.onnx").read_bytes()).hexdigest()
    assert embedder.faces(pictures(1)[0])[0].embedding == pytest.approx(
        identity.load_embedder(path).faces(pictures(1)[0])[0].embedding)
    assert embedder.faces_of([]) == []


def test_many_pictures_equal_one_at_a_time(tmp_path: Path) -> None:
    embedder = identity.load_embedder(still(tmp_path))
    images = pictures(70)
    together = embedder.faces_of(images)
    for i in (0, 63, 64, 69):
        assert together[i][0].embedding == pytest.approx(embedder.faces(images[i])[0].embedding, abs=1e-5)


def test_a_recogniser_of_fixed_batch_works(tmp_path: Path) -> None:
    embedder = identity.load_embedder(still(tmp_path, batch=1))
    images = pictures(3)
    got = np.stack([faces[0].embedding for faces in embedder.faces_of(images)])
    assert got == pytest.approx(by_hand(images[:, 8:120, 8:120]), abs=1e-5)


def test_other_sizes_are_brought_to_the_frame(tmp_path: Path) -> None:
    embedder = identity.load_embedder(still(tmp_path))
    images = pictures(1)
    large = images[0].repeat(3, axis=0).repeat(3, axis=1)  # area averaging must give the small one back
    wide = np.concatenate([np.zeros((384, 64, 3), np.uint8), large, np.zeros((384, 64, 3), np.uint8)], axis=1)
    expected = by_hand(images[:, 8:120, 8:120])[0]
    for image, shift in ((large, 0), (wide, 64)):
        face = embedder.faces(image)[0]
        assert face.embedding == pytest.approx(expected, abs=1e-5)
        assert face.box == (24 + shift, 24, 360 + shift, 360)
    assert onnx_models.to_frame(pictures(1, 64)[0], 128).shape == (128, 128, 3)


@pytest.mark.parametrize("image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3))])
def test_other_arrays_are_refused(tmp_path: Path, image: np.ndarray) -> None:
    with pytest.raises(ScoreError) as caught:
        identity.load_embedder(still(tmp_path)).faces(image)
    assert caught.value.field == "image"


@pytest.mark.parametrize(("changes", "field"), [
    ({"recogniser": "../recogniser.onnx"}, "recogniser"),
    ({"recogniser": "sub/recogniser.onnx"}, "recogniser"),
    ({"recogniser": "..\\recogniser.onnx"}, "recogniser"),
    ({"recogniser": "/etc/hostname"}, "recogniser"),
    ({"recogniser": ".."}, "recogniser"),
    ({"recogniser": "c:x.onnx"}, "recogniser"),
    ({"recogniser": "x\0.onnx"}, "recogniser"),
    ({"recogniser": 3}, "recogniser"),
    ({"recogniser": "missing.onnx"}, "recogniser"),
    ({"presence": "missing.onnx"}, "presence"),
    ({"crop": [8, 8, 120, 129]}, "crop"),
    ({"crop": [8, 8, 120, 119]}, "crop"),
    ({"crop": [120, 8, 8, 120]}, "crop"),
    ({"crop": [8, 8, 120]}, "crop"),
    ({"crop": [8.5, 8, 120, 120]}, "crop"),
    ({"frame": 0}, "frame"),
    ({"frame": True}, "frame"),
    ({"threshold": 1.5}, "threshold"),
    ({"threshold": "high"}, "threshold"),
    ({"kind": "moving"}, "detector"),
    ({"detector": None}, "detector"),
    ({"name": 4}, "name"),
])
def test_wrong_fields_are_named(tmp_path: Path, changes: dict, field: str) -> None:
    path = still(tmp_path, **changes)
    with pytest.raises(ScoreError) as caught:
        identity.load_embedder(path)
    assert caught.value.field == field
    assert caught.value.hint


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    path = still(inside)
    recogniser(outside / "other.onnx")
    (inside / "recogniser.onnx").unlink()
    (inside / "recogniser.onnx").symlink_to(outside / "other.onnx")
    with pytest.raises(ScoreError, match="links out"):
        identity.load_embedder(path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = still(tmp_path)
    (tmp_path / "recogniser.onnx").write_bytes(b"not a model")
    with pytest.raises(ScoreError, match=r"recogniser\.onnx"):
        identity.load_embedder(path)
    path.write_text("[1]")
    with pytest.raises(ScoreError, match="no JSON object"):
        identity.load_embedder(path)
    path.write_text("{")
    with pytest.raises(ScoreError, match="not JSON"):
        identity.load_embedder(path)
    with pytest.raises(ScoreError, match="cannot be read"):
        identity.load_embedder(tmp_path / "none.json")


def test_weights_in_another_file_are_refused(tmp_path: Path) -> None:
    path = still(tmp_path)
    model = onnx.load(str(tmp_path / "recogniser.onnx"))
    onnx.save(model, str(tmp_path / "recogniser.onnx"), save_as_external_data=True, location="w.data", size_threshold=0)
    with pytest.raises(ScoreError, match="another file"):
        identity.load_embedder(path)


def test_a_model_that_insightface_would_feed_raw_pixels_is_refused(tmp_path: Path) -> None:
    path = still(tmp_path)
    model = onnx.load(str(tmp_path / "recogniser.onnx"))
    for node, name in zip(model.graph.node, ("Sub_0", "Mul_0", "rest"), strict=True):
        node.name = name
    onnx.save(model, str(tmp_path / "recogniser.onnx"))
    with pytest.raises(ScoreError, match="normalises its input itself"):
        identity.load_embedder(path)


def test_threads_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert onnx_models.session_options().intra_op_num_threads == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    import torch

    assert onnx_models.threads() == torch.get_num_threads()


def test_missing_library_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError("no", name=name)
    monkeypatch.setattr(onnx_models.importlib, "import_module", absent)
    with pytest.raises(ScoreError) as caught:
        identity.load_embedder("auraface")
    assert "pip install insightface" in caught.value.hint


# --- insightface model packs ----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "words"), [
    ("buffalo_l", ("insightface-cli model.download buffalo_l", "non-commercial")),
    ("auraface", ("hf download fal/AuraFace-v1", "Apache-2.0")),
    ("something", ("insightface-cli model.download something", "Check the licence")),
])
def test_a_missing_pack_names_command_and_licence(tmp_path: Path, name: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ScoreError) as caught:
        identity.load_embedder(name, tmp_path)
    for word in (*words, str(tmp_path)):
        assert word in caught.value.hint


@pytest.mark.parametrize("name", ["../evil", "a/b", "", "x" * 100])
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ScoreError):
        identity.load_embedder(name, tmp_path)


KPS = np.array([[240, 260], [400, 258], [322, 350], [255, 440], [390, 438]], np.float32)


def detector(path: Path, boxes: list[tuple[int, int, int, int, float]], least: int = 0) -> None:
    """An SCRFD-shaped model for 640 x 640: constant boxes and `KPS`, found only if the picture's border is black
    (least=1) or always (least=0). Outputs per stride 8, 16, 32: scores, boxes, keypoints in units of the stride."""
    node, constants, nodes, outputs = onnx.helper.make_node, {}, [], []
    for stride in (8, 16, 32):
        cells = (640 // stride) ** 2 * 2
        score, box, kps = np.zeros((cells, 1)), np.zeros((cells, 4)), np.zeros((cells, 10))
        if stride == 32:
            for i, (x0, y0, x1, y1, s) in enumerate(boxes):
                cell, cx, cy = (10 * 20 + 10 + i) * 2, (10 + i) * 32, 320
                score[cell] = s
                box[cell] = np.array([cx - x0, cy - y0, x1 - cx, y1 - cy]) / 32
                kps[cell] = ((KPS - [cx, cy]) / 32).reshape(-1)
        for kind, value in (("s", score), ("b", box), ("k", kps)):
            constants[f"{kind}{stride}"] = value.astype(np.float32)
    if least:  # the mean of the first row is -1 (after normalisation) only in a padded picture
        constants |= {"lo": np.array([0], np.int64), "hi": np.array([1], np.int64), "axis": np.array([2], np.int64),
                      "limit": np.array(-0.99, np.float32)}
        nodes += [node("Slice", ["x", "lo", "hi", "axis"], ["row"]), node("ReduceMean", ["row"], ["m"], keepdims=0),
                  node("Less", ["m", "limit"], ["dark"]),
                  node("Cast", ["dark"], ["gate"], to=onnx.TensorProto.FLOAT)]
    for kind, width in (("s", 1), ("b", 4), ("k", 10)):
        for stride in (8, 16, 32):
            name = f"{kind}{stride}"
            gated = least and kind == "s"
            nodes.append(node("Mul", [name, "gate"], [f"o{name}"]) if gated else node("Identity", [name], [f"o{name}"]))
            outputs.append(floats(f"o{name}", (640 // stride) ** 2 * 2, width))
    save(path, nodes, [floats("x", 1, 3, "h", "w")], outputs, constants)


def pack(root: Path, boxes: list, least: int = 0) -> None:
    folder = root / "models" / "tinypack"
    folder.mkdir(parents=True)
    detector(folder / "det.onnx", boxes, least)
    recogniser(folder / "rec.onnx", batch="n")


def test_pack_runs_through_insightface_and_sorts_by_size(tmp_path: Path) -> None:
    pack(tmp_path, [(300, 300, 360, 360, 0.9), (100, 120, 560, 540, 0.7)])
    embedder = identity.load_embedder("tinypack", tmp_path)
    assert embedder.sha256 == hashlib.sha256((tmp_path / "models/tinypack/rec.onnx").read_bytes()).hexdigest()
    image = pictures(1, 640)[0]
    faces = embedder.faces(image)
    assert [face.box for face in faces] == [pytest.approx((100, 120, 560, 540), abs=0.1),
                                            pytest.approx((300, 300, 360, 360), abs=0.1)]
    from insightface.utils import face_align

    crop = face_align.norm_crop(image, KPS)  # RGB in, RGB out
    assert faces[0].embedding == pytest.approx(by_hand(crop[None])[0], abs=2e-3)
    assert np.linalg.norm(faces[0].embedding) == pytest.approx(1, abs=1e-6)


def test_a_close_up_is_tried_again_with_a_border(tmp_path: Path) -> None:
    pack(tmp_path, [(160, 160, 480, 480, 0.8)], least=1)
    image = pictures(1, 320)[0]
    faces = identity.load_embedder("tinypack", tmp_path).faces_of([image])[0]
    # 320 px with a border of 160 on each side is 640: the box in the middle is the whole original picture
    assert [face.box for face in faces] == [pytest.approx((0, 0, 320, 320), abs=0.1)]


def test_no_face_is_an_empty_list(tmp_path: Path) -> None:
    pack(tmp_path, [])
    assert identity.load_embedder("tinypack", tmp_path).faces(pictures(1, 640)[0]) == []


def test_a_pack_without_detector_is_refused(tmp_path: Path) -> None:
    pack(tmp_path, [])
    (tmp_path / "models/tinypack/det.onnx").unlink()
    with pytest.raises(ScoreError, match="cannot be loaded"):
        identity.load_embedder("tinypack", tmp_path)


def test_pictures_side_by_side_equal_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    pack(tmp_path, [(300, 300, 360, 360, 0.9), (100, 120, 560, 540, 0.7)])
    embedder = identity.load_embedder("tinypack", tmp_path)
    images = list(pictures(7, 640, seed=9))
    together = embedder.faces_of(images)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    alone = [identity.load_embedder("tinypack", tmp_path).faces(image) for image in images]
    for a, b in zip(together, alone, strict=True):
        assert [face.box for face in a] == [face.box for face in b]
        assert np.stack([f.embedding for f in a]) == pytest.approx(np.stack([f.embedding for f in b]), abs=1e-6)


def test_the_detector_and_its_size_are_recorded(tmp_path: Path) -> None:
    pack(tmp_path, [])
    embedder = identity.load_embedder("tinypack", tmp_path, det_size=320, det_threshold=0.4)
    detector = hashlib.sha256((tmp_path / "models/tinypack/det.onnx").read_bytes()).hexdigest()
    assert embedder.settings == {"detector": detector, "det_size": 320, "det_threshold": 0.4}
    assert embedder._detector.input_sizes == [(320, 320)]  # never insightface's "Auto" of two sizes
