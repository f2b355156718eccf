"""Face recognisers that can be chosen by name: licence, the command that fetches each, customary match threshold.

Facts only, no imports: shown wherever a recogniser is chosen (command line, node, panel) and when one is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DEFAULT_ROOT = Path("~/.insightface")
"""insightface's own folder; every recogniser lies in `models/NAME` below it, unless a host has a folder of its own."""
YUNET, SFACE = "face_detection_yunet_2023mar.onnx", "face_recognition_sface_2021dec.onnx"
_NON_COMMERCIAL = "Its weights are for non-commercial research only (insightface model zoo)."


@dataclass(frozen=True)
class ModelNote:
    """What must be known before a recogniser is used: its licence and the command that fetches it."""

    licence: str
    command: str


@dataclass(frozen=True)
class Known:
    """A recogniser by name. `customary`: similarity from which its users call two faces one person's; `short`: licence.

    The customary value is where somebody else's data put it. A threshold from impostors in one's own pictures is
    better, and a value of one recogniser means nothing for another.
    """

    name: str
    short: str
    customary: float
    install: str


_INSIGHTFACE = "pip install insightface onnxruntime"
KNOWN: tuple[Known, ...] = (
    # 0.32: DeepFace's cosine distance of 0.68 for ArcFace features
    Known("auraface", "Apache-2.0 weights", 0.32, _INSIGHTFACE),
    Known("buffalo_l", "non-commercial research weights", 0.32, _INSIGHTFACE),
    Known("buffalo_s", "non-commercial research weights", 0.32, _INSIGHTFACE),
    Known("antelopev2", "non-commercial research weights", 0.32, _INSIGHTFACE),
    # 0.363: OpenCV's own example of FaceRecognizerSF
    Known("sface", "Apache-2.0 recogniser, MIT detector", 0.363, "pip install opencv-python"),
    # dlib says: one person below a distance of 0.6. Its features are about 1.5 long: 1 - 0.6**2 / (2 * 1.5**2) = 0.92
    Known("dlib", "weights in the public domain (CC0)", 0.92, "pip install dlib-bin face_recognition_models"),
)
NAMES = tuple(known.name for known in KNOWN)


def known(name: str) -> Known | None:
    """The recogniser of that name, in any case; None for a pack nobody told this table about."""
    return next((one for one in KNOWN if one.name == name.lower()), None)


def customary_threshold(name: str) -> float | None:
    """The customary threshold of a recogniser by name, or None."""
    found = known(name)
    return found.customary if found else None


def model_note(name: str, root: str | Path | None = None) -> ModelNote:
    """Licence and fetching command of a recogniser, such as "buffalo_l", "auraface", "sface" or "dlib"."""
    where = Path(root or DEFAULT_ROOT)
    target = (where / "models" / name).as_posix()
    if name.lower() == "auraface":
        return ModelNote("Its weights are under Apache-2.0.", f"hf download fal/AuraFace-v1 --local-dir {target}")
    if name.lower() == "sface":
        return ModelNote(
            "The recogniser is under Apache-2.0, the detector YuNet under MIT (OpenCV model zoo); rights in the "
            "pictures they were trained on are unsettled.",
            f"hf download opencv/face_detection_yunet {YUNET} --local-dir {target} && "
            f"hf download opencv/face_recognition_sface {SFACE} --local-dir {target}")
    if name.lower() == "dlib":
        return ModelNote("Its weights are in the public domain (CC0); rights in the pictures they were trained on are "
                         "unsettled.", "pip install dlib-bin face_recognition_models")
    research = name.startswith(("buffalo_", "antelope", "raccoon_"))
    licence = _NON_COMMERCIAL if research else "Check the licence of its weights before use."
    return ModelNote(licence, f"insightface-cli model.download {name} --root {where.as_posix()}")


def choices_text() -> str:
    """One line for help and tooltips: names with their licences."""
    return ", ".join(f"{one.name} ({one.short})" for one in KNOWN)
