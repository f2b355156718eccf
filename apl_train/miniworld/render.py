"""Pictures of the miniature world: faces from facesjs (node -> SVG -> resvg), things from the Noto emoji artwork.

Only `apl miniworld build` needs this file; it needs node, the npm packages `facesjs` 5 and
`emoji-datasource-google` (under `APL_MINIWORLD_NODE_MODULES`), and the Python package `resvg_py`.
Pictures are uint8 [H, W, 3] RGB, H = W = 128.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from apl_core.errors import ModelError
from apl_train.miniworld.people import background

SIZE = 128
"""Edge of a picture, pixels."""

_LEFT_OUT = re.compile(
    r"face|clock|moon|symbol|\bsign\b|sun with|lantern|doll|snowman|teddy|statue|moyai|silhouette|mosque|synagogue|"
    r"kaaba|temple|shrine|church|arts|wedding|beads|hamsa|prayer|medal|nazar|pistol|dagger|bomb|coffin|urn|"
    r"headstone|blood|syringe|smoking|card|gorilla|monkey|orangutan|phoenix|gift|suit\b|with|without"
)


def node_modules() -> Path:
    """Folder that holds the npm packages. Raises ModelError when they are not installed."""
    root = Path(os.environ.get("APL_MINIWORLD_NODE_MODULES", "node_modules"))
    if not (root / "facesjs").is_dir() or not (root / "emoji-datasource-google").is_dir():
        raise ModelError(
            f"the artwork packages are not under {root}",
            hint="npm install facesjs@5.0.3 emoji-datasource-google, then set APL_MINIWORLD_NODE_MODULES to that "
                 "node_modules",
        )
    return root


def _node(arguments: list[str], text: str = "") -> str:
    env = {**os.environ, "APL_MINIWORLD_NODE_MODULES": str(node_modules().resolve())}
    script = Path(__file__).with_name("faces.mjs")
    done = subprocess.run(
        ["node", str(script), *arguments], input=text, capture_output=True, text=True, env=env, check=False
    )
    if done.returncode:
        raise ModelError(f"node could not draw the faces: {done.stderr.strip()[-400:]}", hint="check node >= 18")
    return done.stdout


def face_parts() -> dict[str, list[list[str]]]:
    """facesjs' part names: kind -> [[id, "male" | "female" | "both"], ...]."""
    return json.loads(_node(["--parts"]))


def _rasterise(job: tuple[str, dict]) -> np.ndarray:
    import resvg_py

    svg, frame = job
    view = f'viewBox="{frame["x"]:.2f} {frame["y"]:.2f} {frame["size"]:.2f} {frame["size"]:.2f}"'
    svg = svg.replace('viewBox="0 0 400 600"', view, 1)
    svg = svg.replace('width="100%" height="100%"', f'width="{SIZE * 2}" height="{SIZE * 2}"', 1)
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, background=frame["background"]))
    picture = Image.open(io.BytesIO(png)).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(picture)


def draw_faces(pictures: Iterable[dict], workers: int = 2, chunk: int = 512) -> Iterator[np.ndarray]:
    """Face objects of `Anatomy.picture` -> uint8 [128, 128, 3], in order."""
    rows = list(pictures)
    with ProcessPoolExecutor(workers) as pool:
        for start in range(0, len(rows), chunk):
            part = rows[start : start + chunk]
            lines = _node([], "\n".join(json.dumps(p["face"]) for p in part)).splitlines()
            jobs = [(json.loads(line), p["frame"]) for line, p in zip(lines, part, strict=True)]
            yield from pool.map(_rasterise, jobs, chunksize=32)


class Things:
    """Non-faces: emoji artwork by name, on random backgrounds, about as large and as upright as faces."""

    def __init__(self, count: int, seed: int = 7):
        root = node_modules() / "emoji-datasource-google"
        rows = json.loads((root / "emoji.json").read_text(encoding="utf-8"))
        wanted = ("Objects", "Food & Drink", "Animals & Nature", "Travel & Places", "Activities")
        names: dict[str, Path] = {}
        for row in rows:
            name = row["name"].lower()
            if row["category"] not in wanted or not row.get("has_img_google"):
                continue
            if _LEFT_OUT.search(name) or len(name.split()) > 2 or not re.fullmatch(r"[a-z ]+", name):
                continue
            names[name] = root / "img" / "google" / "64" / row["image"]
        self.names = sorted(random.Random(seed).sample(sorted(names), min(count, len(names))))
        self._art = {n: Image.open(names[n]).convert("RGBA") for n in self.names}

    def draw(self, rng: random.Random, name: str) -> np.ndarray:
        """One picture of `name`, uint8 [128, 128, 3]."""
        size = rng.randint(92, 112)
        art = self._art[name].resize((size, size), Image.Resampling.BICUBIC)
        art = art.rotate(rng.uniform(-6, 6), Image.Resampling.BICUBIC)
        canvas = Image.new("RGB", (SIZE, SIZE), background(rng))
        free = SIZE - size
        canvas.paste(art, (rng.randint(0, free), rng.randint(0, free)), art)
        return np.asarray(canvas)
