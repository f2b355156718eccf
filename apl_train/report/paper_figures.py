"""The paper's own figures (APL Tables 1-4), measured by its authors on real weights; shown beside ours, never mixed.

Every constant cites its table. ID-ACC is the cosine similarity of ArcFace features (paper sec. 4.1): lower is better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LABEL = "paper, real weights (SD1.5)"
"""How every figure of this module is labelled where it stands beside a measurement of ours."""


@dataclass(frozen=True)
class IdAcc:
    """One cell of the paper's tables: ID-ACC mean and max per person, then averaged over persons."""

    mean: float
    max: float


@dataclass(frozen=True)
class ModelRow:
    """One model of Table 1, without and with the prefix that was learned on SD v1.5, by split ("train", "test")."""

    model: str
    off: Mapping[str, IdAcc]
    on: Mapping[str, IdAcc]


@dataclass(frozen=True)
class QualityRow:
    """One method of Table 2; None where the paper gives no figure."""

    method: str
    fid_id: float | None
    id_acc: float | None
    attr_acc: float | None
    fid_other: float | None
    clip: float | None


@dataclass(frozen=True)
class SweepRow:
    """One row of Table 3 (`value` is m) or Table 4 (`value` is alpha)."""

    value: float
    train: IdAcc
    test: IdAcc


def _split(train: tuple[float, float], test: tuple[float, float]) -> dict[str, IdAcc]:
    return {"train": IdAcc(*train), "test": IdAcc(*test)}


TABLE_1 = (
    ModelRow("SD v1.5", _split((0.31566, 0.37958), (0.30254, 0.36691)), _split((0.03924, 0.10861), (0.03970, 0.10773))),
    ModelRow("SD v1.4", _split((0.29911, 0.36713), (0.28837, 0.35720)), _split((0.03893, 0.10632), (0.04647, 0.11368))),
    ModelRow(
        "Realistic Vision v5.1",
        _split((0.32205, 0.37122), (0.32071, 0.36492)),
        _split((0.09215, 0.14391), (0.09033, 0.14496)),
    ),
    ModelRow("SDXL", _split((0.27917, 0.33371), (0.27218, 0.32830)), _split((0.07267, 0.14245), (0.07852, 0.14368))),
)
"""Table 1: the prefix learned on SD v1.5, on four models."""

TABLE_2 = (
    QualityRow("SD v1.5", None, 0.30254, 0.69361, None, 0.3078),
    QualityRow("FMN", 263.57, None, None, 54.89, 0.1642),
    QualityRow("UCE", 125.67, None, None, 88.69, 0.0298),
    QualityRow("ESD", 189.32, None, None, 9.59, 0.2530),
    QualityRow("CA", 57.58, 0.01215, 0.53898, 4.14, 0.2903),
    QualityRow("APL", 20.01, 0.03970, 0.60222, 2.98, 0.3058),
)
"""Table 2: quality on prompts naming S_test, and on COCO-30k; Attr-ACC is a cosine of facial attribute features."""

TABLE_3 = (
    SweepRow(1, IdAcc(0.12308, 0.20149), IdAcc(0.11434, 0.19768)),
    SweepRow(5, IdAcc(0.05834, 0.12377), IdAcc(0.05758, 0.13179)),
    SweepRow(10, IdAcc(0.03345, 0.10548), IdAcc(0.03257, 0.09702)),
    SweepRow(20, IdAcc(0.03270, 0.09735), IdAcc(0.04084, 0.10780)),
)
"""Table 3: prompt length m."""

TABLE_4 = (
    SweepRow(0, IdAcc(0.05237, 0.12196), IdAcc(0.05688, 0.13048)),
    SweepRow(0.5, IdAcc(0.04826, 0.11933), IdAcc(0.04090, 0.10900)),
    SweepRow(1, IdAcc(0.03345, 0.10548), IdAcc(0.03257, 0.09702)),
    SweepRow(2, IdAcc(0.06819, 0.14412), IdAcc(0.06707, 0.14137)),
    SweepRow(5, IdAcc(0.05622, 0.13619), IdAcc(0.04083, 0.10900)),
)
"""Table 4: weight alpha of equation 5."""


def beside(split: str, condition: str) -> dict[str, float] | None:
    """The paper's SD v1.5 figures for a row of ours, under the keys of scores.json; None where it has no such row.

    Args:
        split: "train", "test" or "final"; the last, unseen as well, stands beside the paper's testing set.
        condition: "off" and "on" are in the paper (Table 1; Attr-ACC of Table 2 is on the testing set only).
    """
    split = "test" if split == "final" else split
    if split not in ("train", "test") or condition not in ("off", "on"):
        return None
    row = TABLE_1[0]
    cell = (row.off if condition == "off" else row.on)[split]
    found = {"id_acc_mean": cell.mean, "id_acc_max": cell.max}
    if split == "test":
        attributes = TABLE_2[0].attr_acc if condition == "off" else TABLE_2[-1].attr_acc
        found["attr_acc"] = attributes if attributes is not None else float("nan")
    return found
