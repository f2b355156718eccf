"""An identity check as one HTML file: figures, the faces that were compared, agreement, groups, and what was unusual.

The page holds everything (faces as data URIs, the scale as SVG, no scripts) and opens offline. Jinja2 escapes every
text in it, file names too. It shows persons' faces: it belongs to whoever made the check.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apl_core import atomic
from apl_core.errors import DatasetError
from apl_core.id_check import counted, counted_face
from apl_train.datasets.pictures import PictureFolder
from apl_train.folder_score import text as words
from apl_train.folder_score.odd_pictures import open_any
from apl_train.folder_score.score import FolderResult, Looked, Scored
from apl_train.report import grids
from apl_train.report.page import TEMPLATES
from apl_train.report.svg import PALETTE
from apl_train.report.table import get, measured, number, percent

PERSONS, PICTURES, REFERENCES = 24, 8, 4
"""How many are shown: persons, pictures of each on each side, references."""
FACE = 112
"""Edge in pixels of an embedded face."""
SHOWN_ODD = 200


def crop(image: NDArray[np.uint8], box: Sequence[float], margin: float = 0.15) -> NDArray[np.uint8]:
    """The square around a face's box with a margin, grey beyond the picture; uint8 [FACE, FACE, 3]."""
    x0, y0, x1, y1 = box
    edge = max(2.0, max(x1 - x0, y1 - y0) * (1 + 2 * margin))
    left, top, side = round((x0 + x1 - edge) / 2), round((y0 + y1 - edge) / 2), max(2, round(edge))
    out = np.full((side, side, 3), 128, np.uint8)
    height, width = image.shape[:2]
    ys, xs = slice(max(0, top), min(height, top + side)), slice(max(0, left), min(width, left + side))
    part = image[ys, xs]
    if part.size:
        out[ys.start - top : ys.start - top + part.shape[0], xs.start - left : xs.start - left + part.shape[1]] = part
    return grids.fit(out, FACE)


def _tile(store: PictureFolder, name: str, looked: Looked, side: str, scored: Scored, person: str) -> dict[str, Any]:
    """One picture: its counted face, or the whole picture without one, with the verdict."""
    faces = (looked.references if side == "references" else looked.sides[side])[name].faces
    try:
        image = open_any(store.read(name)).pixels
    except DatasetError:
        image = None
    vector = scored.references[person].vector
    choice = "largest" if side == "references" else scored.block["face_choice"]
    chosen = counted_face(faces or (), vector, choice)
    if image is None:
        image = np.full((8, 8, 3), 128, np.uint8)
        chosen = None
    value = float(counted([chosen], vector)[0]) if chosen is not None else math.nan
    if side == "references":  # against the others: the mean of all holds the picture itself
        reference = scored.references[person]
        value = float(reference.leave_one_out[reference.kept.index(name)]) if len(reference.kept) > 1 else math.nan
    verdict = "none"
    if not math.isnan(value) and side != "references":
        limit = scored.threshold.value
        verdict = "plain" if math.isnan(limit) else "known" if value >= limit else "other"
    shown = crop(image, chosen.box) if chosen is not None else grids.fit(image, FACE)
    said = ("only one" if side == "references" else "no face") if math.isnan(value) else number(value)
    return {"src": grids.data_uri(shown), "alt": f"{person}, {name}: {said}", "value": said, "verdict": verdict}


def _people(result: FolderResult) -> list[dict[str, Any]]:
    """The first persons by how recognisable their pictures still are: the worst come first."""
    scored, looked, settings = result.scored[0], result.looked[0], result.settings
    last = "on" if "on" in scored.sides else "off"
    order = sorted(scored.sides[last], key=lambda p: -p.max if not math.isnan(p.max) else 2.0)
    folders = {"references": settings.references, "off": settings.images, "on": settings.images_on}
    stores = {key: PictureFolder(folder) for key, folder in folders.items() if folder is not None}
    people = []
    try:
        for person in [p.name for p in order[:PERSONS]]:
            files = {"references": scored.references[person].kept[:REFERENCES],
                     **{side: scored.files[side][person] for side in scored.sides}}
            if last == "on":  # equal names are equal seeds: those first, in one order
                both = [n for n in files["off"] if n in set(files["on"])]
                files = {key: (*both, *(n for n in names if n not in set(both))) if key != "references" else names
                         for key, names in files.items()}
            strips = [{"key": key, "label": words.SIDES.get(key, "references"),
                       "tiles": [_tile(stores[key], name, looked, key, scored, person) for name in names[:PICTURES]],
                       "more": max(0, len(names) - PICTURES)} for key, names in files.items()]
            people.append({"name": person, "strips": strips})
    finally:
        for store in stores.values():
            store.close()
    return people


