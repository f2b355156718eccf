"""Fair tuning: every method's declared grid, on listed persons that the final figures do not show.

The best has the highest joint success (a face that is not recognised) minus drift (of neutral prompts, as a share of
two seeds' distance, mean of unnamed faces and things), on a development split of the list. Nobody unseen is looked at,
and the neutral prompts are training captions, not those that drift is measured on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apl_train.baselines.measure import Ground, Instruments, score
from apl_train.baselines.protocol import Baseline, Person, Prepared
from apl_train.model.backend import Backend

Row = dict[str, Any]


@dataclass
class Tuned:
    """The best settings of a method's grid, every point's figures, and the best point's model where it is at hand."""

    settings: Mapping[str, Any]
    rows: list[Row]
    prepared: Prepared | None


def objective(found: Mapping[str, Any]) -> tuple[float, float]:
    """(joint success of the listed, mean ratio of drift to two seeds) of `measure.score`'s figures."""
    # pictures that diverged have no distance: as bad as another picture altogether
    ratios = [1.0 if r is None else r for r in (kind["ratio_to_two_seeds"] for kind in found["drift"].values())]
    return found["listed"]["joint_success"], sum(ratios) / len(ratios) if ratios else 0.0


def tune(backend: Backend, method: Baseline, on_list: Sequence[Person], instruments: Instruments, base: Ground, *,
         keep: Sequence[str] = (), seed: int = 0, known: Sequence[Row] = (),
         done: Callable[[list[Row]], None] | None = None) -> Tuned:
    """Prepares and scores every point of the method's grid; equal ones are told apart by the lower ID-ACC.

    Args:
        base: the model's own figures on the development split.
        known: rows of points that were measured before; their settings must be equal.
        done: is handed all rows after every point.
    """
    rows: list[Row] = []
    best: Prepared | None = None
    for settings in method.grid:
        row = next((r for r in known if r["settings"] == dict(settings)), None)
        prepared = None
        if row is None:
            prepared = method.prepare(backend, on_list, settings, keep=keep, seed=seed)
            found = score(prepared, f"{method.name}-tuning", instruments, base)
            joint, moved = objective(found)
            row = {"settings": dict(settings), "objective": round(joint - moved, 5), "joint_success": joint,
                   "drift": moved, "id_acc_mean": found["listed"]["id_acc_mean"],
                   "face_rate": found["listed"]["face_rate"], "seconds": prepared.seconds}
        rows.append(row)
        if chosen(rows) is row:
            if best is not None:
                best.close()
            best = prepared
        elif prepared is not None:
            prepared.close()
        if done is not None:
            done(rows)
    return Tuned(chosen(rows)["settings"], rows, best)


def chosen(rows: Sequence[Row]) -> Row:
    """The row with the highest objective; no face at all counts as the worst ID-ACC."""
    return max(rows, key=lambda r: (r["objective"], -(1.0 if r["id_acc_mean"] is None else r["id_acc_mean"])))
