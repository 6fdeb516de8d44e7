"""Whether TransferClassifier chooses well, and how far its best_score_ can be trusted.

    python benchmarks/bench_transfer.py [--parts PART ...] [--budget SECONDS] [--quick] [--json FILE]

tf_efficientnet_lite0 with real weights from ``$FEATX_DATA``, and photos outside of the search: ants-bees (all 243 in
three folds), CIFAR-10 at 96 pixels with 100 labels a class (two draws) and blood cells (the set's own lists, balanced
accuracy).

``chosen``: accuracy of what a search within ``--budget`` has taken, beside the probe alone and beside every recipe that
the search has judged, refitted by itself, of which the best is the choice with hindsight. Exits with 1 where the choice
is below the probe by more than a standard error of the paired difference, or below that best one by more than 0.005 and
by more than a standard error.

``optimism``: ``best_score_`` less the accuracy outside, over thirty draws of 100 photos of CIFAR-10 with the recipes on
features; ``optimism-of-all`` over five with all recipes. Exits with 1 where it is more than 0.015 and a standard error.

With ``--json`` a run that was broken off goes on where it was. ``--quick`` takes few photos, only to show that all of
it works.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _about import packed, runs_in, unpacked, write_json
from _cells import NETWORKS, TASKS, Part, Task
from sklearn.model_selection import StratifiedKFold, StratifiedShuffleSplit

from featx import FeatureStore, TransferClassifier
from featx.estimators.named_recipes import RECIPES

TOLERANCE, MOST_OPTIMISM = 0.005, 0.015
PARTS = ["chosen", "optimism", "optimism-of-all"]
ON_FEATURES = ["probe", "layers", "lda"]
DRAWS = {"optimism": ([*ON_FEATURES, "mean"], 30), "optimism-of-all": (list(RECIPES), 5)}

Run = dict[str, Any]


def parts_of(name: str, quick: bool) -> Iterator[tuple[Task, Part]]:
    """What is searched on, and what is outside of it."""
    task = TASKS[name](100 if quick else 1000)
    if name == "ants-bees":
        X, y = np.concatenate([task.X, task.X_test]), np.concatenate([task.y, task.y_test])
        for learnt, left in StratifiedKFold(3, shuffle=True, random_state=0).split(X, y):
            learnt = learnt[::4] if quick else learnt
            yield task, Part(X[learnt], y[learnt], X[left], y[left])
        return
    for seed in range(2 if name.startswith("cifar") else 1):
        part = task.part(seed, development=False, n_test=len(task.y_test))
        yield task, Part(part.X[::20], part.y[::20], part.X_test, part.y_test) if quick else part


def search(
    name: str, task: Task, store: Any, recipes: Any, budget: float | None, seed: int, cv: Any = 5
) -> TransferClassifier:
    """A search with nothing set but what the data ask for."""
    return TransferClassifier(
        **NETWORKS["lite0"],
        image_size=task.image_size if name != "ants-bees" else None,
        scoring="balanced_accuracy" if task.balanced else None,
        recipes=recipes,
        time_budget=budget,
        cv=cv,
        random_state=seed,
        cache=store,
    )


def chosen(name: str, number: int, task: Task, part: Part, budget: float) -> Run:
    weights = task.weights(part.y_test)
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(folder)

        def right(recipes: Any, limit: float | None, cv: Any = 5) -> tuple[TransferClassifier, np.ndarray, float]:
            start = time.perf_counter()
            fitted = search(name, task, store, recipes, limit, number, cv).fit(part.X, part.y)
            seconds = time.perf_counter() - start
            return fitted, (fitted.predict(part.X_test) == part.y_test) * weights, seconds

        _, of_probe, seconds_of_probe = right(["probe"], None)
        best, of_best, seconds = right("auto", budget)
        board = best.leaderboard_
        each = {"probe": of_probe}
        for recipe, n_folds in zip(board["recipe"], board["n_folds"], strict=True):
            if n_folds and recipe not in ("probe", "mean"):
                # What trains the network has nothing to choose: one fold is enough to come to the model.
                once = StratifiedShuffleSplit(1, test_size=0.2, random_state=0)
                _, each[recipe], _ = right([recipe], None, 5 if recipe in ON_FEATURES else once)
    return {
        "recipe": best.best_recipe_,
        "best_score": best.best_score_,
        "leaderboard": {name: [None if value != value else value for value in row] for name, row in board.items()},
        "seconds": seconds,
        "seconds_of_probe": seconds_of_probe,
        "right": packed(of_best),
        "each": {recipe: packed(values) for recipe, values in each.items()},
    }


def optimism(number: int, recipes: Any, store: FeatureStore) -> Run:
    task = TASKS["cifar-10/10"](1000)
    part = task.part(number, development=False, n_test=1000)
    fitted = search("cifar-10/10", task, store, recipes, None, number).fit(part.X, part.y)
    outside = fitted.score(part.X_test, part.y_test)
    return {"recipe": fitted.best_recipe_, "best_score": fitted.best_score_, "outside": outside}


def gap(values: Any, others: Any) -> tuple[float, float]:
    """Mean of a paired difference, and its standard error."""
    gaps = np.subtract(values, others)
    return float(gaps.mean()), float(gaps.std(ddof=1) / len(gaps) ** 0.5)


def print_chosen(runs: dict[str, Run]) -> bool:
    """Whether all of them are good enough."""
    print(f"\n{'data':18} {'taken':14} accuracy   probe   over the probe   below the best   of         seconds  quick")
    good = True
    for name in ("ants-bees", "cifar-10/100", "blood cells"):
        found = [run for key, run in runs.items() if key.startswith(f"chosen, {name},")]
        if not found:
            continue
        shared = set.intersection(*({*run["each"]} for run in found))
        each = {recipe: np.concatenate([unpacked(run["each"][recipe]) for run in found]) for recipe in shared}
        taken = np.concatenate([unpacked(run["right"]) for run in found])
        over, error = gap(taken, each["probe"])
        best = max(sorted(shared), key=lambda recipe: each[recipe].mean())
        below, error_below = gap(each[best], taken)
        good &= over >= -error and below <= max(TOLERANCE, error_below)
        recipes = ", ".join(dict.fromkeys(run["recipe"] for run in found))
        seconds, quick = (np.mean([run[key] for run in found]) for key in ("seconds", "seconds_of_probe"))
        print(
            f"{name:18} {recipes:14} {taken.mean():8.3f} {each['probe'].mean():7.3f}   {over:+.3f} ± {error:.3f}  "
            f"{below:+.3f} ± {error_below:.3f}   {best:10} {seconds:7.0f} {quick:6.0f}"
        )
    return good


def print_optimism(runs: dict[str, Run]) -> bool:
    """Whether best_score_ is near enough."""
    good = True
    for what in DRAWS:
        found = [run for key, run in runs.items() if key.startswith(f"{what},")]
        if len(found) > 1:
            mean, error = gap([run["best_score"] for run in found], [run["outside"] for run in found])
            good &= mean <= MOST_OPTIMISM + error
            print(f"{what}: best_score_ less the accuracy outside, {len(found)} draws: {mean:+.4f} ± {error:.4f}")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--budget", type=float, default=240, help="seconds of each search")
    parser.add_argument("--quick", action="store_true", help="few photos, small budgets")
    parser.add_argument("--json", type=Path, help="where to write the figures, and to go on from")
    arguments = parser.parse_args()
    settings = {"budget": arguments.budget, "quick": arguments.quick}
    runs: dict[str, Run] = runs_in(arguments.json, settings)

    def keep(key: str, run: Run) -> None:
        runs[key] = run
        print(f"{key}: {run['recipe']}, best_score_ {run['best_score']:.3f}", flush=True)
        if arguments.json:
            write_json(arguments.json, {"settings": settings, "runs": runs})

    if "chosen" in arguments.parts:
        for name in ("ants-bees", "cifar-10/100", "blood cells"):
            for number, (task, part) in enumerate(parts_of(name, arguments.quick)):
                if (key := f"chosen, {name}, {number}") not in runs:
                    keep(key, chosen(name, number, task, part, 5 if arguments.quick else arguments.budget))
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(folder)
        for what in DRAWS.keys() & {*arguments.parts}:
            recipes, n = (["probe", "layers"], 2) if arguments.quick else DRAWS[what]
            for number in range(n):
                if (key := f"{what}, {number}") not in runs:
                    keep(key, optimism(number, recipes, store))
    good = print_chosen(runs) & print_optimism(runs)
    sys.exit(int(not arguments.quick and not good))


if __name__ == "__main__":
    main()
