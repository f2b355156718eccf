"""Everything wrong with two sets is said at once: what a training would stop at, and what would make it worse."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from apl_train.datasets.validate import validate

ID = [("Ada Hill", "a photo of Ada Hill", "A woman", "id"), ("Bo Lake", "a photo of Bo Lake", "A man", "id")]
REG = [("", "a red apple", "", "nonface"), ("", "a man in a park", "", "face")]


def write(folder: Path, rows: list[tuple[str, str, str, str]], size: int = 16) -> Path:
    folder.mkdir(exist_ok=True)
    lines = ["image,name,prompt,description,kind"]
    for i, row in enumerate(rows):
        pixels = np.random.default_rng(i + len(folder.name)).integers(0, 256, (size, size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(",".join((f"{i}.png", *row)))
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def found(*sets: Path | None, **options: object) -> list[tuple[str, str, int, str]]:
    verdict = validate(*sets, **options)
    return [(f.level, f.set, f.problem.row, f.problem.column) for f in verdict.findings]


def many(n: int) -> list[tuple[str, str, str, str]]:
    return [(f"Ada{i} Hill{i}", f"a photo of Ada{i} Hill{i}", f"A woman {i}", "id") for i in range(n)]


def test_good_sets(tmp_path: Path) -> None:
    verdict = validate(write(tmp_path / "id", many(20)), write(tmp_path / "reg", REG), tokenize=str.split, size=16)
    assert verdict.findings == () and verdict.errors == 0
    assert verdict.counts == {"pictures of S_ID": 20, "persons": 20, "unnamed persons": 1, "things": 1}
    assert verdict.text().endswith("0 errors, 0 warnings")


def test_errors_of_the_tables_come_with_their_rows(tmp_path: Path) -> None:
    s_id = write(tmp_path / "id", [*ID, ("Cy Wood", "a photo of Cy", "A man like Wood", "id")])
    s_reg = write(tmp_path / "reg", [*REG, ("", "", "", "face")])
    (s_reg / "0.png").unlink()
    assert found(s_id, s_reg) == [("error", "S_ID", 4, "prompt"), ("error", "S_ID", 4, "description"),
                                  ("error", "S_Reg", 2, "image"), ("error", "S_Reg", 4, "prompt")]
    assert all(f.problem.hint for f in validate(s_id, s_reg).findings)


def test_captions_must_leave_room_for_the_prefix(tmp_path: Path) -> None:
    s_reg = write(tmp_path / "reg", [("", "x " * 66, "", "nonface"), ("", "x " * 65, "", "face")])
    assert found(None, s_reg, tokenize=str.split) == [("error", "S_Reg", 2, "prompt")]
    assert found(None, s_reg, tokenize=str.split, num_tokens=9) == []


def test_nobody_kept_for_testing_is_learned_from_and_nobody_learned_from_is_in_s_reg(tmp_path: Path) -> None:
    people = tmp_path / "people.csv"
    people.write_text("name,split,description\nada  HILL,test,A woman\nX,train,A man\n", encoding="utf-8")
    s_reg = write(tmp_path / "reg", [*REG, ("", "a statue of bo lake", "", "nonface")])
    assert found(write(tmp_path / "id", ID), s_reg, people=people) == [
        ("error", "S_ID", 0, "name"), ("warning", "S_ID", 0, "name"), ("error", "S_Reg", 4, "prompt")]


@pytest.mark.parametrize(("rows", "expected"), [
    ([("", f"a man {i}", "", "face") for i in range(3)], [("error", "S_Reg", 0, "kind")]),
    ([("", f"a man {i}", "", "face") for i in range(7)] + REG[:1], [("warning", "S_Reg", 0, "kind")]),
    ([("", f"stone {i}", "", "nonface") for i in range(3)], [("warning", "S_Reg", 0, "kind")]),
])
def test_faces_and_things_must_be_balanced(rows: list, expected: list, tmp_path: Path) -> None:
    assert found(None, write(tmp_path / "reg", rows)) == expected
    (only,) = validate(None, tmp_path / "reg").findings
    assert "Fig. 7" in only.problem.hint or "half" in only.problem.hint


def test_pictures_of_another_size_and_faces_that_should_not_be(tmp_path: Path) -> None:
    s_id, s_reg = write(tmp_path / "id", many(20)), write(tmp_path / "reg", REG)
    counts = iter([1] * 3 + [0, 4] + [1] * 15 + [1, 0])
    eye = SimpleNamespace(faces_of=lambda images: [["face"] * next(counts) for _ in images])
    assert found(s_id, s_reg, size=32, embedder=eye) == [
        ("warning", "S_ID", 0, "image"), ("warning", "S_ID", 5, "image"), ("warning", "S_ID", 6, "image"),
        ("warning", "S_Reg", 0, "image"), ("warning", "S_Reg", 2, "image"), ("warning", "S_Reg", 3, "image")]


def test_the_verdict_as_json(tmp_path: Path) -> None:
    verdict = validate(write(tmp_path / "id", ID), tmp_path / "gone").to_dict()
    assert verdict["errors"] == 1 and verdict["warnings"] == 1
    assert verdict["findings"][0].keys() == {"level", "set", "row", "column", "message", "hint"}
