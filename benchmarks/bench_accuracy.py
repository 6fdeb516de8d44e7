"""How well each way to reuse a pretrained network classifies, and how FineTuneClassifier's defaults were chosen.

    python benchmarks/bench_accuracy.py [--cells lite0 "lite0, ants-bees" ...] [--ways probe "freeze=-2 augment=flip"]
                                        [--development] [--seeds N] [--quick] [--json FILE]

tf_efficientnet_lite0 with real weights from ``$FEATX_DATA``, three seeds: ants-bees (large photos, 129 to train on),
CIFAR-10 with 10 and 100 labels a class at 96 pixels, and blood cells cut out of photos by their boxes (at most 1,000,
balanced accuracy). One seed: CIFAR-10 with 1,000 labels a class, and squeezenet1_1 everywhere. A seed decides which
photos are trained on and what is drawn at random; what judges is the same for all seeds. Every way sees the same images
at the same size.

The table gives accuracies in percent, mean and standard deviation over the seeds; the differences to the probe and to
the old default, which is measured with one seed, with their standard errors over photos and seeds; and seconds, of the
fit and the predictions, where the pretrained features of these photos are not known yet. Exits with 1 where the default
is below one of both by more than 0.01 and by more than two standard errors.

``--development`` judges by photos that the seed leaves of those to train on, none of which judge in the end: there
recipes are made. A way is one of those in ``WAYS``, or parameters of FineTuneClassifier with their values. With
``--json`` every result is written as soon as it is there, and a run that was broken off goes on where it was.
``--quick`` takes few images and one epoch, only to show that all of it works.
"""

from __future__ import annotations

import argparse
import ast
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from _about import packed, runs_in, unpacked, write_json
from _cells import NETWORKS, TASKS, Task
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from featx import FeatureStore, FineTuneClassifier, PretrainedFeatureExtractor

PROBE_C = 0.01  # of the logistic regression on standardised features
PROBE, DEFAULT, VIEWS, OLD = "probe", "default, freeze=-2", "default, views=flip", "old default, all layers"
WAYS: dict[str, dict[str, Any]] = {
    "head only": {"freeze": "all", "linear_probe": False},
    "freeze=-1": {"freeze": -1},
    DEFAULT: {},
    VIEWS: {"views": "flip"},
    OLD: {"freeze": 0},
}
# The default may be so much below the better of probe and old default, in accuracy or in standard errors.
TOLERANCE, TOLERATED_ERRORS = 0.01, 2.0

Run = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    n_seeds: int
    n_test: int
    quick: bool


FULL = Size(n_seeds=3, n_test=1000, quick=False)
QUICK = Size(n_seeds=2, n_test=100, quick=True)
CELLS = [f"{network}, {task}" for network in NETWORKS for task in TASKS]


def seeds_of(cell: str, way: str, size: Size) -> range:
    """Several for the cells that decide, but for what takes longest; two views are tried in these alone."""
    decides = cell.startswith("lite0") and not cell.endswith("/1000")
    if way == VIEWS and not decides:
        return range(0)
    return range(size.n_seeds if decides and way != OLD else 1)


def task_of(cell: str, size: Size) -> Task:
    task = TASKS[cell.split(", ")[1]](size.n_test)
    return replace(task, n_each=np.minimum(task.n_each, 8), image_size=64) if size.quick else task


# Ways.


def parameters_of(way: str) -> dict[str, Any]:
    """Of one in `WAYS`, or as written."""
    if way in WAYS:
        return WAYS[way]
    try:
        return {name: _value(text) for name, text in (pair.split("=", 1) for pair in way.split())}
    except ValueError as error:
        raise SystemExit(f"--ways: {[PROBE, *WAYS]} or parameters like freeze=-2 are expected, got {way!r}.") from error


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def make_way(way: str, common: dict[str, Any], seed: int, quick: bool) -> BaseEstimator:
    """A new estimator; ``common`` are the parameters that decide which features of which images."""
    if way == PROBE:
        linear = LogisticRegression(C=PROBE_C, max_iter=1000)
        return make_pipeline(PretrainedFeatureExtractor(**common), StandardScaler(), linear)
    tuning = {"random_state": seed, **common, **parameters_of(way)}
    return FineTuneClassifier(**tuning | {"epochs": 1} if quick else tuning)


