"""A map fitted between two token tables: which tokens anchor it, how it was chosen, and how vectors go through it.

Step (table, table) -> map -> vectors. The closed forms are `relative_maps`'s, the choice between them `map_choice`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError, ModelError
from .map_choice import PAPER_TOPK, Candidate, HoldOut, Judged, best_of, considered, directions_to_vectors, judge
from .map_choice import mask_helps as _mask_helps
from .placement import BOS
from .relative_maps import METHODS, SMALLEST, sides_inverted
from .relative_mask import masked
from .token_tables import TokenTable, check_same_vocabulary

BYTE_TOKENS = 512
"""First ids of CLIP's vocabulary: single bytes, and "!" (0), which pads prompts of the second encoder of SDXL."""
TRIM = 0.01
CEILING = 0.999
MIN_ANCHORS = 20


@dataclass(frozen=True, eq=False)
class TransferSettings:
    """How vectors are carried over from one token table to another.

    Attributes:
        method: "auto" (by hold-out), or one of ridge, half, ptfer, procrustes, none.
        centred: whether the tables' means are taken off first; None lets the hold-out decide.
        rho: damping, as a share of the mean eigenvalue; None lets the hold-out decide among 1e-6 to 10.
        weights: float [vocabulary], a token's part in the fit; 0 leaves it out. None: every token alike. Where most of
            a vocabulary was hardly trained, `caption_weights` is what makes a map possible at all.
        topk: PTfer only: entries of a relative code that count; 0 all, None lets the hold-out decide between all and
            the published 8192.
        folds: parts that the anchors are held out in.
        seed: of the drawing of those parts.
        clip_norms: shorten vectors beyond the 99.9th percentile of the target's tokens, with a warning.

    Raises:
        ConfigError: a value is out of range.
    """

    method: str = "auto"
    centred: bool | None = None
    rho: float | None = None
    weights: Tensor | None = None
    topk: int | None = None
    folds: int = 5
    seed: int = 0
    clip_norms: bool = False

    def __post_init__(self) -> None:
        if self.method not in ("auto", *METHODS):
            raise ConfigError(f"method is {self.method!r}.", f"Use one of: auto, {', '.join(METHODS)}.",
                              field="method")
        if self.rho is not None and not 1e-9 <= self.rho <= 1000:
            raise ConfigError(f"rho is {self.rho!r}, not from 1e-9 to 1000.", "1e-4 to 1e-2 is usual.", field="rho")
        if not 2 <= self.folds <= 20:
            raise ConfigError(f"folds is {self.folds!r}, not from 2 to 20.", "5 is usual.", field="folds")
        if self.topk is not None and self.topk and (self.topk < 2 or self.method not in ("auto", "ptfer")):
            raise ConfigError(f"topk is {self.topk!r} with method {self.method}.",
                              "It is for ptfer: 0 for no mask, or 2 and more.", field="topk")


def caption_weights(captions: Iterable[Sequence[int]], vocabulary: int) -> Tensor:
    """log(1 + count) of every token in captions, float32 [vocabulary].

    Args:
        captions: token ids of each caption.
        vocabulary: rows of the tables.

    Raises:
        ModelError: an id is beyond the vocabulary.
    """
    counts = torch.zeros(vocabulary)
    for ids in captions:
        some = torch.tensor(list(ids), dtype=torch.int64)
        if len(some) and not 0 <= int(some.min()) <= int(some.max()) < vocabulary:
            raise ModelError(f"A caption has token {int(some.max())}; the table has {vocabulary}.",
                             "Use the tokenizer that belongs to the tables.", field="captions")
        counts += torch.bincount(some, minlength=vocabulary)
    return torch.log1p(counts)


