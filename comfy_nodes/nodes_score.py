"""Identity Score (ID-ACC): from pictures and reference pictures to how much the faces are alike (APL sec. 4.2).

The face recogniser is the user's own; without one, everything else of this pack works, and this node says what to run.
"""

from __future__ import annotations

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
from ..apl_core.id_scores import PersonScores, cosine, face_rate, joint_success, normalise, reference_embedding
from ..apl_core.identity import Face, FaceEmbedder, load_embedder
from ..apl_core.library import safe_name
from .pictures import GREEN, GREY, RED, boxed, captioned, to_bytes, to_images
from .schema import schema

PART = 8
"""Pictures looked at between two looks at the interrupt button."""
KNOWN = ("auraface", "buffalo_l", "buffalo_s", "antelopev2")


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
    return [*KNOWN, *(name for name in found if name not in KNOWN)]


@lru_cache(maxsize=2)
def _loaded(name: str, folder: Path) -> FaceEmbedder:
    pack = folder / "models" / safe_name(name)
    if (pack / "recogniser.json").is_file():
        return load_embedder(pack / "recogniser.json")
    return load_embedder(name, folder)


def reference_of(faces: list[list[Face]]) -> NDArray[np.float64]:
    """float64 [d]: the mean of the largest face of every reference picture, of length 1.

    Raises:
        ScoreError: no reference picture has a face.
    """
    found = np.array([each[0].embedding for each in faces if each])
    if not found.size:
        raise ScoreError("No face was found in the reference pictures.",
                         "Use a sharp frontal picture in which the face takes a good part.", field="reference")
    return reference_embedding(found) if len(found) > 1 else normalise(found[0])


def faces_of(embedder: FaceEmbedder, pictures: list[NDArray[np.uint8]]) -> list[list[Face]]:
    """`embedder.faces_of`, with the node's progress bar, and an end when the user interrupts."""
    bar, found = comfy.utils.ProgressBar(len(pictures)), []
    for start in range(0, len(pictures), PART):
        comfy.model_management.throw_exception_if_processing_interrupted()
        found += embedder.faces_of(pictures[start : start + PART])
        bar.update_absolute(len(found))
    return found


class IdentityScore(io.ComfyNode):
    """Compares the largest face of every picture with the reference."""

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
                io.Combo.Input("recogniser", options=recognisers(), default=KNOWN[0],
                               tooltip="A face recogniser in models/insightface/models. Scores of different "
                               "recognisers cannot be compared. Mind the licence of its weights."),
                io.Float.Input("threshold", default=0.32, min=-1.0, max=1.0, step=0.01,
                               tooltip="From this similarity on, a face counts as recognised. 0.32 is customary for "
                               "ArcFace; each recogniser has its own."),
            ],
            outputs=[
                io.Image.Output("annotated", tooltip="The pictures with the faces found, and their similarity."),
                io.Float.Output("mean", tooltip="ID-ACC: mean similarity of the pictures with a face. Lower is less "
                                "alike; nan when no picture has a face."),
                io.Float.Output("maximum", tooltip="The most similar picture."),
                io.Float.Output("face_rate", display_name="face rate",
                                tooltip="Share of the pictures that have a face. Pictures without one do not count as "
                                "anonymized."),
                io.Boolean.Output("passed", tooltip="True when every picture has a face and none is recognised."),
                io.String.Output("report", tooltip="The same as text."),
            ],
        )

    @classmethod
    def execute(
        cls, images: torch.Tensor, reference: torch.Tensor, recogniser: str, threshold: float
    ) -> io.NodeOutput:
        embedder = _loaded(recogniser, root())
        target = reference_of(faces_of(embedder, to_bytes(reference)))
        pictures = to_bytes(images)
        found = faces_of(embedder, pictures)
        alike = [float(cosine(faces[0].embedding, target)) if faces else math.nan for faces in found]
        scores = PersonScores("person", np.array([value for value in alike if not math.isnan(value)]), len(pictures))
        passed = joint_success([scores], threshold) == 1.0
        lines = [
            f"{embedder.name}: ID-ACC mean {scores.mean:.3f}, maximum {scores.max:.3f}, threshold {threshold:g}",
            f"faces in {scores.similarities.size} of {len(pictures)} pictures; "
            f"{int((scores.similarities >= threshold).sum())} recognised",
            *(f"{index}: {_shown(value, threshold)}" for index, value in enumerate(alike)),
        ]
        drawn = to_images([
            _annotated(picture, faces, value, threshold)
            for picture, faces, value in zip(pictures, found, alike, strict=True)
        ])
        report = "\n".join(lines)
        return io.NodeOutput(drawn, scores.mean, scores.max, face_rate([scores]), passed, report,
                             ui=ui.PreviewText(report))


def _shown(value: float, threshold: float) -> str:
    if math.isnan(value):
        return "no face"
    return f"{value:.3f} {'recognised' if value >= threshold else 'not recognised'}"


def _annotated(picture: NDArray[np.uint8], faces: list[Face], value: float, threshold: float) -> NDArray[np.uint8]:
    first = RED if value >= threshold else GREEN
    boxes = [(face.box, first if index == 0 else GREY) for index, face in enumerate(faces)]
    return captioned(boxed(picture, boxes), _shown(value, threshold))


NODES = [IdentityScore]
