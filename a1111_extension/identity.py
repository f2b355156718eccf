"""ID-ACC in the WebUI: pictures against reference photos, and the tab "Identity check". The recogniser is `apl_core`'s.

Nothing is installed or fetched from here: without a recogniser, the tab says in one line what the user can run.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..apl_core.errors import APLError, ScoreError
from ..apl_core.recognisers import NAMES as KNOWN
from ..apl_core.recognisers import choices_text, customary_threshold

THRESHOLD = 0.32
CHOICES = ("largest", "best", "all")  # those of `apl_core.id_check`, which the page must not wait for


@dataclass(frozen=True)
class Scores:
    """Similarity of each picture's counted face to the references (NaN without a face), and what was measured by.

    `rejected` are (reference, reason): a reference must show exactly one face. `per_face` are the similarities that
    count in each picture: of every face where "all" was asked for, else of one.
    """

    similarities: tuple[float, ...]
    threshold: float
    recogniser: str
    rejected: tuple[tuple[str, str], ...] = ()
    per_face: tuple[tuple[float, ...], ...] = ()

    def faces_of(self, index: int) -> tuple[float, ...]:
        """A picture's similarities, a face each; one NaN for a picture without a face."""
        found = self.per_face[index] if self.per_face else ()
        return found or (self.similarities[index],)

    @property
    def seen(self) -> list[float]:
        """The similarities of the pictures that have a face."""
        return [value for value in self.similarities if not math.isnan(value)]

    def as_dict(self) -> dict[str, Any]:
        """JSON: null for a picture without a face, which never counts as anonymized."""
        seen = self.seen
        return {"similarities": [None if math.isnan(value) else round(value, 5) for value in self.similarities],
                "per_face": [[round(value, 5) for value in self.faces_of(index) if not math.isnan(value)]
                             for index in range(len(self.similarities))],
                "mean": round(sum(seen) / len(seen), 5) if seen else None,
                "max": round(max(seen), 5) if seen else None,
                "faces": len(seen), "images": len(self.similarities), "threshold": self.threshold,
                "recognised": sum(value >= self.threshold for value in seen), "recogniser": self.recogniser,
                "rejected_references": [f"{name}: {reason}" for name, reason in self.rejected]}


def settings() -> tuple[str, float]:
    """(recogniser, threshold) of the settings page."""
    from modules import shared

    name = str(getattr(shared.opts, "apl_recogniser", "") or KNOWN[0])
    value = getattr(shared.opts, "apl_threshold", THRESHOLD)
    return name, float(value) if isinstance(value, int | float) else THRESHOLD


def folder() -> Path:
    """models/insightface beside the checkpoints, where other extensions have it too."""
    from modules import paths_internal

    return Path(paths_internal.models_path) / "insightface"


def recognisers() -> list[str]:
    """Names to choose from: the well-known ones, and every folder of models/insightface/models."""
    try:
        found = sorted(path.name for path in (folder() / "models").iterdir() if path.is_dir())
    except OSError:
        found = []
    return [*KNOWN, *(name for name in found if name not in KNOWN)]


@lru_cache(maxsize=2)
def _loaded(name: str, root: Path) -> Any:
    from ..apl_core.identity import load_embedder
    from ..apl_core.library import safe_name

    pack = root / "models" / safe_name(name)
    return load_embedder(pack / "recogniser.json" if (pack / "recogniser.json").is_file() else name, root)


def score(images: Sequence[Any], references: Sequence[Any], threshold: float | None = None, *,
          recogniser: str | None = None, face_choice: str = "largest") -> Scores:
    """Compare pictures with a person's reference photos (APL sec. 4.2).

    Args:
        images: uint8 [H, W, 3] RGB each.
        references: the same; two or more give a steadier reference.
        threshold: from which similarity on a face counts as recognised; when None the settings page's, or for another
            recogniser than that page's the one that is customary for it.
        recogniser: one of `recognisers()`; the settings page's when None.
        face_choice: the face that counts in a picture, one of `CHOICES`.

    Raises:
        ScoreError: no such recogniser, or no reference shows exactly one face.
    """
    from ..apl_core.id_check import compare

    chosen, usual = settings()
    if recogniser is not None and recogniser != chosen:
        if recogniser not in recognisers():  # a page must not name files of the server
            raise ScoreError(f"recogniser is {recogniser!r}.", f"Choose one of: {', '.join(recognisers())}.",
                             field="recogniser")
        chosen, usual = recogniser, customary_threshold(recogniser) or usual
    embedder = _loaded(chosen, folder())
    found = compare(embedder, list(images), list(references), face_choice)
    return Scores(tuple(found.shown(index) for index in range(len(images))),
                  usual if threshold is None else float(threshold), embedder.name, found.reference.rejected,
                  tuple(tuple(float(value) for value in values) for values in found.scores.values))


