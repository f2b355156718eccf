"""Identity Score (ID-ACC): from pictures and reference pictures to how much the faces are alike (APL sec. 4.2).

The face recogniser is the user's own. Without one, everything else of this pack works: this node says in its report
what to run, passes the pictures through and lets the queue go on, unless it is told to be strict.
"""

from __future__ import annotations

import logging
import math
from functools import lru_cache
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy_api.latest import io, ui
from numpy.typing import NDArray

from ..apl_core.errors import ScoreError
from ..apl_core.id_check import CHOICES, Comparison, build_reference, person_pictures
from ..apl_core.identity import Face, FaceEmbedder, load_embedder
from ..apl_core.library import safe_name
from ..apl_core.recognisers import NAMES, choices_text, customary_threshold
from .pictures import GREEN, GREY, RED, boxed, captioned, to_bytes, to_images
from .schema import schema

PART = 8
"""Pictures looked at between two looks at the interrupt button."""
_log = logging.getLogger("apl")


def root() -> Path:
    """The host's folder of face recognisers, as other packs have it: models/insightface, packs below models/."""
    registered = folder_paths.folder_names_and_paths.get("insightface", ([], set()))[0]
    return Path(registered[0]) if registered else Path(folder_paths.models_dir) / "insightface"


def recognisers() -> list[str]:
    """Names to choose from: the well-known packs, and every folder of models/insightface/models."""
    try:
        found = sorted(path.name for path in (root() / "models").iterdir() if path.is_dir())
    except OSError:
        found = []
    return [*NAMES, *(name for name in found if name not in NAMES)]


@lru_cache(maxsize=2)
def _loaded(name: str, folder: Path) -> FaceEmbedder:
    pack = folder / "models" / safe_name(name)
    if (pack / "recogniser.json").is_file():
        return load_embedder(pack / "recogniser.json")
    return load_embedder(name, folder)


def faces_of(embedder: FaceEmbedder, pictures: list[NDArray[np.uint8]]) -> list[list[Face]]:
    """`embedder.faces_of`, with the node's progress bar, and an end when the user interrupts."""
    bar, found = comfy.utils.ProgressBar(len(pictures)), []
    for start in range(0, len(pictures), PART):
        comfy.model_management.throw_exception_if_processing_interrupted()
        found += embedder.faces_of(pictures[start : start + PART])
        bar.update_absolute(len(found))
    return found


def compared(embedder: FaceEmbedder, pictures: list[NDArray[np.uint8]], references: list[NDArray[np.uint8]],
             choice: str) -> Comparison:
    """`id_check.compare`, with the node's progress bar. Raises `ScoreError`: no reference shows exactly one face."""
    reference = build_reference(faces_of(embedder, references), field="reference")
    faces = tuple(faces_of(embedder, pictures))
    return Comparison(reference, faces, person_pictures("person", faces, reference, choice), choice)


class IdentityScore(io.ComfyNode):
    """Compares a face of every picture with the reference."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="APL_IdentityScore",
            display_name="Identity Score (ID-ACC)",
            description="Measures how much the faces in pictures resemble a person's reference pictures. Needs a face "
            "recogniser of your own; nothing is downloaded.",
            search_aliases=["face similarity", "ArcFace", "ID-ACC", "APL"],
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The pictures to score, all of one person's prompts."),
                io.Image.Input("reference", tooltip="Pictures of that person; two or more give a steadier reference."),
                io.Combo.Input("recogniser", options=recognisers(), default=NAMES[0],
                               tooltip="A face recogniser in models/insightface/models. Scores of different "
                               f"recognisers cannot be compared. Licences: {choices_text()}."),
                io.Float.Input("threshold", default=0.32, min=-1.0, max=1.0, step=0.01,
                               tooltip="From this similarity on, a face counts as recognised. Customary are 0.32 for "
                               "ArcFace, 0.363 for sface and 0.92 for dlib; each recogniser has its own."),
                io.Combo.Input("face_choice", options=list(CHOICES), default=CHOICES[0], optional=True,
                               tooltip="Which face of a picture counts: the largest, the best match (the worst case "
                               "for privacy), or all of them."),
                io.Boolean.Input("strict", default=False, optional=True,
                                 tooltip="Stop the queue when nothing can be scored. Otherwise the report says why, "
                                 "and the pictures are passed through."),
            ],
            outputs=[
                io.Image.Output("annotated", tooltip="The pictures with the faces found, and their similarity."),
                io.Float.Output("mean", tooltip="ID-ACC: mean similarity of the pictures with a face. Lower is less "
                                "alike; nan when no picture has a face."),
                io.Float.Output("maximum", tooltip="The most similar picture."),
                io.Float.Output("face_rate", display_name="face rate",
                                tooltip="Share of the pictures that have a face. Pictures without one do not count as "
                                "anonymized."),
                io.Boolean.Output("passed", tooltip="True when every picture has a face and none is recognised; "
                                  "never when nothing could be scored."),
                io.String.Output("report", tooltip="The same as text."),
            ],
        )

    @classmethod
    def execute(cls, images: torch.Tensor, reference: torch.Tensor, recogniser: str, threshold: float,
                face_choice: str = CHOICES[0], strict: bool = False) -> io.NodeOutput:
        pictures = to_bytes(images)
        try:
            embedder = _loaded(recogniser, root())
            found = compared(embedder, pictures, to_bytes(reference), face_choice)
        except ScoreError as error:
            if strict:
                raise
            _log.warning("Identity Score: %s", error)
            report = f"Nothing was scored. {error}"
            return io.NodeOutput(images, math.nan, math.nan, math.nan, False, report, ui=ui.PreviewText(report))
        scores, passed = found.scores, found.scores.anonymised(threshold) == len(pictures)
        shown = [found.shown(index) for index in range(len(pictures))]
        report = "\n".join([
            f"{embedder.name}: ID-ACC mean {scores.mean:.3f}, maximum {scores.max:.3f}, threshold {threshold:g}"
            + _customary(recogniser, threshold),
            f"faces in {scores.n_faces} of {len(pictures)} pictures; {scores.recognised(threshold)} recognised",
            *(f"reference {name} left out: {reason}" for name, reason in found.reference.rejected),
            *(f"{index}: {_shown(value, threshold)}" for index, value in enumerate(shown)),
        ])
        drawn = to_images([
            _annotated(picture, found, index, threshold) for index, picture in enumerate(pictures)
        ])
        return io.NodeOutput(drawn, scores.mean, scores.max, scores.n_faces / len(pictures), passed, report,
                             ui=ui.PreviewText(report))


def _customary(recogniser: str, threshold: float) -> str:
    """A word where the threshold is far from what is customary for the recogniser."""
    usual = customary_threshold(recogniser)
    return "" if usual is None or abs(usual - threshold) < 0.1 else f" (customary for {recogniser}: {usual:g})"


def _shown(value: float, threshold: float) -> str:
    if math.isnan(value):
        return "no face"
    return f"{value:.3f} {'recognised' if value >= threshold else 'not recognised'}"


def _annotated(picture: NDArray[np.uint8], found: Comparison, index: int, threshold: float) -> NDArray[np.uint8]:
    value, chosen = found.shown(index), found.chosen(index)
    colour = RED if value >= threshold else GREEN
    boxes = [(face.box, colour if face is chosen else GREY) for face in found.faces[index]]
    return captioned(boxed(picture, boxes), _shown(value, threshold))


NODES = [IdentityScore]
