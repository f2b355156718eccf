"""What the page can do, without a page: starting, stopping, using, publishing, and refusing where others reach it."""

from __future__ import annotations

import inspect
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from apl_core.metadata import PrefixMetadata
from apl_core.prefix import AnonymizationPrompt, load_prefix, save_prefix
from apl_train.training.config import TrainConfig, from_dict, preset, preset_names
from apl_train.ui import alone, commands, jobs
from apl_train.ui.commands import MINIATURE, Wish
from apl_train.ui.desk import BAD, GOOD, NOTE, Desk
from apl_train.ui.place import NOT_ALLOWED, Place, is_loopback


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A desk whose jobs are marked as started, but run nothing."""
    monkeypatch.setattr(jobs, "start", lambda job: (job.folder / "started.json").write_text(
        json.dumps({"time": time.time()})))
    return Desk(Place(runs=tmp_path / "runs", embeddings=tmp_path / "embeddings", host_embeddings=tmp_path / "host",
                      python=sys.executable))


def closed(desk: Desk) -> Desk:
    place = desk.place
    return Desk(Place(runs=place.runs, embeddings=place.embeddings, python=place.python, may_start=False))


def finish(run: Path, code: int) -> None:
    newest = sorted((run / "jobs").iterdir())[-1]
    (newest / "exit.json").write_text(json.dumps({"code": code, "time": time.time()}))


def test_start_queues_the_command_that_is_shown(desk: Desk) -> None:
    wish = Wish(name="first", steps=50, previews=2)
    shown = shlex.split(commands.shown(commands.train(wish, desk.folder_for("first"))))
    said = desk.start(wish)
    assert (said.tone, said.run) == (GOOD, "first-01")
    job = desk.run("first-01").job
    assert list(job.argv) == [sys.executable, "-m", "apl_train", *shown[1:]]
    assert desk.selected == "first-01" and job.state == jobs.RUNNING


def test_a_second_start_waits_and_says_for_what(desk: Desk) -> None:
    desk.start(Wish(name="a"))
    said = desk.start(Wish(name="a"))
    assert said.run == "a-02" and "waits until a-01 is done" in said.text
    assert [job.run.name for job in desk.queue.waiting()] == ["a-01", "a-02"]


@pytest.mark.parametrize("name", ["", "../x", "a/b", "con", "x" * 200, "a\x00b"])
def test_a_name_that_is_no_file_name_is_told(desk: Desk, name: str) -> None:
    said = desk.start(Wish(name=name))
    assert said.tone == BAD and "name" in said.text and not desk.place.runs.exists()


def test_stop_saves_first_and_ends_at_the_second_time(desk: Desk) -> None:
    desk.start(Wish(name="a"))
    job = desk.run("a-01").job
    assert desk.stop("a-01").tone == GOOD and job.control == "stop"
    assert desk.stop("a-01").tone == NOTE and job.control == "kill"
    finish(job.run, -9)
    assert desk.run("a-01").state == jobs.STOPPED and desk.stop("a-01").tone == NOTE


def test_a_waiting_run_is_taken_out_by_stop_and_can_be_hastened(desk: Desk) -> None:
    for name in "abc":
        desk.start(Wish(name=name))
    assert desk.hasten("c-01").tone == GOOD
    assert [job.run.name for job in desk.queue.waiting()] == ["a-01", "c-01", "b-01"]
    assert "taken out" in desk.stop("c-01").text
    assert [job.run.name for job in desk.queue.waiting()] == ["a-01", "b-01"]
    assert desk.hasten("a-01").tone == NOTE


def test_pause_and_go_on(desk: Desk) -> None:
    desk.start(Wish(name="a"))
    job = desk.run("a-01").job
    desk.pause("a-01")
    assert job.control == "pause" and desk.run("a-01").state == "paused"
    desk.pause("a-01")
    assert job.control == "" and desk.run("a-01").state == jobs.RUNNING
    desk.stop("a-01")
    assert desk.pause("a-01").tone == NOTE and job.control == "stop"


def test_resume_adds_a_job_to_the_same_run(desk: Desk) -> None:
    desk.start(Wish(name="a"))
    assert desk.resume("a-01").tone == NOTE  # it runs
    finish(desk.place.runs / "a-01", 9)
    assert desk.again(desk.run("a-01")) and desk.resume("a-01").tone == GOOD
    run = desk.run("a-01")
    assert [job.kind for job in run.jobs] == ["train", "resume"] and run.state == jobs.RUNNING
    assert run.job.argv[3:] == ("resume", str(desk.place.runs / "a-01"))


@pytest.mark.parametrize("name", ["", None, "none", "../..", "a\x00"])
def test_a_run_that_is_not_there_is_told(desk: Desk, name: Any) -> None:
    for action in (desk.stop, desk.pause, desk.resume, desk.hasten):
        assert action(name).tone == BAD
    assert desk.run(name) is None


def test_the_choice_survives_a_restart_and_a_deleted_run(desk: Desk) -> None:
    desk.start(Wish(name="a"))
    desk.start(Wish(name="b"))
    desk.select("a-01")
    desk.select("no such run")
    assert Desk(desk.place).selected == "a-01"
    for file in sorted((desk.place.runs / "a-01").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    (desk.place.runs / "a-01").rmdir()
    assert Desk(desk.place).selected == "b-01"


def test_where_others_reach_the_page_nothing_is_started_and_no_folder_taken(desk: Desk, tmp_path: Path) -> None:
    desk.start(Wish(name="a"))
    there = closed(desk)
    for said in (there.start(Wish()), there.resume("a-01"), there.stop("a-01"), there.pause("a-01"),
                 there.hasten("a-01"), there.check(Wish(s_id=str(tmp_path)))):
        assert (said.tone, said.text) == (BAD, NOT_ALLOWED)
    assert desk.run("a-01").job.control == ""
    with pytest.raises(Exception, match="listens beyond"):
        there.data_folder("s_id", str(tmp_path))
    assert there.data_folder("s_id", MINIATURE).name == "s_id"


def test_every_action_that_starts_something_is_guarded() -> None:
    """`use` too: whoever can replace a prefix by its name can take a server's protection away."""
    actions = {name for name, method in inspect.getmembers(Desk, inspect.isfunction)
               if str(inspect.signature(method).return_annotation) == "Said" and not name.startswith("_")}
    refusing = {name for name in actions if "_guarded" in inspect.getsource(getattr(Desk, name))}
    assert actions == refusing and {"start", "make", "draw", "use", "publish"} <= actions


