"""The Fréchet distance is clean-fid's own, and is what the formula says."""

from __future__ import annotations

import importlib.util
import sys
import types

import numpy as np
import pytest

from apl_core.errors import ScoreError
from apl_train.tables import frechet

pytestmark = pytest.mark.skipif(not all(importlib.util.find_spec(m) for m in ("cleanfid", "scipy")),
                                reason="clean-fid is not installed")


def features(n: int, d: int, seed: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + shift


def by_hand(a: np.ndarray, b: np.ndarray) -> float:
    """|mu_a - mu_b|^2 + Tr(A + B) - 2 Tr (A^1/2 B A^1/2)^1/2, with symmetric roots by eigenvalues."""
    mu_a, mu_b, cov_a, cov_b = a.mean(0), b.mean(0), np.cov(a.T), np.cov(b.T)
    w, v = np.linalg.eigh(cov_a)
    root = (v * np.sqrt(np.clip(w, 0, None))) @ v.T
    inner = np.linalg.eigvalsh(root @ cov_b @ root)
    roots = np.sqrt(np.clip(inner, 0, None)).sum()
    return float(((mu_a - mu_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * roots)


@pytest.mark.parametrize(("n", "d", "shift"), [(50, 4, 0.0), (200, 12, 1.5), (300, 32, 0.1)])
def test_it_is_the_formula(n: int, d: int, shift: float) -> None:
    a, b = features(n, d, 1), features(n, d, 2, shift)
    assert frechet.fid(a, b) == pytest.approx(by_hand(a, b), rel=1e-6)
    assert frechet.fid(a, b) == pytest.approx(frechet.fid(b, a), rel=1e-6)


def test_of_independent_features_it_is_two_squares() -> None:
    """For Gaussians whose features are independent: sum of (mu_a - mu_b)^2 + (sigma_a - sigma_b)^2."""
    mu_a, mu_b, sd_a, sd_b = np.array([0.0, 1.0]), np.array([3.0, -1.0]), np.array([1.0, 4.0]), np.array([2.0, 0.5])
    found = frechet.distance_function()(mu_a, np.diag(sd_a**2), mu_b, np.diag(sd_b**2))
    assert found == pytest.approx(((mu_a - mu_b) ** 2).sum() + ((sd_a - sd_b) ** 2).sum(), rel=1e-9)


def test_equal_sets_are_at_zero_and_a_shift_is_its_square() -> None:
    a = features(100, 6, 3)
    assert 0 <= frechet.fid(a, a) < 1e-6
    assert frechet.fid(a, a + 2.0) == pytest.approx(6 * 4.0, rel=1e-6)


def test_the_function_is_clean_fids_own() -> None:
    function = frechet.distance_function()
    assert (function.__module__, function.__name__) == ("cleanfid.fid", "frechet_distance")


def test_fewer_pictures_than_features_still_give_a_number() -> None:
    value = frechet.fid(features(20, 64, 5), features(20, 64, 6))
    assert np.isfinite(value) and value > 0


@pytest.mark.parametrize("broken", ["missing", "of another torch"])
def test_it_works_beside_a_torchvision_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """PyTorch's CPU build has no torchvision on PyPI that fits it: importing one there raises RuntimeError."""
    class Finder:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name.split(".")[0] == "torchvision":
                wrong = RuntimeError("operator torchvision::nms does not exist")
                raise ImportError(name) if broken == "missing" else wrong

    for name in [n for n in sys.modules if n.split(".")[0] in ("torchvision", "cleanfid")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    frechet.distance_function.cache_clear()
    try:
        assert frechet.fid(features(40, 3, 1), features(40, 3, 2)) > 0
        left = [n for n in sys.modules if n.split(".")[0] == "torchvision"]
        assert not left, "nobody else must meet the blank module"
    finally:
        frechet.distance_function.cache_clear()


def test_a_whole_torchvision_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    own = types.ModuleType("torchvision")
    monkeypatch.setitem(sys.modules, "torchvision", own)
    with frechet._without_torchvision():
        assert sys.modules["torchvision"] is not own
    assert sys.modules["torchvision"] is own


@pytest.mark.parametrize(("a", "b", "says"), [
    (np.zeros((1, 3)), np.zeros((5, 3)), "two rows"), (np.zeros(5), np.zeros((5, 3)), "two rows"),
    (np.full((5, 3), np.nan), np.zeros((5, 3)), "not finite"), (np.ones((5, 3)), np.ones((5, 4)), "3 and 4 wide"),
])
def test_bad_features_are_refused(a: np.ndarray, b: np.ndarray, says: str) -> None:
    with pytest.raises(ScoreError, match=says):
        frechet.fid(a, b)


def test_without_clean_fid_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "cleanfid"]:
        monkeypatch.delitem(sys.modules, name)

    class Finder:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name.split(".")[0] == "cleanfid":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    frechet.distance_function.cache_clear()
    try:
        with pytest.raises(ScoreError, match="cleanfid is not installed") as error:
            frechet.fid(np.eye(4), np.eye(4))
        assert "clean-fid" in error.value.hint
    finally:
        frechet.distance_function.cache_clear()
