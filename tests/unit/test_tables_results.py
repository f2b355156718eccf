"""Results as JSON and as a document: ours with interval, the paper's beside it, every table beside its command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from apl_core.errors import ScoreError
from apl_core.id_scores import Interval
from apl_train import claims
from apl_train.tables import command, document, results
from apl_train.tables.results import Column, Row, Table

TABLE = Table(
    "table1", "By model", "paper Table 1", [Column("mean", "ID-ACC mean"), Column("faces", "faces", 2)],
    [Row("base", {"mean": Interval(0.5, 0.4, 0.6), "faces": 1.0}, {"mean": 0.303}),
     Row("lost", {}, {"mean": 0.1}, "not run: no file"), Row("odd", {"mean": Interval(0.25, math.nan, math.nan)})],
    {"n": {"test": {"persons": 3}}, "sampler": "DDIM"}, ["A note."], ["plot.svg"],
    {"ratio": [0.5, math.nan], "claims": {}})


def test_the_json_holds_values_intervals_and_the_papers_figures(tmp_path: Path) -> None:
    path = results.write(TABLE, tmp_path, "miniature")
    assert path.name == "table1.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved["command"] == "apl evaluate --preset miniature --only table1"
    assert saved["rows"][0] == {"name": "base", "note": "", "paper": {"mean": 0.303}, "values": {
        "mean": {"value": 0.5, "lo": 0.4, "hi": 0.6}, "faces": {"value": 1.0, "lo": None, "hi": None}}}
    assert saved["rows"][2]["values"]["mean"] == {"value": 0.25, "lo": None, "hi": None}
    assert saved["extra"]["ratio"] == [0.5, None], "what is not finite is null, never NaN"
    assert results.write(TABLE, tmp_path, "sd15").name == "table1-sd15.json"


def test_the_terminal_shows_the_papers_row_under_ours() -> None:
    lines = results.text(TABLE.to_dict("miniature", "apl evaluate --preset miniature --only table1")).splitlines()
    assert "apl evaluate --preset miniature --only table1" in lines[0]
    assert "0.500 [0.400, 0.600]" in lines[2] and "1.00" in lines[2]
    assert lines[3].strip().startswith(results.PAPER) and "0.303" in lines[3]
    assert "not run: no file" in lines[4]


def test_the_document_names_every_command_and_what_was_not_run(tmp_path: Path) -> None:
    results.write(TABLE, tmp_path, "miniature")
    path = document.write(tmp_path, tmp_path / "docs" / "results.md")
    text = path.read_text(encoding="utf-8")
    assert "`apl evaluate --preset miniature --only table1`" in text
    assert "0.500 [0.400, 0.600] (0.303)" in text and "– (0.100)" in text
    assert "plot.svg" in text and "A note." in text and "DDIM" in text
    assert "- `apl evaluate --preset miniature --only table2`" in text.split("## Not run yet")[1]
    assert document.write(tmp_path, path).read_text(encoding="utf-8") == text, "the same results, the same bytes"


def test_tables_come_in_the_papers_order(tmp_path: Path) -> None:
    for key in ("fig6", "table1", "loss", "table2"):
        results.write(Table(key, key, "", [], [], {}), tmp_path, "miniature")
    results.write(Table("table1", "real", "", [], [], {}), tmp_path, "sd15")
    found = [(t["table"], t["preset"]) for t in results.read_all(tmp_path)]
    assert found == [("table1", "miniature"), ("table1", "sd15"), ("table2", "miniature"), ("fig6", "miniature"),
                     ("loss", "miniature")]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"table": "table99", "preset": "x"}', "\xff"])
def test_a_file_that_holds_no_results_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "fig6.json").write_text(content, encoding="latin-1")
    with pytest.raises(ScoreError, match=r"fig6\.json holds no results"):
        results.read_all(tmp_path)


def test_results_of_other_commands_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "baselines.json").write_text("{}")
    assert results.read_all(tmp_path) == []


def test_the_committed_document_is_what_the_committed_results_say(tmp_path: Path) -> None:
    root = claims.FILE.parent.parent
    where, page = root / "benchmarks" / "results", root / "docs" / "results.md"
    if not page.exists():
        pytest.skip("no results are committed")
    text = document.markdown(results.read_all(where))
    assert text == page.read_text(encoding="utf-8"), "run: apl evaluate --docs"
    for table in results.read_all(where):
        for figure in table["figures"]:
            if table["preset"] == "miniature":
                assert (root / "docs" / "figures" / figure).is_file()


def test_tables_of_files_that_have_been_replaced_say_so() -> None:
    """By the hashes among a table's conventions, which every run writes down."""
    now = document.file_hash(document.shipped.locate("base_model", "miniature"))[:12]
    prefix = document.load_prefix(document.shipped.prefix_file("anonymize-miniature")).content_hash[:12]
    own = {"model": f"miniature-sd1; sha256 {now}", "prefix": f"anonymize-miniature, m 10; {prefix}"}
    table = {"preset": "miniature", "conventions": own}
    assert document._of_earlier_files(table) == []
    assert document._of_earlier_files({"preset": "miniature", "conventions": {"model": own["model"]}}) == []
    other = table | {"conventions": own | {"model": "miniature-sd1; sha256 0123456789ab"}}
    assert document._of_earlier_files(other)[0] == "**Of an earlier model**; not run again since."
    other = table | {"conventions": dict.fromkeys(own, "x; 0123456789ab")}
    assert document._of_earlier_files(other)[0].startswith("**Of an earlier model and prefix**")
    assert document._of_earlier_files(other | {"preset": "sd15"}) == []


def test_only_known_and_measured_claims_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "FILE", tmp_path / "claims.json")
    command.record({"levels-fall": {"value": 0.0, "n": 6}, "no-reg": {"value": None}, "unheard-of": {"value": 1.0}})
    rows = {r["id"]: r for r in json.loads((tmp_path / "claims.json").read_text(encoding="utf-8"))}
    assert rows["levels-fall"]["measured"] == 0.0 and rows["levels-fall"]["n"] == 6
    assert rows["no-reg"]["measured"] is None and "unheard-of" not in rows