# All of them.


def measure(
    cells: Sequence[str],
    ways: Sequence[str],
    size: Size,
    known: dict[str, Run],
    keep: Callable[[dict[str, Run]], None],
    development: bool,
) -> dict[str, Run]:
    """What each way has right, by "cell, way, seed"; those known are left as they are."""
    runs = dict(known)
    for cell in cells:
        network = cell.split(", ")[0]
        task: Task | None = None
        for seed in range(size.n_seeds):
            for way in ways:
                key = f"{cell}, {way}, {seed}"
                if key in runs or seed not in seeds_of(cell, way, size):
                    continue
                task = task or task_of(cell, size)
                runs[key] = _run(way, task, NETWORKS[network], seed, size, development)
                keep(runs)
                print(f"{key}: {runs[key]['accuracy']:.4f} in {runs[key]['seconds']:.0f} s", flush=True)
    return runs


def _run(way: str, task: Task, network: dict[str, Any], seed: int, size: Size, development: bool) -> Run:
    part = task.part(seed, development, size.n_test)
    with tempfile.TemporaryDirectory() as folder:  # each way with a store of its own: none lives off another
        common = {**network, "image_size": task.image_size, "cache": FeatureStore(folder)}
        start = time.perf_counter()
        model = make_way(way, common, seed, size.quick).fit(part.X, part.y)
        fitted = time.perf_counter()
        right = model.predict(part.X_test) == part.y_test
        end = time.perf_counter()
    return {
        "accuracy": float(np.average(right, weights=task.weights(part.y_test))),
        "seconds": end - start,
        "fit_seconds": fitted - start,
        "n": len(right),
        "weights": _packed_weights(task.weights(part.y_test)),
        "right": np.packbits(right).tobytes().hex(),
    }


def _packed_weights(weights: np.ndarray) -> dict[str, list[float] | str] | None:
    """None where all weigh the same."""
    found = packed(weights)
    return None if len(found["distinct"]) == 1 else found


def right_of(run: Run) -> np.ndarray:
    """Of shape (n,): what each image adds to the score, whose mean is the accuracy."""
    right = np.unpackbits(np.frombuffer(bytes.fromhex(run["right"]), np.uint8), count=run["n"]).astype(float)
    return right if run["weights"] is None else right * unpacked(run["weights"])


def difference(runs: Sequence[Run], others: Sequence[Run], same_photos: bool) -> tuple[float, float]:
    """Mean difference of two ways, seed by seed, and its standard error over photos and seeds."""
    gaps = np.stack([right_of(run) - right_of(other) for run, other in zip(runs, others, strict=True)])
    return float(gaps.mean()), standard_error(gaps, same_photos)


def standard_error(gaps: np.ndarray, same_photos: bool) -> float:
    """Of the mean of gaps of shape (n_seeds, n_photos), where another draw has other seeds and other photos.

    The variances of the means by photo and by seed, less what both of them hold: that of single results, from which
    photo and seed are taken out. Where every seed has photos of its own, the variance of the means by seed is all.
    """
    n_seeds, n_photos = gaps.shape
    within = gaps.var(axis=1, ddof=1).mean() / gaps.size
    if n_seeds == 1:
        return float(within**0.5)
    by_seed = gaps.mean(1).var(ddof=1) / n_seeds
    if not same_photos:
        return float(max(by_seed, within) ** 0.5)
    by_photo = gaps.mean(0).var(ddof=1) / n_photos
    rest = gaps - gaps.mean(1, keepdims=True) - gaps.mean(0) + gaps.mean()
    single = (rest**2).sum() / ((n_seeds - 1) * (n_photos - 1)) / gaps.size
    return float(max(by_photo, by_seed, by_photo + by_seed - single) ** 0.5)