def anchors(source: TokenTable, target: TokenTable, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Ids int64 [k] and weights float32 [k] of the tokens that a map is fitted on.

    Left out: tokens of weight 0, CLIP's byte tokens with "!" and its BOS and EOS, rows of zeros, and of what remains
    the rows whose norm is outside the 1st to 99th percentile in either table: those were hardly trained.

    Raises:
        ModelError: the tables have different vocabularies, the weights do not fit, or too few tokens remain.
    """
    check_same_vocabulary({source.name: source, target.name: target})
    given = torch.ones(source.vocabulary) if weights is None else weights.detach().to("cpu", torch.float32).flatten()
    if len(given) != source.vocabulary or not bool(torch.isfinite(given).all()) or bool((given < 0).any()):
        raise ModelError(f"weights has {len(given)} numbers for {source.vocabulary} tokens, or some are negative.",
                         "Give one number of at least 0 for every token.", field="weights")
    keep = given > 0
    if source.vocabulary >= BOS:  # CLIP's own vocabulary
        keep[:BYTE_TOKENS] = False
        keep[BOS:] = False
    norms = [table.lengths for table in (source, target)]
    for each in norms:
        keep &= each > 0
    inside = keep.clone()
    if int(keep.sum()) > MIN_ANCHORS:
        for each in norms:
            low, high = _percentiles(each[keep], (TRIM, 1 - TRIM))
            inside &= (each >= low) & (each <= high)
    ids = inside.nonzero().flatten()
    if len(ids) < MIN_ANCHORS:
        raise ModelError(f"{len(ids)} tokens are left to fit a map on; it takes {MIN_ANCHORS}.",
                         "Give captions with more different words, or none.", field="weights")
    return ids, given[ids]


def _percentiles(values: Tensor, shares: Sequence[float]) -> list[float]:
    return torch.quantile(values.double(), torch.tensor(shares, dtype=torch.float64)).tolist()


@dataclass(frozen=True, eq=False)
class TableMap:
    """A map from one token table to another, and what is known of it.

    Attributes:
        source, target: the tables. ids, weights: the anchors.
        hold: their folds for the centring chosen, and the tables' means and median norms.
        candidate: the map chosen; judged: hold-out scores of everything that was considered.
        mask_scores: PTfer's mean held-out cosine without and with a mask, where one was tried.
        ceiling: 99.9th percentile of the target's norms after its mean was taken off.
    """

    source: TokenTable
    target: TokenTable
    ids: Tensor
    weights: Tensor
    hold: HoldOut
    candidate: Candidate
    judged: tuple[Judged, ...]
    ceiling: float
    clip_norms: bool = False
    mask_scores: tuple[float, float] | None = None

    @property
    def chosen(self) -> Judged:
        """Hold-out score of the map, without its mask."""
        plain = Candidate(self.candidate.method, self.candidate.rho, self.candidate.centred)
        return next(each for each in self.judged if each.candidate == plain)

    @cached_property
    def matrix(self) -> Tensor:
        """W [dt, ds], float32, without a mask: found when it is asked for, as vectors under a mask do not take it."""
        method = self.candidate.method
        return self.hold.whole("cross", *sides_inverted([method])).map(method, self.candidate.rho).float()

    @property
    def damping(self) -> dict[str, float]:
        """lam by the side that it is added to: rho times the mean eigenvalue, which of unit rows is their weight by
        dimensions."""
        return {side: self.candidate.rho * float(self.weights.sum()) / table.width
                for side, table in (("target", self.target), ("source", self.source))
                if side in sides_inverted([self.candidate.method])}

    def carry(self, vectors: Tensor, matrix: Tensor | None = None) -> Tensor:
        """float32 [n, dt] of vectors [n, ds]: direction by the map, norm relative to the median kept per vector.

        Args:
            matrix: the map to take instead, such as one of `without`.

        Raises:
            ModelError: the vectors are of another width.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.source.width:
            raise ModelError(f"The vectors are {list(vectors.shape)}; the table of {self.source.name} is "
                             f"{self.source.width} wide.", "Name the table of the model they were learned on.",
                             field="prefix")
        a, b = self.hold.sides
        x = vectors.detach().to("cpu", torch.float32) - a.mean
        if self.candidate.topk and matrix is None:
            rows = (side.units(table.vectors, self.ids) for side, table in ((a, self.source), (b, self.target)))
            moved = masked(*rows, self.weights, x, self.candidate.topk, self.candidate.rho,
                           self.hold.without(0).target)
        else:
            moved = x @ (self.matrix if matrix is None else matrix).T
        lengths = x.norm(dim=1)
        if self.clip_norms:
            lengths = lengths.clamp(max=self.ceiling / self.scale)
        return directions_to_vectors(moved, lengths, b.mean, self.scale)

    @property
    def scale(self) -> float:
        """Target's median norm / source's."""
        return self.hold.sides[1].median / max(self.hold.sides[0].median, SMALLEST)

    def without(self, fold: int) -> Tensor:
        """W [dt, ds] fitted without a fold's anchors (and without a mask), for judging it by them."""
        return self.hold.without(fold).map(self.candidate.method, self.candidate.rho)

    def facts(self) -> dict[str, Any]:
        """What a prefix file records of the map, JSON values only."""
        found: dict[str, Any] = {
            "method": self.candidate.method, "centred": self.candidate.centred, "rho": self.candidate.rho,
            "lambda": self.damping, "topk": self.candidate.topk, "anchors": len(self.ids),
            "holdout_cosine": round(self.chosen.cosine, 6), "holdout_pairs": round(self.chosen.pairs, 6),
            "source_table_sha256": self.source.sha256, "target_table_sha256": self.target.sha256,
        }
        if self.mask_scores is not None:
            found["holdout_mask"] = [round(value, 6) for value in self.mask_scores]
        return found


def fit(source: TokenTable, target: TokenTable, settings: TransferSettings | None = None) -> TableMap:
    """The map from `source` to `target` under `settings`, chosen on held-out tokens where they leave a choice.

    "auto" judges ridge raw and centred, and the other methods in the better of both.

    Raises:
        ModelError: the tables do not fit each other, or too few tokens remain to fit on.
    """
    s = settings or TransferSettings()
    ids, weights = anchors(source, target, s.weights)
    methods, rhos = considered(s.method, s.rho)
    # whether the means are in the way is asked of ridge: eigenvalues of the target, which it needs none of, cost most
    first, others = methods[:1], methods[1:]
    holds = {centred: HoldOut(source, target, ids, weights, centred, folds=s.folds, seed=s.seed)
             for centred in ((False, True) if s.centred is None else (s.centred,))}
    judged = judge(list(holds.values()), first, rhos)
    if others:
        judged += judge([holds[best_of(judged).candidate.centred]], others, rhos, judged)
    best = best_of([each for each in judged if s.method == "none" or each.candidate.method != "none"])
    chosen = best.candidate
    hold = holds[chosen.centred]
    topk, scores = 0, None
    if chosen.method == "ptfer" and s.topk != 0:
        asked = s.topk or PAPER_TOPK
        if asked < len(ids):
            # where nothing is predicted, a mask would be chosen by chance
            scores = _mask_helps(hold, chosen.rho, asked / len(ids)) if best.predicts else None
            topk = asked if s.topk or (scores and scores[1] > scores[0]) else 0
    candidate = Candidate(chosen.method, chosen.rho, chosen.centred, topk)
    ceiling = _percentiles(hold.sides[1].lengths[ids], (CEILING,))[0]
    return TableMap(source, target, ids, weights, hold, candidate, tuple(judged), ceiling, s.clip_norms, scores)
