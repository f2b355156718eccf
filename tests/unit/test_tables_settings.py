"""Presets of the evaluation are read whole, and what is wrong in one is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apl_core.errors import ConfigError
from apl_train.tables import command
from apl_train.tables.settings import (
    TABLES,
    EvaluateSettings,
    ModelEntry,
    Size,
    check_there,
    from_dict,
    preset_names,
    read_settings,
)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_can_be_read_and_sizes_every_table(name: str) -> None:
    settings = read_settings(name)
    assert settings.name == name and set(settings.sizes) == set(TABLES)
    assert settings.models and all(isinstance(m, ModelEntry) for m in settings.models)
    assert json.loads(json.dumps(settings.to_dict())) == settings.to_dict()
    for table in ("table3", "table4", "fig8"):
        assert settings.size(table).values


def test_the_real_preset_is_the_papers_size() -> None:
    """Sec. 4.1 to 4.4: 100 persons, 4,000 faces, 30k neutral pictures, 50 newcomers, 800 iterations, every 100."""
    s = read_settings("sd15")
    assert s.size("table1").persons == 100
    assert s.size("table2").persons * s.size("table2").seeds == 4000 and s.size("table2").prompts == 30_000
    assert (s.size("fig5").persons, s.size("fig5").iterations, s.size("fig5").every) == (50, 800, 100)
    assert s.size("table3").values == (1, 5, 10, 20) and s.size("table4").values == (0, 0.5, 1, 2, 5)


def test_a_preset_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("steps: 7\nmodels:\n  - {name: a, checkpoint: a.safetensors}\nsizes:\n  table1: {persons: 3}\n")
    settings = read_settings(str(path))
    assert (settings.name, settings.steps, settings.size("table1").persons) == ("mine", 7, 3)
    assert settings.size("fig6") == Size() and settings.models[0].checkpoint == "a.safetensors"


@pytest.mark.parametrize(("values", "says"), [
    ({"stepz": 1}, "unknown setting 'stepz'"), ({"steps": 0}, "steps is 0"), ({"steps": 2.5}, "steps is 2.5"),
    ({"guidance": -1}, "guidance is -1"), ({"template": "a person"}, "without a place for the name"),
    ({"sizes": {"table9": {}}}, "sizes has"), ({"sizes": {"table1": {"persons": 0}}}, "persons is 0"),
    ({"sizes": {"table1": {"seeds": True}}}, "seeds is True"), ({"sizes": {"table1": {"size": 1}}}, "'size'"),
    ({"sizes": {"table1": {"splits": ["some"]}}}, "splits is"), ({"sizes": {"table1": 3}}, "holds 3"),
    ({"sizes": {"table3": {"values": ["many"]}}}, "values is"), ({"sizes": 3}, "sizes is 3"),
    ({"models": "sd15"}, "models is 'sd15'"), ({"models": [{"name": "a"}]}, "checkpoint"),
    ({"models": [{"name": "a", "checkpoint": "x"}, {"name": "a", "checkpoint": "y"}]}, "one name twice"),
    ([1], "holds list"),
])
def test_what_is_wrong_is_named(values: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        from_dict(values, "test")
    assert error.value.hint


@pytest.mark.parametrize(("preset", "says"), [("sd99", "preset is 'sd99'"), ("none.yaml", "Cannot read")])
def test_a_preset_that_is_not_there(preset: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=says):
        read_settings(preset)


def test_what_a_preset_names_has_to_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The preset `sd15` as it ships has none of its files: one message names them all, before a model is loaded."""
    monkeypatch.chdir(tmp_path)
    check_there(read_settings("miniature"), TABLES)
    with pytest.raises(ConfigError) as error:
        command.run("sd15", "table1", None, docs=False, say=pytest.fail)
    assert "checkpoint models/v1-5-pruned-emaonly.safetensors, persons data/persons." in error.value.message
    assert "sd15.yaml" in error.value.hint and "docs/evaluate.md" in error.value.hint and not list(tmp_path.iterdir())
    settings = from_dict({"persons": "people", "newcomers": "new", "s_id": "id", "s_reg": "reg"}, "test")
    (tmp_path / "people").mkdir()
    check_there(settings, ["table1", "table2", "fig6"])
    for tables, absent in ((["fig5"], "newcomers new."), (["table3"], "s_id id, s_reg reg."),
                           (["fig5", "loss"], "newcomers new, s_id id, s_reg reg.")):
        with pytest.raises(ConfigError) as error:
            check_there(settings, tables)
        assert error.value.message.endswith(absent)


def test_only_names_tables_in_the_papers_order() -> None:
    assert command.chosen_tables("") == list(TABLES)
    assert command.chosen_tables("fig6, table1") == ["table1", "fig6"]
    with pytest.raises(ConfigError, match="only has 'table7'"):
        command.chosen_tables("table1,table7")
    assert all(callable(command.measure_of(table)) for table in TABLES)
    with pytest.raises(ConfigError, match="only has 'x'"):
        command.measure_of("x")


def test_settings_without_a_preset_are_the_miniatures() -> None:
    assert EvaluateSettings().checkpoint == "miniature"