def _tiles(block: Mapping[str, Any]) -> list[dict[str, str]]:
    """The four figures at the top, of the first recogniser."""
    sides = words.sides_of(block)
    last, first = block[sides[-1]], block[sides[0]]

    def tile(key: str, label: str, note: str, text: Any) -> dict[str, str]:
        found = {"value": text(get(last, key, "value")), "label": label, "note": note}
        return found | ({"before": text(get(first, key, "value"))} if len(sides) > 1 else {})

    bounds = words.figure(last["id_acc_mean"]).partition(" ")[2]
    k = measured(get(last, "worst_of_k", "k"))
    return [
        tile("id_acc_mean", "likeness (ID-ACC mean)", f"95% interval {bounds}" if bounds else "one person: no interval",
             number),
        tile("recognised", "of the pictures are recognised",
             f"from {number(block['threshold']['value'])}, {words.SOURCES[block['threshold']['source']]}", percent),
        tile("joint_success", "show a face and are not recognised", "no face is no success", percent),
        tile("worst_of_k", f"of the persons are recognised in any of {k:.0f} pictures" if k else "in any of k pictures",
             "one picture is enough", percent),
    ]


def _scale(block: Mapping[str, Any]) -> dict[str, Any]:
    """Positions, in percent of an axis, of strangers, threshold, means and the persons' own references."""
    marks = [("strangers", block["strangers"], "two_seeds"), ("recognised from", block["threshold"]["value"], "random"),
             ("own references", block["ceiling"], "description")]
    marks += [(words.SIDES[side], block[side]["id_acc_mean"]["value"], side) for side in words.sides_of(block)]
    known = sorted(((label, float(v), key) for label, v, key in marks if measured(v) is not None), key=lambda m: m[1])
    if len(known) < 2:
        return {"marks": []}
    low, high = known[0][1], known[-1][1]
    room = max(high - low, 1e-3) * 0.08
    place = [{"label": label, "value": number(value), "key": key, "row": i % 2,
              "at": round(100 * (value - low + room) / (high - low + 2 * room), 2)}
             for i, (label, value, key) in enumerate(known)]
    return {"marks": place}


def _context(result: FolderResult) -> dict[str, Any]:
    scores = result.scores
    blocks = [{
        "name": b["name"], "licence": b["licence"], "threshold": words.threshold_text(b["threshold"]),
        "sides": [words.SIDES[s] for s in words.sides_of(b)], "rows": words.rows_of(b), "scale": _scale(b),
        "groups": [words.group_cells(row, words.sides_of(b)) for row in b.get("groups") or ()],
        "rejected": [(person, one["file"], one["reason"]) for person, found in b["rejected_references"].items()
                     for one in found], "left_out": list(b["left_out"].items()),
        "facts": [("recogniser", b["sha256"]), *((key, str(value)) for key, value in b["settings"].items())],
    } for b in scores["recognisers"]]
    first = scores["recognisers"][0]
    return {
        "palette": PALETTE, "tiles": _tiles(first), "blocks": blocks, "people": _people(result),
        "persons": first["off"]["n_persons"], "has_on": "on" in first,
        "agreement": [(words.SIDES[side], words.agreement_text(found)) for side, found in
                      (scores["agreement"] or {}).items()],
        "paired": scores["paired_names"], "odd": scores["odd"][:SHOWN_ODD], "odd_count": len(scores["odd"]),
        "folder_names": {"references": "references", **words.SIDES},
        "settings": [(key, str(value)) for key, value in scores["settings"].items() if value is not None],
    }


def render(result: FolderResult) -> str:
    """The page as text; the same check gives the same text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    text = environment.get_template("identity.html").render(_context(result))
    return text.encode("utf-8", "replace").decode("utf-8")  # a file name that is not UTF-8 must not spoil the page


def write_all(path: Path, result: FolderResult) -> list[Path]:
    """PATH.json, PATH.md and PATH.html, each whole or not at all. Raises `StorageError`."""
    files = [path.with_suffix(suffix) for suffix in (".json", ".md", ".html")]
    atomic.write_json(files[0], result.scores)
    atomic.write_text(files[1], words.markdown(result.scores))
    atomic.write_text(files[2], render(result))
    return files
