"""benchmarks/all.py, the tables of beyond.py and drift_trade.py, second_run.py: parts exist, rows stay apart."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from apl_train import claims

BENCHMARKS = Path(claims.FILE).parent
pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


def test_recorded_figures_go_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = claims.FILE.read_bytes()
    monkeypatch.setenv(claims.INTO, str(tmp_path / "run.json"))
    claims.record({"two-score": (1.9, None, 16)})
    rows = {r["id"]: r for r in json.loads((tmp_path / "run.json").read_text("utf-8"))}
    assert rows["two-score"]["measured"] == 1.9 and rows["two-score"]["holds"] is True
    assert claims.FILE.read_bytes() == before


def test_parts_run_one_by_one_and_their_rows_make_one_table(benchmark, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    every = benchmark("all")
    monkeypatch.setattr(every, "HERE", tmp_path)
    program = ("import os, sys; from apl_train import claims\n"
               "claims.record({'two-score': (float(sys.argv[1]), None, 4), 'two-generate': (1.5, None, 4)})\n")
    (tmp_path / "good.py").write_text(program, "utf-8")
    (tmp_path / "bad.py").write_text("raise SystemExit(3)\n", "utf-8")
    (tmp_path / "quiet.py").write_text("print('skipped: no checkout')\n", "utf-8")
    parts = {"good": ("good.py", "1.9"), "bad": ("bad.py",), "quiet": ("quiet.py",), "gone": ("gone.py",)}
    monkeypatch.setattr(every, "PARTS", {name: every.Part(argv, name) for name, argv in parts.items()})
    found = {name: every.run_part(name, tmp_path) for name in parts}
    assert {r["id"]: r["measured"] for r in found["good"][1]} == {"two-generate": 1.5, "two-score": 1.9}
    assert found["bad"][0].startswith("failed with exit code 3") and found["gone"][0].startswith("skipped")
    assert "nothing measured" in found["quiet"][0]
    table = every.show(found)
    (short,) = [line for line in table.splitlines() if "generation:" in line]
    assert "1.500" in short and short.endswith("SHORT")
    (good,) = [line for line in table.splitlines() if "scoring:" in line]
    assert "1.900" in good and ">= 1.8" in good and "SHORT" not in good


def test_every_part_names_a_program_with_a_docstring(benchmark) -> None:
    every = benchmark("all")
    for part in every.PARTS.values():
        script = BENCHMARKS / part.argv[0]
        if script.is_file():  # parts of others are called where they are present
            assert script.read_text("utf-8").startswith('"""'), script
    for key in ("sdxl-flops-floor", "memory-paper", "loop-inversion", "encode-diffusers", "two-score"):
        assert claims.TARGETS[key].command.split()[1].split("/")[1] in {p.argv[0] for p in every.PARTS.values()}


