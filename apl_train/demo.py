"""`apl demo`: train a prefix on the shipped miniature world, score it on persons it never met, and write the report.

The same trainer, files and scores that a full-size model uses; only the paths are the miniature's. A second run reuses
the training and everything that does not depend on the prefix.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from apl_core.errors import APLError
from apl_core.identity import load_embedder
from apl_core.prefix import AnonymizationPrompt, load_prefix
from apl_train import shipped
from apl_train.make.assessment import Assessment, next_steps
from apl_train.model.backend import Backend
from apl_train.report.table import score_table
from apl_train.scoring.command import attribute_reader
from apl_train.scoring.persons import read_evaluation_set
from apl_train.training import config as configs
from apl_train.training.command import resume, train

_log = logging.getLogger("apl.demo")


def _prefix(run: Path, backend: Backend, steps: int | None, cache: Path) -> tuple[AnonymizationPrompt, float]:
    """The run's prefix, trained now unless it is there; and the seconds that took."""
    path, began = run / "prefix" / f"{shipped.PREFIX}.safetensors", time.monotonic()
    if path.exists():
        return load_prefix(path), 0.0
    if (run / "config.yaml").exists():
        return resume(run, backend=backend, cache=cache), time.monotonic() - began
    values = configs.preset("fast") | {"name": shipped.PREFIX} | ({"steps": steps} if steps else {})
    return train(run, configs.from_dict(values), backend=backend, cache=cache), time.monotonic() - began


def run_demo(run: Path, *, steps: int | None = None, persons: int = 16, seeds: int = 4,
             train_seeds: int = 2) -> tuple[dict[str, Any], str]:
    """Everything in one go; returns scores.json and what the terminal shows.

    seeds: pictures of each unseen person; train_seeds: at most so many of each of S_ID, who stand beside them for
    comparison.

    Writes `<run>/prefix/*.safetensors`, `scores.json` and `report.html`. Raises APLError.
    """
    seconds: dict[str, float] = {}
    cache = run.parent / "cache"
    began = time.monotonic()
    backend = Backend.load(shipped.locate("base_model", shipped.MINIATURE))
    people = read_evaluation_set(shipped.locate("persons", shipped.MINIATURE))
    embedder = load_embedder(shipped.recogniser(shipped.MINIATURE))
    attributes = attribute_reader(shipped.MINIATURE)
    seconds["load"] = time.monotonic() - began
    prompt, seconds["train"] = _prefix(run, backend, steps, cache)
    prefix_path = run / "prefix" / f"{shipped.PREFIX}.safetensors"
    steps_next = next_steps(prefix_path)
    scores = Assessment(run, run, backend, prompt, people, embedder, attributes, cache, persons, seeds,
                        min(train_seeds, seeds), commands=steps_next, seconds=seconds).measure()
    _record(scores, seconds)
    text = "\n".join([score_table(scores), "", f"report:  {run / 'report.html'}   (open it in a browser)",
                      f"prefix:  {prefix_path}", f"scores:  {run / 'scores.json'}", "", "next:",
                      *(f"  {command}\n      {what}" for what, command in steps_next)])
    return scores, text


def _record(scores: dict[str, Any], seconds: dict[str, float]) -> None:
    """The demo's own claims, where this is the full-length demo of a checkout."""
    from apl_train import claims

    try:
        claims.record_demo(scores, seconds)
    except APLError as error:
        _log.info("the demo's claims were not recorded: %s", error)
