"""How well FineTuneRegressor counts red blood cells in photos, beside ridge regression on features and beside the mean.

    python benchmarks/bench_counts.py [--ways ...] [--quick] [--json FILE]

tf_efficientnet_lite0 with real weights on BCCD, from ``$FEATX_DATA``: 292 photos to train on and 72 to be judged by, by
the set's own lists; the target is the number of red cells that have a box. Every way sees the whole photo at 320 x 240
pixels. The table gives mean absolute errors in cells, mean and standard deviation over three seeds, which draw what is
drawn at random (one where all layers train); R2; and seconds of fit and prediction where no features are known yet.
With ``--json`` a run that was broken off goes on where it was. ``--quick`` takes 24 photos and one epoch, only to show
that all of it works.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _about import runs_in, write_json
from _cells import NETWORKS, read_blood
from PIL import Image
from sklearn.base import BaseEstimator
from sklearn.dummy import DummyRegressor
from sklearn.linear_model import RidgeCV
from sklearn.metrics import mean_absolute_error, r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torchvision.transforms.v2 import functional as F

from featx import FeatureStore, FineTuneRegressor, PretrainedFeatureExtractor

N_SEEDS, N_QUICK = 3, 24


class WholePhoto:
    """A photo at 320 x 240 pixels, as the network was trained to see pixels; nothing is cropped away."""

    cache_key = "whole photo, 320 x 240, bilinear"

    def __call__(self, image: Image.Image) -> Any:
        pixels = F.to_dtype(
            F.pil_to_tensor(image.convert("RGB").resize((320, 240), Image.Resampling.BILINEAR)), scale=True
        )
        return F.normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def read(lists: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Photos, and red cells in each."""
    photos = [*read_blood(lists)]
    X = np.array([photo.file for photo in photos], dtype=object)
    return X, np.array([sum(kind == "RBC" for kind, _ in photo.boxes) for photo in photos], dtype=float)


def tuned(**parameters: Any) -> Callable[[dict[str, Any], int, dict[str, Any]], BaseEstimator]:
    return lambda common, seed, quick: FineTuneRegressor(**common, **parameters, **quick, random_state=seed)


WAYS: dict[str, Callable[[dict[str, Any], int, dict[str, Any]], BaseEstimator]] = {
    "mean": lambda common, seed, quick: DummyRegressor(),
    "ridge on features": lambda common, seed, quick: make_pipeline(
        PretrainedFeatureExtractor(**common), StandardScaler(), RidgeCV(np.logspace(0, 5, 11))
    ),
    "head only": tuned(freeze="all"),
    "freeze=-1": tuned(freeze=-1),
    "default": tuned(),
    "default, huber": tuned(loss="huber"),
    "default, all layers": tuned(freeze=0),
}
ONE_SEED = ("mean", "ridge on features", "default, all layers")  # nothing is drawn, or it takes longest


def run(way: str, seed: int, quick: bool) -> dict[str, Any]:
    (X, y), (X_test, y_test) = read(["train", "val"]), read(["test"])
    if quick:
        X, y, X_test, y_test = X[:N_QUICK], y[:N_QUICK], X_test[:N_QUICK], y_test[:N_QUICK]
    with tempfile.TemporaryDirectory() as folder:
        common = {**NETWORKS["lite0"], "preprocess": WholePhoto(), "cache": FeatureStore(folder)}
        start = time.perf_counter()
        found = WAYS[way](common, seed, {"epochs": 1} if quick else {}).fit(X, y).predict(X_test)
        seconds = time.perf_counter() - start
    return {
        "error": float(mean_absolute_error(y_test, found)),
        "R2": float(r2_score(y_test, found)),
        "seconds": seconds,
        "n": len(y),
        "n_test": len(y_test),
        "predicted": " ".join(f"{value:.3f}" for value in found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="only these")
    parser.add_argument("--quick", action="store_true", help="few photos, one epoch, one seed")
    parser.add_argument("--json", type=Path, help="where to write the figures, and to go on from")
    arguments = parser.parse_args()
    settings = {"quick": arguments.quick}
    runs = runs_in(arguments.json, settings)
    print(f"{'way':20} error, cells     R2   seconds")
    for way in arguments.ways:
        seeds = range(1 if arguments.quick or way in ONE_SEED else N_SEEDS)
        for seed in seeds:
            if f"{way}, {seed}" not in runs:
                runs[f"{way}, {seed}"] = run(way, seed, arguments.quick)
                if arguments.json:
                    write_json(arguments.json, {"settings": settings, "runs": runs})
        found = [runs[f"{way}, {seed}"] for seed in seeds]
        errors = np.array([one["error"] for one in found])
        spread = f"± {errors.std(ddof=1):4.2f}" if len(errors) > 1 else ""
        r2, seconds = (np.mean([one[name] for one in found]) for name in ("R2", "seconds"))
        print(f"{way:20} {errors.mean():5.2f} {spread:6} {r2:7.2f} {seconds:8.0f}", flush=True)


if __name__ == "__main__":
    main()
