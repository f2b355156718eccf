"""The command line: help for everything, one JSON object on request, errors with a way out and never a traceback."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from apl_core.metadata import PrefixMetadata
from apl_core.prefix import AnonymizationPrompt, load_prefix, save_prefix
from apl_train import claims
from apl_train.commands import cli
from apl_train.training import config as configs


def squeezed(text: str) -> str:
    """Without any space: help is wrapped, at hyphens too."""
    return "".join(text.split())


def vectors(m: int = 3, width: int = 768) -> torch.Tensor:
    return torch.randn(m, width, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    meta = PrefixMetadata(title="mine", alpha=0.5, base_model="some model", steps=40, level=20, seed=7,
                          scores={"set": {"mean": 0.25}})
    save_prefix(AnonymizationPrompt("sd1", {"emb_params": vectors()}, meta), tmp_path / "mine.safetensors")
    return tmp_path / "mine.safetensors"


def failed(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and message of a command that must fail without printing a result or a traceback."""
    try:
        code = cli.main(argv)
    except SystemExit as stopped:  # the parser's own way for wrong options
        code = stopped.code
    said = capsys.readouterr()
    assert said.out == "" and "Traceback" not in said.err
    assert "error: " in said.err
    return code, said.err


# -- help ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    assert squeezed(cli.COMMANDS[command][1:]) in squeezed(said) and "--json" in said
    assert hasattr(cli, f"_run_{command}")


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_fits_a_terminal_and_speaks_to_people(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main([*filter(None, [command]), "--help"])
    said = capsys.readouterr().out
    assert max(map(len, said.partition("\n\n")[2].splitlines())) <= 80  # argparse cannot break the usage's choices
    for odd in ("<class", "default: null", "default: None", "default: )", "default: [", "__post_init__"):
        assert odd not in said


def test_help_tells_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    listed = capsys.readouterr().out.partition("exit codes:")[2].split("\n")
    assert [int(line.split()[0]) for line in listed if line[:3].strip()] == [0, 2, 3, 4, 5, 6, 7, 8, 9, 130]


@pytest.mark.parametrize("error", [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError(),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"),
])
def test_memory_that_runs_out_anywhere_is_told(
    error: BaseException, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_args: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "_run_doctor", full)
    assert cli.main(["doctor"]) == 9
    assert "sd15-8gb" in capsys.readouterr().err


def test_other_errors_of_the_libraries_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_args: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(cli, "_run_doctor", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        cli.main(["doctor"])


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    said = squeezed(capsys.readouterr().out)
    assert stopped.value.code == 0
    assert all(squeezed(command + about) in said for command, about in cli.COMMANDS.items())


def test_help_of_train_is_the_settings_own_words(capsys: pytest.CaptureFixture[str]) -> None:
    """Compared with the source's text, so that a setting without help is seen."""
    (body,) = [node.body for node in ast.parse(inspect.getsource(configs)).body
               if isinstance(node, ast.ClassDef) and node.name == "TrainConfig"]
    about = {a.target.id: ast.literal_eval(b.value) for a, b in itertools.pairwise(body)
             if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)}
    assert set(about) == set(configs.TrainConfig.__dataclass_fields__)
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    said = squeezed(capsys.readouterr().out)
    for field, words in about.items():
        assert f"--{field}" in said and squeezed(words) in said, field


def test_the_preset_gives_the_defaults_and_options_override_them() -> None:
    for argv in (["train", "--preset", "paper", "--alpha", "2"], ["train", "--alpha=2", "--preset=paper"]):
        parsed = cli._parsers(cli._preset_of(argv))[0].parse_args(argv)
        assert cli._train_config(parsed.train) == configs.TrainConfig(alpha=2.0)
    fast = cli._parsers(cli._preset_of(["train"]))[0].parse_args(["train"])
    assert cli._train_config(fast.train) == configs.from_dict(configs.preset("fast"))


# -- what is wrong is said with a way out -------------------------------------------------------------------------

@pytest.mark.parametrize(("argv", "code", "message", "way_out"), [
    (["train", "--preset", "nope"], 2, "preset is 'nope'", "fast, miniature, miniature-guided"),
    (["train", "--preset=nope"], 2, "preset is 'nope'", "fast, miniature, miniature-guided"),
    (["train", "--steps", "0"], 2, "steps is 0", "from 1 to"),
    (["train", "--schedule", "linear"], 2, "schedule is 'linear'", "constant, cosine"),
    (["resume", "nowhere"], 2, "nowhere holds no training", "apl train"),
    (["inspect", "nope"], 3, "no prefix named 'nope'", "There are"),
    (["inspect", "nope@12"], 3, "no prefix named 'nope'", "There are"),
    (["inspect", "nowhere.safetensors"], 3, "nowhere.safetensors does not exist", "Check the name"),
    (["sample", "--prefix", "nope", "--prompt", "a"], 3, "no prefix named 'nope'", "There are"),
    (["convert", "nowhere.pt", "--out", "a.safetensors"], 3, "nowhere.pt", ""),
    (["claims", "--rerun", "nope"], 2, "claim is 'nope'", "base-id-acc"),
])
def test_wrong_values(
    argv: list[str], code: int, message: str, way_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    found, said = failed(argv, capsys)
    assert found == code and message in said and way_out in said
    first, _, hint = said.partition("\n")
    assert first.startswith("error: ") and hint.strip(), "a message and its way out"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("argv", "words"), [
    ([], "command"), (["nope"], "'nope'"), (["train", "--nope", "3"], "--nope"),
    (["train", "--steps", "many"], "steps"), (["train", "--preset"], "--preset"),
    (["sample", "--prefix", "x"], "prompt"), (["miniworld", "nope"], "'nope'"),
    (["convert", "a.pt"], "out"), (["inspect"], "file"), (["score", "--seeds", "x"], "seeds"),
])
def test_wrong_options_are_usage_errors(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = failed(argv, capsys)
    assert code == 2
    assert words in said.partition("error: ")[2] and "--help" in said


def test_a_training_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "config.yaml").write_text("steps: 3\n")
    (tmp_path / "state" / "step-0000002.safetensors").write_bytes(b"anything")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    code, said = failed(["train", "--run", str(tmp_path)], capsys)
    assert code == 2 and "already holds a training" in said and f"apl resume {tmp_path}" in said
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_finished_training_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prefix").mkdir()
    assert failed(["train", "--run", str(tmp_path)], capsys)[0] == 2


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    argv = ["train", "--base_model", str(tmp_path / "nowhere.safetensors"), "--run", str(tmp_path / "run")]
    for _ in range(2):  # a start that failed is no training: the next one is not refused
        code, said = failed(argv, capsys)
        assert code == 6 and "nowhere.safetensors" in said


def test_a_missing_package_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_args: object) -> None:
        raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers")

    monkeypatch.setattr(cli, "_run_doctor", fail)
    code, said = failed(["doctor"], capsys)
    assert code == 2 and "diffusers is not installed" in said and "pip install" in said


