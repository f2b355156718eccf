"""What is known of a transfer before a picture is drawn: how well held-out tokens are predicted, and whether the
prefix's vectors are like the tokens that the map was fitted on.

A prefix is no token. Vectors far longer than tokens, or in directions that tokens hardly take, are carried over by
guesswork, whatever the hold-out says; the report says so for each of them (field.md 3.4's stress, by our figures).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .map_choice import CLEAR
from .relative_maps import SMALLEST, unit
from .table_map import TableMap
from .token_tables import TokenTable

SAMPLE = 256
SPREAD = 8192
"""Anchors that the span is found from at most."""
NEAREST = 5
ENERGY = 0.99
"""Share of the anchors' energy that the directions "inside their span" hold."""
SCALES = (0.25, 4.0, 40.0)
BANDS = 4
_ROWS = 8192


@dataclass(frozen=True)
class VectorReport:
    """One vector of the prefix, in the source's table and, carried over, in the target's.

    Attributes:
        norm_percentile: tokens with a smaller norm, percent.
        residual: part of the vector outside the anchors' span, 0 to 1; tokens' own are about 0.1.
        likeness: largest cosine with a token.
        nearest, carried_to: (token id, cosine), the most alike first, in the source and in the target.
        warnings: why it is off the manifold; empty where it is not.
    """

    index: int
    norm_percentile: float
    residual: float
    likeness: float
    nearest: tuple[tuple[int, float], ...]
    carried_to: tuple[tuple[int, float], ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class KeyReport:
    """Transfer of one tensor.

    Attributes:
        key: tensor key of the new file. copied: whether both tables are one, so that nothing was mapped.
        facts: what the file records. choice: best hold-out score by method.
        bands: held-out cosine and nearest-token recall by frequency of the tokens, the most frequent first.
        holdout: recall and PTfer's loss on held-out tokens; stress: cosines for sums, differences and scaled tokens.
        vectors: one report each.
    """

    key: str
    copied: bool
    facts: Mapping[str, Any]
    vectors: tuple[VectorReport, ...]
    choice: tuple[Mapping[str, Any], ...] = ()
    bands: tuple[Mapping[str, Any], ...] = ()
    holdout: Mapping[str, float] = field(default_factory=dict)
    stress: Mapping[str, float] = field(default_factory=dict)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Of the map, and of all vectors."""
        found = [f"{self.key}, vector {each.index}: {text}" for each in self.vectors for text in each.warnings]
        if self.choice and not any(row["cosine"] > CLEAR * row["error"] for row in self.choice):
            found.insert(0, f"{self.key}: no map predicts held-out tokens better than chance; these two tables have "
                            "nothing in common, and what is carried over means nothing there")
        return tuple(found)


@dataclass(frozen=True)
class TransferReport:
    """Every tensor's report."""

    keys: tuple[KeyReport, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """Of all tensors; where tensors agree on a source vector, once for each."""
        return tuple(text for each in self.keys for text in each.warnings)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"warnings": list(self.warnings), "tensors": {each.key: {
            "copied": each.copied, "facts": dict(each.facts), "choice": [dict(row) for row in each.choice],
            "bands": [dict(row) for row in each.bands], "holdout": dict(each.holdout), "stress": dict(each.stress),
            "vectors": [{"index": v.index, "norm_percentile": v.norm_percentile, "residual": v.residual,
                         "likeness": v.likeness, "nearest": [list(n) for n in v.nearest],
                         "carried_to": [list(n) for n in v.carried_to], "warnings": list(v.warnings)}
                        for v in each.vectors]} for each in self.keys}}

    def text(self, word: Callable[[int], str] = str) -> str:
        """For people. word: what a token id is called."""
        lines = []
        for each in self.keys:
            facts = each.facts
            if each.copied:
                lines.append(f"{each.key}: copied, both models have one token table")
            else:
                lines.append(f"{each.key}: {facts['method']}, {'centred' if facts['centred'] else 'raw'}, rho "
                             f"{facts['rho']:g}, {facts['anchors']} tokens; held-out cosine "
                             f"{facts['holdout_cosine']:.3f}")
                lines += [f"  {row['method']:12}{row['cosine']:8.3f} ± {row['error']:.3f}   pairs {row['pairs']:.3f}   "
                          f"{row['setting']}" for row in each.choice]
                lines += [f"  tokens, {row['band']:20}cosine {row['cosine']:.3f}, itself nearest {row['top1']:.2f}, "
                          f"among ten {row['top10']:.2f}" for row in each.bands]
                lines.append("  stress: " + ", ".join(f"{name} {value:.3f}" for name, value in each.stress.items()))
            lines += [f"  vector {v.index}: norm percentile {v.norm_percentile:.1f}, outside the span "
                      f"{v.residual:.2f}, nearest {', '.join(word(i) for i, _ in v.nearest)} ({v.likeness:.2f})"
                      + (f", carried to {', '.join(word(i) for i, _ in v.carried_to)}" if not each.copied else "")
                      for v in each.vectors]
        return "\n".join([*lines, *(f"WARNING {text}" for text in self.warnings)])


def nearest(table: Tensor, vectors: Tensor, count: int, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(cosines, ids), each [n, count], of the rows of `table` most alike each vector, the most alike first.

    lengths: the rows' norms, where they are known.
    """
    wanted, lengths = unit(vectors), table.norm(dim=1) if lengths is None else lengths
    cosines = torch.cat([_alike(wanted, *part) for part in zip(table.split(_ROWS), lengths.split(_ROWS), strict=True)],
                        dim=1)
    best = cosines.topk(min(count, cosines.shape[1]), dim=1)
    return best.values, best.indices


def _alike(wanted: Tensor, rows: Tensor, lengths: Tensor) -> Tensor:
    """Cosines [n, k] of unit vectors [n, width] with rows [k, width] of these norms.

    The products are divided, not the rows before them: those are far more numbers.
    """
    return (wanted @ rows.T).div_(lengths.clamp(min=SMALLEST))


class Manifold:
    """What is usual among a table's anchors, to hold vectors against.

    Args:
        table: the token table. ids: its anchors.
    """

    def __init__(self, table: TokenTable, ids: Tensor) -> None:
        self.table = table
        self.norms = table.lengths[ids].sort().values
        spread = unit(table.vectors[ids[torch.linspace(0, len(ids) - 1, min(len(ids), SPREAD)).long()]])
        values, basis = torch.linalg.eigh(spread.T @ spread)
        outside = values.clamp(min=0).cumsum(0) <= (1 - ENERGY) * values.clamp(min=0).sum()
        self.outside = basis[:, outside].float()
        some = table.vectors[ids[torch.linspace(0, len(ids) - 1, min(len(ids), SAMPLE)).long()]]
        # a token's own row is always nearest: the second one tells how near others stand
        self.least_likeness = float(torch.quantile(self.nearest(some, 2)[0][:, 1], 0.01))
        self.most_residual = float(torch.quantile(self.residuals(some), 0.99))

    def nearest(self, vectors: Tensor, count: int = NEAREST) -> tuple[Tensor, Tensor]:
        """(cosines, ids), each [n, count], of the tokens most alike each vector."""
        return nearest(self.table.vectors, vectors, count, self.table.lengths)

    def residuals(self, vectors: Tensor) -> Tensor:
        """Length of unit vectors' part outside the anchors' span, [n]."""
        return (unit(vectors) @ self.outside).norm(dim=1)

    def percentiles(self, vectors: Tensor) -> Tensor:
        """Percent of anchors with a smaller norm, [n]."""
        return 100 * torch.searchsorted(self.norms, vectors.norm(dim=1).contiguous()) / len(self.norms)

    def warnings(self, norm: float, residual: float, likeness: float) -> tuple[str, ...]:
        """Why a vector is off the manifold."""
        found = []
        top = float(self.norms[-1])
        if norm > top:
            found.append(f"{norm / float(self.norms.median()):.1f} times as long as a token; tokens go up to "
                         f"{top / float(self.norms.median()):.1f}")
        if norm < float(self.norms[0]):
            found.append(f"shorter than any token ({norm / float(self.norms.median()):.2f} of the median)")
        if residual > self.most_residual:
            found.append(f"{residual:.2f} of it is outside the tokens' directions; a token's part there is at most "
                         f"{self.most_residual:.2f}")
        if likeness < self.least_likeness:
            found.append(f"like no token (cosine {likeness:.2f}; between tokens at least {self.least_likeness:.2f})")
        return tuple(found)


def describe(key: str, manifold: Manifold, vectors: Tensor, carried: Tensor, facts: Mapping[str, Any],
             mapped: TableMap | None) -> KeyReport:
    """The report of one tensor.

    Args:
        manifold: of the source's table. vectors, carried: [m, ds] and [m, dt].
        facts: what the file records.
        mapped: the map; None where the tensor was copied.
    """
    likeness, ids = manifold.nearest(vectors)
    into = (nearest(mapped.target.vectors, carried, NEAREST, mapped.target.lengths) if mapped else (likeness, ids))
    norms, percentiles, residuals = vectors.norm(dim=1), manifold.percentiles(vectors), manifold.residuals(vectors)
    reports = tuple(VectorReport(
        i, round(float(percentiles[i]), 2), round(float(residuals[i]), 4), round(float(likeness[i, 0]), 4),
        _pairs(ids[i], likeness[i]), _pairs(into[1][i], into[0][i]),
        manifold.warnings(float(norms[i]), float(residuals[i]), float(likeness[i, 0])),
    ) for i in range(len(vectors)))
    if mapped is None:
        return KeyReport(key, True, facts, reports)
    bands, holdout, stress = _held_out(mapped)
    return KeyReport(key, False, facts, reports, choice_table(mapped), bands, holdout, stress)


def _pairs(ids: Tensor, cosines: Tensor) -> tuple[tuple[int, float], ...]:
    return tuple((int(i), round(float(c), 4)) for i, c in zip(ids, cosines, strict=True))


def choice_table(mapped: TableMap) -> tuple[dict[str, Any], ...]:
    """Best hold-out score of every method that was considered, the best first."""
    best: dict[str, Any] = {}
    for each in mapped.judged:
        method = each.candidate.method
        if method not in best or each.cosine > best[method].cosine:
            best[method] = each
    return tuple({"method": method, "cosine": round(j.cosine, 6), "error": round(j.error, 6),
                  "pairs": round(j.pairs, 6), "setting": j.candidate.text()}
                 for method, j in sorted(best.items(), key=lambda item: -item[1].cosine))


def _held_out(mapped: TableMap) -> tuple[tuple[dict[str, Any], ...], dict[str, float], dict[str, float]]:
    """(bands, recall and loss, stress) of the first fold's tokens, by the map fitted without them."""
    hold, matrix = mapped.hold, mapped.without(0)
    places = hold.sample(0, SAMPLE)
    ids = hold.ids[places]
    x, truth = mapped.source.vectors[ids], mapped.target.vectors[ids]
    found = mapped.carry(x, matrix)
    cosines = (unit(found) * unit(truth)).sum(1)
    ranks = _ranks(mapped.target, found, cosines, ids)
    weights = hold.weights[places]
    # ids of CLIP's vocabulary are in the order of its merges, which is that of frequency
    order = (-weights).argsort(stable=True) if bool((weights != weights[0]).any()) else ids.argsort()
    bands = []
    for i, part in enumerate(order.chunk(BANDS)):
        name = ("most frequent", "frequent", "rare", "rarest")[i]
        bands.append({"band": name, "n": len(part), "cosine": round(float(cosines[part].mean()), 6),
                      "top1": round(float((ranks[part] < 1).double().mean()), 4),
                      "top10": round(float((ranks[part] < 10).double().mean()), 4)})
    holdout = {"cosine": float(cosines.mean()), "top1": float((ranks < 1).double().mean()),
               "top10": float((ranks < 10).double().mean()), "relative_code_loss": _code_loss(mapped, x, found)}
    half = len(ids) // 2
    one, two = slice(0, half), slice(half, 2 * half)
    cases = {"sums": (x[one] + x[two], truth[one] + truth[two]),
             "differences": (x[one] - x[two], truth[one] - truth[two])}
    cases |= {f"x{scale:g}": (x * scale, truth * scale) for scale in SCALES}
    stress = {name: round(float((unit(mapped.carry(a, matrix)) * unit(b)).sum(1).mean()), 6)
              for name, (a, b) in cases.items()}
    return tuple(bands), {name: round(value, 6) for name, value in holdout.items()}, stress


def _ranks(table: TokenTable, found: Tensor, cosines: Tensor, ids: Tensor) -> Tensor:
    """How many tokens are more alike each prediction than its own is, [n]."""
    wanted, above = unit(found), torch.zeros(len(ids), dtype=torch.int64)
    own = torch.arange(len(ids))
    for start in range(0, table.vocabulary, _ROWS):
        alike = _alike(wanted, table.vectors[start : start + _ROWS], table.lengths[start : start + _ROWS])
        here = (ids >= start) & (ids < start + _ROWS)
        alike[own[here], ids[here] - start] = -2.0
        above += (alike > cosines[:, None]).sum(1)
    return above


def _code_loss(mapped: TableMap, x: Tensor, found: Tensor, count: int = 64) -> float:
    """PTfer's loss, 1 - cos of both relative codes, of some tokens."""
    a, b = mapped.hold.sides
    v, u = unit(x[:count] - a.mean), unit(found[:count] - b.mean)
    dot, one, two = torch.zeros(len(v)), torch.zeros(len(v)), torch.zeros(len(v))
    taking_part = torch.zeros(mapped.source.vocabulary).index_fill_(0, mapped.ids, 1.0)
    for start in range(0, len(taking_part), _ROWS):  # a table in its order: to gather most of its rows takes longer
        part = slice(start, start + _ROWS)
        r, s = ((w @ table.vectors[part].T - (w @ side.mean)[:, None])
                * (taking_part[part] / side.lengths[part].clamp(min=SMALLEST))
                for w, table, side in ((v, mapped.source, a), (u, mapped.target, b)))
        dot, one, two = dot + (r * s).sum(1), one + r.square().sum(1), two + s.square().sum(1)
    return float((1 - dot / (one * two).sqrt().clamp(min=SMALLEST)).mean())
