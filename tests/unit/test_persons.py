"""Reading an evaluation set: good folders whole, bad ones with row, column and way out."""

from __future__ import annotations

import io
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from apl_core.errors import DatasetError
from apl_train.scoring.persons import NeutralPrompt, read_evaluation_set

PEOPLE = (
    "name,split,description,attributes\n"
    'Ada Quill,train,"A female white baseball player, long hair","{""gender"": ""female""}"\n'
    "Bo Strand,test,A male black hockey player,\n"
)
NEUTRAL = "prompt,kind\na red bus,nonface\na portrait of a woman,unnamed_face\n"


def picture(value: int) -> np.ndarray:
    return np.full((6, 5, 3), value, np.uint8)


def encoded(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(value)).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


REFERENCES = {"Ada Quill/0.webp": 10, "Ada Quill/1.webp": 11, "Bo Strand/0.webp": 20, "Bo Strand/1.webp": 21}


def make(folder: Path, people: str = PEOPLE, neutral: str | None = NEUTRAL, drop: str = "",
         zipped: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "people.csv").write_text(people, encoding="utf-8")
    if neutral is not None:
        (folder / "neutral.csv").write_text(neutral, encoding="utf-8")
    files = {name: encoded(v) for name, v in REFERENCES.items() if name != drop}
    files["Ada Quill/notes.txt"] = b"no picture"
    if zipped:
        with zipfile.ZipFile(folder / "references.zip", "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        for name, data in files.items():
            (folder / "references" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "references" / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_everything(tmp_path: Path, zipped: bool) -> None:
    found = read_evaluation_set(make(tmp_path, zipped=zipped))
    ada, bo = found.persons
    assert (ada.name, ada.split, ada.attributes) == ("Ada Quill", "train", {"gender": "female"})
    assert ada.description == "A female white baseball player, long hair"
    assert bo.attributes == {}
    assert found.of_split("test") == (bo,)
    assert found.of_split("train", 0) == ()
    assert found.of_kind("nonface") == (NeutralPrompt("a red bus", "nonface"),)
    for i, person in enumerate(found.persons):
        for k, image in enumerate(found.references(person)):
            assert image.dtype == np.uint8
            assert np.array_equal(image, picture(10 * (i + 1) + k))


def test_hash_is_of_the_content(tmp_path: Path) -> None:
    one = read_evaluation_set(make(tmp_path / "a")).sha256
    assert read_evaluation_set(make(tmp_path / "b", zipped=False)).sha256 == one
    folder = make(tmp_path / "c", zipped=False)
    (folder / "references/Bo Strand/1.webp").write_bytes(encoded(99))
    assert read_evaluation_set(folder).sha256 != one
    assert read_evaluation_set(make(tmp_path / "d", neutral=NEUTRAL + "a dog,nonface\n")).sha256 != one


def test_neutral_prompts_may_be_missing_and_a_byte_order_mark_is_no_matter(tmp_path: Path) -> None:
    found = read_evaluation_set(make(tmp_path, people="\ufeff" + PEOPLE, neutral=None))
    assert found.neutral == ()
    assert len(found.persons) == 2


@pytest.mark.parametrize(("people", "field", "words"), [
    (PEOPLE.replace("split", "group"), "split", "no column"),
    (PEOPLE.replace(",test,", ",tests,"), "split", "row 3"),
    (PEOPLE.replace("Bo Strand,test", ",test"), "name", "row 3"),
    (PEOPLE.replace("A male black hockey player", ""), "description", "row 3"),
    (PEOPLE.replace('{""gender"": ""female""}', "female"), "attributes", "row 2"),
    (PEOPLE.replace('""female""}', "3}"), "attributes", "row 2"),
    (PEOPLE + "Bo Strand,train,someone,\n", "name", "row 4"),
    (PEOPLE + "Cy Moor,train,someone,\n", "references", "Cy Moor has 0"),
    (PEOPLE.replace('"A female white baseball player, long hair"', "a, b"), "people.csv", "more cells"),
    (PEOPLE + "Cy Moor,train\n", "people.csv", "fewer cells"),
    ("name,split,description,attributes\n", "name", "nobody"),
    ("", "name", "no column"),
])
def test_wrong_people_are_named(tmp_path: Path, people: str, field: str, words: str) -> None:
    with pytest.raises(DatasetError) as caught:
        read_evaluation_set(make(tmp_path, people=people))
    assert caught.value.field == field
    assert words in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(("neutral", "words"), [
    ("prompt,kind\na bus,face\n", "row 2: kind"), ("prompt,kind\n,nonface\n", "row 2: prompt"),
    (NEUTRAL + "a red bus,nonface\n", "row 4"), ("prompt\nx\n", "no column kind"),
])
def test_wrong_neutral_prompts_are_named(tmp_path: Path, neutral: str, words: str) -> None:
    with pytest.raises(DatasetError) as caught:
        read_evaluation_set(make(tmp_path, neutral=neutral))
    assert words in caught.value.message


def test_references_must_be_there_and_sound(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="Bo Strand has 1"):
        read_evaluation_set(make(tmp_path / "one", drop="Bo Strand/0.webp"))
    folder = make(tmp_path / "none", zipped=False)
    shutil.rmtree(folder / "references")
    with pytest.raises(DatasetError, match="neither"):
        read_evaluation_set(folder)
    (folder / "references.zip").write_bytes(b"PK no")
    with pytest.raises(DatasetError, match="zip"):
        read_evaluation_set(folder)
    folder = make(tmp_path / "bad", zipped=False)
    (folder / "references/Ada Quill/0.webp").write_bytes(b"RIFF")
    found = read_evaluation_set(folder)
    with pytest.raises(DatasetError, match="not a sound picture"):
        found.references(found.persons[0])
    with pytest.raises(DatasetError, match="cannot be read"):
        read_evaluation_set(tmp_path / "nowhere")


def test_names_in_the_zip_that_lead_elsewhere_are_no_references(tmp_path: Path) -> None:
    folder = make(tmp_path, drop="Bo Strand/0.webp")
    with zipfile.ZipFile(folder / "references.zip", "a") as archive:
        for name in ("../Bo Strand.webp", "Bo Strand/../0.webp", "/Bo Strand/0.webp"):
            archive.writestr(name, encoded(1))
    with pytest.raises(DatasetError, match="Bo Strand has 1"):
        read_evaluation_set(folder)


def test_references_are_read_as_dataset_pictures_are(tmp_path: Path) -> None:
    """Upright, transparency on white, and never from outside the folder."""
    folder = make(tmp_path / "set", zipped=False)
    ada = folder / "references" / "Ada Quill"
    turned, exif = np.arange(30, dtype=np.uint8).reshape(2, 5, 3), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise for looking at
    Image.fromarray(turned).save(ada / "0.webp", lossless=True, exif=exif)
    Image.new("RGBA", (5, 6), (9, 9, 9, 0)).save(ada / "1.webp", lossless=True)
    Image.fromarray(picture(7)).save(ada / "2.bmp")
    found = read_evaluation_set(folder)
    images = found.references(found.persons[0])
    assert np.array_equal(images[0], np.rot90(turned, -1))
    assert (images[1] == 255).all() and np.array_equal(images[2], picture(7))
    (tmp_path / "outside.webp").write_bytes(encoded(1))
    (ada / "3.webp").symlink_to(tmp_path / "outside.webp")
    with pytest.raises(DatasetError, match="leads out of the folder") as caught:
        read_evaluation_set(folder)
    assert caught.value.field == "Ada Quill/3.webp"


def test_not_utf8_is_said(tmp_path: Path) -> None:
    folder = make(tmp_path)
    (folder / "people.csv").write_bytes(PEOPLE.replace("Ada", "Adá").encode("latin-1"))
    with pytest.raises(DatasetError, match="UTF-8"):
        read_evaluation_set(folder)
