"""The terminal's table: values in their columns, missing ones named, the paper's figures as printed in the paper."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from apl_train.report import paper_figures, table


def condition(mean: float | None, **more) -> dict:
    row = {
        "id_acc_mean": mean,
        "id_acc_max": 0.7,
        "ci95": [0.5, 0.6],
        "face_rate": 0.99,
        "attr_acc": 0.9,
        "joint_success": 0.25,
        "n_persons": 24,
        "n_images": 192,
    }
    return row | more


SCORES = {
    "persons": {
        "test": {"description": condition(0.1), "on": condition(0.2), "off": condition(0.6), "mystery": condition(0.3)},
        "train": {"off": condition(0.61), "on": condition(None, ci95=None, attr_acc=None)},
        "impostor_floor": 0.031,
        "threshold": 0.32,
        "ceiling": None,
    },
    "drift": {
        "nonfaces": {
            "on": 0.25,
            "random": None,
            "two_seeds": 0.5,
            "pixel_on": 0.05,
            "face_rate_off": 0.0,
            "face_rate_on": 0.016,
        }
    },
    "uninvited_rate": {"faces_in_nonfaces_on": 0.016, "named_in_nonfaces_excess": -0.01, "else": None},
}


def line(text: str, start: str, nth: int = 0) -> str:
    return [row for row in text.splitlines() if row.strip().startswith(start)][nth]


def test_a_row_holds_its_values_in_the_order_of_the_head() -> None:
    text = table.score_table(SCORES)
    cells = re.split(r"\s{2,}", line(text, "name, prefix on").strip())
    assert cells == ["name, prefix on", "0.200", "[0.500, 0.600]", "0.700", "99.0%", "0.900", "25.0%"]
    assert "Unseen persons (24 persons, 192 pictures per row)" in text


def test_columns_end_at_the_same_place() -> None:
    rows = [row for row in table.score_table(SCORES).splitlines() if row.startswith("  name, prefix")][:2]
    assert len({row.index("[") for row in rows}) == 1
    assert len({len(row) for row in rows}) == 1


def test_conditions_come_in_reading_order_and_unknown_ones_last() -> None:
    assert table.conditions_of(SCORES["persons"]["test"]) == ["off", "on", "description", "mystery"]


def test_missing_values_are_named_never_zero() -> None:
    text = table.score_table(SCORES)
    row = line(text, "name, prefix on", 1)
    assert row.count("n/m") == 2
    assert "0.000" not in row
    assert text.rstrip().endswith("n/m = not measured")


def test_drift_is_put_against_two_seeds() -> None:
    text = table.score_table(SCORES)
    assert re.split(r"\s{2,}", line(text, "prefix on").strip()) == ["prefix on", "0.250", "0.050", "50.0%"]
    assert re.split(r"\s{2,}", line(text, "random prefix").strip()) == ["random prefix", "n/m", "n/m", "n/m"]
    assert "pictures with a face: 0.0% off, 1.6% on" in text


def test_uninvited_rates_are_in_words_where_the_key_is_known() -> None:
    assert table.rates(SCORES["uninvited_rate"]) == [
        ("a face in prompts without persons, prefix on", "1.6%"),
        ("a named person in prompts without persons, difference", "-1.0%"),
        ("else", "not measured"),
    ]
    assert table.rates(None) == []
    row = line(table.score_table(SCORES), "a face in prompts without persons, prefix on")
    assert row.endswith(" 1.6%")


def test_persons_kept_for_last_stand_in_where_only_they_were_scored() -> None:
    final = {"persons": {"final": {"off": condition(0.6), "on": condition(0.2), "description": condition(0.1)}}}
    assert table.unseen(SCORES) == table.unseen({}) == "test"
    assert table.unseen(final) == "final"
    assert table.way_to_description(final) == pytest.approx(0.8)
    assert "Unseen persons kept for last (24 persons" in table.score_table(final)


@pytest.mark.parametrize("scores", [{}, {"persons": None, "drift": None}, {"persons": {"test": {}}}])
def test_nothing_measured_is_said_so(scores: dict) -> None:
    assert table.score_table(scores) == "Scores: not measured.\n"


def test_the_way_to_the_description() -> None:
    assert table.way_to_description(SCORES) == pytest.approx((0.6 - 0.2) / (0.6 - 0.1))
    assert table.way_to_description(SCORES, "train") is None
    same = {"persons": {"test": {key: condition(0.3) for key in ("off", "on", "description")}}}
    assert table.way_to_description(same) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not measured"),
        (math.nan, "not measured"),
        (math.inf, "not measured"),
        ("0.3", "not measured"),
        (True, "not measured"),
        (-0.0001, "0.000"),
        (-0.25, "-0.250"),
        (np.float32(0.5), "0.500"),
        (2, "2.000"),
    ],
)
def test_numbers(value, text: str) -> None:
    assert table.number(value) == text


@pytest.mark.parametrize("value", [None, [], [0.1], [0.1, None], [0.1, math.nan], "ab", {"lo": 1, "hi": 2}])
def test_half_an_interval_is_none(value) -> None:
    assert table.interval(value) == ""


def test_constants_are_found_beside_the_splits_or_at_the_top() -> None:
    assert table.constant(SCORES, "threshold") == 0.32
    assert table.constant(SCORES, "ceiling") is None
    assert table.constant({"ceiling": 0.9}, "ceiling") == 0.9


def test_durations() -> None:
    assert table.durations({"a": 48.25, "b": 161.2, "c": None}) == [
        ("a", "48.2 s"),
        ("b", "2 min 41 s"),
        ("c", "not measured"),
    ]


def test_the_papers_rows_are_labelled_and_as_printed() -> None:
    text = table.score_table(SCORES)
    on = line(text, "paper, real weights (SD1.5), on")
    assert re.findall(r"\d\.\d{3}", on) == ["0.040", "0.108", "0.602"]  # Table 1 and 2: .03970 / .10773, .60222
    off = line(text, "paper, real weights (SD1.5), off", 1)
    assert re.findall(r"\d\.\d{3}", off) == ["0.316", "0.380"]  # Table 1: .31566 / .37958
    assert paper_figures.beside("test", "random") is None
    assert paper_figures.beside("other", "off") is None
    assert paper_figures.beside("final", "off") == paper_figures.beside("test", "off")


def test_the_papers_tables_agree_where_they_repeat_each_other() -> None:
    first = paper_figures.TABLE_1[0]
    assert paper_figures.TABLE_2[0].id_acc == first.off["test"].mean
    assert paper_figures.TABLE_2[-1].id_acc == first.on["test"].mean
    ten = next(row for row in paper_figures.TABLE_3 if row.value == 10)
    one = next(row for row in paper_figures.TABLE_4 if row.value == 1)
    assert (ten.train, ten.test) == (one.train, one.test)
