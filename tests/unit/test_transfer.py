"""Carrying vectors between token tables: against PTfer's published search, numpy by hand, and the truth of made tables.

The search is `fakes/published_search.py`, written from its description and used by no product code.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import published_search
from torch import Tensor

from apl_core import map_choice, relative_mask
from apl_core.errors import ConfigError, ModelError, PrefixFileError
from apl_core.map_choice import Candidate, HoldOut, Judged, best_of, directions_to_vectors, judge
from apl_core.metadata import PrefixMetadata
from apl_core.prefix import AnonymizationPrompt, load_prefix, save_prefix
from apl_core.relative_maps import METHODS, Moments, Spectra, unit
from apl_core.relative_mask import masked
from apl_core.table_map import anchors, fit
from apl_core.token_tables import TokenTable
from apl_core.transfer import RECORD, Mapper, TransferSettings, caption_weights, transfer


def shared_tables(tokens: int = 2400, ds: int = 24, dt: int = 40, shared: int = 20, noise: float = 0.05,
                  seed: int = 0) -> tuple[TokenTable, TokenTable]:
    """Two tables that see the same `shared` dimensions, of a power-law spectrum, each with noise of its own."""
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(tokens, shared, generator=g) * torch.arange(1, shared + 1) ** -0.5
    found = []
    for name, width in (("source", ds), ("target", dt)):
        rows = common @ torch.randn(shared, width, generator=g) / width**0.5
        rows = rows + noise * rows.std() * torch.randn(tokens, width, generator=g)
        found.append(TokenTable(rows, name))
    return found[0], found[1]


def prefix_of(vectors: Tensor, **meta: object) -> AnonymizationPrompt:
    return AnonymizationPrompt("sd1", {"emb_params": vectors},
                               PrefixMetadata(title="tried", widths={"emb_params": vectors.shape[1]}, **meta))


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a, b, dim=-1)


def test_ptfer_s_closed_form_is_what_the_published_search_finds() -> None:
    source, target = shared_tables(tokens=800, ds=16, dt=20, shared=16, noise=0.3)
    ids = torch.arange(790)
    a, b = source.vectors[ids], target.vectors[ids]
    vectors = source.vectors[790:]
    searched, loss = published_search.search(a, b, vectors)
    matrix = Spectra(Moments(source.vectors, target.vectors, ids, torch.ones(790))).map("ptfer", 1e-9).float()
    closed = unit(vectors) @ matrix.T
    assert float(cosines(closed, searched).min()) >= 0.995
    codes = unit(vectors) @ unit(a).T
    assert float((1 - cosines(unit(closed) @ unit(b).T, codes)).mean()) <= loss + 1e-6


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("method", ["ridge", "ptfer", "half", "procrustes"])
def test_identity_transfer_gives_cosine_1(method: str, centred: bool) -> None:
    source, _ = shared_tables()
    mapped = fit(source, TokenTable(source.vectors.clone()), TransferSettings(method, centred=centred, rho=1e-6))
    vectors = torch.cat([source.vectors[:20], source.vectors[:20] - source.vectors[20:40]])
    found = mapped.carry(vectors)
    assert float(cosines(found, vectors).min()) > 0.9999
    torch.testing.assert_close(found.norm(dim=1), vectors.norm(dim=1), rtol=1e-3, atol=1e-5)


def test_maps_against_numpy_by_hand() -> None:
    """Ridge as augmented least squares, ptfer as the same the other way round, half through matrix square roots."""
    source, target = shared_tables(tokens=300, noise=0.3)
    ids = torch.arange(20, 280)
    weights = torch.rand(260, generator=torch.Generator().manual_seed(1)) + 0.1
    rho = 0.01
    spectra = Spectra(Moments(source.vectors, target.vectors, ids, weights))
    root = weights.double().sqrt().numpy()[:, None]
    a = root * (lambda x: x / np.linalg.norm(x, axis=1, keepdims=True))(source.vectors[ids].double().numpy())
    b = root * (lambda x: x / np.linalg.norm(x, axis=1, keepdims=True))(target.vectors[ids].double().numpy())

    def least_squares(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """M with x M = y, its rows damped by lam = rho trace(x'x) / d."""
        lam = rho * np.trace(x.T @ x) / x.shape[1]
        stacked = np.vstack([x, lam**0.5 * np.eye(x.shape[1])])
        return np.linalg.lstsq(stacked, np.vstack([y, np.zeros((x.shape[1], y.shape[1]))]), rcond=None)[0]

    def root_of(x: np.ndarray) -> np.ndarray:
        gram = x.T @ x + rho * np.trace(x.T @ x) / x.shape[1] * np.eye(x.shape[1])
        u, s, vt = np.linalg.svd(gram)
        return (u / s**0.5) @ vt

    wanted = {"ridge": least_squares(a, b).T, "ptfer": least_squares(b, a), "none": b.T @ a,
              "half": root_of(b) @ (b.T @ a) @ root_of(a)}
    for method, matrix in wanted.items():
        near = 1e-3 * np.abs(matrix).max()
        np.testing.assert_allclose(spectra.map(method, rho).numpy(), matrix, rtol=1e-3, atol=near)
    from scipy.linalg import polar

    np.testing.assert_allclose(spectra.map("procrustes", rho).numpy(), polar(b.T @ a)[0], atol=1e-4)
    lam = {"source": rho * np.trace(a.T @ a) / 24, "target": rho * np.trace(b.T @ b) / 40}
    given = torch.zeros(source.vocabulary)
    given[ids] = weights
    for method, sides in (("ridge", ["source"]), ("ptfer", ["target"]), ("half", ["source", "target"]),
                          ("procrustes", [])):
        mapped = fit(source, target, TransferSettings(method, centred=False, rho=rho, weights=given))
        share = float(mapped.weights.sum() / weights.sum())  # rows of an unusual norm are no anchors
        assert mapped.damping == {side: pytest.approx(lam[side] * share, rel=1e-4) for side in sides}


@pytest.mark.parametrize(("ds", "dt", "least"), [(24, 40, 1.0), (40, 24, 1.0), (24, 40, 1e-9), (24, 24, 1e-3)])
def test_the_nearest_turn_of_any_shape_and_spectrum(ds: int, dt: int, least: float) -> None:
    """Eigenvectors where they tell the directions apart, singular vectors where rounding has taken the last ones."""
    source, target = shared_tables(tokens=300, ds=ds, dt=dt, noise=0.3)
    rows = source.vectors * torch.cat([torch.ones(ds - 4), torch.full((4,), least)])
    moments = Moments(rows, target.vectors, torch.arange(300), torch.ones(300))
    found = Spectra(moments).map("procrustes", 0).numpy()
    few = found if ds > dt else found.T
    np.testing.assert_allclose(few @ few.T, np.eye(min(ds, dt)), atol=1e-4)
    # of all turns, it is the one whose product with the moments has the largest trace: their singular values' sum
    values = np.linalg.svd(moments.cross.numpy(), compute_uv=False)
    assert np.trace(found.T @ moments.cross.numpy()) == pytest.approx(values.sum(), rel=1e-6)


@pytest.mark.parametrize("centred", [False, True])
def test_scores_by_hand(centred: bool) -> None:
    """Every candidate judged in its short way scores what its matrix does, on tokens and on pairs of them."""
    source, target = shared_tables(tokens=400, noise=0.3)
    source = TokenTable(source.vectors + 0.5 * source.vectors[0])
    hold = HoldOut(source, target, torch.arange(400), torch.ones(400), centred)
    a, b = hold.sides
    for methods in (METHODS, ("ridge",), ("ptfer",), ("procrustes",), ("none",)):
        judged = judge([hold], methods, (1e-3, 1.0))
        assert len(best_of(judged).cosines) == 400 and {len(each.cosines) for each in judged} <= {160, 400}
        for each in judged:
            tokens, pairs = [], []
            for fold in range(len(each.cosines) // 80):
                matrix = hold.without(fold).map(each.candidate.method, each.candidate.rho)
                ids = hold.ids[hold.sample(fold)]
                x, truth, half = source.vectors[ids], target.vectors[ids], len(ids) // 2
                for rows, wanted, into in ((x, truth, tokens),
                                           (x[:half] + x[half:], truth[:half] + truth[half:], pairs),
                                           (x[:half] - x[half:], truth[:half] - truth[half:], pairs)):
                    moved = rows - a.mean
                    predicted = directions_to_vectors(moved @ matrix.T, moved.norm(dim=1), b.mean, b.median / a.median)
                    into.append(cosines(predicted, wanted))
            assert each.cosine == pytest.approx(float(torch.cat(tokens).mean()), abs=1e-4), each.candidate
            assert each.pairs == pytest.approx(float(torch.cat(pairs).mean()), abs=1e-4), each.candidate


def test_what_is_clearly_behind_or_chance_is_not_judged_on_every_fold() -> None:
    source, target = shared_tables(noise=0.05)
    ids, weights = torch.arange(2400), torch.ones(2400)
    judged = judge([HoldOut(source, target, ids, weights, False)], METHODS, (1e-3, 1e-2))
    far = next(each for each in judged if each.candidate.method == "none")
    assert len(far.cosines) == 512 and len(best_of(judged).cosines) == 1280
    # a rival that is far ahead leaves nobody else in sight
    again = judge([HoldOut(source, target, ids, weights, False)], ("none",), (1e-3,), judged)
    assert len(again[0].cosines) == 512
    g = torch.Generator().manual_seed(3)
    strange = TokenTable(torch.randn(2400, 40, generator=g))
    chance = judge([HoldOut(source, strange, ids, weights, False)], METHODS, (1e-3, 1e-2))
    assert {len(each.cosines) for each in chance} == {512}
    found = transfer(prefix_of(source.vectors[:2]), source, {"clip_l": source, "clip_g": strange})
    assert found.report.warnings[0].startswith("clip_g: no map predicts")
    asked = fit(source, strange, TransferSettings("ptfer", topk=100))
    assert asked.candidate.topk == 100 and asked.mask_scores is None


@pytest.mark.parametrize("centred", [False, True])
def test_moments_of_all_anchors_are_those_of_the_folds_and_of_the_others(centred: bool,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_choice, "ANCHORS", 150)
    source, target = shared_tables(tokens=500, noise=0.3)
    ids = torch.arange(0, 500, 2)
    weights = torch.rand(250, generator=torch.Generator().manual_seed(1)) + 0.1
    hold = HoldOut(source, target, ids, weights, centred)
    assert len(hold.ids) == 150
    mean = (weights[:, None] * source.vectors[ids]).sum(0) / weights.sum()
    rows = source.vectors[ids] - mean if centred else source.vectors[ids]
    assert hold.sides[0].median == pytest.approx(float(rows.norm(dim=1).median()), rel=1e-5)
    direct = Spectra(Moments(source.vectors, target.vectors, ids, weights, hold.means))
    for method in METHODS:
        wanted = direct.map(method, 0.01)
        torch.testing.assert_close(hold.whole("cross").map(method, 0.01), wanted, rtol=1e-3,
                                   atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("how", ["formed", "approached", "approached by other tokens", "not arrived"])
@pytest.mark.parametrize("rho", [1e-3, 1e-6])
def test_a_mask_keeps_the_rows_most_alike_and_no_others(how: str, rho: float, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = shared_tables(tokens=200)
    a, b = unit(source.vectors[:150]), unit(target.vectors[:150])
    vectors, topk = source.vectors[150:153], 60
    some = b[:80] if how == "approached by other tokens" else b
    if how == "not arrived":
        monkeypatch.setattr(relative_mask, "PASSES", 2)
    spectrum = None if how == "formed" else torch.linalg.eigh(some.T @ some)
    found = masked(a, b, torch.ones(150), vectors, topk, rho, spectrum)
    for v, u in zip(vectors.numpy().astype(np.float64), found.numpy(), strict=True):
        code = a.numpy().astype(np.float64) @ (v / np.linalg.norm(v))
        rows = np.argsort(-code)[:topk]
        some = b.numpy().astype(np.float64)[rows]
        gram = some.T @ some
        wanted = np.linalg.solve(gram + rho * np.trace(gram) / 40 * np.eye(40), some.T @ code[rows])
        assert u @ wanted / np.linalg.norm(u) / np.linalg.norm(wanted) > 0.999995
        assert np.linalg.norm(u) == pytest.approx(np.linalg.norm(wanted), rel=5e-3)


@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_held_out_tokens_order_the_methods_as_the_study_found(noise: float) -> None:
    """field.md 3.2: ridge ahead of both symmetric maps, those ahead of PTfer, and that ahead of no inverse at all."""
    source, target = shared_tables(noise=noise, ds=60, dt=100, shared=50)
    train = torch.zeros(source.vocabulary)
    train[:2000] = 1
    truth, held = target.vectors[2000:], source.vectors[2000:]
    score = {}
    for method in ("ridge", "half", "procrustes", "ptfer", "none"):
        mapped = fit(source, target, TransferSettings(method, centred=False, weights=train))
        score[method] = float(cosines(mapped.carry(held), truth).mean())
        # what the hold-out promised is what unseen tokens get
        assert mapped.chosen.cosine == pytest.approx(score[method], abs=0.03)
    assert score["ridge"] > max(score["half"], score["procrustes"])
    assert min(score["half"], score["procrustes"]) > score["ptfer"] - 0.02
    assert score["ptfer"] > score["none"]
    auto = fit(source, target, TransferSettings(weights=train))
    assert auto.candidate.method == "ridge"
    assert float(cosines(auto.carry(held), truth).mean()) >= max(score.values()) - 0.01


def test_weights_make_a_map_where_most_of_a_vocabulary_was_never_trained() -> None:
    source, target = shared_tables()
    g = torch.Generator().manual_seed(3)
    trained = torch.randperm(2400, generator=g)[:300]
    untrained = torch.ones(2400, dtype=torch.bool)
    untrained[trained] = False
    tables = []
    for table in (source, target):
        rows = table.vectors.clone()
        rows[untrained] = rows.std() * torch.randn(2100, table.width, generator=g)
        tables.append(TokenTable(rows, table.name))
    counts = torch.zeros(2400)
    counts[trained[:250]] = 5
    held = trained[250:]
    blind = cosines(fit(*tables).carry(tables[0].vectors[held]), tables[1].vectors[held]).mean()
    weighted = cosines(fit(*tables, TransferSettings(weights=counts.log1p())).carry(tables[0].vectors[held]),
                       tables[1].vectors[held]).mean()
    assert float(weighted) > float(blind) + 0.1
    assert float(weighted) > 0.95


def test_anchors_leave_out_what_was_hardly_trained() -> None:
    g = torch.Generator().manual_seed(0)
    source, target = (TokenTable(torch.randn(49408, width, generator=g)) for width in (4, 6))
    ids, weights = anchors(source, target)
    assert int(ids.min()) >= 512 and int(ids.max()) < 49406
    assert bool((weights == 1).all())
    norms = source.vectors[512:49406].norm(dim=1).double().numpy()
    kept = source.vectors[ids].norm(dim=1).numpy()
    low, high = np.quantile(norms, (0.01, 0.99))
    assert kept.min() >= low - 1e-6 and kept.max() <= high + 1e-6
    assert 0.95 < len(ids) / 48894 < 0.98  # two tables, independent: (1 - 0.02)^2
    given = torch.zeros(49408)
    given[600:700] = 2.0
    ids, weights = anchors(source, target, given)
    assert set(ids.tolist()) <= set(range(600, 700)) and bool((weights == 2).all())


def test_caption_weights_are_log_of_1_plus_count() -> None:
    captions = [[5, 6, 6], [6], []]
    counts = Counter(i for caption in captions for i in caption)
    np.testing.assert_allclose(caption_weights(captions, 9).numpy(), np.log1p([counts[i] for i in range(9)]), rtol=1e-6)
    with pytest.raises(ModelError, match="token 9"):
        caption_weights([[9]], 9)


def test_a_file_of_the_other_family_with_what_was_done(tmp_path: Path) -> None:
    source, target = shared_tables()
    prefix = prefix_of(source.vectors[100:104] * torch.tensor([[0.5], [1.0], [2.0], [1.0]]), alpha=0.5, level=400,
                       steps=1600, scores={"id_acc": 0.1})
    found = transfer(prefix, source, {"clip_l": TokenTable(source.vectors.half(), stored=torch.float16),
                                      "clip_g": target}, TransferSettings(centred=False))
    save_prefix(found.prefix, tmp_path / "x.safetensors")
    loaded = load_prefix(tmp_path / "x.safetensors", enforce=True)
    assert loaded.family == "sdxl" and loaded.widths == {"clip_l": 24, "clip_g": 40}
    assert torch.equal(loaded.vectors("clip_l"), prefix.vectors())
    assert (loaded.meta.alpha, loaded.meta.level, loaded.meta.steps) == (0.5, 400, 1600)
    assert not loaded.meta.scores and prefix.content_hash in loaded.meta.transferred_from
    record = json.loads(loaded.meta.extra[RECORD])
    assert record["clip_l"]["method"] == "copy"
    told = record["clip_g"]
    assert (told["method"], told["target_table_sha256"]) == ("ridge", target.sha256)
    assert told["source_table_sha256"] == source.sha256 and told["holdout_cosine"] > 0.95
    rows = unit(source.vectors[found_ids := anchors(source, target)[0]]).double()
    assert told["lambda"]["source"] == pytest.approx(told["rho"] * float(rows.square().sum()) / 24, rel=1e-3)
    # the norm relative to the median token is kept, vector by vector
    ratio = prefix.vectors().norm(dim=1) / source.vectors[found_ids].norm(dim=1).median()
    again = loaded.vectors("clip_g").norm(dim=1) / target.vectors[found_ids].norm(dim=1).median()
    torch.testing.assert_close(again, ratio, rtol=1e-4, atol=1e-5)


def test_a_first_encoder_of_its_own_table_is_mapped_too() -> None:
    source, target = shared_tables()
    tuned = shared_tables(dt=24, seed=0)[1]
    mapper = Mapper(source, {"clip_l": tuned, "clip_g": target})
    assert all(each is not None for each in mapper.maps.values())
    found = mapper.carry(prefix_of(source.vectors[50:53])).prefix
    assert float(cosines(found.vectors("clip_l"), tuned.vectors[50:53]).min()) > 0.9
    assert float(cosines(found.vectors("clip_g"), target.vectors[50:53]).min()) > 0.9


def test_masks_are_tried_for_ptfer_and_taken_where_they_help() -> None:
    source, target = shared_tables(tokens=600)
    asked = fit(source, target, TransferSettings("ptfer", topk=100, centred=False))
    assert asked.candidate.topk == 100 and asked.mask_scores is not None
    whole = fit(source, target, TransferSettings("ptfer", topk=0, centred=False))
    assert whole.candidate.topk == 0
    vectors = source.vectors[:3]
    rows = unit(source.vectors[asked.ids]), unit(target.vectors[asked.ids])
    by_hand = masked(*rows, torch.ones(len(asked.ids)), vectors, 100, asked.candidate.rho)
    assert float(cosines(asked.carry(vectors), by_hand).min()) > 0.9999
    assert float(cosines(asked.carry(vectors), whole.carry(vectors)).max()) < 0.9999


def test_long_vectors_are_shortened_only_when_asked() -> None:
    source, target = shared_tables()
    prefix = prefix_of(source.vectors[:2] * torch.tensor([[1.0], [40.0]]))
    tables = {"clip_l": source, "clip_g": target}
    kept = transfer(prefix, source, tables).prefix.vectors("clip_g").norm(dim=1)
    clipped = transfer(prefix, source, tables, TransferSettings(clip_norms=True))
    norms = clipped.prefix.vectors("clip_g").norm(dim=1)
    assert float(norms[1]) < float(kept[1]) / 5 and float(norms[0]) == pytest.approx(float(kept[0]), rel=1e-4)
    assert any("shortened" in text for text in clipped.report.warnings)


def test_what_is_refused() -> None:
    source, target = shared_tables(tokens=300)
    for values in ({"method": "search"}, {"rho": 0.0}, {"folds": 1}, {"topk": 5, "method": "ridge"}):
        with pytest.raises(ConfigError):
            TransferSettings(**values)
    tables = {"clip_l": source, "clip_g": target}
    with pytest.raises(ModelError, match="width 5"):
        transfer(prefix_of(torch.ones(2, 5)), source, tables)
    with pytest.raises(ModelError, match="clip_g"):
        transfer(prefix_of(source.vectors[:2]), source, {"clip_g": target})
    with pytest.raises(ModelError, match="different numbers of tokens"):
        transfer(prefix_of(source.vectors[:2]), source, {"clip_l": source, "clip_g": TokenTable(target.vectors[:299])})
    few = torch.zeros(300)
    few[:5] = 1
    with pytest.raises(ModelError, match="tokens are left"):
        transfer(prefix_of(source.vectors[:2]), source, tables, TransferSettings(weights=few))
    with pytest.raises(ModelError, match="weights"):
        transfer(prefix_of(source.vectors[:2]), source, tables, TransferSettings(weights=torch.ones(3)))
    two = AnonymizationPrompt("sdxl", {"clip_l": torch.ones(2, 24), "clip_g": torch.ones(2, 40)},
                              PrefixMetadata(widths={"clip_l": 24, "clip_g": 40}))
    with pytest.raises(PrefixFileError, match="several tensors"):
        transfer(two, source, tables)


def test_ptfer_is_taken_where_neither_tokens_nor_pairs_tell_maps_apart() -> None:
    def judged(method: str, cosine: float, pairs: float) -> Judged:
        return Judged(Candidate(method, 0.1, False), torch.ones(100), torch.full((100,), cosine), cosine, 0.02, pairs,
                      0.01)

    ridge, ptfer, damped = judged("ridge", 0.50, 0.30), judged("ptfer", 0.49, 0.295), judged("ptfer", 0.485, 0.292)
    assert best_of([ridge, damped, ptfer]) is ptfer
    assert best_of([ridge, judged("ptfer", 0.47, 0.30)]) is ridge, "tokens tell them apart"
    assert best_of([ridge, judged("ptfer", 0.49, 0.28)]) is ridge, "pairs tell them apart"
    assert best_of([ridge, judged("half", 0.50, 0.31)]).candidate.method == "half"


def test_the_error_of_pairs_is_that_of_a_plain_mean() -> None:
    source, target = shared_tables(tokens=400, noise=0.3)
    hold = HoldOut(source, target, torch.arange(400), torch.rand(400) + 0.5, False)
    (found,) = judge([hold], ("ridge",), (0.1,))
    pairs = []
    for fold in range(5):
        ids = hold.ids[hold.sample(fold)]
        x, truth, half = source.vectors[ids], target.vectors[ids], len(ids) // 2
        matrix = hold.without(fold).map("ridge", 0.1)
        for sign in (1, -1):
            moved, wanted = ((rows[:half] + sign * rows[half:]) for rows in (x, truth))
            pairs.append(cosines(moved @ matrix.T, wanted).numpy())
    values = np.concatenate(pairs)
    assert found.pairs_error == pytest.approx(values.std() / np.sqrt(len(values)), rel=1e-3)