def table(scores: Scores, labels: Sequence[str]) -> str:
    """HTML: one row for each face that counts, the threshold's line, the means."""
    rows = []
    for label, value in _lines(scores, labels):
        verdict = "no face" if math.isnan(value) else (
            f"{value:.3f} · " + ("recognised" if value >= scores.threshold else "not recognised"))
        width = 0 if math.isnan(value) else max(0.0, min(1.0, value)) * 100
        rows.append(f"<tr><td>{html.escape(label)}</td><td class='apl-bar'><i style='width:{width:.0f}%'></i>"
                    f"<b style='left:{max(0.0, scores.threshold) * 100:.0f}%'></b></td><td>{verdict}</td></tr>")
    found = scores.as_dict()
    mean = "no face in any picture"
    if found["mean"] is not None:
        mean = f"mean {found['mean']:.3f}, highest {found['max']:.3f}"
    return (f"<table class='apl-scores'>{''.join(rows)}</table><p>{html.escape(mean)} · {found['faces']} of "
            f"{found['images']} pictures have a face · threshold {scores.threshold:g} · "
            f"{html.escape(scores.recogniser)}</p>" + "".join(
                f"<p>{html.escape(f'reference {name} left out: {reason}')}</p>" for name, reason in scores.rejected))


def _lines(scores: Scores, labels: Sequence[str]) -> list[tuple[str, float]]:
    """(label, similarity) of every row; faces are numbered where a picture has several that count."""
    lines = []
    for index, label in enumerate(labels):
        found = scores.faces_of(index)
        lines += [(label if len(found) == 1 else f"{label}, face {at + 1}", value) for at, value in enumerate(found)]
    return lines


def check(source: str, picture: Any, *references: Any, recogniser: str | None = None,
          face_choice: str = "largest") -> str:
    """The tab's button: HTML with the scores, or a line that says what is missing."""
    import numpy as np

    from .compare import LAST

    try:
        given = [each for each in references if each is not None]
        if not given:
            raise ScoreError("There is no reference picture.", "Add at least one photo of the person.",
                             field="references")
        if source == "picture":
            images, labels = ([picture], ["picture"]) if picture is not None else ([], [])
        elif source == "pair":
            images, labels = list(LAST.pair or ()), ["without the prefix", "with the prefix"]
        else:
            images = list(LAST.images)
            labels = [f"picture {index + 1}" for index in range(len(images))]
        if not images:
            raise ScoreError("There is no picture to check.", "Generate one first, or add one here.", field="images")
        arrays = [np.array(each.convert("RGB")) if hasattr(each, "convert") else np.asarray(each) for each in images]
        return table(score(arrays, given, recogniser=recogniser, face_choice=face_choice), labels[: len(arrays)])
    except APLError as error:
        return f"<p class='apl-state apl-bad'>{html.escape(str(error))}</p>"


def _asked(source: str, picture: Any, recogniser: str, face_choice: str, *references: Any) -> str:
    return check(source, picture, *references, recogniser=recogniser or None, face_choice=face_choice)


def tab() -> Any:
    """The gradio Blocks of the tab, built when the host asks."""
    import gradio as gr

    preferred, names = settings()[0], recognisers()

    with gr.Blocks(analytics_enabled=False) as blocks:
        gr.HTML(value="<p>How much do pictures resemble a person? Scores stay in this process; photos are not kept. "
                "Use photos of people who agreed to it.</p>")
        with gr.Row():
            references = [gr.Image(label=f"Reference photo {index + 1}", type="numpy",
                                   elem_id=f"apl_reference_{index + 1}") for index in range(3)]
        with gr.Row():
            source = gr.Radio(label="Check", choices=["last pictures", "pair", "picture"], value="last pictures",
                              elem_id="apl_check_source")
            picture = gr.Image(label="Picture", type="numpy", elem_id="apl_check_picture")
        with gr.Row():
            recogniser = gr.Dropdown(label="Recogniser", choices=names if preferred in names else [preferred, *names],
                                     value=preferred, elem_id="apl_check_recogniser")
            choice = gr.Radio(label="Face that counts", choices=list(CHOICES), value=CHOICES[0],
                              elem_id="apl_check_face")
        gr.HTML(value=f"<p>Licences: {html.escape(choices_text())}. <i>best</i> is the worst case for privacy.</p>")
        button = gr.Button("Check", elem_id="apl_check")
        out = gr.HTML(value="", elem_id="apl_check_result")
        button.click(fn=_asked, inputs=[source, picture, recogniser, choice, *references], outputs=[out])
    return blocks
