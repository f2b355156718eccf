"""Two runs side by side, as HTML text: what was set differently, both curves in one chart, what came out."""

from __future__ import annotations

from html import escape

from . import curves, pages
from .runs import Run, training_folder


def compared(a: Run | None, b: Run | None, *, tell: bool = True) -> str:
    """Two runs side by side: settings that differ, both curves in one chart, scores and, if `tell`, last pictures."""
    if a is None or b is None:
        return pages.body('<div class="apl-empty">Choose two runs above. Each training started under "New prefix" '
                          "is one.</div>")
    keys = [key for key in dict.fromkeys([*a.config, *b.config]) if key != "config_version"]
    rows = "".join(
        f'<tr><td class="apl-dim">{escape(key)}</td><td class="diff">{escape(str(a.config.get(key, "–")))}</td>'
        f'<td class="diff">{escape(str(b.config.get(key, "–")))}</td></tr>'
        for key in keys if a.config.get(key) != b.config.get(key)) or \
        '<tr><td colspan="3" class="apl-dim">Both have the same settings.</td></tr>'
    legend = "".join(f'<span class="apl-key" style="background:{colour}"></span>{escape(run.name)}'
                     for run, colour in zip((a, b), curves.COLOURS, strict=False))
    charts = []
    for column, title in ((1, "L_ID"), (2, "L_Reg")):
        lines = [(run.name, [(r[0], r[column]) for r in run.losses if r[column] is not None]) for run in (a, b)]
        charts.append(f'<div class="apl-box"><h3>{title}</h3>'
                      f"{curves.loss_chart(f'{title} of both runs', lines, max(a.steps, b.steps))}</div>")
    scored = "".join(f"<tr><td class='apl-dim'>{label}</td><td>{one}</td><td>{two}</td></tr>"
                     for label, one, two in _score_rows(a, b))
    names = f"<tr><th></th><th>{escape(a.name)}</th><th>{escape(b.name)}</th></tr>"
    tables = "".join(f'<div class="apl-box"><h3>{title}</h3><div class="apl-scroll"><table class="apl-list">{names}'
                     f"{content}</table></div></div>"
                     for title, content in (("What was set differently", rows), ("What came out", scored)))
    return pages.body(f'<div class="apl-charts">{tables}</div>', f"<p>{legend}</p>",
                      f'<div class="apl-charts">{"".join(charts)}</div>', _faces_of_both(a, b) if tell else "")


def _score_rows(a: Run, b: Run) -> list[tuple[str, str, str]]:
    rows = [("steps", f"{a.step:,}", f"{b.step:,}"), ("state", pages.STATES[a.state], pages.STATES[b.state])]
    for label, split in (("last pictures, persons learned on", "train"),
                         ("last pictures, persons never seen", "test")):
        scores = (pages.id_acc(run, split) or "not measured" for run in (a, b))
        rows.append((f"ID-ACC, {label.partition(', ')[2]}", *scores))
        rows.append((label, *(_drawn(run, split) for run in (a, b))))
    return rows


def _drawn(run: Run, split: str) -> str:
    """Mean score of the last pictures, without -> with."""
    last = run.previews[max(run.previews)] if run.previews else ()
    rows = [p for p in last if p.split == split]
    off = [p.off_score for p in rows if p.off_score is not None]
    on = [p.on_score for p in rows if p.on_score is not None]
    if not off or not on:
        return "not measured"
    return f"{sum(off) / len(off):.2f} → <b>{sum(on) / len(on):.2f}</b> <span class='apl-dim'>n = {len(on)}</span>"


def _faces_of_both(a: Run, b: Run) -> str:
    if not a.previews or not b.previews:
        return ""
    last = [(run, run.previews[max(run.previews)], training_folder(run.folder) / "previews") for run in (a, b)]
    rows = []
    for i, person in enumerate(last[0][1]):
        other = next((p for p in last[1][1] if p.name == person.name), None)
        if other is None:
            continue
        cells = (pages.face(last[0][2], person.off, person.off_score, f"{person.name}, without", pages.WARM),
                 pages.face(last[0][2], person.on, person.on_score, f"{person.name}, {a.name}"),
                 pages.face(last[1][2], other.on, other.on_score, f"{person.name}, {b.name}"))
        with_prefix = "".join(f"<td>{cell}</td>" for cell in cells[1:])
        rows.append(f'<tr>{pages.who(person)}<td class="bare">{cells[0]}</td>{with_prefix}</tr>')
        if i == 7:
            break
    if not rows:
        return ""
    heads = f'<tr><th></th><th class="bare">without</th><th>{escape(a.name)}</th><th>{escape(b.name)}</th></tr>'
    table = f'<table class="apl-faces">{heads}{"".join(rows)}</table>'
    return f'<div class="apl-box"><h3>Last pictures</h3><div class="apl-scroll">{table}</div></div>'
