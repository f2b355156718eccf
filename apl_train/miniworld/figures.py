"""`apl miniworld figures`: the plots of docs/miniworld.md, which are the paper's ablations on the miniature world.

The sweeps over alpha (Table 4), m (Table 3) and the number of persons (Fig. 8), the levels (Fig. 6) and training
without regularisation (Fig. 7) are those of `apl evaluate`; here is only the picture at the top of README.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from apl_core.atomic import write_with
from apl_core.prefix import load_prefix
from apl_train import claims, shipped
from apl_train.model.backend import Backend
from apl_train.scoring.persons import read_evaluation_set
from apl_train.tables.command import evaluate_tables
from apl_train.tables.settings import read_settings

DOCS = claims.FILE.parent.parent / "docs" / "figures"
TABLES = ("table3", "table4", "fig6", "fig7", "fig8")


def write_figures(run: Path | None = None, say: Callable[[str], None] = lambda _text: None) -> list[Path]:
    """Measures what is not measured yet, writes docs/figures/* and benchmarks/results/*; returns the figures."""
    found = evaluate_tables(read_settings(shipped.MINIATURE), run or Path("runs/evaluate") / shipped.MINIATURE, TABLES,
                            say=say)
    return [*(DOCS / name for table in found.values() for name in table["figures"]), write_before_after()]


def write_before_after(persons: int = 8) -> Path:
    """The picture at the top of README.md: unseen persons without the prefix, with it, and their descriptions alone."""
    backend = Backend.load(shipped.locate("base_model", shipped.MINIATURE))
    prompt = load_prefix(shipped.prefix_file(shipped.PREFIX))
    people = read_evaluation_set(shipped.locate("persons", shipped.MINIATURE)).of_split("test", persons)
    named, described = [f"A close-up portrait of {p.name}" for p in people], [p.description for p in people]
    seeds = list(range(100, 100 + persons))
    rows = [backend.sample(named, seeds).images, backend.sample(named, seeds, vectors=prompt).images,
            backend.sample(described, seeds).images]
    grid = np.concatenate([np.concatenate(list(r), 1) for r in rows])
    path = DOCS / "before-after.png"
    write_with(path, lambda temporary: Image.fromarray(grid).save(temporary, "PNG"))
    return path
