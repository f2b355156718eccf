"""Datasets are read as they were written, in every shape they come in, and all that is wrong is said at once."""

from __future__ import annotations

import csv
import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from apl_core.errors import ConfigError, DatasetError
from apl_train.datasets.dataset import COLUMNS, Record, problems, read_dataset

ID_ROWS = [
    ("a.png", "Ada Brown", "a photo of Ada Brown", "A female scientist, with brown hair", "id"),
    ("sub/b.webp", "Ödön Kis", "a portrait of Ödön Kis, smiling", "A male painter", "id"),
]
REG_ROWS = [("a.png", "", "a red apple", "", "nonface"), ("sub/b.webp", "", "a woman in a park", "", "face")]


def picture(seed: int, size: tuple[int, int] = (16, 24), channels: int = 3) -> np.ndarray:
    """uint8 [H, W, channels]; size is (width, height)."""
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), np.uint8)


def put(path: Path, pixels: np.ndarray, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **({"lossless": True} if path.suffix == ".webp" else {}) | options)


def table(folder: Path, rows: list[tuple[str, ...]], heading: tuple[str, ...] = COLUMNS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as handle:
        csv.writer(handle).writerows([heading, *rows])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    table(tmp_path, ID_ROWS)
    put(tmp_path / "a.png", picture(0))
    put(tmp_path / "sub" / "b.webp", picture(1))
    return tmp_path


def pack(folder: Path) -> None:
    with zipfile.ZipFile(folder / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a.png", "sub/b.webp"):
            archive.write(folder / name, name)
            (folder / name).unlink()


@pytest.mark.parametrize("zipped", [False, True])
def test_records_and_pictures(folder: Path, zipped: bool) -> None:
    if zipped:
        pack(folder)
    dataset = read_dataset(folder, expect="id")
    assert dataset.folder == folder and len(dataset.records) == 2
    assert dataset.records[0] == Record("a.png", "Ada Brown", ID_ROWS[0][2], ID_ROWS[0][3], "id")
    assert dataset.sha256 == hashlib.sha256((folder / "metadata.csv").read_bytes()).hexdigest()
    images = dataset.images([1, 0, 1])
    assert images.dtype == np.uint8 and images.shape == (3, 24, 16, 3)
    assert np.array_equal(images, np.stack([picture(1), picture(0), picture(1)]))
    assert dataset.images(range(0)).shape[0] == 0
    assert problems(folder, "id") == []


def test_content_is_hashed_with_every_pictures_bytes(folder: Path) -> None:
    def found() -> str:
        return read_dataset(folder, expect="id").content_sha256

    names, whole = ("a.png", "sub/b.webp"), hashlib.sha256()
    whole.update(hashlib.sha256((folder / "metadata.csv").read_bytes()).hexdigest().encode())
    for name in names:
        whole.update(hashlib.sha256((folder / name).read_bytes()).digest())
    first = found()
    assert first == whole.hexdigest()
    put(folder / "sub" / "b.webp", picture(9))
    changed = found()
    assert changed != first
    put(folder / "c.png", picture(3))  # no row lists it
    pack(folder)
    assert found() == changed  # where the bytes lie does not matter
    table(folder, ID_ROWS[::-1])
    assert found() not in (first, changed)


def test_loose_pictures_may_stand_beside_an_archive(folder: Path) -> None:
    pack(folder)
    put(folder / "c.png", picture(2))
    table(folder, [*ID_ROWS, ("c.png", "Ada Brown", "Ada Brown", "A woman", "id")])
    assert np.array_equal(read_dataset(folder, expect="id").images([2])[0], picture(2)) and not problems(folder, "id")


def test_in_s_reg_c2_is_c1(folder: Path) -> None:
    table(folder, REG_ROWS)
    records = read_dataset(folder, expect="reg").records
    assert [(r.c1, r.c2, r.kind) for r in records] == [
        ("a red apple", "a red apple", "nonface"), ("a woman in a park", "a woman in a park", "face")
    ]
    assert problems(folder, "reg") == []


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text.replace("\r\n", "\n").encode(),
        lambda text: (text + "\r\n\r\n").encode(),
        lambda text: ("\r\n" + text).encode(),
        lambda text: text.replace(",id", ",id ").replace("a.png,", " a.png ,").encode(),
        lambda text: text.rstrip().encode(),
    ],
    ids=["BOM", "LF", "blank lines behind", "blank line ahead", "spaces", "no last line end"],
)
def test_harmless_differences_of_csv(folder: Path, rewrite) -> None:
    expected = read_dataset(folder, expect="id").records
    path = folder / "metadata.csv"
    path.write_bytes(rewrite(path.read_bytes().decode("utf-8")))
    assert read_dataset(folder, expect="id").records == expected


def test_more_columns_and_another_order_are_fine(folder: Path) -> None:
    heading = ("kind", "note", "prompt", "image", "description", "name")
    rows = [(kind, "x", prompt, image, description, name) for image, name, prompt, description, kind in ID_ROWS]
    table(folder, rows, heading)
    assert read_dataset(folder, expect="id").records[1].c2 == "A male painter"


