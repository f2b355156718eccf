"""Training settings: presets parse, wrong values name the field, the range and the way out."""

from __future__ import annotations

import pytest

from apl_core.errors import ConfigError
from apl_train.training import config


@pytest.mark.parametrize("name", config.preset_names())
def test_every_preset_is_a_whole_configuration(name: str) -> None:
    made = config.from_dict(config.preset(name), origin=name)
    assert config.from_dict(made.to_dict()) == made


@pytest.mark.parametrize(("name", "plain"), [("miniature-guided", "fast"), ("sd15-guided", "sd15-fast")])
def test_guided_presets_change_one_setting(name: str, plain: str) -> None:
    found, without = (config.from_dict(config.preset(n)).to_dict() for n in (name, plain))
    assert {k: v for k, v in found.items() if v != without[k]} == {"guided_share": 0.5}


def test_paper_preset_says_what_the_paper_says() -> None:
    paper = config.from_dict(config.preset("paper"))
    assert (paper.num_tokens, paper.alpha, paper.learning_rate) == (10, 1.0, 1e-3)
    assert (paper.steps, paper.batch_size) == (20_000, 1)
    assert paper == config.TrainConfig()


@pytest.mark.parametrize(("field", "value"), [
    ("num_tokens", 0), ("num_tokens", 65), ("num_tokens", 2.5), ("num_tokens", True), ("steps", 0), ("steps", -1),
    ("batch_size", 0), ("alpha", float("nan")), ("alpha", "strong"), ("learning_rate", 0.0),
    ("learning_rate", float("inf")), ("id_share", 1.5), ("reg_weight", -1.0), ("schedule", "linear"),
    ("init", "zeros"), ("low_t", 1000), ("persons", 0), ("seed", -1), ("save_every", 0), ("placement", "middle"),
    ("timesteps", "late"), ("time_floor", 1.1), ("guided_share", -0.1), ("guided_low", 0.5), ("name_noise", 2.0),
    ("pseudo_share", float("nan")),
])
def test_a_wrong_value_is_named_with_the_way_out(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        config.from_dict({field: value})
    assert field in caught.value.message
    assert repr(value) in caught.value.message or str(value) in caught.value.message
    assert caught.value.hint and caught.value.field == field


def test_contradictions_are_refused() -> None:
    with pytest.raises(ConfigError, match="low_t"):
        config.TrainConfig(low_t=500, high_t=400)
    with pytest.raises(ConfigError, match="guided_low"):
        config.TrainConfig(guided_low=8.0, guided_high=4.0)
    with pytest.raises(ConfigError, match="no bank"):
        config.TrainConfig(timesteps="separability")
    with pytest.raises(ConfigError, match="nothing to train"):
        config.TrainConfig(no_reg=True, id_share=0.0)


def test_unknown_setting_future_version_and_not_settings() -> None:
    with pytest.raises(ConfigError, match="unknown setting 'learning_rat'"):
        config.from_dict({"learning_rat": 1})
    with pytest.raises(ConfigError, match="config_version"):
        config.from_dict({"config_version": 2})
    with pytest.raises(ConfigError):
        config.from_dict([1, 2])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="preset"):
        config.preset("papper")


def test_yaml_numbers_without_a_dot_are_numbers(tmp_path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("learning_rate: 1e-3\n")
    assert config.from_dict(config.read_yaml(file)).learning_rate == 1e-3
    file.write_text("steps: [1\n")
    with pytest.raises(ConfigError, match="not YAML"):
        config.read_yaml(file)
