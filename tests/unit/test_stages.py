"""The build of the miniature world, without its hours: which stages there are and in which order they are asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from apl_core.errors import ConfigError
from apl_train.commands import cli
from apl_train.miniworld import export, stages
from apl_train.miniworld.build import Build

WRITERS = {"export": "write_all", "dataset": "write_dataset", "family": "write_family"}


class Recorder:
    """Stands for a Build; keeps what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def render(self) -> None:
        self.asked.append("pictures")

    def __getattr__(self, name: str) -> None:
        self.asked.append(name)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    made = Recorder()
    for stage, writer in WRITERS.items():
        monkeypatch.setattr(export, writer, lambda build, assets, stage=stage: build.asked.append(f"{stage}:{assets}"))
    return made


def test_every_stage_is_a_part_of_a_build_or_a_writer() -> None:
    """A name that is neither would be found out after hours."""
    for stage in stages.STAGES:
        assert stage in {*WRITERS, "pictures"} or hasattr(Build, stage), stage


def test_stages_run_in_order_up_to_the_one_that_is_asked_for(recorder: Recorder, tmp_path: Path) -> None:
    stages.run_stages(recorder, "unet", tmp_path)
    assert recorder.asked == ["tokenizer", "pictures", "recogniser2", "left_out", "vae", "text", "latents", "unet"]
    recorder.asked.clear()
    stages.run_stages(recorder, assets=tmp_path)
    assert recorder.asked[-3:] == [f"export:{tmp_path}", f"dataset:{tmp_path}", f"family:{tmp_path}"]
    assert len(recorder.asked) == len(stages.STAGES)


def test_an_unknown_stage_is_named_before_anything_runs(recorder: Recorder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"until is 'unett'.*family") as error:
        stages.run_stages(recorder, "unett", tmp_path)
    assert error.value.field == "until" and recorder.asked == []


def test_the_command_says_so_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = tmp_path / "work"
    assert cli.main(["miniworld", "build", "--work", str(work), "--until", "unett"]) == 2
    assert "until is 'unett'" in capsys.readouterr().err and not work.exists()