def test_every_kind_of_picture_becomes_rgb(tmp_path: Path) -> None:
    """Compared with arithmetic by hand, not with Pillow's conversion."""
    rgba = picture(3, channels=4)
    grey = picture(4)[..., 0]
    put(tmp_path / "rgba.png", rgba)
    put(tmp_path / "grey.png", grey)
    palette = Image.fromarray(np.tile(np.arange(16, dtype=np.uint8), (24, 1)), "L").copy()
    palette = palette.convert("P")
    palette.putpalette([value for entry in range(256) for value in (entry * 3 % 256, entry * 7 % 256, 255 - entry)])
    palette.save(tmp_path / "palette.png")
    turned = Image.fromarray(picture(5, (24, 16)))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise for looking at
    turned.save(tmp_path / "turned.png", exif=exif)
    names = ("rgba", "grey", "palette", "turned")
    table(tmp_path, [(f"{name}.png", "", name, "", "nonface") for name in names])
    images = read_dataset(tmp_path, expect="reg").images(range(4))
    alpha = rgba[..., 3:].astype(float) / 255
    assert np.abs(images[0] - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1
    assert np.array_equal(images[1], np.repeat(grey[..., None], 3, -1))
    index = np.asarray(palette).astype(int)
    assert np.array_equal(images[2], np.stack([index * 3 % 256, index * 7 % 256, 255 - index], -1))
    assert np.array_equal(images[3], np.rot90(picture(5, (24, 16)), -1))


def test_everything_wrong_is_said_at_once_with_its_row(folder: Path) -> None:
    table(folder, [
        ("gone.png", "Ada Brown", "a photo of Eda Brown", "A woman", "face"),
        ID_ROWS[1],
        ("a.png", "Ada Brown", "Ada Brown", "the scientist Brown", "id"),
    ])
    found = problems(folder, "id")
    assert [(p.row, p.column) for p in found] == [(2, "kind"), (2, "prompt"), (2, "image"), (4, "description")]
    assert all(p.message and p.hint for p in found)
    assert str(found[2]).startswith("row 2, column image: there is no picture gone.png")
    with pytest.raises(DatasetError) as caught:
        read_dataset(folder, expect="id")
    assert "row 2, column kind" in caught.value.message and "after this one: 3" in caught.value.message
    assert "S_Reg" in caught.value.hint and caught.value.exit_code == 5


def test_rows_are_counted_as_a_spreadsheet_does(folder: Path) -> None:
    """Blank lines count, and a line break inside quotes does not begin a row."""
    text = 'image,name,prompt,description,kind\n\na.png,Ada Brown,"two\nlines Ada Brown",A woman,id\n,,,,\nx,y,y,z,id\n'
    (folder / "metadata.csv").write_text(text, encoding="utf-8")
    assert [(p.row, p.column) for p in problems(folder, "id")] == [(3, "prompt"), (5, "image")]


@pytest.mark.parametrize(
    ("name", "description", "given_away"),
    [
        ("James Brown", "A male singer, with brown hair", ""),
        ("James Brown", "A male singer like Brown", "'Brown'"),
        ("James Brown", "a man, JAMES  brown to his friends", "'James Brown'"),
        ("Ann Lee", "A woman with sleek hair", ""),
        ("Ann Lee", "A woman, Lee's sister", "'Lee'"),
        ("Art", "A partial view of a man", ""),
        ("Zoë Ōta", "A woman, O\u0304ta by name", "'Ōta'"),
        ("\u5218\u5fb7\u534e", "\u7537\u6b4c\u624b\u5218\u5fb7\u534e\u5148\u751f", "\u5218\u5fb7\u534e"),
        ("sadie wenert", "a woman of the wenert family", "'wenert'"),
    ],
)
def test_a_description_must_not_give_the_person_away(
    folder: Path, name: str, description: str, given_away: str
) -> None:
    table(folder, [("a.png", name, f"a photo of {name}", description, "id")])
    found = problems(folder, "id")
    assert [p.column for p in found] == (["description"] if given_away else [])
    assert given_away in "".join(p.message for p in found)


def test_a_name_may_be_written_in_other_case_and_form_in_its_prompt(folder: Path) -> None:
    table(folder, [("a.png", "Zoë  Kis", "a photo of ZOE\u0308 KIS's dog", "A woman", "id")])
    assert problems(folder, "id") == []


def test_room_is_asked_for_every_text_that_is_encoded(folder: Path) -> None:
    asked: list[str] = []

    def room(text: str) -> int:
        asked.append(text)
        return 20 - len(text)

    found = problems(folder, "id", encoder_room=room)
    assert asked == [text for row in ID_ROWS for text in row[2:4]]
    assert [(p.row, p.column) for p in found] == [(2, "description"), (3, "prompt")]
    assert f"{len(ID_ROWS[0][3]) - 20} tokens too long" in found[0].message
    table(folder, REG_ROWS)
    asked.clear()
    problems(folder, "reg", encoder_room=room)
    assert asked == ["a red apple", "a woman in a park"]


def test_pictures_are_opened_only_when_asked_for(folder: Path) -> None:
    (folder / "a.png").write_bytes(b"no picture")
    assert problems(folder, "id", check_images=False) == []
    dataset = read_dataset(folder, expect="id")
    assert [p.column for p in problems(folder, "id")] == ["image"]
    with pytest.raises(DatasetError, match=r"a\.png cannot be read") as caught:
        dataset.images([1, 0])
    assert caught.value.hint and caught.value.field == "image"


def test_a_batch_needs_one_size(folder: Path) -> None:
    put(folder / "sub" / "b.webp", picture(1, (8, 8)))
    dataset = read_dataset(folder, expect="id")
    assert dataset.images([1]).shape == (1, 8, 8, 3)
    with pytest.raises(DatasetError, match=r"sub/b\.webp is 8 x 8, a\.png is 16 x 24"):
        dataset.images([0, 1])


def test_expect_is_one_of_two(folder: Path) -> None:
    with pytest.raises(ConfigError, match="expect is 'both'"):
        read_dataset(folder, expect="both")