def test_the_table_of_rows_fills_the_document(benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = benchmark("beyond_table")
    row = {"ratio": {"value": 0.61234, "lo": 0.5, "hi": 0.7}, "attributes": 0.97, "faces": 1.0, "joint_success": 0.4,
           "drift_nonfaces": 0.25, "drift_unnamed_faces": 0.3, "persons": 16, "pictures": 32, "steps": 120}
    point = {"strength": 0.5, "ratio": 0.8, "lo": 0.3, "hi": 0.5, "id_acc_mean": 0.4}
    rows = {"plain": row | {"written_otherwise": {"off": 0.2, "on": 0.1, "ratio": 0.5}}, "suffix": row,
            "strength": {"points": [point]}}
    monkeypatch.setattr(table, "FILE", tmp_path / "rows.json")
    monkeypatch.setattr(table, "DOCS", tmp_path / "doc.md")
    (tmp_path / "rows.json").write_text(json.dumps(rows), "utf-8")
    (tmp_path / "doc.md").write_text("x\n<!-- beyond: rows -->\nold\n<!-- end -->\ny\n", "utf-8")
    assert table.write_docs() and not table.write_docs()
    text = (tmp_path / "doc.md").read_text("utf-8")
    assert "| suffix | 0.612 | 0.500 to 0.700 | 0.970 | 1.000 | 0.250 | 0.300 |" in text and "old" not in text
    assert "| `fast`, shorter | 0.200 | 0.100 | 0.500 |" in text and "0.300 to 0.500" in text and text.startswith("x\n")


def test_why_the_papers_loop_cannot_be_imported_is_said(benchmark, tmp_path: Path) -> None:
    loops = benchmark("published_loops")
    (tmp_path / "train.py").write_text("from face_data.names import people\n", "utf-8")
    assert "face_data" in loops.why_not(tmp_path)
    (tmp_path / "train.py").write_text("x = 1\n", "utf-8")
    assert loops.why_not(tmp_path) == ""


def test_others_than_the_processes_asked_for_are_no_comparison(benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    two = benchmark("two_processes")
    told = {"generate": {"cpu": 1.0}, "score": {"cpu": 1.0}, "processes": 1}
    done = SimpleNamespace(returncode=0, stdout=f"note\n{two.MARK}{json.dumps(told)}\n", stderr="")
    monkeypatch.setattr(two.subprocess, "run", lambda *_a, **_k: done)
    assert two.run(1, 4, 1) == {"generate": {"cpu": 1.0}, "score": {"cpu": 1.0}}
    with pytest.raises(SystemExit, match="nothing to compare"):
        two.run(2, 4, 1)


def test_the_miniature_is_a_folder_that_diffusers_reads(benchmark, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    folder = benchmark("published_loops").diffusers_folder(tmp_path / "model")
    schedule = diffusers.DDPMScheduler.from_pretrained(folder, subfolder="scheduler", local_files_only=True)
    assert schedule.config.prediction_type == "epsilon" and schedule.config.beta_schedule == "scaled_linear"
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet", local_files_only=True)
    assert unet.config.sample_size == 16 and unet.config.cross_attention_dim == 96


def test_sdxl_is_counted_at_its_published_size(benchmark) -> None:
    """Parameters of the published checkpoints: the UNet's 2,567,463,684, CLIP-G's 694,659,840."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    model = benchmark("step_cost_sdxl").sdxl()
    count = [sum(p.numel() for p in m.parameters()) for m in (model.unet, *model.texts)]
    assert count == [2_567_463_684, 123_060_480, 694_659_840]
    assert all(p.device == torch.device("meta") for p in model.unet.parameters())


def test_the_trade_of_likeness_and_drift_is_drawn_from_its_rows(benchmark, tmp_path: Path) -> None:
    """Every row has its number in table and figure, and the document holds what the results say."""
    trade = benchmark("drift_trade")

    def row(ratio: float, faces: float) -> dict:
        return {key: {"value": v, "lo": v - 0.02, "hi": v + 0.02}
                for key, v in (("ratio", ratio), ("unnamed_faces", faces), ("nonfaces", 0.3))}

    rows = {"reg_weight 8": row(0.32, 0.16), "shipped prefix": row(0.15, 0.22)}
    lines = trade.table(rows).splitlines()[2:]
    assert lines == ["| 4: reg_weight 8 | 0.320 (0.30 to 0.34) | 0.160 (0.14 to 0.18) | 0.300 (0.28 to 0.32) |",
                     "| 8: shipped prefix | 0.150 (0.13 to 0.17) | 0.220 (0.20 to 0.24) | 0.300 (0.28 to 0.32) |"]
    drawn = trade.figure(rows)
    assert all(f">{number}</text>" in drawn for number in (4, 8)) and ">1</text>" not in drawn
    known = json.loads(trade.FILE.read_text(encoding="utf-8"))
    assert trade.table(known) in trade.DOCS.read_text(encoding="utf-8"), "run: python benchmarks/drift_trade.py --docs"
    assert trade.FIGURE.exists()


def test_a_second_run_is_judged_by_the_intervals_of_the_first(benchmark) -> None:
    second = benchmark("second_run")
    row = {"id_acc_mean": 0.5, "ci95": [0.4, 0.6], "id_acc_max": None, "ci95_max": [None, None], "by_person": [0.5]}
    drift = {"on": 0.2, "ci95": {"on": [0.1, 0.3]}, "ratio": {"value": 0.21, "lo": 0.2, "hi": 0.22}}
    first = {"rows": [{"name": "base", "values": {"off": {"value": 0.7, "lo": 0.6, "hi": 0.8},
                                                  "faces": {"value": 1.0, "lo": None, "hi": None}}}],
             "persons": row, "drift": drift, "seconds": {"train": 3.0}}
    assert all(f.inside and f.first == f.second for f in second.figures(first, json.loads(json.dumps(first))))
    other = json.loads(json.dumps(first))
    other["rows"][0]["values"]["off"]["value"] = 0.81
    other["persons"]["id_acc_mean"] = 0.6
    other["drift"] = {"on": 0.05}
    seen = {f.where: (f.second, f.inside) for f in second.figures(first, other)}
    assert seen == {"/rows/base/values/off": (0.81, False), "/persons/id_acc_mean": (0.6, True),
                    "/drift/on": (0.05, False), "/drift/ratio": (None, False)}
    assert "/rows/base/values/off: 0.8100, first 0.7000" in (shown := second.show({"t": list(
        second.figures(first, other))}).replace("    ", "/")) and "nothing, first 0.2100" in shown


def test_a_second_run_has_none_of_the_first_ones_figures(benchmark, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    second = benchmark("second_run")
    root, into = tmp_path / "root", tmp_path / "into"
    program = ("import json, sys, os; from pathlib import Path\n"
               "assert Path(os.environ['PYTHONPATH']) == Path.cwd()\n"
               "Path(sys.argv[1]).write_text(json.dumps({'value': 1.5, 'lo': 1.0, 'hi': 2.0}))\n")
    for name, text in {"apl_train/__init__.py": "", "apl_train/__main__.py": program, "b/first.json":
                       json.dumps({"value": 1.0, "lo": 0.9, "hi": 1.1}), "b/other.json": "{}"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, "utf-8")
    who = ["-c", "user.name=t", "-c", "user.email=t@t"]
    for words in (["init", "--quiet"], ["add", "."], [*who, "commit", "-qm", "t"]):
        subprocess.run(["git", *words], cwd=root, check=True)
    monkeypatch.setattr(second, "ROOT", root)
    monkeypatch.setattr(second, "PARTS", {"one": ("b/first.json", ("b/first.json",))})
    second.clone(into)
    assert not (into / "b/first.json").exists() and (into / "b/other.json").exists()
    second.measure(into, "one")
    (found,) = second.compared(into, "one")
    assert (found.first, found.second, found.inside) == (1.0, 1.5, False)
    (into / "b/first.json").write_text('{"value": 1.05}', "utf-8")
    second.clone(into)
    second.measure(into, "one")  # there already: not measured again
    assert second.compared(into, "one")[0].inside
    (root / "b/first.json").write_text('{"value": 2.0, "lo": 1.0, "hi": 3.0}', "utf-8")
    with pytest.raises(SystemExit, match="measured again"):
        second.compared(into, "one")


def test_every_part_of_a_second_run_has_figures_to_judge_by(benchmark) -> None:
    second = benchmark("second_run")
    for name, (file, _) in second.PARTS.items():
        assert list(second.figures(json.loads((second.ROOT / file).read_text("utf-8")), None)), name
