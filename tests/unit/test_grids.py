"""Picture grids against arrays put together by hand, and encoded pictures read back by Pillow."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from apl_core.errors import ScoreError
from apl_train.report import grids


def pictures(rows: int, columns: int, height: int = 5, width: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, (rows, columns, height, width, 3), dtype=np.uint8)


def test_tile_puts_every_pixel_where_numpy_puts_it() -> None:
    images = pictures(2, 3)
    white_column = np.full((5, 2, 3), 255, np.uint8)
    rows = [np.hstack([images[r, 0], white_column, images[r, 1], white_column, images[r, 2]]) for r in range(2)]
    expected = np.vstack([rows[0], np.full((2, 16, 3), 255, np.uint8), rows[1]])
    assert np.array_equal(grids.tile(images, gap=2), expected)


def test_tile_without_gap_and_in_another_colour() -> None:
    images = pictures(1, 2)
    assert np.array_equal(grids.tile(images, gap=0), np.hstack([images[0, 0], images[0, 1]]))
    assert grids.tile(images, gap=1, background=(1, 2, 3))[0, 4].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 2, 4, 4, 3)), np.zeros((2, 4, 4, 3), np.uint8), np.zeros((0, 2, 4, 4, 3), np.uint8)]
)
def test_tile_refuses_what_is_no_grid(bad: np.ndarray) -> None:
    with pytest.raises(ScoreError, match="images"):
        grids.tile(bad)


def test_tile_refuses_a_negative_gap() -> None:
    with pytest.raises(ScoreError, match="gap is -1"):
        grids.tile(pictures(1, 1), gap=-1)


def test_labels_stand_outside_and_leave_the_pictures_untouched() -> None:
    images = pictures(2, 2, 40, 40)
    plain = grids.tile(images)
    sheet = grids.labelled(images, ["first", "second"], ["left", "right"])
    height, width = plain.shape[:2]
    end = sheet.shape[0] - grids.MARGIN, sheet.shape[1] - grids.MARGIN
    assert np.array_equal(sheet[end[0] - height : end[0], end[1] - width : end[1]], plain)
    above, beside = sheet[: end[0] - height], sheet[:, : end[1] - width]
    assert (above < 128).any()
    assert (beside < 128).any()


def test_no_labels_means_only_a_margin() -> None:
    images = pictures(1, 2, 10, 10)
    sheet = grids.labelled(images)
    inner = sheet[grids.MARGIN : -grids.MARGIN, grids.MARGIN : -grids.MARGIN]
    assert np.array_equal(inner, grids.tile(images))
    outer = sheet.copy()
    outer[grids.MARGIN : -grids.MARGIN, grids.MARGIN : -grids.MARGIN] = 255
    assert (outer == 255).all()


def test_row_labels_stay_in_their_room_however_long() -> None:
    images = pictures(1, 1, 60, 60)
    sheet = grids.labelled(images, ["W" * 300 + " and more words"], label_width=50)
    label = sheet[:, : grids.MARGIN + 50 + grids.MARGIN]
    assert sheet.shape[1] == 50 + 60 + 3 * grids.MARGIN
    assert (label[:, : grids.MARGIN - 2] == 255).all()
    assert (label[:, -grids.MARGIN + 2 :] == 255).all()


def test_the_number_of_labels_must_fit() -> None:
    with pytest.raises(ScoreError, match="rows has 1 labels for 2"):
        grids.labelled(pictures(2, 1), rows=["only one"])


def test_fit_keeps_small_pictures_and_the_ratio_of_large_ones() -> None:
    small = pictures(1, 1, 8, 8)[0, 0]
    assert grids.fit(small, 8) is small
    assert grids.fit(np.zeros((100, 50, 3), np.uint8), 20).shape == (20, 10, 3)


@pytest.mark.parametrize("encode", [grids.to_png, grids.to_webp])
def test_encoded_pictures_are_lossless_and_the_same_every_time(encode) -> None:
    image = pictures(1, 1, 33, 17)[0, 0]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode(image))).convert("RGB")), image)
    assert encode(image) == encode(image.copy())


@pytest.mark.parametrize("webp", [True, False])
def test_data_uri_decodes_to_the_picture(webp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grids.features, "check", lambda _: webp)
    image = pictures(1, 1)[0, 0]
    head, _, data = grids.data_uri(image).partition(",")
    assert head == f"data:image/{'webp' if webp else 'png'};base64"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")), image)
