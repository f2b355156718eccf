"""An identity check in words: Markdown for a file and the terminal, from its JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apl_train.report.table import get, interval, measured, number, percent

MISSING = "not measured"
SIDES = {"off": "without prefix", "on": "with prefix"}
SOURCES = {
    "impostors": "from strangers in these pictures",
    "given": "as given",
    "customary": "customary for this recogniser, set on other people's data",
    "none": "none: too few strangers, and no customary value is known",
}
SHOWN_ODD = 200
"""Odd files listed in the Markdown; all are in the JSON."""


def share(value: Any) -> str:
    """A share with its interval: "37.5% [30.0%, 45.1%]"."""
    bounds = [measured(get(value, key)) for key in ("lo", "hi")]
    tail = f" [{percent(bounds[0])}, {percent(bounds[1])}]" if None not in bounds else ""
    return percent(get(value, "value"), MISSING) + tail


def figure(value: Any) -> str:
    """A similarity or ratio with its interval: "0.123 [0.100, 0.140]"."""
    bounds = interval([get(value, "lo"), get(value, "hi")])
    return f"{number(get(value, 'value'), missing=MISSING)} {bounds}".strip()


def threshold_text(threshold: Mapping[str, Any]) -> str:
    """"0.412, from strangers in these pictures (at most 1 in 1000 of 3120 accepted)"."""
    text = f"{number(threshold.get('value'), missing='no threshold')}, {SOURCES[threshold['source']]}"
    if (far := measured(threshold.get("far"))) is not None:
        text += f" (at most 1 in {round(1 / far)} of {threshold['impostors']} comparisons accepted)"
    return text


def sides_of(block: Mapping[str, Any]) -> list[str]:
    """The sides that were scored: "off", and "on" where there was such a folder."""
    return [side for side in SIDES if isinstance(block.get(side), Mapping)]


def rows_of(block: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """The table of one recogniser: (label, one cell a side)."""
    sides = [block[side] for side in sides_of(block)]
    worst = measured(get(sides[0], "worst_of_k", "k"))
    rows = [
        ("persons, pictures", [f"{side['n_persons']}, {side['n_images']}" for side in sides]),
        ("pictures with a face", [share(side["face_rate"]) for side in sides]),
        ("ID-ACC mean", [figure(side["id_acc_mean"]) for side in sides]),
        ("ID-ACC max", [figure(side["id_acc_max"]) for side in sides]),
        ("between strangers (0) and the person (1)", [number(side["between"], missing=MISSING) for side in sides]),
        ("pictures recognised", [share(side["recognised"]) for side in sides]),
        ("a face AND not recognised", [share(side["joint_success"]) for side in sides]),
        (f"persons recognised in any of {worst:.0f}" if worst else "persons recognised in any of k",
         [share(side["worst_of_k"]) for side in sides]),
    ]
    rows += [(f"recognised at 1 in {round(1 / row['far'])}", [percent(row[side], "too few strangers") for side in
                                                              sides_of(block)]) for row in block["at_far"]]
    return rows


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
    return [line(head), "|" + "---|" * len(head), *(line(row) for row in rows), ""]


def _recogniser(block: Mapping[str, Any]) -> list[str]:
    sides = sides_of(block)
    lines = [f"## {block['name']}", "", f"Recognised from {threshold_text(block['threshold'])}. Strangers reach "
             f"{number(block['strangers'], missing=MISSING)} on average, the persons' own references "
             f"{number(block['ceiling'], missing=MISSING)}. {block['licence']}".rstrip(), "",
             *_table(["", *(SIDES[side] for side in sides)], [[label, *cells] for label, cells in rows_of(block)])]
    if change := block.get("change"):
        lines += [f"With the prefix: ID-ACC times {figure(change['ratio'])}; pictures with a face "
                  f"{_points(change['face_rate'])}; joint success {_points(change.get('joint_success'))} (paired over "
                  "persons).", ""]
    if groups := block.get("groups"):
        head = ["group", "persons", *(f"ID-ACC {SIDES[s]}" for s in sides), *(f"joint success {SIDES[s]}" for s in
                                                                              sides), "own threshold"]
        lines += _table(head, [group_cells(row, sides) for row in groups])
    rejected = [f"{person}: {one['file']} ({one['reason']})" for person, found in block["rejected_references"].items()
                for one in found]
    if rejected:
        lines += ["References left out:", "", *(f"- {text}" for text in rejected), ""]
    if block["left_out"]:
        lines += ["Persons left out:", "", *(f"- {name}: {why}" for name, why in block["left_out"].items()), ""]
    return lines


def group_cells(row: Mapping[str, Any], sides: Sequence[str]) -> list[str]:
    """One row of the panel by group."""
    name, blank = f"{row['column']}: {row['group']}", "too few persons" if row["too_few"] else MISSING
    return [name, str(row["n_persons"]),
            *(figure(row[side]["id_acc_mean"]) if side in row else blank for side in sides),
            *(share(row[side]["joint_success"]) if side in row else blank for side in sides),
            number(get(row, "own_threshold", "value"), missing="too few strangers")]


def _points(value: Any) -> str:
    found = measured(get(value, "value"))
    if found is None:
        return MISSING
    bounds = interval([100 * v if (v := measured(get(value, key))) is not None else None for key in ("lo", "hi")], 1)
    return f"{100 * found:+.1f} points {bounds}".rstrip()


def agreement_text(found: Mapping[str, Any]) -> str:
    """"97.5% equal verdicts on 80 pictures (kappa 0.61, correlation of similarities 0.72)"."""
    return (f"{percent(found['share'], MISSING)} equal verdicts on {found['pictures']} pictures (kappa "
            f"{number(found['kappa'], 2, MISSING)}, correlation of similarities "
            f"{number(found['correlation'], 2, MISSING)})")


def markdown(scores: Mapping[str, Any]) -> str:
    """The whole check as Markdown."""
    settings = scores["settings"]
    lines = ["# Identity check", "",
             "ID-ACC is the cosine similarity of a face to the person's references; lower is less recognisable. A "
             "picture without a face has no similarity and is no success. Intervals are 95%, over persons.", ""]
    for block in scores["recognisers"]:
        lines += _recogniser(block)
    if scores["agreement"]:
        lines += ["## Agreement of the two recognisers", "",
                  *(f"- {SIDES[side]}: {agreement_text(found)}" for side, found in scores["agreement"].items()), ""]
    if paired := scores["paired_names"]:
        lines += [f"{paired['both']} of {paired['off']} file names are in both folders; equal names should be equal "
                  "seeds.", ""]
    odd = scores["odd"]
    lines += [f"## Unusual files: {len(odd)}", ""]
    if odd:
        lines += _table(["folder", "file", "what"], [[r["folder"], r["file"], r["reason"]] for r in odd[:SHOWN_ODD]])
    if len(odd) > SHOWN_ODD:
        lines += [f"... and {len(odd) - SHOWN_ODD} more in the JSON file.", ""]
    lines += [f"Face choice: {settings['face_choice']}. " + " ".join(
        f"{block['name']}: recogniser {block['sha256'][:12]}, detector settings {block['settings']}." for block in
        scores["recognisers"])]
    return "\n".join(lines) + "\n"
