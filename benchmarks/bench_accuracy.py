"""How well each way to reuse a pretrained network classifies: frozen features, a trained head, fine-tuning, LP-FT.

    python benchmarks/bench_accuracy.py [--cells ants-bees cifar-10/100 ...] [--rates 1e-4 3e-4 ...] [--quick]
                                        [--json FILE]

squeezenet1_1 with real weights from ``$FEATX_DATA``. Cells: ants-bees (243 photos, five folds, shuffled by the seed),
and CIFAR-10 with 10, 100 and 1,000 labels a class (drawn by the seed; tested on 2,000 images of its test part, the same
for all). Every way sees the same images for the same seed, at the same size, and all but Head2Toe the same layer; none
is tuned on a cell. The table gives accuracies in percent: mean and standard deviation over the seeds, and the mean
difference to the linear probe by seed, with its standard deviation.

On two cores the whole takes about an hour, half of it fine-tuning on ants-bees. ``--cells`` runs some, ``cifar-10``
all three of CIFAR-10; ``--rates`` compares learning rates of fine-tuning and LP-FT beside the linear probe, which is
how the default was chosen (``benchmarks/accuracy.md``). With ``--json`` every score is written as soon as it is there,
and a run that was broken off goes on where it was. ``--quick`` takes few images and epochs, only to show that all of it
works. Two processes with OMP_NUM_THREADS=1, for some cells each, are faster than one with two threads.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _about import about
from _ways import DATA, WEIGHTS
from sklearn.base import BaseEstimator
from sklearn.feature_selection import SelectFromModel
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from featx import FeatureStore, FineTuneClassifier, PretrainedFeatureExtractor

STRENGTH = 0.01  # C of every logistic regression on standardised features
N_SEEDS, N_FOLDS, N_TEST = 3, 5, 2000
N_SELECTED = 512  # features that Head2Toe keeps

Images = np.ndarray  # of bytes
Part = tuple[Images, np.ndarray, Images, np.ndarray]  # to train on, and to test on


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    n_seeds: int
    n_folds: int
    n_photos: int | None
    n_test: int
    ants_bees_size: int  # side in pixels fed to the network
    cifar_size: int
    epochs: int | str


# CIFAR-10 made larger than 32 x 32: with ten labels a class a linear probe is right in 0.34 of all cases at 64 pixels,
# 0.43 at 96, 0.47 at 128 and 0.49 at 160.
FULL = Size(N_SEEDS, N_FOLDS, None, N_TEST, 128, 96, "auto")
QUICK = Size(1, 2, 40, 100, 64, 64, 1)


# Cells: for each seed, one part or several whose scores are averaged.


def read_zip(name: str) -> tuple[Images, np.ndarray]:
    """Files and classes, in the order of their names."""
    with zipfile.ZipFile(DATA / "data" / name) as archive:
        names = sorted(entry for entry in archive.namelist() if entry.endswith(".jpg"))
        X = np.array([archive.read(entry) for entry in names], dtype=object)
    return X, np.unique([entry.split("/")[0] for entry in names], return_inverse=True)[1]


def some_of_each(y: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Rows of n images of every class."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(np.flatnonzero(y == code))[:n] for code in np.unique(y)])


def ants_bees(size: Size) -> Callable[[int], Iterator[Part]]:
    X, y = read_zip("ants-bees.zip")
    if size.n_photos is not None:
        rows = some_of_each(y, size.n_photos // 2, 0)
        X, y = X[rows], y[rows]

    def parts(seed: int) -> Iterator[Part]:
        for train, test in StratifiedKFold(size.n_folds, shuffle=True, random_state=seed).split(X, y):
            yield X[train], y[train], X[test], y[test]

    return parts


def cifar(n_labels: int) -> Callable[[Size], Callable[[int], Iterator[Part]]]:
    def cell(size: Size) -> Callable[[int], Iterator[Part]]:
        X, y = read_zip("cifar10-train.zip")
        X_test, y_test = read_zip("cifar10-test.zip")
        test = some_of_each(y_test, size.n_test // 10, 0)

        def parts(seed: int) -> Iterator[Part]:
            rows = some_of_each(y, n_labels, seed)
            yield X[rows], y[rows], X_test[test], y_test[test]

        return parts

    return cell


CELLS: dict[str, Callable[[Size], Callable[[int], Iterator[Part]]]] = {
    "ants-bees": ants_bees,
    **{f"cifar-10/{n}": cifar(n) for n in (10, 100, 1000)},
}


# Ways.


def make_way(way: str, common: dict[str, Any], epochs: int | str, seed: int) -> BaseEstimator:
    """A new estimator; ``common`` are the parameters that decide which features of which images."""
    linear = LogisticRegression(C=STRENGTH, max_iter=1000)
    tuning = {"epochs": epochs, "random_state": seed, **common}
    if way == "linear probe":
        return make_pipeline(PretrainedFeatureExtractor(**common), StandardScaler(), linear)
    if way == "Head2Toe":  # features of all stages, the most useful of them chosen by a first linear model
        extractor = PretrainedFeatureExtractor(**common, layers="all", grid=2, normalize="l2")
        chosen = SelectFromModel(linear, max_features=N_SELECTED, threshold=-np.inf)
        return make_pipeline(extractor, StandardScaler(), chosen, linear)
    if way == "head only":
        return FineTuneClassifier(freeze="all", linear_probe=False, **tuning)
    start, _, rate = way.partition(AT)
    return FineTuneClassifier(linear_probe=start == "LP-FT", learning_rate=float(rate) if rate else "auto", **tuning)


AT = " at "  # between a way and its learning rate, where it is not the default
WAYS = ("linear probe", "Head2Toe", "head only", "fine-tuning", "LP-FT")


def ways_at(rates: list[float] | None) -> tuple[str, ...]:
    """All ways; or the linear probe and both kinds of fine-tuning at several learning rates."""
    if rates is None:
        return WAYS
    return (WAYS[0], *(f"{way}{AT}{rate:g}" for way in ("fine-tuning", "LP-FT") for rate in rates))


# All of them.


def measure(
    cells: list[str],
    ways: tuple[str, ...],
    size: Size,
    known: dict[str, dict[str, float]],
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, dict[str, float]]:
    """Accuracy and seconds by "cell, way, seed", those known left as they are."""
    runs = dict(known)
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(folder)
        for cell in cells:
            image_size = size.ants_bees_size if cell == "ants-bees" else size.cifar_size
            common = {"backbone": "squeezenet1_1", "weights": WEIGHTS, "image_size": image_size, "cache": store}
            parts = None
            for seed in range(size.n_seeds):
                for way in ways:
                    if f"{cell}, {way}, {seed}" in runs:
                        continue
                    parts = parts or CELLS[cell](size)
                    start, scores = time.perf_counter(), []
                    for X, y, X_test, y_test in parts(seed):
                        scores.append(make_way(way, common, size.epochs, seed).fit(X, y).score(X_test, y_test))
                    seconds = time.perf_counter() - start
                    runs[f"{cell}, {way}, {seed}"] = {"accuracy": float(np.mean(scores)), "seconds": seconds}
                    keep(runs)
    return runs


def summarise(
    runs: dict[str, dict[str, float]], cells: list[str], ways: tuple[str, ...], n_seeds: int
) -> list[dict[str, Any]]:
    """One row for each cell and way."""
    rows = []
    for cell in cells:
        base = np.array([runs[f"{cell}, {ways[0]}, {seed}"]["accuracy"] for seed in range(n_seeds)])
        for way in ways:
            of_way = [runs[f"{cell}, {way}, {seed}"] for seed in range(n_seeds)]
            accuracies = np.array([run["accuracy"] for run in of_way])
            rows.append(
                {
                    "cell": cell,
                    "way": way,
                    "accuracy": float(accuracies.mean()),
                    "spread": spread(accuracies),
                    "gain": float((accuracies - base).mean()),
                    "gain_spread": spread(accuracies - base),
                    "seconds": float(np.median([run["seconds"] for run in of_way])),
                }
            )
    return rows


def spread(values: np.ndarray) -> float:
    """Standard deviation between seeds; 0 for one seed."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'cell':14} {'way':19} accuracy   over the probe   seconds")
    for row in rows:
        accuracy, deviation, gain, gain_deviation = (
            100 * row[name] for name in ("accuracy", "spread", "gain", "gain_spread")
        )
        print(f"{row['cell']:14} {row['way']:19} {accuracy:4.1f} ± {deviation:3.1f}", end=" ")
        print(f"{gain:+8.1f} ± {gain_deviation:3.1f} {row['seconds']:10.1f}")


