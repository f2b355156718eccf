"""`apl score`: load what is to be scored, evaluate it, write scores.json, and record the claims that it settles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from apl_core.atomic import write_json
from apl_core.errors import APLError
from apl_core.identity import load_embedder
from apl_core.prefix import load_prefix
from apl_train import shipped
from apl_train.model.backend import Backend
from apl_train.model.precision import chosen
from apl_train.processes import this_process
from apl_train.scoring.attributes import AttributeReader
from apl_train.scoring.evaluate import evaluate
from apl_train.scoring.persons import read_evaluation_set


class StageBars:
    """One tqdm bar a stage of an evaluation, from its progress callback."""

    def __init__(self) -> None:
        self._stage, self._bar = "", None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self.close()
            self._stage = stage
            self._bar = tqdm(total=total, desc=stage, unit="picture", dynamic_ncols=True, leave=False,
                             disable=not this_process().main)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def attribute_reader(recogniser: str) -> AttributeReader | None:
    """The attribute model that belongs to a recogniser: only the shipped one has one so far."""
    if recogniser.startswith(shipped.MINIATURE):
        return AttributeReader(shipped.locate("attributes", shipped.MINIATURE))
    return None


def score(
    prefix: str | None,
    base_model: str = shipped.MINIATURE,
    persons: str = shipped.MINIATURE,
    recogniser: str = shipped.MINIATURE,
    *,
    splits: Sequence[str] = ("train", "test"),
    seeds: int = 8,
    limit: int | None = None,
    phrase: str | None = None,
    out: Path | None = None,
    cache: Path | None = None,
    backend: Backend | None = None,
) -> dict[str, Any]:
    """scores.json of a prefix (see `evaluate`), written to `out`. Settings are checked before the model is loaded."""
    prompt = load_prefix(shipped.prefix_file(prefix)) if prefix else None
    people = read_evaluation_set(shipped.locate("persons", persons))
    embedder = load_embedder(shipped.recogniser(recogniser))
    attributes = attribute_reader(recogniser)
    processes = this_process()
    out = out if processes.main else None
    if out is not None:
        write_json(out, {"state": "measuring"})  # an unwritable place is better known now than after an hour
    backend = backend or Backend.load(shipped.locate("base_model", base_model),
                                      device=processes.own_device() or chosen().device)
    bars = StageBars()
    try:
        scores = evaluate(backend, prompt, people, embedder, attributes, splits=splits, seeds=seeds,
                          persons_limit=limit, phrase=phrase, cache=cache, progress=bars)
    except APLError:
        if out is not None:
            out.unlink(missing_ok=True)
        raise
    finally:
        bars.close()
    if out is not None:
        write_json(out, scores)
    return scores
