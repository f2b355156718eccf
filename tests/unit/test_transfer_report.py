"""What a transfer says of itself, against numpy by hand and against vectors made to be wrong."""

from __future__ import annotations

import json

import numpy as np
import torch

from apl_core.metadata import PrefixMetadata
from apl_core.prefix import AnonymizationPrompt
from apl_core.table_map import TransferSettings, fit
from apl_core.token_tables import TokenTable
from apl_core.transfer import transfer
from apl_core.transfer_report import Manifold, choice_table, describe, nearest

WIDTH = 32


def tables(tokens: int = 1500, dead: int = 6) -> tuple[TokenTable, TokenTable]:
    """Power-law tables; the source's last `dead` directions are all but unused."""
    g = torch.Generator().manual_seed(2)
    common = torch.randn(tokens, WIDTH - dead, generator=g) * torch.arange(1, WIDTH - dead + 1) ** -0.5
    source = torch.cat([common, 1e-4 * torch.randn(tokens, dead, generator=g)], dim=1)
    target = common @ torch.randn(WIDTH - dead, 48, generator=g) / 7 + 0.02 * torch.randn(tokens, 48, generator=g)
    return TokenTable(source, "source"), TokenTable(target, "target")


def unit_rows(rows: torch.Tensor) -> np.ndarray:
    value = rows.double().numpy()
    return value / np.linalg.norm(value, axis=1, keepdims=True)


def test_nearest_tokens_by_hand() -> None:
    source, _ = tables(200)
    vectors = source.vectors[:3] + 0.05
    alike = unit_rows(vectors) @ unit_rows(source.vectors).T
    values, ids = nearest(source.vectors, vectors, 4)
    assert ids.tolist() == np.argsort(-alike, axis=1)[:, :4].tolist()
    np.testing.assert_allclose(values.numpy(), -np.sort(-alike, axis=1)[:, :4], atol=1e-5)


def test_tokens_are_on_the_manifold_and_made_vectors_are_not() -> None:
    source, target = tables()
    mapped = fit(source, target)
    manifold = Manifold(source, mapped.ids)
    strange = torch.zeros(1, WIDTH)
    strange[0, -3] = float(source.vectors.norm(dim=1).median())
    long, short = source.vectors[704:705] * 40, source.vectors[705:706] * 1e-3
    vectors = torch.cat([source.vectors[700:704], long, short, strange])
    report = describe("clip_g", manifold, vectors, mapped.carry(vectors), mapped.facts(), mapped)
    tokens, long, short, outside = report.vectors[:4], *report.vectors[4:]
    assert not any(each.warnings for each in tokens)
    assert [each.nearest[0][0] for each in tokens] == [700, 701, 702, 703]
    assert [each.carried_to[0][0] for each in tokens] == [700, 701, 702, 703]
    assert long.norm_percentile == 100 and "times as long as a token" in long.warnings[0]
    assert short.norm_percentile == 0 and "shorter" in short.warnings[0]
    assert outside.residual > 0.99 and len(outside.warnings) >= 2
    assert "vector 4" in " ".join(report.warnings)
    norms = np.linalg.norm(source.vectors[mapped.ids].numpy(), axis=1)
    for i, each in enumerate(tokens):
        assert abs(each.norm_percentile - 100 * (norms < np.linalg.norm(vectors[i].numpy())).mean()) < 0.2


def test_recall_and_cosine_by_hand() -> None:
    """The figures of held-out tokens, found again without the report's code."""
    source, target = tables()
    mapped = fit(source, target, TransferSettings("ridge", centred=False, rho=1e-3))
    manifold = Manifold(source, mapped.ids)
    report = describe("clip_g", manifold, source.vectors[:2], mapped.carry(source.vectors[:2]), mapped.facts(), mapped)
    places = mapped.hold.sample(0, 256)
    ids = mapped.hold.ids[places].numpy()
    train = np.setdiff1d(mapped.ids.numpy(), mapped.hold.ids[mapped.hold.parts[0]].numpy())
    a, b = unit_rows(source.vectors[train]), unit_rows(target.vectors[train])
    lam = 1e-3 * np.trace(a.T @ a) / WIDTH
    predicted = unit_rows(source.vectors[ids]) @ np.linalg.solve(a.T @ a + lam * np.eye(WIDTH), a.T @ b)
    predicted /= np.linalg.norm(predicted, axis=1, keepdims=True)
    alike = predicted @ unit_rows(target.vectors).T
    own = alike[np.arange(len(ids)), ids]
    ranks = (alike > own[:, None] + 1e-9).sum(1)
    assert abs(report.holdout["cosine"] - own.mean()) < 1e-4
    assert abs(report.holdout["top1"] - (ranks < 1).mean()) < 0.01
    assert abs(report.holdout["top10"] - (ranks < 10).mean()) < 0.01
    codes = [unit_rows(source.vectors[ids[:64]]) @ unit_rows(source.vectors[mapped.ids]).T,
             predicted[:64] @ unit_rows(target.vectors[mapped.ids]).T]
    loss = 1 - (codes[0] * codes[1]).sum(1) / np.linalg.norm(codes[0], axis=1) / np.linalg.norm(codes[1], axis=1)
    assert abs(report.holdout["relative_code_loss"] - loss.mean()) < 1e-4
    weighted = sum(row["cosine"] * row["n"] for row in report.bands) / sum(row["n"] for row in report.bands)
    assert abs(weighted - own.mean()) < 1e-4
    differences = source.vectors[ids[:128]] - source.vectors[ids[128:256]]
    truth = target.vectors[ids[:128]] - target.vectors[ids[128:256]]
    moved = differences.double().numpy() @ np.linalg.solve(a.T @ a + lam * np.eye(WIDTH), a.T @ b)
    cosine = (unit_rows(torch.from_numpy(moved)) * unit_rows(truth)).sum(1).mean()
    assert abs(report.stress["differences"] - cosine) < 1e-4
    assert abs(report.stress["x40"] - report.holdout["cosine"]) < 1e-4  # a linear map minds no length


def test_bands_follow_the_captions_counts() -> None:
    source, target = tables()
    weights = torch.linspace(3, 0.1, source.vocabulary)
    mapped = fit(source, target, TransferSettings(weights=weights))
    report = describe("clip_g", Manifold(source, mapped.ids), source.vectors[:1], mapped.carry(source.vectors[:1]),
                      mapped.facts(), mapped)
    assert [row["band"] for row in report.bands] == ["most frequent", "frequent", "rare", "rarest"]


def test_the_report_is_json_and_reads_as_text() -> None:
    source, target = tables()
    prefix = AnonymizationPrompt("sd1", {"emb_params": torch.cat([source.vectors[9:11], 40 * source.vectors[11:12]])},
                                 PrefixMetadata(title="tried", widths={"emb_params": WIDTH}))
    found = transfer(prefix, source, {"clip_l": source, "clip_g": target})
    value = json.loads(json.dumps(found.report.to_dict(), allow_nan=False))
    assert value["tensors"]["clip_l"]["copied"] and len(value["tensors"]["clip_g"]["vectors"]) == 3
    text = found.report.text(lambda i: f"<{i}>")
    assert "copied" in text and "<9>" in text and "WARNING clip_g, vector 2" in text
    best = choice_table(fit(source, target))
    assert best[0]["cosine"] == max(row["cosine"] for row in best) and {row["method"] for row in best} == {
        "ridge", "half", "ptfer", "procrustes", "none"}