def chosen_cells(names: list[str] | None, quick: bool) -> list[str]:
    cells = [cell for cell in CELLS if names is None or {cell, cell.split("/")[0]} & set(names)]
    if not cells:
        raise SystemExit(f"--cells: some of {list(CELLS)} are expected, or what stands before the stroke, got {names}.")
    return [cell for cell in cells if cell in ("ants-bees", "cifar-10/10")] if quick and not names else cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", help=f"only these of {', '.join(CELLS)}")
    parser.add_argument("--rates", nargs="+", type=float, help="learning rates to compare")
    parser.add_argument("--quick", action="store_true", help="few images, one epoch, one seed")
    parser.add_argument("--json", type=Path, help="where to write the figures, and to go on from")
    arguments = parser.parse_args()
    size, cells = QUICK if arguments.quick else FULL, chosen_cells(arguments.cells, arguments.quick)
    known: dict[str, Any] = {}
    settings = json.loads(json.dumps(vars(size)))
    if arguments.json and arguments.json.exists():
        before = json.loads(arguments.json.read_text())
        if before["settings"] != settings:
            raise SystemExit(f"--json: {arguments.json} was measured with other settings. Name another file.")
        known = before["runs"]

    def keep(runs: dict[str, Any], **more: Any) -> None:
        if arguments.json:
            figures = {"settings": settings, "runs": runs, **more}
            arguments.json.write_text(json.dumps(figures | about(), indent=2))

    ways = ways_at(arguments.rates)
    runs = measure(cells, ways, size, known, keep)
    rows = summarise(runs, cells, ways, size.n_seeds)
    keep(runs, table=rows)
    if arguments.quick:
        print("Too few images and epochs to judge.\n")
    print_table(rows)


if __name__ == "__main__":
    main()
