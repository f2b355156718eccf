"""What a prepared baseline does: ID-ACC on listed and on unseen persons, faces, attributes, drift of neutral prompts.

The instruments are those that score a prefix (`evaluate`): equal persons, prompts, seeds and sampler, the same
recogniser, threshold and yardstick of drift, intervals over persons. The only difference is where pictures come from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apl_core import id_scores
from apl_core.errors import ScoreError
from apl_core.id_scores import Interval
from apl_core.identity import FaceEmbedder
from apl_train.baselines import BASELINES, Prepared
from apl_train.model.backend import Backend
from apl_train.scoring import drift
from apl_train.scoring.attributes import attr_acc
from apl_train.scoring.gallery import Gallery, Threshold, build_gallery, faces_by_person, find_threshold, person_scores
from apl_train.scoring.observe import Observed, Observer, Progress, shots_of
from apl_train.scoring.persons import EvaluationSet, NeutralPrompt, PersonRecord

KINDS = {"unnamed_face": "unnamed_faces", "nonface": "nonfaces"}


@dataclass(frozen=True)
class Instruments:
    """What pictures are made and looked at with.

    Attributes:
        people: the evaluation set that the persons are of.
        attributes: as in `evaluate`, or None.
        cache: keeps what is seen in the model's own pictures; personal data.
    """

    people: EvaluationSet
    embedder: FaceEmbedder
    attributes: Any = None
    steps: int = 20
    guidance: float = 3.0
    template: str = "A close-up portrait of {}"
    cache: Path | None = None
    progress: Progress | None = None

    def observe(self, source: Any, stage: str, subjects: Sequence[tuple[str, str]], seeds: int) -> Observed:
        """Pictures of a `Backend` or a `Prepared`; only the former's are cached."""
        observer = Observer(source, self.embedder, self.attributes, self.steps, self.guidance, self.cache,
                            self.progress)
        return observer.observe(stage, shots_of(subjects, seeds), cacheable=isinstance(source, Backend))

    def asked(self, persons: Sequence[PersonRecord]) -> list[tuple[str, str]]:
        """(person, prompt with the name) of each."""
        return [(p.name, self.template.replace("{}", p.name)) for p in persons]


@dataclass(frozen=True, eq=False)
class Ground:
    """The model itself on the same persons and prompts: what every method is compared with.

    Attributes:
        groups: persons by "listed" and "unseen"; empty ones are left out.
        neutral: neutral prompts by "unnamed_faces" and "nonfaces".
        seen: what the model's pictures of each group and kind show.
    """

    groups: Mapping[str, tuple[PersonRecord, ...]]
    neutral: Mapping[str, tuple[NeutralPrompt, ...]]
    seen: Mapping[str, Observed]
    gallery: Gallery
    threshold: Threshold
    seeds: int
    neutral_seeds: int


def ground(backend: Backend, instruments: Instruments, listed: Sequence[PersonRecord],
           unseen: Sequence[PersonRecord], neutral: Sequence[NeutralPrompt], seeds: int, neutral_seeds: int = 2,
           impostors: Sequence[PersonRecord] = ()) -> Ground:
    """Looks at the model's own pictures. `impostors`: further persons to set the threshold with, unpictured.

    Raises:
        ScoreError: nobody, or too few similarities between different persons for a threshold.
    """
    groups = {k: tuple(v) for k, v in (("listed", listed), ("unseen", unseen)) if v}
    kinds = {name: tuple(n for n in neutral if n.kind == kind) for kind, name in KINDS.items()}
    kinds = {name: prompts for name, prompts in kinds.items() if prompts}
    everybody = [p for persons in groups.values() for p in persons]
    gallery = build_gallery(instruments.people, [*everybody, *impostors], instruments.embedder, instruments.progress)
    seen = {k: instruments.observe(backend, f"baselines-{k}/off", instruments.asked(p), seeds)
            for k, p in groups.items()}
    off = [faces for k, persons in groups.items() for faces in faces_by_person(seen[k], len(persons))]
    off += [off[0][:0]] * len(impostors)
    threshold = find_threshold(gallery, off)
    if math.isnan(threshold.value):
        raise ScoreError(f"{threshold.impostors} impostor similarities are too few for a threshold.",
                         "Take more persons or seeds.", field="seeds")
    for kind, prompts in kinds.items():
        subjects = [(n.prompt, n.prompt) for n in prompts]
        seen[kind] = instruments.observe(backend, f"baselines-{kind}/off", subjects, neutral_seeds)
    return Ground(groups, kinds, seen, gallery, threshold, seeds, neutral_seeds)