def summarise(
    runs: dict[str, Run], cells: Iterable[str], ways: Iterable[str], size: Size, development: bool
) -> list[dict[str, Any]]:
    """One row for each cell and way that all seeds were measured with."""
    rows = []
    for cell in cells:
        found = {way: [runs.get(f"{cell}, {way}, {seed}") for seed in seeds_of(cell, way, size)] for way in ways}
        whole = {way: [run for run in of_way if run] for way, of_way in found.items() if of_way and all(of_way)}
        for way, of_way in whole.items():
            accuracies = np.array([run["accuracy"] for run in of_way])
            row = {
                "cell": cell,
                "way": way,
                "n_seeds": len(of_way),
                "accuracy": float(accuracies.mean()),
                "spread": float(accuracies.std(ddof=1)) if len(of_way) > 1 else None,
                "seconds": float(np.median([run["seconds"] for run in of_way])),
                "over": {},
            }
            for other in {PROBE, OLD} & {*whole} - {way}:  # over the seeds that both were measured with
                n = min(len(of_way), len(whole[other]))
                row["over"][other] = difference(of_way[:n], whole[other][:n], not development)
            rows.append(row)
    return rows


def too_low(row: dict[str, Any]) -> bool:
    """Whether the default is worse than it may be beside the probe or the old default."""
    gaps = row["over"].values() if row["way"] == DEFAULT else ()
    return any(-gain > max(TOLERANCE, TOLERATED_ERRORS * error) for gain, error in gaps)


def print_table(rows: list[dict[str, Any]]) -> None:
    width = max(len(row["way"]) for row in rows)
    print(f"\n{'cell':27} {'way':{width}} accuracy      over the probe   over the old   seconds")
    for row in rows:
        spread = "     " if row["spread"] is None else f"± {100 * row['spread']:3.1f}"
        gains = [_gain(row["over"].get(other)) for other in (PROBE, OLD)]
        low = "  TOO LOW" if too_low(row) else ""
        shown = f"{row['cell']:27} {row['way']:{width}} {100 * row['accuracy']:5.1f} {spread}"
        print(f"{shown}   {gains[0]:14}   {gains[1]:12} {row['seconds']:8.0f}{low}")


def _gain(of_pair: tuple[float, float] | None) -> str:
    return "" if of_pair is None else f"{100 * of_pair[0]:+5.1f} ± {100 * of_pair[1]:3.1f}"


def chosen_cells(names: list[str] | None, size: Size) -> list[str]:
    if names is None:
        return [cell for cell in CELLS if not size.quick or cell in ("lite0, ants-bees", "squeezenet1_1, blood cells")]
    known = {name for cell in CELLS for name in (cell, *cell.split(", "))}
    if strange := sorted({*names} - known):
        raise SystemExit(f"--cells: some of {CELLS}, or a network, or a task are expected, got {strange}.")
    return [cell for cell in CELLS if {cell, *cell.split(", ")} & {*names}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", help="only these: networks, tasks, or both with a comma between them")
    parser.add_argument("--ways", nargs="+", default=[PROBE, *WAYS], help="only these, or parameters with values")
    parser.add_argument("--development", action="store_true", help="judge by photos of the training part")
    parser.add_argument("--seeds", type=int, help="how many, where it is not one in any case")
    parser.add_argument("--quick", action="store_true", help="few images, one epoch, two cells")
    parser.add_argument("--json", type=Path, help="where to write the figures, and to go on from")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else FULL
    size = replace(size, n_seeds=arguments.seeds or size.n_seeds)
    cells, ways = chosen_cells(arguments.cells, size), arguments.ways
    for way in ways:
        _ = way == PROBE or parameters_of(way)
    settings = vars(size) | {"development": arguments.development}
    known = runs_in(arguments.json, settings)

    def keep(runs: dict[str, Any], **more: Any) -> None:
        if arguments.json:
            write_json(arguments.json, {"settings": settings, "runs": runs, **more})

    runs = measure(cells, ways, size, known, keep, arguments.development)
    rows = summarise(runs, cells, ways, size, arguments.development)
    keep(runs, table=rows)
    if arguments.quick:
        print("Too few images and epochs to judge.")
    print_table(rows)
    sys.exit(int(not arguments.quick and any(map(too_low, rows))))


if __name__ == "__main__":
    main()
