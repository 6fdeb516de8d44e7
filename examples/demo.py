"""Few-shot transfer: pretrained features against raw pixels.

    python examples/demo.py                        # real handwritten digits, five labels a class, twenty draws
    python examples/demo.py --photos FOLDER        # your own photos: one subfolder per class

Every choice (layer, pooling, grid, regularisation) is made by cross-validation on the labelled part alone; what is
printed is the accuracy on images that no choice has seen. Runs offline with the embedded network, two to five
minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from sklearn.base import BaseEstimator
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.svm import SVC
from tqdm.auto import tqdm

import featx
from featx import PretrainedFeatureExtractor, list_layers, load_image_folder

C_VALUES = [0.01, 0.1, 1.0]
SVC_GRID = {"svc__C": [0.1, 1, 10, 100], "svc__gamma": ["scale", 1e-4, 3e-4, 1e-3, 3e-3, 1e-2]}
BASELINE = "raw pixels, tuned SVC"


def tuned(steps: Sequence[BaseEstimator], grid: dict[str, list[Any]], folds: StratifiedKFold) -> GridSearchCV:
    """The one protocol for all: a grid search over the same folds of the labelled part."""
    return GridSearchCV(make_pipeline(*steps), grid, cv=folds, n_jobs=-1)


def candidates(
    raw: BaseEstimator, extractor: PretrainedFeatureExtractor, grid: dict[str, list[Any]], folds: StratifiedKFold
) -> dict[str, GridSearchCV]:
    """What is compared: raw pixels with two classifiers, and the network with random and with pretrained weights.

    To be fitted from the last to the first: joblib replaces a worker that grows after its first task, as one that has
    to load a network later does.
    """
    linear = [StandardScaler(), LogisticRegression(max_iter=2000)]
    regularised = {"logisticregression__C": C_VALUES}
    searched = {f"pretrainedfeatureextractor__{name}": values for name, values in grid.items()} | regularised
    untrained = PretrainedFeatureExtractor(**(extractor.get_params() | {"weights": None}))
    return {
        "raw pixels, logistic regression": tuned([raw, *linear], regularised, folds),
        BASELINE: tuned([raw, SVC()], SVC_GRID, folds),
        f"{extractor.backbone}, random weights": tuned([untrained, *linear], searched, folds),
        f"{extractor.backbone}, pretrained": tuned([extractor, *linear], searched, folds),
    }


def draw(y: np.ndarray, per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of a labelled part with ``per_class`` rows of each class, and of the rest."""
    rng = np.random.default_rng(seed)
    labelled = np.concatenate([rng.choice(np.flatnonzero(y == c), per_class, replace=False) for c in np.unique(y)])
    return labelled, np.setdiff1d(np.arange(len(y)), labelled)


def print_table(scores: dict[str, list[float]]) -> None:
    """Mean accuracy of each, and its paired gain over the tuned SVC with the standard error of that gain."""
    print(f"\n{'':34s} accuracy   gain over the SVC")
    for name, values in scores.items():
        gains = np.subtract(values, scores[BASELINE])
        error = f" +- {gains.std(ddof=1) / len(gains) ** 0.5:.3f}" if len(gains) > 1 else ""
        print(f"{name:34s} {np.mean(values):8.3f}   " + ("" if name == BASELINE else f"{gains.mean():+.3f}{error}"))


def run_on_digits(n_draws: int, cache: str, per_class: int = 5) -> dict[str, list[float]]:
    """Few-shot digits: 8 x 8 pixels, shown to the network at twice their size."""
    X, y = load_digits(return_X_y=True)
    print(
        f"Handwritten digits, {per_class} labels a class, {n_draws} draws; accuracy on the other digits of each draw."
    )
    extractor = PretrainedFeatureExtractor(
        "featx_micro", image_shape=(8, 8), pixel_range=(0, 16), image_size=16, cache=cache
    )
    grid = {"layers": [1, 2], "pooling": ["avg", "max"], "grid": [2, 4]}
    scores: dict[str, list[float]] = {}
    for seed in tqdm(range(n_draws), desc="draws"):
        labelled, rest = draw(y, per_class, seed)
        folds = StratifiedKFold(5, shuffle=True, random_state=seed)
        searches = candidates(FunctionTransformer(), extractor, grid, folds)
        for name in reversed(searches):  # the networks first, see `candidates`
            searches[name].fit(X[labelled], y[labelled])
            scores.setdefault(name, []).append(searches[name].score(X[rest], y[rest]))
    scores = {name: scores[name] for name in searches}
    print_table(scores)
    print("\nNext: make demo PHOTOS=folder, with one subfolder of photos per class, or examples/ and README.md.")
    return scores


def thumbnails(paths: Sequence[str]) -> np.ndarray:
    """Raw pixels of photos: upright, 16 x 16, in 0..1."""
    upright = (ImageOps.exif_transpose(Image.open(path)).convert("RGB").resize((16, 16)) for path in paths)
    return np.stack([np.asarray(photo).ravel() / 255 for photo in upright])


def run_on_photos(folder: str, backbone: str, weights: str, cache: str) -> dict[str, list[float]]:
    """A folder of class subfolders: a third is held out, the rest is searched."""
    photos = load_image_folder(folder)
    print(f"{len(photos.data)} photos of {len(photos.target_names)} classes; a third is held out.")
    X, held_out, y, truth = train_test_split(
        photos.data, photos.target, test_size=1 / 3, stratify=photos.target, random_state=0
    )
    extractor = PretrainedFeatureExtractor(backbone, weights=weights, normalize="l2", cache=cache)
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    grid = {"layers": list_layers(backbone)[-2:], "pooling": ["avg", "max"], "grid": [1]}
    scores: dict[str, list[float]] = {}
    searches = candidates(FunctionTransformer(thumbnails), extractor, grid, folds)
    for name in tqdm(reversed(searches), desc="models", total=len(searches)):
        scores[name] = [searches[name].fit(X, y).score(held_out, truth)]
    scores = {name: scores[name] for name in searches}
    print_table(scores)
    chosen = searches[f"{backbone}, pretrained"].best_params_
    print("\nChosen on the labelled part:", {name.split("__")[-1]: value for name, value in chosen.items()})
    print("Next: BACKBONE=resnet18 (fetches ImageNet weights once), or BACKBONE=name WEIGHTS=file.safetensors.")
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", help="folder with one subfolder of photos per class")
    parser.add_argument("--backbone", default="featx_micro", help="name from featx.list_backbones()")
    parser.add_argument("--weights", default="DEFAULT", help="name of published weights, or a file")
    parser.add_argument("--draws", type=int, default=20, help="how often the labelled digits are drawn")
    parser.add_argument("--json", type=Path, help="where to write the scores")
    arguments = parser.parse_args()
    # A folder of its own: what is shown takes no more than one pass per image, and needs no earlier run.
    with tempfile.TemporaryDirectory() as cache:
        if arguments.photos:
            scores = run_on_photos(arguments.photos, arguments.backbone, arguments.weights, cache)
        else:
            scores = run_on_digits(arguments.draws, cache)
    if arguments.json:
        arguments.json.write_text(json.dumps({"scores": scores, "baseline": BASELINE, "featx": featx.__version__}))


if __name__ == "__main__":
    main()