def score(source: Any, name: str, instruments: Instruments, base: Ground) -> dict[str, Any]:
    """Rows of every group and the drift of every kind; plain values, None for what cannot be had.

    source: a `Prepared`, or the model itself for the row to compare with.
    """
    found: dict[str, Any] = {}
    for group, persons in base.groups.items():
        observed = instruments.observe(source, f"baselines-{group}/{name}", instruments.asked(persons), base.seeds)
        found[group] = _row(persons, observed, base.seen[group], base)
    found["drift"] = {}
    for kind, prompts in base.neutral.items():
        texts = [n.prompt for n in prompts]
        observed = instruments.observe(source, f"baselines-{kind}/{name}", [(t, t) for t in texts], base.neutral_seeds)
        moved = drift.paired_latents(texts, base.seen[kind].latents, observed.latents)
        ratio = moved.ratio(drift.two_seed_latents(texts, base.seen[kind].latents))
        found["drift"][kind] = {"value": _finite(moved.mean), "ratio_to_two_seeds": _finite(ratio.value),
                                "ci95": _ends(ratio), "face_rate": float((observed.counts > 0).mean()),
                                "n_prompts": len(texts), "n_images": len(observed.counts)}
    return found


def _row(persons: Sequence[PersonRecord], observed: Observed, off: Observed, base: Ground) -> dict[str, Any]:
    own, plain = (person_scores(persons, one, base.gallery) for one in (observed, off))
    mean = id_scores.cluster_bootstrap(own)
    ratio = id_scores.paired_bootstrap(plain, own).ratio
    truth = [p.attributes for p in persons for _ in range(base.seeds)]
    row = {"id_acc_mean": mean.value, "id_acc_max": id_scores.id_acc_max(own), "face_rate": id_scores.face_rate(own),
           "attr_acc": attr_acc(observed.attributes, truth),
           "joint_success": id_scores.joint_success(own, base.threshold.value), "ratio_to_base": ratio.value}
    return {k: _finite(v) for k, v in row.items()} | {
        "ci95": _ends(mean), "ci95_max": _ends(id_scores.cluster_bootstrap(own, id_scores.person_maxima)),
        "ratio_ci95": _ends(ratio), "n_persons": len(persons), "n_images": len(observed.counts)}


def measure(
    backend: Backend, method: str | Prepared, persons_listed: Sequence[PersonRecord],
    persons_unseen: Sequence[PersonRecord], seeds: int, *, instruments: Instruments,
    on_list: Sequence[PersonRecord] | None = None, settings: Mapping[str, Any] | None = None, keep: Sequence[str] = (),
    neutral: Sequence[NeutralPrompt] = (), neutral_seeds: int = 2, base: Ground | None = None,
) -> dict[str, Any]:
    """One method's figures, as plain values.

    Args:
        method: a name of `BASELINES`, prepared here with `settings` and `keep`, or what was prepared.
        persons_listed, persons_unseen: who is pictured; the former must be on the list.
        on_list: everybody on the list, `persons_listed` by default.
        seeds: pictures of each person.
        neutral: prompts whose drift is measured.
        base: the model's own figures where they are known (see `ground`).

    Raises:
        ScoreError: an unseen person is on the list, or too few persons for a threshold.
        ConfigError: see `Baseline.prepare`.
    """
    on_list = list(persons_listed if on_list is None else on_list)
    names = {p.name for p in on_list}
    for person in persons_unseen:
        if person.name in names:
            raise ScoreError(f"{person.name} is on the list and among the unseen.", "Measure other persons.",
                             field="persons_unseen")
    base = base or ground(backend, instruments, persons_listed, persons_unseen, neutral, seeds, neutral_seeds)
    owned = isinstance(method, str)
    prepared = BASELINES[method].prepare(backend, on_list, settings, keep=keep) if owned else method
    began = time.monotonic()
    try:
        found = score(prepared, prepared.name, instruments, base)
    finally:
        if owned:
            prepared.close()
    return {"method": prepared.name, **found, "notes": dict(prepared.notes),
            "seconds": {"prepare": prepared.seconds, "measure": round(time.monotonic() - began, 3)}}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _ends(interval: Interval) -> list[float] | None:
    ends = [interval.lo, interval.hi]
    return ends if all(map(math.isfinite, ends)) else None
