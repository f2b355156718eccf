"""dlib, the one recogniser of photographs whose weights come with a package, on the six-face photo in insightface's.

The known pairs: six people stand side by side in one photo, so none of its 15 pairs is one person; and a mirrored,
reduced and darkened copy shows the same six, so each face there is one person with its original. The photo is read
from the installed package and never stored. dlib's own example code is the reference for every feature.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from apl_core import identity
from apl_core.errors import ScoreError
from apl_core.recognisers import customary_threshold

NEEDS = ("dlib", "face_recognition_models", "insightface")
missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
photographs = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}; "
                                                       "pip install dlib-bin face_recognition_models insightface")


def photo() -> np.ndarray:
    folder = Path(importlib.util.find_spec("insightface").submodule_search_locations[0])
    return np.array(Image.open(folder / "data" / "images" / "t1.jpg").convert("RGB"))


def copy_of(image: np.ndarray) -> np.ndarray:
    """Mirrored, at 3/4 of the size, and a fifth darker: other pixels everywhere, the same six people."""
    height, width = image.shape[:2]
    small = Image.fromarray(image).resize((width * 3 // 4, height * 3 // 4), Image.Resampling.LANCZOS)
    return np.ascontiguousarray((np.asarray(small)[:, ::-1] * 0.8).astype(np.uint8))


def left_to_right(faces: list[identity.Face]) -> list[identity.Face]:
    return sorted(faces, key=lambda face: face.box[0])


@photographs
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_six_people_are_six_and_their_copies_are_themselves(tmp_path: Path) -> None:
    embedder = identity.load_embedder("dlib", tmp_path)
    image = photo()
    first, second = (left_to_right(faces) for faces in embedder.faces_of([image, copy_of(image)]))
    assert len(first) == 6 and len(second) == 6
    second = second[::-1]  # mirrored
    threshold = customary_threshold("dlib")
    pairs = [(i, j, float(first[i].embedding @ first[j].embedding)) for i, j in itertools.combinations(range(6), 2)]
    pairs += [(i, i, float(a.embedding @ b.embedding)) for i, (a, b) in enumerate(zip(first, second, strict=True))]
    wrong = [pair for pair in pairs if (pair[2] >= threshold) != (pair[0] == pair[1])]
    assert len(pairs) == 21
    if os.environ.get("APL_RECORD_CLAIMS"):
        from apl_train import claims

        claims.record({"dlib-pairs": (float(len(wrong)), None, len(pairs))})
    assert not wrong

    # dlib's own way: detector, landmarks, descriptor of the whole picture, one person below a distance of 0.6
    import dlib

    models = Path(importlib.util.find_spec("face_recognition_models").submodule_search_locations[0]) / "models"
    shape = dlib.shape_predictor(str(models / "shape_predictor_5_face_landmarks.dat"))
    net = dlib.face_recognition_model_v1(str(models / "dlib_face_recognition_resnet_model_v1.dat"))
    boxes = sorted(dlib.get_frontal_face_detector()(image, 0), key=lambda box: box.left())
    plain = np.array([net.compute_face_descriptor(image, shape(image, box)) for box in boxes])
    for face, box, feature in zip(first, boxes, plain, strict=True):
        assert face.embedding == pytest.approx(feature / np.linalg.norm(feature), abs=1e-4)
        assert face.box == (box.left(), box.top(), box.right() + 1, box.bottom() + 1)
    apart = np.linalg.norm(plain[:, None] - plain[None], axis=-1)[np.triu_indices(6, 1)]
    assert (apart > 0.6).all()


@photographs
def test_a_close_up_and_a_picture_without_anybody(tmp_path: Path) -> None:
    embedder = identity.load_embedder("dlib", tmp_path)
    assert embedder.faces(np.full((200, 300, 3), 90, np.uint8)) == []
    image = photo()[200:450, :240]  # the leftmost of the six
    whole = embedder.faces(image)
    assert len(whole) == 1
    x0, y0, x1, y1 = (int(v) for v in whole[0].box)
    close = embedder.faces(image[y0:y1, x0:x1])  # fills the frame
    assert len(close) == 1
    assert float(close[0].embedding @ whole[0].embedding) >= customary_threshold("dlib")


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("dlib") is None:
        with pytest.raises(ScoreError) as caught:
            identity.load_embedder("dlib", tmp_path)
    else:
        real = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "face_recognition_models" else real(n))
        with pytest.raises(ScoreError) as caught:
            identity.load_embedder("dlib", tmp_path)
    assert "pip install dlib-bin face_recognition_models" in caught.value.hint and "CC0" in caught.value.hint
