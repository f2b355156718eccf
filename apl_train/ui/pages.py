"""What the page shows, as HTML text; every word that comes from a file is escaped here."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from . import curves, jobs, thumbs
from .desk import Said
from .jobs import DONE, FAILED, LOST, QUEUED, RUNNING, STOPPED, Job
from .place import Place
from .runs import PAUSED, Preview, Run, training_folder

STATES = {QUEUED: "waiting", RUNNING: "running", PAUSED: "paused", DONE: "done", STOPPED: "stopped, saved",
          FAILED: "failed", LOST: "interrupted"}
CODES = {
    2: "A setting is wrong.", 3: "A prefix file could not be read.", 4: "A prompt and the prefix do not fit together.",
    5: "Something is wrong with the pictures or their table.", 6: "The checkpoint could not be used.",
    7: "Scores could not be computed.", 8: "A file could not be written, often a full disk.",
    9: "The training could not go on; the last good state is kept.",
    127: "The interpreter for training could not be started.",
    -9: "The system ended the process, most often because memory ran out. Take a preset for less memory.",
    -11: "The process crashed inside a library.", -6: "The process crashed inside a library.",
}
STAGES = ("generate", "validate", "cache", "train", "score", "install")
SHOWN_LEVELS = 6
SCORE_FROM, SCORE_TO = 0.0, 0.8
WARM = "--apl-warm"


def style() -> str:
    return f"<style>{Path(__file__).with_name('style.css').read_text(encoding='utf-8')}</style>"


def body(*parts: str) -> str:
    return f'<div class="apl-b">{"".join(parts)}</div>'


def step(number: int, title: str, text: str) -> str:
    """The heading of one step on the way to a prefix."""
    return body(f'<div class="apl-step"><span class="n">{number}</span><div><h2>{escape(title)}</h2>'
                f'<p class="apl-dim">{escape(text)}</p></div></div>')


def heading(title: str, text: str) -> str:
    return body(f"<h2>{escape(title)}</h2><p class='apl-dim apl-lines'>{escape(text)}</p>")


def said(what: Said | None) -> str:
    return body(f'<div class="apl-said {what.tone}" role="status">{escape(what.text)}</div>') if what else ""


def top(place: Place) -> str:
    where = f" in {escape(place.host)}" if place.host else ""
    return body('<div class="apl-top"><div><h1>Anonymization prompts</h1><p class="apl-dim">Learn a prefix that '
                f"reduces recognisable likeness of named persons{where}, and look at what it does.</p></div></div>")


def duration(seconds: float) -> str:
    """ "about 4 min" for people."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def ago(then: float) -> str:
    gap = time.time() - then
    return "just now" if gap < 5 else f"{duration(gap)} ago"


def pill(state: str) -> str:
    return f'<span class="apl-pill apl-{state}">{STATES.get(state, state)}</span>'


def bar(run: Run) -> str:
    share = 100 * min(1.0, run.step / run.steps) if run.steps else 0.0
    return (f'<div class="apl-bar" role="progressbar" aria-label="steps done" aria-valuemin="0" aria-valuemax="100" '
            f'aria-valuenow="{share:.0f}" title="{share:.0f}%"><i style="width:{share:.1f}%"></i></div>')


def strip(active: Run | None, waiting: int, *, tell: bool = True) -> str:
    """The one line above all screens: what runs now and how long it will take."""
    if active is None:
        return body('<div class="apl-strip"><span class="apl-dim">Nothing is running.</span></div>')
    trains = active.left and active.stage in ("", "train")
    left = f"about {duration(active.left)} left" if trains else _phase(active, tell)
    more = f'<span class="apl-dim">{waiting} waiting</span>' if waiting else ""
    count = f"step {active.step:,} of {active.steps:,}" if active.steps else ""
    return body(f'<div class="apl-strip"><b>{escape(active.name)}</b>{pill(active.state)}{bar(active)}'
                f"<span>{count}</span><span>{left}</span>{more}</div>")


def _phase(run: Run, tell: bool) -> str:
    if run.state == PAUSED:
        return "paused"
    if run.job and run.job.control == "stop":
        return "saving"
    if run.losses and run.step >= run.steps and run.stage in ("", "train"):
        return "finishing"
    last = jobs.log_lines(run.job, 1, 4096) if run.job and tell else []
    return escape(last[0][:90]) if last else "getting ready"


