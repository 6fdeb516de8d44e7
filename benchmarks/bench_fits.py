"""Fits on known features: scikit-learn with the threads that everybody has, with one, in workers, and featx's way.

    python benchmarks/bench_fits.py [--quick] [--json FILE]

3,068 random rows of 1,280 float32 features and ten classes, like those of as many photos; five folds x five values of
C of a logistic regression on standardised features, 25 fits. Four ways to the same scores: ``GridSearchCV`` as it is;
in a process with ``OMP_NUM_THREADS=1``; with ``n_jobs=-1``, whose workers have one thread each and start while the
clock runs; and what ``featx search`` and ``featx fit`` do. Each alone, and beside a process that is busy with nothing.
Every run has a process of its own, and the clock leaves imports out; ways take turns, and medians are compared. Exits
with 1 where a limit is not met. ``--quick`` takes one turn, and judges the scores alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from _about import about
from sklearn.model_selection import GridSearchCV, StratifiedKFold

from featx.choosing.probes import C_VALUES, accuracies_of, classifier

N_ROWS, N_FEATURES, N_CLASSES, N_FOLDS, TURNS = 3068, 1280, 10, 5, 3
# Largest difference between two ways' mean scores: BLAS adds up in another order with another count of threads.
TOLERANCE = 1e-3
WAYS = {
    "default": "`GridSearchCV`",
    "one": "the same, `OMP_NUM_THREADS=1`",
    "workers": "the same, `n_jobs=-1`",
    "featx": "`featx search`, `featx fit`",
}
PLACES = ("alone", "beside a busy process")
# In a place, of one way's time over another's.
LIMITS = (
    ("alone", "default", "featx", "at least", 2.0),
    ("alone", "featx", "one", "at most", 1.0),
    ("beside a busy process", "default", "featx", "at least", 3.0),
    ("beside a busy process", "featx", "one", "at most", 1.25),
)

Figures = dict[str, Any]


def random_rows() -> tuple[np.ndarray, np.ndarray]:
    """Rows as pooled activations are: never negative, much of them shared, and classes that are told apart in part.

    A fit takes ten to fifty iterations on them.
    """
    generator = np.random.default_rng(0)
    y = np.arange(N_ROWS) % N_CLASSES
    centres = generator.normal(size=(N_CLASSES, N_FEATURES)) * (generator.random((N_CLASSES, N_FEATURES)) < 0.05)
    noise = 0.5 * generator.normal(size=(N_ROWS, N_FEATURES))
    strengths = generator.normal(size=(N_ROWS, 100)) * np.geomspace(1, 0.05, 100)
    shared = strengths @ generator.normal(size=(100, N_FEATURES))
    return np.maximum(noise + shared + 1.2 * centres[y], 0).astype(np.float32), y.astype(str)


def search(rows: np.ndarray, y: np.ndarray, folds: StratifiedKFold, n_jobs: int | None) -> np.ndarray:
    grid = {"logisticregression__C": C_VALUES}
    found = GridSearchCV(classifier(), grid, cv=folds, refit=False, n_jobs=n_jobs).fit(rows, y)
    return found.cv_results_["mean_test_score"]


def run(way: str) -> Figures:
    """Mean scores by C, and seconds, of one way in this process."""
    rows, y = random_rows()
    folds = StratifiedKFold(N_FOLDS, shuffle=True, random_state=0)
    calls: dict[str, Callable[[], np.ndarray]] = {
        "default": lambda: search(rows, y, folds, None),
        "one": lambda: search(rows, y, folds, None),
        "workers": lambda: search(rows, y, folds, -1),
        "featx": lambda: accuracies_of(rows, y, folds).mean(axis=1),
    }
    start, start_cpu = time.perf_counter(), time.process_time()
    scores = calls[way]()
    times = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - start_cpu}
    return {"scores": scores.tolist(), **times}


def run_in_process(way: str) -> Figures:
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    if way == "one":
        environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, __file__, "--way", way]
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)


@contextmanager
def busy_process() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure(n_turns: int) -> dict[str, dict[str, list[Figures]]]:
    """All runs, by place and way."""
    runs: dict[str, dict[str, list[Figures]]] = {place: {way: [] for way in WAYS} for place in PLACES}
    for _ in range(n_turns):
        for place, ways in runs.items():
            with nullcontext() if place == "alone" else busy_process():
                for way, figures in ways.items():
                    figures.append(run_in_process(way))
    return runs


def check_parity(runs: dict[str, dict[str, list[Figures]]]) -> list[float]:
    """The mean scores, which every way has."""
    wanted = runs["alone"]["one"][0]["scores"]
    for place, ways in runs.items():
        for way, figures in ways.items():
            for figure in figures:
                difference = np.abs(np.subtract(figure["scores"], wanted)).max()
                assert difference <= TOLERANCE, f"{way}, {place}: scores differ by up to {difference}"
    return wanted


def check_limits(medians: dict[str, dict[str, float]]) -> list[Figures]:
    rows = []
    for place, way, other, kind, limit in LIMITS:
        ratio = medians[place][way] / medians[place][other]
        met = ratio >= limit if kind == "at least" else ratio <= limit
        rows.append({"ratio": f"{way} / {other}, {place}", "time": ratio, "limit": f"{kind} {limit:g}", "met": met})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one turn, and no limit on time")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        return print(json.dumps(run(arguments.way)))
    runs = measure(1 if arguments.quick else TURNS)
    scores = check_parity(runs)
    seconds = {place: {way: [run["seconds"] for run in of] for way, of in ways.items()} for place, ways in runs.items()}
    medians = {place: {way: float(np.median(of)) for way, of in ways.items()} for place, ways in seconds.items()}
    limits = check_limits(medians)
    print(f"{N_FOLDS * len(C_VALUES)} fits; all ways have the same mean scores\n")
    print(f"{'seconds':45}" + "".join(f"{place:>24}" for place in PLACES))
    for way, label in WAYS.items():
        print(f"{label:45}" + "".join(f"{medians[place][way]:24.2f}" for place in PLACES))
    print()
    for row in limits:
        verdict = "" if arguments.quick else "met" if row["met"] else "NOT MET"
        print(f"{row['ratio']:45} {row['time']:8.2f}   {row['limit']:14} {verdict}".rstrip())
    if arguments.json:
        figures = {"scores": scores, "median_seconds": medians, "seconds": seconds, "limits": limits}
        arguments.json.write_text(json.dumps(figures | about(), indent=2))
    sys.exit(not arguments.quick and not all(row["met"] for row in limits))


if __name__ == "__main__":
    main()
