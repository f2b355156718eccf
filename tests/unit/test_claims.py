"""Claims: a figure is held against its bound, written beside the others, and measured by a command that exists."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import re
import shlex
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from apl_core.errors import ConfigError, ScoreError, StorageError
from apl_core.prefix import load_prefix
from apl_train import claims
from apl_train.commands import cli

ROOT = Path(claims.__file__).resolve().parent.parent


@pytest.mark.parametrize(("bound", "measured", "expected"), [
    ("<= 0.2", 0.2, True), ("<= 0.2", 0.2001, False), ("<= 0.0", -0.1, True), (">= 0.60", 0.6, True),
    (">= 0.60", 0.5999, False), (">= 20", 20, True), (">= 20", 19, False), ("<= 0.2", None, None),
])
def test_holds(bound: str, measured: float | None, expected: bool | None) -> None:
    assert claims.holds(bound, measured) is expected


def test_every_bound_can_be_read() -> None:
    for key, target in claims.TARGETS.items():
        sign, value = target.bound.split(" ")
        assert sign in ("<=", ">="), key
        assert claims.holds(target.bound, float(value)) is True, key
        assert claims.holds(target.bound, float(value) + (1 if sign == "<=" else -1)) is False, key


def test_what_tests_and_benchmarks_record_are_targets() -> None:
    def shape(key: ast.expr | None) -> str:
        parts = key.values if isinstance(key, ast.JoinedStr) else [key]
        return "".join(re.escape(p.value) if isinstance(p, ast.Constant) else ".+" for p in parts)

    files = [f for folder in ("tests", "benchmarks", "apl_train") for f in (ROOT / folder).rglob("*.py")]
    wrong_on_purpose = ("test_claims.py", "test_tables_results.py")
    said = {(f.name, shape(key)) for f in files if f.name not in wrong_on_purpose
            for call in ast.walk(ast.parse(f.read_text(encoding="utf-8"))) if isinstance(call, ast.Call)
            and getattr(call.func, "attr", "") == "record" and call.args and isinstance(call.args[0], ast.Dict)
            for key in call.args[0].keys}
    assert len(said) > 30
    for name, wanted in said:
        assert any(re.fullmatch(wanted, target) for target in claims.TARGETS), (name, wanted)


def test_record_keeps_other_rows_and_the_order(tmp_path: Path) -> None:
    file = tmp_path / "claims.json"
    claims.record({"filler": (0.95, [0.9, 1.0], 32)}, file)
    claims.record({"base-id-acc": (0.5, None, 32), "on-test": (0.123456789, [0.1, 0.15], 32)}, file)
    rows = json.loads(file.read_text(encoding="utf-8"))
    assert [row["id"] for row in rows] == list(claims.TARGETS)
    known = {row["id"]: row for row in rows}
    assert known["filler"] == {
        "id": "filler", "issue": "main", "claim": claims.TARGETS["filler"].claim, "bound": ">= 0.90", "measured": 0.95,
        "ci95": [0.9, 1.0], "n": 32, "command": "apl miniworld card", "holds": True,
        "measured_on": {"world": known["filler"]["measured_on"]["world"]},
    }
    assert known["base-id-acc"]["holds"] is False and known["base-id-acc"]["ci95"] is None
    assert known["on-test"]["measured"] == 0.12346 and known["on-test"]["holds"] is True
    assert known["verification"]["holds"] is None and known["verification"]["measured"] is None
    claims.record({"filler": (None, None, None)}, file)
    assert claims.read(file)[list(claims.TARGETS).index("filler")]["holds"] is None


def test_commands_that_measure_beside_each_other_lose_no_row(tmp_path: Path) -> None:
    """Threads stand for processes: the lock is of the open file. A row unknown to this version is another's to keep."""
    file = tmp_path / "claims.json"
    file.write_text(json.dumps([{"id": "of a newer version", "measured": 3}]), encoding="utf-8")
    keys = list(claims.TARGETS)[:12]
    threads = [threading.Thread(target=claims.record, args=({key: (0.5, None, i + 1)}, file))
               for i, key in enumerate(keys)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = {row["id"]: row for row in json.loads(file.read_text(encoding="utf-8"))}
    assert [rows[key]["n"] for key in keys] == list(range(1, 13))
    assert rows["of a newer version"] == {"id": "of a newer version", "measured": 3}
    assert set(rows) - set(claims.TARGETS) == {"of a newer version"}


def test_a_folder_that_cannot_be_written_to_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StorageError, match="Cannot write"):
        claims.record({"filler": (0.95, None, 1)}, tmp_path / "file" / "claims.json")