def run_list(found: Sequence[Run], waiting: Sequence[Job], selected: str) -> str:
    """All runs: those that run or wait in their order, then the others, the newest first."""
    if not found:
        return body('<div class="apl-empty">No run yet. Start one under "New prefix".</div>')
    order = {job.run.name: i for i, job in enumerate(waiting)}
    rows = []
    for run in sorted(found, key=lambda run: (order.get(run.name, len(order)), -run.changed)):
        share = f"{100 * run.step // run.steps}%" if run.steps else ""
        chosen = ' class="on"' if run.name == selected else ""
        name = escape(run.name)
        rows.append(f'<tr{chosen}><td><b title="{name}">{name}</b></td><td>{pill(run.state)}</td><td>{share}</td>'
                    f'<td class="apl-dim">{ago(run.changed)}</td></tr>')
    table = f'<table class="apl-list apl-all" aria-label="All runs">{"".join(rows)}</table>'
    return body(f'<div class="apl-scroll">{table}</div>')


def status(run: Run | None, *, tell: bool = True) -> str:
    """State, figures and curves of the chosen run; `tell`: what it printed too, which may hold names and paths."""
    if run is None:
        return body('<div class="apl-empty">Choose a run, or start one under "New prefix".</div>')
    head = (f'<div class="apl-top"><div><h2>{escape(run.name)} {pill(run.state)}</h2>'
            f'<p class="apl-dim">{escape(_about(run))}</p></div></div>')
    return body(head, crash(run, tell=tell), _stages(run), _scored(run, tell), _tiles(run), _charts(run))


def _scored(run: Run, tell: bool) -> str:
    """ID-ACC of scores.json, "" for a run that was not scored."""
    found = id_acc(run, "test")
    if not found:
        return ""
    report = run.folder / "report.html"
    where = f'<p class="apl-dim">report: {escape(str(report))}</p>' if tell and report.exists() else ""
    return f'<div class="apl-said good">ID-ACC of persons never seen in training: {found}{where}</div>'


def id_acc(run: Run, split: str) -> str:
    """"0.55 -> 0.24" without and with the prefix, as scores.json has it; "" where it was not measured."""
    means = []
    for condition in ("off", "on"):
        value: Any = run.scores
        for key in ("persons", split, condition, "id_acc_mean"):
            value = value.get(key) if isinstance(value, Mapping) else None
        if not isinstance(value, int | float) or isinstance(value, bool):
            return ""
        means.append(f"{value:.2f}")
    return f"{means[0]} → <b>{means[1]}</b>"


def _stages(run: Run) -> str:
    """How far `apl make` is, "" for a run that only trains."""
    if not run.stage:
        return ""
    at = STAGES.index(run.stage) if run.stage in STAGES else 0
    if run.state == DONE:
        at = len(STAGES)
    marks = "".join(f'<li class="{"past" if i < at else "now" if i == at else ""}">{name}</li>'
                    for i, name in enumerate(STAGES))
    planned = f'<span class="apl-dim">planned: {duration(run.planned)} in all</span>' if run.planned else ""
    return f'<ol class="apl-stages">{marks}</ol>{planned}'


def _about(run: Run) -> str:
    c = run.config
    words = [f"checkpoint {Path(str(c['base_model'])).name}" if c.get("base_model") else "",
             f"{c.get('num_tokens')} vectors" if c.get("num_tokens") else "",
             f"alpha {c.get('alpha')}" if c.get("alpha") is not None else "",
             f"batch {c.get('batch_size')}" if c.get("batch_size") else ""]
    return " · ".join(word for word in words if word) or "its settings are not written yet"


def _tiles(run: Run) -> str:
    tail = run.losses[-50:]
    means = []
    for column in (1, 2):
        values = [row[column] for row in tail if row[column] is not None]
        means.append(f"{sum(values) / len(values):.4f}" if values else "–")
    left = duration(run.left) if run.left else ("–" if run.state != RUNNING else "soon known")
    tiles = ((f"{run.step:,} / {run.steps:,}" if run.steps else "–", "steps"),
             (f"{run.rate:.2f}" if run.rate else "–", "steps a second"), (left, "time left"),
             (means[0], "L_ID, last 50 steps"), (means[1], "L_Reg, last 50 steps"))
    cells = "".join(f'<div class="apl-tile"><b>{value}</b><span>{label}</span></div>' for value, label in tiles)
    return f'{bar(run)}<div class="apl-tiles">{cells}</div>'


def _charts(run: Run) -> str:
    marks = [step for step in run.levels if step < run.steps]
    parts = []
    for column, title, about in ((1, "L_ID", "named persons: falls as the prefix learns"),
                                 (2, "L_Reg", "everything else: has to stay low")):
        points = [(row[0], row[column]) for row in run.losses if row[column] is not None]
        chart = curves.loss_chart(f"{title} over steps", [(title, points)], run.steps,
                                  colours=curves.COLOURS[column - 1 : column], marks=marks)
        parts.append(f'<div class="apl-box"><h3>{title} <span class="apl-dim">{about}</span></h3>{chart}</div>')
    return f'<div class="apl-charts">{"".join(parts)}</div>'


