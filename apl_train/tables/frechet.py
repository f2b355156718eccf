"""The Fréchet distance between two sets of features, by clean-fid's own function (paper reference [30]).

FID = |mu_a - mu_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)). It falls as n grows, so only equal n compare, and beside
every figure stands the floor: the distance of two sets of the same model with other seeds.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apl_core.errors import ScoreError

INSTALL = "pip install clean-fid; beside a torch that is not pip's own: pip install --no-deps clean-fid"


@contextlib.contextmanager
def _without_torchvision() -> Iterator[None]:
    """clean-fid imports torchvision for its picture loader, which nothing here uses, and a torchvision that does not
    belong to the torch beside it cannot be imported at all: a blank one stands in while clean-fid is imported."""
    class Blank(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    names = ("torchvision", "torchvision.models", "torchvision.models.inception", "torchvision.models.utils",
             "torchvision.transforms")
    before = {name: sys.modules.get(name) for name in names}
    known = set(sys.modules)
    blanks = {name: Blank(name) for name in names}
    for name, module in blanks.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(blanks[parent], child, module)
    sys.modules.update(blanks)
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update({name: module for name, module in before.items() if module is not None})
        for name in set(sys.modules) - known:
            if name.split(".")[0] == "cleanfid":  # made with the blank one: whoever imports it next gets a whole one
                del sys.modules[name]


@cache
def distance_function() -> Callable[..., float]:
    """`cleanfid.fid.frechet_distance`. Raises ScoreError where clean-fid is not installed."""
    try:
        importlib.import_module("torchvision")
        fits = True
    except (ImportError, RuntimeError, AttributeError):
        fits = False
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]  # half imported
    try:
        with contextlib.nullcontext() if fits else _without_torchvision():
            return importlib.import_module("cleanfid.fid").frechet_distance
    except ImportError as error:
        raise ScoreError(f"{error.name or 'clean-fid'} is not installed; it computes the Fréchet distance.",
                         INSTALL, field="fid") from error


def statistics(features: NDArray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and covariance as clean-fid takes them: float [n, d] -> float64 [d], [d, d].

    Raises:
        ScoreError: fewer than two rows, or values that are not finite.
    """
    values = np.asarray(features, dtype=np.float64)
    if values.ndim != 2 or len(values) < 2:
        raise ScoreError(f"features are {list(values.shape)}; a covariance needs [n, d] with two rows or more.",
                         "Take more pictures.", field="features")
    if not np.isfinite(values).all():
        raise ScoreError("features are not finite.", "Check the model that gave them.", field="features")
    return values.mean(axis=0), np.cov(values, rowvar=False)


def fid(a: NDArray, b: NDArray) -> float:
    """Fréchet distance of two sets of features, float [n, d] each. Raises ScoreError, also when the widths differ."""
    mean_a, cov_a = statistics(a)
    mean_b, cov_b = statistics(b)
    if mean_a.shape != mean_b.shape:
        raise ScoreError(f"features are {len(mean_a)} and {len(mean_b)} wide.", "Take both from one model.",
                         field="features")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # scipy's, over how clean-fid calls its matrix root
        value = float(distance_function()(mean_a, np.atleast_2d(cov_a), mean_b, np.atleast_2d(cov_b)))
    return max(value, 0.0)  # equal sets: rounding may leave -1e-9


def conventions(n_a: int, n_b: int, features: str) -> dict[str, Any]:
    """What a figure of `fid` has to be read with."""
    return {"distance": "cleanfid.fid.frechet_distance", "features": features, "n": [n_a, n_b]}
