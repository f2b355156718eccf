"""S_Reg from folders, shards, COCO and `datasets`: streamed, balanced between persons and things, naming nobody."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from apl_core.errors import ConfigError, DatasetError
from apl_train.datasets.dataset import problems, read_dataset
from apl_train.datasets.neutral_sources import Pair, build, prompts_of, source_of, squared


def picture(seed: int = 0, size: tuple[int, int] = (24, 16), kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)).save(data, kind)
    return data.getvalue()


def pairs(captions: list[str]) -> list[Pair]:
    return [Pair(picture(i), caption, f"{i}.png") for i, caption in enumerate(captions)]


def tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as out:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


class Rows(list):
    """What datasets' streamed rows answer to, as its documentation has it."""

    @property
    def features(self) -> dict[str, None]:
        return {"image": None, "caption": None}

    def cast_column(self, _name: str, _feature: object) -> Rows:
        return self


@pytest.fixture
def source(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path | None]:
    """The same two captioned pictures in every form."""
    form, home = request.param, tmp_path / "source"
    home.mkdir()
    a, b = picture(0), picture(1, kind="JPEG")
    if form == "sidecars":
        (home / "sub").mkdir()
        (home / "a.png").write_bytes(a)
        (home / "a.txt").write_text("a red apple\n")
        (home / "sub" / "b.jpg").write_bytes(b)
        (home / "sub" / "b.caption").write_text("a man in a park")
        (home / "c.png").write_bytes(picture(2))  # without a caption
        return str(home), None
    if form == "jsonl":
        (home / "a.png").write_bytes(a)
        (home / "b.jpg").write_bytes(b)
        rows = [{"file_name": "a.png", "text": "a red apple"}, {"file_name": "b.jpg", "text": "a man in a park"}]
        (home / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return str(home), None
    if form == "shard":  # as img2dataset writes LAION
        return str(tar(home / "00000.tar", {
            "000.png": a, "000.txt": b"a red apple", "000.json": b'{"caption": "other"}',
            "001.jpg": b, "001.json": b'{"caption": "a man in a park"}', "002.txt": b"alone"})), None
    if form == "shards in a folder":
        tar(home / "0.tar", {"x.png": a, "x.txt": b"a red apple"})
        tar(home / "1.tar", {"y.jpg": b, "y.txt": b"a man in a park"})
        return str(home), None
    if form == "coco":
        (home / "a.png").write_bytes(a)
        (home / "b.jpg").write_bytes(b)
        table = {"images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.jpg"}],
                 "annotations": [{"image_id": 1, "caption": "a red apple"}, {"image_id": 1, "caption": "fruit"},
                                 {"image_id": 2, "caption": "a man in a park"}]}
        (tmp_path / "captions.json").write_text(json.dumps(table))
        return str(tmp_path / "captions.json"), home
    module = ModuleType("datasets")
    rows = Rows([{"image": {"bytes": a}, "caption": "a red apple"},
                 {"image": {"bytes": b}, "caption": ["a man in a park", "x"]}])
    module.load_dataset = lambda name, split, streaming: rows if (name, split, streaming) == (
        "someone/pictures", "train", True) else None
    module.Image = lambda decode: SimpleNamespace(decode=decode)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return "someone/pictures", None


@pytest.mark.parametrize("source", ["sidecars", "jsonl", "shard", "shards in a folder", "coco", "datasets"],
                         indirect=True)
def test_every_source_gives_the_same_set(source: tuple[str, Path | None], tmp_path: Path) -> None:
    out = tmp_path / "set"
    built = build(source_of(*source), out, count=10, size=16)
    assert (built.faces, built.nonfaces, built.by_words) == (1, 1, True)
    records = read_dataset(out, expect="reg").records
    assert sorted((r.c1, r.kind) for r in records) == [("a man in a park", "face"), ("a red apple", "nonface")]
    assert problems(out, "reg") == [] and (out / "contact-sheet-1.jpg").exists()
    (index,) = [i for i, r in enumerate(records) if r.kind == "nonface"]
    with Image.open(io.BytesIO(picture(0))) as original:
        middle = np.asarray(original)[:, 4:20]  # the square in the middle of 24 x 16, at its own size
    assert np.array_equal(read_dataset(out, expect="reg").images([index])[0], middle)


def test_persons_are_never_more_than_things(tmp_path: Path) -> None:
    captions = ["a woman"] * 6 + ["a tree", "a stone"]
    built = build(iter(pairs(captions)), tmp_path / "few", count=8, size=16)
    assert (built.faces, built.nonfaces) == (2, 2)
    assert built.left_out == {"more persons than needed": 2, "more persons than things": 2}
    built = build(iter(pairs([f"stone {i}" for i in range(9)] + ["a man"])), tmp_path / "many", count=6, size=16)
    assert (built.faces, built.nonfaces) == (1, 3) and built.left_out == {"more things than needed": 6}
    with pytest.raises(DatasetError, match="No picture without persons"):
        build(iter(pairs(["a woman"])), tmp_path / "none", count=4, size=16)
    assert not (tmp_path / "none" / "metadata.csv").exists()


