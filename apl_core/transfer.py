"""A prefix from one model family to another, from the token tables alone: SD1.x to SDXL without training.

Step prefix + tables -> prefix (APL sec. 4.1). Where a target's table is the source's own, as SDXL's first encoder's is,
the vectors are copied; the other tensors go through a closed-form map (`relative_maps`) that held-out tokens choose.
What was done is recorded in the file: method, lambda, hold-out score and the hashes of both tables.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .errors import ModelError, PrefixFileError
from .families import FAMILIES
from .prefix import AnonymizationPrompt
from .table_map import TableMap, TransferSettings, anchors, caption_weights, fit
from .token_tables import TokenTable, check_same_vocabulary
from .transfer_report import KeyReport, Manifold, TransferReport, describe

__all__ = ["Mapper", "TransferSettings", "Transferred", "caption_weights", "transfer"]
RECORD = "apl.transfer"
"""Header key of what was done, one JSON object a tensor."""


@dataclass(frozen=True, eq=False)
class Transferred:
    """A prefix of the target's family, and the report of how it came about."""

    prefix: AnonymizationPrompt
    report: TransferReport


class Mapper:
    """Fitted once for a pair of models; carries over any number of prefixes, such as the levels of one.

    Args:
        source: the table of the model that prefixes were learned on.
        targets: tables by tensor keys: `clip_l` and `clip_g`, or `emb_params`.
        settings: see `TransferSettings`.

    Raises:
        ModelError: the targets are no family's, tables do not fit each other, or too few tokens remain to fit on.
    """

    def __init__(self, source: TokenTable, targets: Mapping[str, TokenTable],
                 settings: TransferSettings | None = None) -> None:
        self.family = family_of_targets(targets)
        check_same_vocabulary({"source": source, **targets})
        self.source, self.targets = source, dict(targets)
        self.settings = settings or TransferSettings()
        self.maps: dict[str, TableMap | None] = {
            key: None if source.agrees_with(table) else fit(source, table, self.settings)
            for key, table in targets.items()
        }
        mapped = next((each for each in self.maps.values() if each is not None), None)
        ids = mapped.ids if mapped else anchors(source, source, self.settings.weights)[0]
        self._manifold = Manifold(source, ids)

    def carry(self, prefix: AnonymizationPrompt) -> Transferred:
        """The prefix for the target's family.

        Raises:
            ModelError: it is of another width than the source's table.
            PrefixFileError: it has several tensors.
        """
        vectors = source_vectors(prefix, self.source)
        tensors, reports, record = {}, [], {}
        for key, mapped in self.maps.items():
            carried = vectors if mapped is None else mapped.carry(vectors)
            record[key] = self._copied() if mapped is None else mapped.facts()
            tensors[key] = carried.clone()
            report = describe(key, self._manifold, vectors, carried, record[key], mapped)
            reports.append(_with_ceiling(report, mapped, vectors))
        return Transferred(AnonymizationPrompt(self.family, tensors, self._meta(prefix, record)),
                           TransferReport(tuple(reports)))

    def _copied(self) -> dict[str, Any]:
        return {"method": "copy", "source_table_sha256": self.source.sha256, "target_table_sha256": self.source.sha256}

    def _meta(self, prefix: AnonymizationPrompt, record: Mapping[str, Any]) -> Any:
        methods = ", ".join(f"{key}: {facts['method']}" for key, facts in record.items())
        # scores were measured on the other model: they are not this file's
        return prefix.meta.with_fields(
            title=f"{prefix.name}-{self.family}", family=self.family, widths=None, scores={},
            transferred_from=f"{prefix.content_hash} ({methods})",
            extra={**prefix.meta.extra, RECORD: json.dumps(record, sort_keys=True)},
        )


def _with_ceiling(report: KeyReport, mapped: TableMap | None, vectors: Tensor) -> KeyReport:
    """Says which vectors are, or were, beyond the 99.9th percentile of the target's tokens."""
    if mapped is None:
        return report
    beyond = (vectors - mapped.hold.sides[0].mean).norm(dim=1) * mapped.scale > mapped.ceiling
    if not bool(beyond.any()):
        return report
    text = "shortened to" if mapped.clip_norms else "longer than"
    note = (f"{text} the 99.9th percentile of the target's tokens ({mapped.ceiling:.3g})",)
    rows = tuple(type(row)(**{**vars(row), "warnings": row.warnings + (note if bool(beyond[row.index]) else ())})
                 for row in report.vectors)
    return KeyReport(**{**vars(report), "vectors": rows})


def family_of_targets(targets: Mapping[str, TokenTable]) -> str:
    """The family of a file with tensors for these tables. Raises ModelError where there is none."""
    keys = set(targets)
    if keys == set(FAMILIES["sdxl"].widths):
        return "sdxl"
    if keys == {"emb_params"}:
        return "sd2" if targets["emb_params"].width == FAMILIES["sd2"].widths["emb_params"] else "sd1"
    raise ModelError(f"The target has token tables {', '.join(sorted(keys)) or 'of no encoder'}.",
                     "A Stable Diffusion XL model has clip_l and clip_g; others have emb_params.", field="targets")


def source_vectors(prefix: AnonymizationPrompt, source: TokenTable) -> Tensor:
    """float32 [m, ds] of a prefix that fits the source's table. Raises ModelError and PrefixFileError."""
    if len(prefix.tensors) > 1:
        raise PrefixFileError(f"{prefix.name} has several tensors ({', '.join(prefix.tensors)}).",
                              "Only a prefix with one, learned on Stable Diffusion 1.x or 2.x, can be carried over.",
                              field="prefix")
    vectors = prefix.vectors()
    if vectors.shape[1] != source.width:
        raise ModelError(f"{prefix.name} has vectors of width {vectors.shape[1]}; the table of {source.name} is "
                         f"{source.width} wide.", "Name the model that the prefix was learned on.", field="source")
    return vectors


def transfer(prefix: AnonymizationPrompt, source: TokenTable, targets: Mapping[str, TokenTable],
             settings: TransferSettings | None = None) -> Transferred:
    """Carry a prefix over to another family; see `Mapper`, which several prefixes of one model can share.

    Raises:
        ModelError: the tables do not fit each other or the prefix, or too few tokens remain to fit on.
        PrefixFileError: the prefix has several tensors.
    """
    source_vectors(prefix, source)  # before a fit that takes seconds
    return Mapper(source, targets, settings).carry(prefix)
