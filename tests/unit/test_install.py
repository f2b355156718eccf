"""install.py: silent in a host, a private environment otherwise, commands as lists, and nothing done twice."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The files that a host finds in the repository's root."""
    root = tmp_path / "repo"
    root.mkdir()
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy2(path, root)
    return root


@pytest.fixture
def install(copy: Path) -> ModuleType:
    """The module, living in the copy."""
    spec = importlib.util.spec_from_file_location("apl_install_under_test", copy / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tree(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in folder.rglob("*")
    }


def start(root: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    argv = [sys.executable, "-B", str(root / "install.py"), *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, cwd=root.parent,
                          env={**os.environ, "COLUMNS": "100", **variables})


def test_without_arguments_nothing_changes(copy: Path) -> None:
    before = tree(copy.parent)
    done = start(copy, PYTHONPATH=str(copy), APL_TORCH="torch==0.0.0")
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    assert "nothing to install" in done.stdout and tree(copy.parent) == before


@pytest.mark.parametrize("argument", ["gui", "--demo", "DEMO", "."])
def test_unknown_arguments_end_in_usage(copy: Path, argument: str) -> None:
    before = tree(copy.parent)
    done = start(copy, argument)
    assert done.returncode == 2 and "usage: install.py" in done.stderr and "{demo,test,ui}" in done.stderr
    assert tree(copy.parent) == before


def test_help_names_purposes_and_variables(copy: Path) -> None:
    done = start(copy, "--help")
    assert done.returncode == 0 and tree(copy).keys() == {path.name for path in copy.iterdir()}
    for word in ("demo", "test", "ui", ".venv", "APL_TORCH", "PIP_INDEX_URL"):
        assert word in done.stdout


def test_an_old_python_gets_one_line(install: ModuleType, monkeypatch, capsys) -> None:
    monkeypatch.setattr(install.sys, "version_info", (3, 9, 18))
    monkeypatch.setattr(install.subprocess, "run", None)
    assert install.main(["demo"]) == 1
    out = capsys.readouterr().out
    assert "needs Python 3.10 or newer" in out and out.count("\n") == 1
    assert install.main([]) == 0


def test_an_old_python_can_read_the_file() -> None:
    ast.parse((ROOT / "install.py").read_text(encoding="utf-8"), feature_version=(3, 7))


def test_the_oldest_python_is_that_of_the_project(install: ModuleType) -> None:
    oldest = re.search(r'requires-python = ">=(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert (int(oldest[1]), int(oldest[2])) == install.OLDEST


def test_the_extras_exist(install: ModuleType) -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extras in install.EXTRAS.values():
        for extra in extras.split(","):
            assert re.search(rf"^{extra} = \[", text, re.MULTILINE), extra


def test_constraints_pin_one_version_for_every_python() -> None:
    """Each line is NAME==VERSION, perhaps with a marker; torch is the user's choice."""
    seen: dict[str, list[str]] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            found = re.fullmatch(r"([a-z0-9-]+)==[0-9][0-9a-z.]*(?:; (python_version (?:<|>=) \"3\.11\"))?", line)
            assert found, line
            seen.setdefault(found[1], []).append(found[2] or "")
    assert "torch" not in seen and {"numpy", "diffusers", "transformers", "pytest", "gradio"} <= set(seen)
    for name, markers in seen.items():
        assert len(set(markers)) == len(markers) and (len(markers) == 1 or "" not in markers), name


def test_pip_commands_are_lists(install: ModuleType) -> None:
    pip = ["py", "-m", "pip", "install", "--disable-pip-version-check", "--no-compile",
           "--constraint", "constraints.txt"]
    whole = [*pip, "--editable"]
    assert install.pip_commands(Path("py"), "demo", "", "") == [[*whole, ".[demo]"]]
    hostile = "torch==2.13.0; rm -rf $HOME"
    assert install.pip_commands(Path("py"), "test", hostile, "") == [[*pip, hostile], [*whole, ".[demo,dev]"]]
    assert install.pip_commands(Path("py"), "demo", "", "https://index") == [
        [*pip, "torch", "--extra-index-url", "https://index"], [*whole, ".[demo]"]
    ]


def test_what_is_started(install: ModuleType) -> None:
    assert install.command_of(Path("py"), "demo", ["--out", "a b"]) == ["py", "-m", "apl_train", "demo", "--out", "a b"]
    assert install.command_of(Path("py"), "ui", ["--port", "1"]) == ["py", "-m", "apl_train", "ui", "--port", "1"]
    assert install.command_of(Path("py"), "test", ["-q", "--help"]) == ["py", "-m", "pytest", "-q", "--help"]


def test_exit_codes_and_environment_of_children(install: ModuleType, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", "/of/a/host")
    code = "import os, sys; sys.exit(40 + ('PYTHONPATH' in os.environ))"
    assert install.run([sys.executable, "-c", code], cwd=tmp_path) == 40
    if os.name != "nt":
        assert install.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 15)"]) == 143


class Machine:
    """Stands for the machine: records commands; a `venv` command makes the interpreter that later ones find."""

    def __init__(self, install: ModuleType, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.commands: list[tuple[list[str], Path | None]] = []
        self.codes: dict[str, int] = {}
        self.python = install.venv_python(root / ".venv")
        self.version = "3.11.7"
        monkeypatch.setattr(install, "run", self.run)
        monkeypatch.setattr(install, "version_of", lambda python: self.version if python.exists() else "")
        monkeypatch.setattr(install, "is_reachable", lambda url: False)
        monkeypatch.delenv("APL_TORCH", raising=False)

    def run(self, argv: list[str], cwd: Path | None = None) -> int:
        if argv[1] == "-c":  # the question whether pip is there
            return 0
        self.commands.append((argv, cwd))
        if argv[1:3] == ["-m", "venv"]:
            self.python.parent.mkdir(parents=True)
            self.python.touch()
        return self.codes.get(argv[2], 0)

    def take(self) -> list[str]:
        """The modules started since the last call."""
        taken, self.commands = [argv[2] for argv, _ in self.commands], []
        return taken


@pytest.fixture
def machine(install: ModuleType, copy: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(install, copy, monkeypatch)


def test_the_first_run_installs_and_the_second_starts_at_once(
    install: ModuleType, machine: Machine, copy: Path, capsys
) -> None:
    machine.codes["apl_train"] = 7
    assert install.main(["demo", "--steps", "5"]) == 7
    (venv, _), (pip, pip_folder), (demo, demo_folder) = machine.commands
    assert venv == [sys.executable, "-m", "venv", str(copy / ".venv")]
    assert pip[0] == str(machine.python) and pip[-1] == ".[demo]" and pip_folder == copy
    assert demo == [str(machine.python), "-m", "apl_train", "demo", "--steps", "5"] and demo_folder is None
    lines = capsys.readouterr().out.splitlines()
    assert [line[:5] for line in lines] == ["[1/2]"] * 2 + ["[2/2]"] * 2 and lines[3].endswith(" s.")
    machine.take()
    assert install.main(["demo"]) == 7 and machine.take() == ["apl_train"] and capsys.readouterr().out == ""


@pytest.mark.parametrize("change", ["pyproject.toml", "constraints.txt", "python", "torch", "moved", "spoiled stamp"])
def test_a_change_installs_again(
    install: ModuleType, machine: Machine, copy: Path, monkeypatch, change: str
) -> None:
    install.main(["demo"])
    machine.take()
    stamp = copy / ".venv" / "apl-demo.stamp"
    if change == "python":
        machine.version = "3.12.1"
    elif change == "torch":
        monkeypatch.setenv("APL_TORCH", "torch==2.13.0")
    elif change == "moved":  # as when the folder was copied: the installation points at the old place
        shutil.copytree(copy, copy.parent / "old")
        stamp.write_text(install.fingerprint(copy.parent / "old", "3.11.7") + "\n\n")
    elif change == "spoiled stamp":
        stamp.write_bytes(b"\xff")
    else:
        with (copy / change).open("a") as handle:
            handle.write("# changed\n")
    install.main(["demo"])
    assert machine.take() == ["pip"] * (2 if change == "torch" else 1) + ["apl_train"]
    install.main(["demo"])
    assert machine.take() == ["apl_train"]


def test_any_torch_will_do_when_none_is_asked_for(install: ModuleType, machine: Machine, monkeypatch) -> None:
    monkeypatch.setenv("APL_TORCH", "torch==2.13.0")
    install.main(["demo"])
    assert machine.take() == ["venv", "pip", "pip", "apl_train"]
    monkeypatch.delenv("APL_TORCH")
    install.main(["demo"])
    assert machine.take() == ["apl_train"]


def test_the_two_purposes_have_stamps_of_their_own(install: ModuleType, machine: Machine, copy: Path) -> None:
    assert install.main(["test", "-k", "x"]) == 0
    assert machine.commands[-1] == ([str(machine.python), "-m", "pytest", "-k", "x"], copy)
    assert machine.take() == ["venv", "pip", "pytest"]
    install.main(["demo"])
    assert machine.take() == ["pip", "apl_train"]


def test_a_failed_installation_starts_nothing_and_is_tried_again(install: ModuleType, machine: Machine, capsys) -> None:
    machine.codes["pip"] = 3
    assert install.main(["demo"]) == 3 and machine.take() == ["venv", "pip"]
    assert "run the same command again" in capsys.readouterr().out
    machine.codes.clear()
    assert install.main(["demo"]) == 0 and machine.take() == ["pip", "apl_train"]


def test_a_failed_environment_says_how_on(install: ModuleType, machine: Machine, capsys) -> None:
    machine.codes["venv"] = 1
    assert install.main(["test"]) == 1 and machine.take() == ["venv"]
    assert "apt install python3-venv" in capsys.readouterr().out


def test_an_environment_of_an_old_python_is_refused(install: ModuleType, machine: Machine, capsys) -> None:
    machine.version = "3.9.18"
    assert install.main(["demo"]) == 1 and machine.take() == ["venv"]
    assert "too old: delete that folder" in capsys.readouterr().out


def test_an_interruption_ends_in_one_line(install: ModuleType, machine: Machine, monkeypatch, capsys) -> None:
    def interrupt(argv: list[str], cwd: Path | None = None) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(install, "run", interrupt)
    assert install.main(["demo"]) == 130 and "goes on from there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("platform", "tool", "driver", "expected"),
    [("linux", False, False, True), ("linux", True, False, False), ("linux", False, True, False),
     ("win32", False, False, False), ("darwin", False, False, False)],
)
def test_only_linux_without_an_nvidia_gpu_wants_the_cpu_build(
    install: ModuleType, monkeypatch, tmp_path: Path, platform: str, tool: bool, driver: bool, expected: bool
) -> None:
    monkeypatch.setattr(install, "sys", SimpleNamespace(platform=platform))
    monkeypatch.setattr(install, "shutil", SimpleNamespace(which=lambda name: f"/bin/{name}" if tool else None))
    monkeypatch.setattr(install, "NVIDIA_DRIVER", tmp_path if driver else tmp_path / "none")
    assert install.wants_cpu_torch() is expected


@pytest.mark.parametrize(
    ("wanted", "torch", "reachable", "expected"),
    [(True, "", True, True), (True, "", False, False), (True, "torch==2.13.0", True, False), (False, "", True, False)],
)
def test_the_cpu_index_is_used_only_where_wanted_and_reachable(
    install: ModuleType, machine: Machine, monkeypatch, wanted: bool, torch: str, reachable: bool, expected: bool
) -> None:
    monkeypatch.setattr(install, "wants_cpu_torch", lambda: wanted)
    monkeypatch.setattr(install, "is_reachable", lambda url: reachable)
    monkeypatch.setenv("APL_TORCH", torch)
    install.main(["demo"])
    assert any("--extra-index-url" in argv for argv, _ in machine.commands) is expected


def test_reachable_means_an_answer(install: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "page").write_text("x")
    assert install.is_reachable((tmp_path / "page").as_uri())
    assert not install.is_reachable((tmp_path / "none").as_uri())
    assert not install.is_reachable("http://127.0.0.1:9/none") and not install.is_reachable("no address")


@pytest.mark.timeout(900)  # some seconds on an idle machine, minutes on a loaded one
@pytest.mark.skipif(os.name == "nt", reason="makes links")
def test_a_real_environment_is_made_kept_and_mended(install: ModuleType, tmp_path: Path, capfd) -> None:
    """Slow for this file (a few seconds): nothing here is recorded instead of run."""
    venv = tmp_path / "env"
    python = install.venv_python(venv)
    version = install.make_venv(venv)
    assert version == ".".join(map(str, sys.version_info[:3]))
    (venv / "mine.txt").write_text("kept")
    assert install.make_venv(venv) == version and (venv / "mine.txt").exists()
    for link in python.parent.glob("python*"):
        link.unlink()
        link.symlink_to("/nowhere/python3")
    assert install.version_of(python) == ""
    assert install.make_venv(venv) == version and not (venv / "mine.txt").exists()


def test_a_folder_that_is_no_environment_is_not_emptied(install: ModuleType, machine: Machine, copy: Path) -> None:
    (copy / ".venv").mkdir()
    (copy / ".venv" / "mine.txt").write_text("kept")
    install.main(["demo"])
    assert machine.commands[0][0] == [sys.executable, "-m", "venv", str(copy / ".venv")]


def test_no_shell_is_ever_started() -> None:
    calls = [node for node in ast.walk(ast.parse((ROOT / "install.py").read_text(encoding="utf-8")))
             if isinstance(node, ast.Call)]
    started = [call for call in calls if ast.unparse(call.func).startswith(("subprocess.", "os.system", "os.popen"))]
    assert {ast.unparse(call.func) for call in started} == {"subprocess.run"}
    assert not [keyword for call in started for keyword in call.keywords if keyword.arg == "shell"]
