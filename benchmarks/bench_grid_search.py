"""A grid search over layers and classifiers: how often each photo goes through the network, and what it costs.

    python benchmarks/bench_grid_search.py [--quick] [--json FILE]

squeezenet1_1 with real weights on 243 photos of ants and bees, from ``$FEATX_DATA``; its last three stages x 4 values
of C x 5 folds, and a refit. Seven ways to the same scores: a plain transformer, as one writes it by hand around
torchvision, alone and in ``Pipeline(memory=...)``; featx without a cache, alone and in ``Pipeline(memory=...)``; featx
with a new ``cache=``, and with the same one in another process; and the ideal: one bare pass of featx's that reads all
three stages, then the same fits on ready matrices. The plain transformer decodes in one thread and leaves memory
formats as they come, so featx without a cache beside it shows what is the engine's and what the cache's. Each runs in a
process of its own, and the clock runs from the search's first step to its last, imports left out. What counts are the
ratios, since all of them share the machine; the short ones take turns and give medians, the four long ones run once.
The ratio of processor times, of all threads, tells how far others disturbed. Exits with 1 where a limit is not met.
``--quick`` takes a third of the photos and fewer turns, and judges scores and passes alone.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _about import about
from _ways import (
    WEIGHTS,
    Figures,
    check_limits,
    compare,
    count_images,
    is_failed,
    parse_arguments,
    print_limits,
    print_table,
    run_in_process,
    unpack_photos,
)
from safetensors.torch import load_file
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F
from torchvision.io import ImageReadMode, decode_image
from torchvision.models import squeezenet1_1
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms import v2

import featx.activations.extraction  # noqa: F401 with torchvision, so that the clock does not run for it
from featx import FeatureStore, PretrainedFeatureExtractor, list_layers, load_image_folder

STAGES = list_layers("squeezenet1_1")[-3:]
STRENGTHS = [0.001, 0.01, 0.1, 1.0]  # C
N_FOLDS, TURNS, QUICK_TURNS = 5, 5, 3
# Largest difference between two ways' mean scores: they are means over the same folds of the same counts of hits.
TOLERANCE = 1e-9
LABELS = {
    "plain": "plain transformer",
    "memory": "plain, memory=",
    "uncached": "featx, no cache",
    "uncached-memory": "featx, memory=",
    "cold": "featx, new cache",
    "warm": "featx, new process",
    "ideal": "ideal",
}
PASSES = {"plain": 61, "memory": 25, "uncached": 61, "uncached-memory": 25, "cold": 1, "warm": 0, "ideal": 1}
# Of one way's time over another's. Those of featx without a cache guard against a slower look-up, since
# plain passes of any speed hide it.
LIMITS = (
    ("cold", "ideal", "at most", 1.25),
    ("plain", "cold", "at least", 30.0),
    ("memory", "cold", "at least", 15.0),
    ("warm", "ideal", "at most", 1.0),
    ("uncached", "cold", "at least", 20.0),
    ("uncached-memory", "cold", "at least", 9.0),
)

Scores = list[float]  # by stage, then by C


def make_extractor(cache: FeatureStore | None, layers: Any = "penultimate") -> PretrainedFeatureExtractor:
    return PretrainedFeatureExtractor("squeezenet1_1", weights=WEIGHTS, layers=layers, normalize="l2", cache=cache)


def classifier_steps() -> list[tuple[str, Any]]:
    return [("scale", StandardScaler()), ("classify", LogisticRegression(max_iter=1000))]


PREPROCESS = v2.Compose(
    [
        v2.Resize(256, antialias=True),
        v2.CenterCrop(224),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
)


class PlainTransformer(TransformerMixin, BaseEstimator):
    """Average-pooled, l2-normalised features of one layer, as a user of torchvision writes it down."""

    batch_size = 32

    def __init__(self, layers: str = STAGES[-1]) -> None:
        self.layers = layers

    def fit(self, X: np.ndarray, y: Any = None) -> PlainTransformer:
        return self

    @torch.inference_mode()
    def transform(self, X: np.ndarray) -> np.ndarray:
        network = plain_network(self.layers)
        rows = []
        for start in range(0, len(X), self.batch_size):
            images = [decode_image(path, ImageReadMode.RGB) for path in X[start : start + self.batch_size]]
            rows.append(network(torch.stack([PREPROCESS(image) for image in images]))["out"].mean((2, 3)))
        return F.normalize(torch.cat(rows)).numpy()


@functools.cache
def plain_network(layer: str) -> torch.nn.Module:
    """It ends at the layer, which is more than most do."""
    network = squeezenet1_1()
    network.load_state_dict(load_file(WEIGHTS), strict=False)
    return create_feature_extractor(network.eval(), {layer: "out"})


# The ways. Each runs in a process of its own.


def search(paths: np.ndarray, y: np.ndarray, extractor: BaseEstimator, memory: str | None) -> Scores:
    """One grid search over the whole pipeline."""
    pipeline = Pipeline([("extract", extractor), *classifier_steps()], memory=memory)
    grid = {"extract__layers": STAGES, "classify__C": STRENGTHS}
    found = GridSearchCV(pipeline, grid, cv=N_FOLDS).fit(paths, y).cv_results_
    scores = {
        (point["extract__layers"], point["classify__C"]): score
        for point, score in zip(found["params"], found["mean_test_score"], strict=True)
    }
    return [float(scores[stage, strength]) for stage in STAGES for strength in STRENGTHS]


def search_ideally(paths: np.ndarray, y: np.ndarray) -> Scores:
    """One pass that reads all stages, then the same fits on ready matrices, and one refit."""
    extractor = make_extractor(None, STAGES)
    matrix, names = extractor.transform(paths), extractor.get_feature_names_out()
    searches, matrices = [], []
    for stage in STAGES:  # normalize="l2" works on each stage by itself
        matrices.append(matrix[:, [name.startswith(f"{stage}_avg_") for name in names]])
        grid = GridSearchCV(Pipeline(classifier_steps()), {"classify__C": STRENGTHS}, cv=N_FOLDS, refit=False)
        searches.append(grid.fit(matrices[-1], y))
    scores = [score for grid in searches for score in grid.cv_results_["mean_test_score"].tolist()]
    best, strength = divmod(int(np.argmax(scores)), len(STRENGTHS))
    Pipeline(classifier_steps()).set_params(classify__C=STRENGTHS[strength]).fit(matrices[best], y)
    return scores


def run(way: str, photos: Path, folder: Path, quick: bool) -> Figures:
    """Scores, seconds and passes over the photos of one way."""
    data = load_image_folder(photos)
    paths, y = (data.data[::3], data.target[::3]) if quick else (data.data, data.target)
    cache = FeatureStore(folder) if way in ("cold", "warm") else None
    memory = str(folder) if way.endswith("memory") else None
    extractor = PlainTransformer() if way in ("plain", "memory") else make_extractor(cache)
    n_seen = count_images()
    start, start_cpu = time.perf_counter(), time.process_time()
    scores = search_ideally(paths, y) if way == "ideal" else search(paths, y, extractor, memory)
    times = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - start_cpu}
    computed = None if cache is None else cache.info()["computed"]
    return {"scores": scores, **times, "images": n_seen(), "n": len(paths), "computed": computed}


# All of them.


def measure(folder: Path, quick: bool) -> dict[str, list[Figures]]:
    """All runs of every way."""
    photos = unpack_photos(folder)
    runs: dict[str, list[Figures]] = {way: [] for way in LABELS}
    for turn in range(QUICK_TURNS if quick else TURNS):
        for way in ("ideal", "cold", "warm"):
            runs[way].append(run_in_process(__file__, way, photos, folder / f"store-{turn}", quick))
    for way in ("memory", "plain", "uncached", "uncached-memory"):
        runs[way].append(run_in_process(__file__, way, photos, folder / way, quick))
    return runs


def check_parity(runs: dict[str, list[Figures]]) -> None:
    """Every way has the same scores; the cache sends each photo through the network once, and none again."""
    wanted = np.asarray(runs["ideal"][0]["scores"])
    for way, figures in runs.items():
        for run in figures:
            difference = np.abs(np.asarray(run["scores"]) - wanted).max()
            assert difference <= TOLERANCE, f"{LABELS[way]}: scores differ by up to {difference}"
    for way, figures in runs.items():
        for run in figures:
            assert run["images"] == PASSES[way] * run["n"], f"{LABELS[way]}: {run['images']} images through the network"
    for run in (*runs["cold"], *runs["warm"]):
        assert run["computed"] == run["n"], f"the store has counted {run['computed']} images"


def main() -> None:
    arguments = parse_arguments(__doc__, quick="81 photos, and no limit on time")
    if arguments.way:
        way, photos, folder = arguments.way
        return print(json.dumps(run(way, Path(photos), Path(folder), arguments.quick)))
    with tempfile.TemporaryDirectory() as folder:
        runs = measure(Path(folder), arguments.quick)
    check_parity(runs)
    ways = compare(runs, runs["ideal"])
    limits = check_limits(ways, LIMITS)
    n_photos, n_fits = runs["ideal"][0]["n"], len(STAGES) * len(STRENGTHS) * N_FOLDS
    print(f"{n_photos} photos, {n_fits} fits and a refit; all ways have the same scores\n")
    print_table(ways, LABELS)
    print_limits(limits, arguments.quick)
    if arguments.json:
        figures = {"n_photos": n_photos, "ways": ways, "limits": limits, "scores": runs["ideal"][0]["scores"]}
        arguments.json.write_text(json.dumps(figures | about(), indent=2))
    sys.exit(is_failed(limits, arguments.quick))


if __name__ == "__main__":
    main()
