"""The recogniser that a name or a file stands for. Nothing is downloaded unless the caller says so."""

from __future__ import annotations

from pathlib import Path

from .faces import Face, FaceEmbedder, largest_first, with_border
from .recognisers import DEFAULT_ROOT, KNOWN, ModelNote, customary_threshold, model_note

__all__ = ["DEFAULT_ROOT", "KNOWN", "Face", "FaceEmbedder", "ModelNote", "customary_threshold", "largest_first",
           "load_embedder", "model_note", "with_border"]


def load_embedder(source: str | Path, root: str | Path | None = None, *, allow_download: bool = False,
                  det_size: int = 640, det_threshold: float | None = None) -> FaceEmbedder:
    """The recogniser that `source` names.

    Args:
        source: a recogniser.json (or a folder with one), "sface", "dlib", or the name of an insightface model pack such
            as "auraface".
        root: insightface's folder; models lie in `root`/models/NAME.
        allow_download: fetch a missing insightface pack; see `identity_insightface`.
        det_size: edge of the detector's input in pixels, always explicit; without effect on a recogniser.json and dlib.
        det_threshold: least score of a face, on the detector's own scale; the back-end's own default when None.

    Raises:
        ScoreError: it is missing, damaged, or a library is missing; the hint holds the command to run.
    """
    path, kind = Path(source), str(source).lower()
    manifest = path if path.suffix == ".json" else path / "recogniser.json"
    if path.suffix == ".json" or manifest.is_file():
        from .identity_still import StillEmbedder

        return StillEmbedder(manifest)
    chosen = {} if det_threshold is None else {"det_threshold": det_threshold}
    if kind == "sface":
        from .identity_sface import SFaceEmbedder

        return SFaceEmbedder(root, det_size=det_size, **chosen)
    if kind == "dlib":
        from .identity_dlib import DlibEmbedder

        return DlibEmbedder(root, **chosen)
    from .identity_insightface import InsightFaceEmbedder

    return InsightFaceEmbedder(str(source), root, allow_download=allow_download, det_size=det_size, **chosen)