@pytest.mark.parametrize(("address", "inside"), [
    ("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
    ("", False), (None, False), ("192.168.1.5", False), ("example.org", False), ("localhost.example.org", False)])
def test_loopback(address: str | None, inside: bool) -> None:
    assert is_loopback(address) is inside


def trained(desk: Desk) -> AnonymizationPrompt:
    desk.start(Wish(name="a"))
    run = desk.place.runs / "a-01"
    (run / "config.yaml").write_text("steps: 8\n")
    vectors = {"emb_params": torch.randn(2, 768, generator=torch.Generator().manual_seed(0))}
    prompt = AnonymizationPrompt("sd1", vectors, PrefixMetadata(title="a", family="sd1", num_tokens=2))
    save_prefix(prompt, run / "prefix" / "a.safetensors")
    save_prefix(prompt, run / "prefix" / "a.step-4.safetensors")
    return prompt


def test_use_and_publish(desk: Desk) -> None:
    prompt = trained(desk)
    assert desk.prefixes() == ["a-01 @ 8", "a-01 @ 4"] and desk.metadata("a-01 @ 8")["title"] == "a"
    assert desk.use("a-01 @ 4", "mine", False).tone == GOOD
    for folder in desk.folders():
        assert load_prefix(folder / "mine.safetensors", enforce=True).content_hash == prompt.content_hash
    said = desk.publish("a-01 @ 8", "My / title", "me", "MIT", "")
    out = desk.place.runs / "a-01" / "published" / "My-title.safetensors"
    assert said.tone == GOOD and load_prefix(out, enforce=True).meta.license == "MIT"
    assert desk.use("a-01 @ 4", "../mine", False).tone == BAD and desk.publish("a-01 @ 8", "", "", "", "").tone == BAD


@pytest.mark.parametrize("choice", [None, "", "a-01", "a-01 @ 5", "a-01 @ x", "../a-01 @ 8", "b @ 8"])
def test_a_prefix_that_is_not_there_is_told(desk: Desk, choice: Any) -> None:
    trained(desk)
    assert desk.use(choice, "mine", False).tone == BAD and desk.metadata(choice) == {}
    assert not (desk.place.embeddings).exists()


def test_the_commands_are_ones_that_the_command_line_takes(desk: Desk, tmp_path: Path) -> None:
    from apl_train.commands import cli

    wish = Wish(name="a b", checkpoint="/models/m.safetensors", s_id="x", s_reg="y", steps=60, previews=3)
    top, _ = cli._parsers(from_dict(preset("fast")).to_dict())
    args = top.parse_args(commands.train(wish, tmp_path / "run")).train
    config = from_dict({k: v for k, v in vars(args).items() if k in TrainConfig.__dataclass_fields__})
    assert (config.name, config.base_model, config.s_id, config.s_reg) == ("a b", "/models/m.safetensors", "x", "y")
    assert (config.steps, config.levels_every, config.previews, config.batch_size) == (60, 12, 3, 8)
    for words in (commands.resume(tmp_path), commands.score(tmp_path / "p", "miniature", tmp_path / "s.json"),
                  commands.use(tmp_path / "p", [tmp_path, tmp_path], "n"),
                  commands.publish(tmp_path / "p", tmp_path / "o", "t", "", "MIT", ""), commands.validate(wish),
                  *commands.generate(Wish(people="p.csv", limit=3), tmp_path), *commands.generate(wish, tmp_path)):
        assert top.parse_args(words)


def test_make_takes_the_wish_as_it_is(tmp_path: Path) -> None:
    from apl_train.commands import cli
    from apl_train.make.settings import MakeSettings

    top, _ = cli._parsers({})

    def settings(wish: Wish, host: Path | None) -> MakeSettings:
        args = top.parse_args(commands.make(wish, tmp_path / "r", tmp_path / "e", host)).make
        values = {k: getattr(args, k) for k in MakeSettings.__dataclass_fields__}
        return MakeSettings(**values | {"host": tuple(values["host"])})

    drawn = settings(Wish("n", "/m.safetensors", "", "", "sd15-fast", 60, 2, "p.csv", 5, 3, 40), tmp_path / "h")
    assert (drawn.name, drawn.checkpoint, drawn.preset, drawn.steps) == ("n", "/m.safetensors", "sd15-fast", 60)
    assert (drawn.people, drawn.limit, drawn.each, drawn.neutral, drawn.s_id) == ("p.csv", 5, 3, 40, "")
    assert (drawn.host, drawn.embeddings, drawn.previews) == ((str(tmp_path / "h"),), str(tmp_path / "e"), 2)
    given = settings(Wish(), None)
    assert Path(given.s_id).is_dir() and Path(given.s_reg).is_dir() and given.host == ()


def test_every_preset_can_be_chosen_for_the_checkpoint_that_it_is_for() -> None:
    found = commands.presets()
    assert sorted(p.name for p in found) == preset_names() and all(p.about and p.steps > 0 for p in found)
    for p in found:
        assert p.steps == from_dict(preset(p.name)).steps
    small, large = commands.presets_for(found, MINIATURE), commands.presets_for(found, "/m.safetensors")
    assert sorted([*small, *large]) == preset_names() and small[0] == "fast" and "paper" in large


def test_checkpoints_are_found_in_their_folders(tmp_path: Path) -> None:
    for name in ("b.safetensors", "a/c.safetensors", "d/model_index.json", "d/unet.safetensors", "e.ckpt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = Place(checkpoints=(tmp_path, tmp_path / "none")).models()
    assert found == [MINIATURE, str(tmp_path / "b.safetensors"), str(tmp_path / "a" / "c.safetensors"),
                     str(tmp_path / "d")]


def test_credentials_come_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(alone.AUTH, raising=False)
    assert alone.credentials() is None
    monkeypatch.setenv(alone.AUTH, "me:a:b")
    assert alone.credentials() == ("me", "a:b")
    monkeypatch.setenv(alone.AUTH, "me")
    with pytest.raises(Exception, match="user:password"):
        alone.credentials()
