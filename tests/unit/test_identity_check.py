"""Which face counts, what is no reference, what strangers reach: each rule against numpy or a loop by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from apl_core import id_check as c
from apl_core.errors import ScoreError
from apl_core.identity import Face


def unit(*values: float) -> np.ndarray:
    v = np.array(values, np.float64)
    return (v / np.linalg.norm(v)).astype(np.float32)


def face(vector: np.ndarray, size: float = 10, score: float = 0.9) -> Face:
    return Face((0, 0, size, size), score, vector)


X, Y, Z = unit(1, 0, 0), unit(0, 1, 0), unit(0, 0, 1)


def test_a_reference_is_the_mean_of_pictures_with_exactly_one_face() -> None:
    shots = [[face(X)], [], [face(Y)], [face(X), face(Z)], [face(unit(1, 1, 1))]]
    found = c.build_reference(shots, ["a", "b", "c", "d", "e"])
    mean = (X + Y + unit(1, 1, 1)) / 3
    assert found.vector == pytest.approx(mean / np.linalg.norm(mean), abs=1e-6)
    assert found.kept == ("a", "c", "e")
    assert found.rejected == (("b", "no face was found"), ("d", "2 faces were found"))
    others = [(Y + unit(1, 1, 1)), (X + unit(1, 1, 1)), (X + Y)]
    expected = [float(a @ (b / np.linalg.norm(b))) for a, b in zip((X, Y, unit(1, 1, 1)), others, strict=True)]
    assert found.leave_one_out == pytest.approx(expected, abs=1e-6)
    assert found.ceiling == pytest.approx(np.mean(expected), abs=1e-6)


def test_one_reference_has_no_ceiling_and_none_is_an_error() -> None:
    found = c.build_reference([[face(X)]])
    assert found.vector == pytest.approx(X) and math.isnan(found.ceiling) and found.kept == ("picture 1",)
    with pytest.raises(ScoreError, match="exactly one face") as caught:
        c.build_reference([[], [face(X), face(Y)]], ["a.png", "b.png"])
    assert "a.png: no face was found; b.png: 2 faces were found" in caught.value.message and caught.value.hint
    with pytest.raises(ScoreError, match="there is none"):
        c.build_reference([])


def test_the_face_that_counts() -> None:
    small, large = face(X, 10), face(unit(1, 1, 0), 30)
    r = X.astype(np.float64)
    assert c.counted([small, large], r) == pytest.approx([math.sqrt(0.5)])
    assert c.counted([large, small], r, "best") == pytest.approx([1.0])
    assert c.counted([large, small], r, "all") == pytest.approx([math.sqrt(0.5), 1.0])
    for choice in c.CHOICES:
        assert c.counted([], r, choice).shape == (0,)  # no face is never a similarity
    with pytest.raises(ScoreError, match="face_choice"):
        c.counted([small], r, "middle")


def test_a_person_against_a_loop() -> None:
    shots = [[face(X), face(Y, 20)], [], [face(unit(3, 1, 0))], [face(Z)]]
    reference = c.build_reference([[face(X)]])
    person = c.person_pictures("p", shots, reference, "all")
    values = [1.0, 0.0, 3 / math.sqrt(10), 0.0]
    assert person.mean == pytest.approx(np.mean(values), abs=1e-6) and person.max == pytest.approx(1.0)
    assert (person.n_images, person.n_faces) == (4, 3)
    assert person.recognised(0.9) == 2 and person.anonymised(0.9) == 1
    largest = c.person_pictures("p", shots, reference)
    assert largest.mean == pytest.approx((0 + 3 / math.sqrt(10) + 0) / 3, abs=1e-6) and largest.recognised(0.9) == 1
    empty = c.person_pictures("p", [[], []], reference)
    assert math.isnan(empty.mean) and math.isnan(empty.max) and empty.anonymised(0.5) == 0


@pytest.mark.parametrize("choice", c.CHOICES)
def test_impostors_against_a_loop(choice: str) -> None:
    rng = np.random.default_rng(3)

    def random_faces(count: int) -> list[Face]:
        return [face(unit(*rng.normal(size=5)), rng.uniform(5, 50)) for _ in range(count)]

    references = [c.build_reference([random_faces(1), random_faces(1)]) for _ in range(4)]
    faces = [[random_faces(rng.integers(0, 4)) for _ in range(3)] for _ in range(4)]
    expected = []
    for i, reference in enumerate(references):
        for j, own in enumerate(faces):
            for shot in own:
                if i != j and shot:
                    looked = [max(shot, key=lambda f: f.area)] if choice == "largest" else shot
                    expected.append(max(float(f.embedding @ reference.vector) for f in looked))
    assert sorted(c.impostors(references, faces, choice)) == pytest.approx(sorted(expected), abs=1e-6)
    assert c.impostors(references, [[[]], [[]], [[]], [[]]]).shape == (0,)


class ByColour:
    """Red is a face along X, green along Y; black is none. Only what `compare` calls."""

    name, sha256 = "colour", "0"

    def faces(self, image: np.ndarray) -> list[Face]:
        r, g, _ = image[0, 0].astype(float)
        return [face(unit(r, g, 0))] if r + g else []

    def faces_of(self, images: list[np.ndarray]) -> list[list[Face]]:
        return [self.faces(image) for image in images]


def shot(r: int, g: int) -> np.ndarray:
    return np.full((4, 4, 3), (r, g, 0), np.uint8)


def test_compare_keeps_pictures_without_a_face_apart() -> None:
    found = c.compare(ByColour(), [shot(200, 0), shot(0, 0), shot(0, 90)], [shot(100, 0), shot(0, 0)])
    assert [len(v) for v in found.scores.values] == [1, 0, 1]
    assert found.shown(0) == pytest.approx(1.0) and math.isnan(found.shown(1)) and found.shown(2) == pytest.approx(0.0)
    assert found.reference.rejected == (("picture 2", "no face was found"),)
    assert found.scores.mean == pytest.approx(0.5)


def test_the_face_that_is_shown_is_the_one_that_counted() -> None:
    small, large = face(X, 10), face(unit(1, 1, 0), 30)
    reference = c.build_reference([[face(X)]])
    for choice, wanted in (("largest", large), ("best", small), ("all", small)):
        found = c.Comparison(reference, ([large, small], []), c.person_pictures("p", [[large, small], []], reference,
                                                                                choice), choice)
        assert found.chosen(0) is wanted and found.chosen(1) is None
        assert found.shown(0) == pytest.approx(float(wanted.embedding @ X))