@pytest.fixture
def broken_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torchvision of another build than torch: it is found, and importing it raises."""
    (tmp_path / "site" / "torchvision").mkdir(parents=True)
    (tmp_path / "site" / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')\n")
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))


@pytest.mark.parametrize("error", [
    ModuleNotFoundError("Could not import module 'BloomPreTrainedModel'. Are this object's requirements defined?"),
    RuntimeError("Failed to import diffusers.models because of the following error"),
], ids=["transformers", "diffusers"])
def test_a_package_that_breaks_the_libraries_is_named(
    error: Exception, broken_torchvision: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_args: object) -> None:
        raise error

    monkeypatch.setattr(cli, "_run_claims", fail)
    code, said = failed(["claims"], capsys)
    assert code == 2 and "torchvision" in said and "does not belong to torch" in said and "Bloom" not in said
    assert "pip uninstall torchvision" in said and "apl doctor" in said


def test_doctor_names_it_too(broken_torchvision: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("broken: ")]
    assert len(said) == 1 and "torchvision::nms" in said[0] and "pip uninstall torchvision" in said[0]


def test_other_import_errors_of_the_libraries_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_args: object) -> None:
        raise RuntimeError("Failed to import diffusers.models because of the following error")

    monkeypatch.setattr(cli, "_run_claims", fail)
    monkeypatch.setattr("apl_train.commands.doctor.misfits", dict)
    with pytest.raises(RuntimeError, match="Failed to import"):
        cli.main(["claims"])


def test_ctrl_c_ends_quietly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run_doctor", interrupt)
    assert cli.main(["doctor"]) == 130
    assert "Traceback" not in capsys.readouterr().err


# -- commands that need no model ----------------------------------------------------------------------------------

def test_inspect(prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(prefix)]) == 0
    said = capsys.readouterr().out
    assert "mine" in said and "some model" in said and load_prefix(prefix).content_hash in said
    assert cli.main(["inspect", str(prefix), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = {"file": str(prefix), "title": "mine", "family": "sd1", "num_tokens": 3, "alpha": 0.5, "steps": 40,
                "level": 20, "seed": 7, "widths": {"emb_params": 768}, "scores": {"set": {"mean": 0.25}}}
    assert {k: found[k] for k in expected} == expected


def test_inspect_of_a_file_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"no prefix")
    code, said = failed(["inspect", str(tmp_path / "bad.safetensors")], capsys)
    assert code == 3 and "bad.safetensors" in said


def test_convert_reads_a_pickle_of_the_paper(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paper = {"string_to_token": {"alz": torch.tensor(265)}, "string_to_param": {"alz": vectors()}}
    torch.save(paper, tmp_path / "a.pt")
    out = tmp_path / "out.safetensors"
    assert cli.main(["convert", str(tmp_path / "a.pt"), "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["file"] == str(out) and found["content_hash"] == load_prefix(out).content_hash
    assert torch.equal(load_file(out)["emb_params"], vectors())


@pytest.mark.parametrize(("to", "key"), [("a1111", "emb_params"), ("kohya", "emb_params"), ("diffusers", "<mine>")])
def test_convert_writes_for_other_tools(
    prefix: Path, to: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / f"{to}.safetensors"
    assert cli.main(["convert", str(prefix), "--out", str(out), "--to", to]) == 0
    assert str(out) in capsys.readouterr().out
    (found,) = load_file(out).items()
    assert found[0] == key and torch.equal(found[1], vectors())


@pytest.mark.parametrize(("to", "out", "words"), [
    ("nope", "a.safetensors", "no export target"), ("a1111", "a.pt", "does not end in .safetensors"),
    ("forge-flux", "a.safetensors", "no embedding of the family sd1"),
])
def test_convert_refuses(
    prefix: Path, to: str, out: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = failed(["convert", str(prefix), "--out", str(tmp_path / out), "--to", to], capsys)
    assert code == 3 and words in said and not (tmp_path / out).exists()


def test_convert_refuses_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"model.a": torch.ones(2, 2), "model.b": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    argv = ["convert", str(tmp_path / "model.safetensors"), "--out", str(tmp_path / "a.safetensors")]
    assert failed(argv, capsys)[0] == 3


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"] == metadata.version("torch") and found["cores"] > 0
    assert not set(found["packages"]) & {name for names in found["missing"].values() for name in names}
    assert cli.main(["doctor"]) == 0
    assert found["python"] in capsys.readouterr().out


def test_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(claims, "FILE", tmp_path / "claims.json")
    assert cli.main(["claims", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["claims"]
    assert [row["id"] for row in found] == list(claims.TARGETS)
    assert cli.main(["claims"]) == 0
    assert f"{len(claims.TARGETS)} not run" in capsys.readouterr().out