def test_a_recogniser_tells_persons_from_things_where_there_is_one(tmp_path: Path) -> None:
    eye = SimpleNamespace(faces_of=lambda images: [["face"] if i % 2 else [] for i, _ in enumerate(images)])
    built = build(iter(pairs(["a", "b", "c", "d"])), tmp_path, count=4, size=16, embedder=eye)
    assert (built.faces, built.nonfaces, built.by_words) == (2, 2, False)


def test_captions_that_name_somebody_or_are_none_are_left_out(tmp_path: Path) -> None:
    captions = ["a stone", "ADA  hill smiling", "Hillary", " \n\t", "x" * 3000, "two\nlines\x07"]
    built = build(iter([*pairs(captions), Pair(b"no picture", "a tree", "t.png")]), tmp_path, count=20, size=16,
                  names=["Ada Hill", "Adele"])
    assert built.left_out == {"naming a person of S_ID": 1, "without a usable caption": 2,
                              "damaged or of another format": 1}
    assert [r.c1 for r in read_dataset(tmp_path, expect="reg").records] == ["a stone", "Hillary", "two lines"]


def test_a_stream_is_read_no_further_than_needed(tmp_path: Path) -> None:
    taken = []

    def endless():
        while True:
            for pair in pairs(["a man", "a stone"]):
                taken.append(pair)
                yield pair

    build(endless(), tmp_path, count=4, size=16)
    assert len(taken) <= 16


def test_squared_keeps_the_middle() -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    assert squared(wide, 10).min() == 255 and squared(wide.transpose(1, 0, 2).copy(), 20).min() > 200


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


BAD = {
    "no folder": (lambda t: ("./gone", None), DatasetError, "no folder", "Check the path"),
    "no captions": (lambda t: (t / "empty", None), DatasetError, "No picture in", "NAME.txt beside"),
    "broken jsonl": (lambda t: (write(t / "empty" / "metadata.jsonl", "{").parent, None), DatasetError,
                     "line 1 is no row", "file_name"),
    "no shard": (lambda t: (t / "gone.tar", None), DatasetError, "There is no", "shards"),
    "broken shard": (lambda t: (write(t / "a.tar", "no tar"), None), DatasetError, "cannot be read as a tar", "again"),
    "shard without pairs": (lambda t: (tar(t / "a.tar", {"a.png": picture()}), None), DatasetError,
                            "No picture in a.tar has a caption", "KEY.jpg"),
    "COCO without pictures": (lambda t: (write(t / "c.json", "{}"), None), ConfigError, "needs its pictures",
                              "--images"),
    "no COCO": (lambda t: (write(t / "c.json", "{}"), t), DatasetError, "no COCO captions file", "annotations"),
    "COCO that is not there": (lambda t: (t / "gone.json", t), DatasetError, "cannot be read", "Check the path"),
    "COCO of other pictures": (lambda t: (write(t / "c.json", json.dumps({
        "images": [{"id": 1, "file_name": "../../etc/a.png"}], "annotations": [{"image_id": 1, "caption": "x"}]})), t),
        DatasetError, "None of the pictures", "--images"),
    "datasets is not installed": (lambda t: ("someone/pictures", None), ConfigError, "not installed",
                                  "pip install datasets"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_sources(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setitem(sys.modules, "datasets", None)
    make, error, message, hint = BAD[what]
    value, images = make(tmp_path)
    with pytest.raises(error, match=message) as caught:
        build(source_of(str(value), images), tmp_path / "set", count=4, size=16)
    assert hint in caught.value.hint and not (tmp_path / "set" / "metadata.csv").exists()


def test_a_finished_set_is_not_written_over(tmp_path: Path) -> None:
    write(tmp_path / "metadata.csv", "mine")
    with pytest.raises(ConfigError, match="holds a dataset already"):
        build(iter(pairs(["a"])), tmp_path, count=4, size=16)


def test_own_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", "prompt,kind\na red apple,nonface\na man,face\n")
    assert [(p.prompt, p.kind) for p in prompts_of(path)] == [("a red apple", "nonface"), ("a man", "face")]
    with pytest.raises(DatasetError, match="row 3"):
        prompts_of(write(path, "prompt,kind\na,face\nb,thing\n"))
    with pytest.raises(DatasetError, match="cannot be read"):
        prompts_of(tmp_path / "gone.csv")
