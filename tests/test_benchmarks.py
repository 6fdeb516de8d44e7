"""What benchmarks say of their figures."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def standard_error(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    if not BENCHMARKS.exists():
        pytest.skip("installed without the benchmarks")
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("bench_accuracy").standard_error


@pytest.mark.parametrize("spreads", [(0.05, 0.3, 0.2), (0.02, 0.4, 0.2), (0.0, 0.3, 0.3)])
@pytest.mark.parametrize("same_photos", [True, False])
def test_standard_error_is_how_far_means_scatter(
    standard_error: Callable[..., Any], spreads: tuple[float, float, float], same_photos: bool
) -> None:
    """Of gaps that seeds, photos and chance make: squared and on average, what is reported is what draws show."""
    rng, n_seeds, n_photos = np.random.default_rng(0), 5, 200
    of_seed, of_photo, of_chance = spreads
    means, squares = [], []
    for _ in range(2000):
        photos = rng.normal(0, of_photo, size=(1 if same_photos else n_seeds, n_photos))
        gaps = rng.normal(0, of_seed, size=(n_seeds, 1)) + photos + rng.normal(0, of_chance, size=(n_seeds, n_photos))
        means.append(gaps.mean())
        squares.append(standard_error(gaps, same_photos) ** 2)
    true = float(np.std(means))
    assert 0.95 * true < np.mean(squares) ** 0.5 < 1.35 * true  # never below what is true, by much


def test_standard_error_of_one_seed_is_that_of_its_photos(standard_error: Callable[..., Any]) -> None:
    gaps = np.random.default_rng(0).normal(size=(1, 400))
    assert standard_error(gaps, True) == pytest.approx(gaps.std(ddof=1) / 20)