def test_what_ships_has_a_row_for_every_target_and_no_other() -> None:
    assert [row["id"] for row in json.loads(claims.FILE.read_text(encoding="utf-8"))] == list(claims.TARGETS)


def test_rows_are_as_the_targets_say_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words and bounds come from the code; a row of a target that is gone is dropped."""
    file = tmp_path / "claims.json"
    claims.record({"filler": (0.95, None, 1)}, file)
    rows = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps([*({**r, "claim": "old words"} for r in rows), {"id": "gone"}]), encoding="utf-8")
    found = {row["id"]: row for row in claims.read(file)}
    assert "gone" not in found and found["filler"]["claim"] != "old words" and found["filler"]["measured"] == 0.95
    monkeypatch.setitem(claims.TARGETS, "filler", dataclasses.replace(claims.TARGETS["filler"], bound=">= 0.99"))
    claims.record({"filler": (0.95, None, 1)}, file)
    assert {row["id"]: row["holds"] for row in claims.read(file)}["filler"] is False


def test_a_figure_of_files_that_have_changed_since_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another world, or another prefix; what depends on neither stays, and recording keeps no stale figure."""
    file = tmp_path / "claims.json"
    claims.record({"filler": (0.95, None, 1), "on-test": (0.1, None, 1), "flops-paper": (0.3, None, 1)}, file)

    def measured() -> dict[str, float | None]:
        rows = {row["id"]: row for row in claims.read(file)}
        return {key: rows[key]["measured"] for key in ("filler", "on-test", "flops-paper")}

    assert measured() == {"filler": 0.95, "on-test": 0.1, "flops-paper": 0.3}
    now = claims._hash
    monkeypatch.setattr(claims, "_hash", lambda kind: "another" if kind == "prefix" else now(kind))
    assert measured() == {"filler": 0.95, "on-test": None, "flops-paper": 0.3}
    monkeypatch.setattr(claims, "_hash", lambda kind: "another" if kind == "world" else now(kind))
    assert measured() == {"filler": None, "on-test": None, "flops-paper": 0.3}
    claims.record({"filler": (0.97, None, 1)}, file)
    monkeypatch.setattr(claims, "_hash", now)
    assert measured() == {"filler": None, "on-test": None, "flops-paper": 0.3}