def crash(run: Run, *, tell: bool = True) -> str:
    """What ended a run that did not end well, with the last lines it printed."""
    if run.state not in (FAILED, LOST):
        return ""
    code = run.job.code if run.job else None
    if run.state == LOST:
        why = "It was interrupted: the computer was switched off, or its process was ended from outside."
    else:
        why = CODES.get(code, "") if code is not None else ""
    lines = jobs.log_lines(run.job, 12) if run.job and tell else []
    told = f"<p>{escape(run.error)}</p>" if run.error and tell else ""
    log = f'<pre class="apl-log">{escape(chr(10).join(lines))}</pre>' if lines else ""
    number = f" (exit code {code})" if code is not None else ""
    saved = f"Saved up to step {run.step:,} at most; Resume goes on from the last saved state." if run.step else ""
    return (f'<div class="apl-crash" role="alert"><h2>This run {"was interrupted" if run.state == LOST else "failed"}'
            f"{number}</h2><p>{escape(why)}</p>{told}{log}<p class='apl-dim'>{escape(saved)}</p></div>")


def log(run: Run | None) -> str:
    lines = jobs.log_lines(run.job) if run and run.job else []
    return body(f'<pre class="apl-log">{escape(chr(10).join(lines)) or "nothing was printed yet"}</pre>')


def previews(run: Run | None) -> str:
    """Faces without and with the prefix, at step 0 and every level, with the score under each."""
    if run is None or not run.previews:
        waits = run is not None and run.state in (QUEUED, RUNNING, PAUSED)
        text = "Pictures appear here at step 0 and at every saved level." if waits else "This run drew no pictures."
        return body(f'<div class="apl-empty">{text}</div>') if run is not None else ""
    steps = _spread(sorted(run.previews), SHOWN_LEVELS)
    folder = training_folder(run.folder) / "previews"
    heads = "".join(f"<th>step {step:,}</th>" for step in steps)
    rows = []
    for i, first in enumerate(run.previews[steps[0]]):
        bare = face(folder, first.off, first.off_score, f"{first.name}, without the prefix", WARM)
        cells = [f'<td class="bare">{bare}</td>']
        for step in steps:
            shown = run.previews[step]
            person = shown[i] if i < len(shown) and shown[i].name == first.name else None
            words = f"{first.name}, with the prefix of step {step:,}"
            cells.append(f"<td>{face(folder, person.on, person.on_score, words) if person else ''}</td>")
        rows.append(f'<tr>{who(first)}{"".join(cells)}</tr>')
    scored = any(p.on_score is not None for step in steps for p in run.previews[step])
    note = ("Under each face: likeness to the person, 1 = the same face, near 0 = a stranger." if scored else
            "No face recogniser is installed for this checkpoint, so the faces carry no score.")
    table = f'<table class="apl-faces"><tr><th></th><th class="bare">without</th>{heads}</tr>{"".join(rows)}</table>'
    return body(f'<div class="apl-box"><h3>Same seeds, without and with the prefix</h3><div class="apl-scroll">{table}'
                f'</div><p class="apl-dim">{note}</p></div>')


def who(person: Preview) -> str:
    """The head of a person's row."""
    split = {"train": "learned on", "test": "never seen in training"}.get(person.split, person.split)
    return f'<th class="who" scope="row">{escape(person.name)}<small>{escape(split)}</small></th>'


def _spread(steps: Sequence[int], most: int) -> list[int]:
    """At most so many, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    return sorted({steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)})


def face(folder: Path, name: str, score: float | None, words: str, colour: str = "--apl-accent") -> str:
    """A face and its score; `words` say what it shows to those who cannot see it."""
    uri = thumbs.of_file(folder, name)
    picture = f'<img src="{uri}" alt="{escape(words)}">' if uri else '<img alt="no picture">'
    if score is None:
        return f'{picture}<span class="apl-dim">–</span>'
    share = 100 * min(1.0, max(0.0, (score - SCORE_FROM) / (SCORE_TO - SCORE_FROM)))
    return (f'{picture}<div class="apl-meter"><i style="width:{share:.0f}%;background:var({colour})"></i></div>'
            f'<span class="apl-score">{score:.2f}</span>')


def sheet(found: Sequence[thumbs.Card], total: int, title: str) -> str:
    """A contact sheet: pictures with the two texts that are learned from."""
    figures = []
    for card in found:
        picture = '<div class="none">no picture</div>'
        if card.uri:
            picture = f'<img src="{card.uri}" alt="{escape(card.prompt)}">'
        texts = [f"<b>{escape(card.name)}</b>" if card.name else "", escape(card.prompt),
                 f'<span class="apl-dim">{escape(card.description)}</span>' if card.description else ""]
        figures.append(f'<figure>{picture}<figcaption>{"<br>".join(t for t in texts if t)}</figcaption></figure>')
    return body(f"<h3>{escape(title)}: {len(found)} of {total:,} pictures</h3>"
                f'<div class="apl-sheet">{"".join(figures)}</div>')