def test_what_figures_are_of_changes_with_the_shipped_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model" / "relatives").mkdir(parents=True)
    (tmp_path / "model_xl").mkdir()
    for name in ("model/miniature-sd1", "model/relatives/miniature-1.4", "model_xl/miniature-sdxl"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
    monkeypatch.setattr(claims.shipped, "ASSETS", tmp_path)
    world, relatives, sdxl = (claims._hash(kind) for kind in ("world", "relatives", "sdxl"))
    assert len({world, relatives, sdxl}) == 3 and {len(world), len(relatives), len(sdxl)} == {8}
    (tmp_path / "model_xl" / "miniature-sdxl.safetensors").write_bytes(b"trained again")
    assert [claims._hash(kind) for kind in ("world", "relatives")] == [world, relatives]
    assert claims._hash("sdxl") != sdxl
    (tmp_path / "model" / "relatives" / "miniature-1.4.safetensors").unlink()
    assert claims._hash("relatives") == "missing"
    (tmp_path / "model" / "miniature-sd1.safetensors").write_bytes(b"trained again")
    assert claims._hash("world") != world
    (tmp_path / "model" / "miniature-sd1.safetensors").unlink()
    assert claims._hash("world") == "missing"  # as in an installation from a wheel
    assert claims._hash("prefix") == load_prefix(claims.shipped.prefix_file("anonymize-miniature")).content_hash[:8]


def test_nothing_is_written_for_an_unknown_id_or_a_figure_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "claims.json"
    claims.record({"filler": (0.95, None, 1)}, file)
    before = file.read_bytes()
    with pytest.raises(ConfigError, match="claim is 'nope'") as caught:
        claims.record({"on-test": (0.1, None, 1), "nope": (1.0, None, 1)}, file)
    assert "base-id-acc" in caught.value.hint
    for figure in ((float("nan"), None, 1), (float("inf"), None, 1), (0.1, [0.0, float("nan")], 1)):
        with pytest.raises(ScoreError, match="on-test was measured as"):
            claims.record({"filler": (0.5, None, 1), "on-test": figure}, file)
    assert file.read_bytes() == before


def test_table(tmp_path: Path) -> None:
    file = tmp_path / "claims.json"
    claims.record({"filler": (0.95, [0.9, 1.0], 32), "on-test": (0.5, None, None)}, file)
    lines = claims.table(claims.read(file)).splitlines()
    assert len(lines) == len(claims.TARGETS) + 2
    (filler,) = [line for line in lines if "(filler)" in line]
    assert all(word in filler for word in (">= 0.90", "0.950", "[0.900, 1.000]", " 32 ", "holds"))
    (short,) = [line for line in lines if "(on-test)" in line]
    assert "0.500" in short and "SHORT" in short
    assert lines[-1] == f"1 holds, 1 SHORT, {len(claims.TARGETS) - 2} not run"


@pytest.mark.parametrize("key", claims.TARGETS)
def test_every_command_exists(key: str) -> None:
    words = shlex.split(claims.TARGETS[key].command)
    if words[0] == "apl":
        assert cli._parsers({})[0].parse_args(words[1:])["command"] == words[1]
    elif words[:3] == ["python", "-m", "pytest"]:
        assert (ROOT / words[3]).is_file()
    elif words[1] != "install.py":
        assert words[0] == "python" and words[1].startswith("benchmarks/") and (ROOT / words[1]).is_file()
    else:
        assert words[0] == "python" and (ROOT / words[1]).is_file()
        spec = importlib.util.spec_from_file_location("apl_install_under_test", ROOT / words[1])
        install = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(install)
        assert words[2] in install.EXTRAS


@pytest.mark.parametrize(("key", "argv"), [
    ("filler", ["-m", "apl_train", "miniworld", "card"]), ("demo-minutes", ["install.py", "demo"]),
    ("kill-resume", ["-m", "pytest", "tests/world/test_resume.py"]),
])
def test_rerun_starts_that_command(key: str, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def run(argv: list[str], **options: object) -> SimpleNamespace:
        seen.update(argv=argv, **options)
        return SimpleNamespace(returncode=5)

    monkeypatch.setattr(claims.subprocess, "run", run)
    assert claims.rerun(key) == 5
    assert seen["argv"] == [sys.executable, *argv] and seen["cwd"] == ROOT and "shell" not in seen
    with pytest.raises(ConfigError, match="claim is 'nope'"):
        claims.rerun("nope")


def test_the_demo_is_held_against_the_shipped_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "FILE", tmp_path / "benchmarks" / "claims.json")
    scores = {"persons": {"test": {"off": {"id_acc_mean": 0.8}, "on": {"id_acc_mean": 0.2, "n_persons": 24}}}}
    claims.record_demo(scores, {"train": 150.0})
    assert not claims.FILE.exists()  # an installation without the folder, as from a wheel
    claims.FILE.parent.mkdir()
    claims.record_demo(scores, {"train": 0.0})
    assert not claims.FILE.exists()  # nothing was trained this time
    claims.record_demo(scores, {"train": 150.0})
    found = {row["id"]: row for row in claims.read()}
    assert found["demo-train-minutes"]["measured"] == 2.5 and found["demo-drop"]["measured"] is None
    if sys.platform != "win32":
        assert 0.01 < found["demo-memory"]["measured"] < 100
    claims.record({"on-test": (0.1, None, 32)})
    claims.record_demo(scores, {"train": 150.0})
    found = {row["id"]: row for row in claims.read()}
    assert found["demo-drop"]["measured"] == pytest.approx((1 - 0.2 / 0.8) / (1 - 0.1), abs=1e-4)


def test_memory_is_left_out_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    assert claims._peak_gb() is None


def test_a_marked_table_shows_the_figures_as_they_are() -> None:
    rows = [{"id": "a", "claim": "A", "bound": "<= 0.2", "measured": 0.25, "ci95": [0.1, 0.4], "n": 3, "holds": False},
            {"id": "b", "claim": "B", "bound": ">= 1", "measured": None, "ci95": None, "n": None, "holds": None}]
    new = claims.fill("x\n<!-- claims: a b -->\nold\n<!-- end -->\ny", rows)
    assert new == ("x\n<!-- claims: a b -->\n| | bound | measured | 95% interval | n | |\n|---|---|---|---|---|---|\n"
                   "| A | ≤ 0.2 | 0.250 | 0.100 to 0.400 | 3 | **short** |\n| B | ≥ 1 |  |  |  | not run |\n"
                   "<!-- end -->\ny")
    assert claims.fill(new, rows) == new
    with pytest.raises(ConfigError, match="'c'"):
        claims.fill("<!-- claims: c -->\n<!-- end -->", rows)


@pytest.mark.parametrize("document", ["README.md", "docs/miniworld.md"])
def test_documents_show_the_measured_figures(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    assert "<!-- claims: " in text
    assert claims.fill(text, claims.read()) == text, "run: apl claims --docs"
