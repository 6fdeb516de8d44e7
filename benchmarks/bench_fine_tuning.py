"""A grid search over fine-tuning: how often each photo goes through the frozen front, and what it costs.

    python benchmarks/bench_fine_tuning.py [--quick] [--json FILE]

squeezenet1_1 with real weights on 243 photos of ants and bees, from ``$FEATX_DATA``. First the head alone
(freeze="all"): 4 learning rates x 5 folds x 10 epochs, and a refit. featx with a new ``cache=``, and with the same one
in another process; skorch, whose data set decodes each photo for every epoch and whose batches go through the whole
network; and the ideal: one bare pass over the photos, then a plain torch loop that trains the same heads on ready
matrices. skorch would need hours for the whole, so one fold of one learning rate is timed, all of its epochs and its
prediction, and the time is scaled by the photos that go through the network. Without skorch (``pip install skorch``)
its row says so.

Then the last two stages (freeze=-2), in one fit of few epochs, with the values at the freeze point computed once and
without. What that can save at best follows from its parts, each measured alone: decoding, front, and a step of the
tail.

Last the textbook's recipe, one fit of it: vgg16 without its top, frozen, average pooling, Dense(1024, relu), softmax,
Adam, 10 epochs; beside the loop that one writes by hand, of which one epoch is timed and scaled to ten. Its weights are
random, which changes no time.

Each way runs in a process of its own, with imports left out of the clock. What counts are the ratios, since all share
the machine; the short ones take turns and give medians. The ratio of processor times, of all threads and child
processes, tells how far others disturbed. Exits with 1 where a limit is not met. ``--quick`` takes 40 photos and one
epoch, and checks passes and losses alone.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

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
from PIL import Image
from safetensors.torch import load_file
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from torch import nn
from torch.nn import functional as F
from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1, vgg16

import featx.training.fitting  # with torchvision, so that the clock does not run for it
import featx.training.values
from featx import FeatureStore, FineTuneClassifier, PretrainedFeatureExtractor, list_layers, load_image_folder

TRANSFORM = SqueezeNet1_1_Weights.IMAGENET1K_V1.transforms()  # a description: nothing is downloaded

RATES = [3e-4, 1e-3, 3e-3, 1e-2]
TIMED_RATE = 1  # position of the one that skorch is timed with
N_FOLDS, N_EPOCHS, N_TAIL_EPOCHS, BATCH, SEED = 5, 10, 5, 32, 0
FRONT = 5  # modules of ``features`` up to the third stage from the end, the last that freeze=-2 leaves as it is
N_QUICK, TURNS = 40, 3
# A mean score may be lower by this, since sums are rounded otherwise; skorch draws other random numbers, and may have
# two photos more right in its one fold.
TOLERANCE, PHOTOS_TOLERATED = 0.01, 2
# Mean losses of an epoch with and without the shortcut, after steps whose rounding differs.
LOSS_TOLERANCE = 1e-3
LABELS = {
    "cold": "featx, new cache",
    "warm": "featx, new process",
    "probe": "the same, linear_probe",
    "skorch": "skorch (scaled)",
    "pass": "ideal: the bare pass",
    "heads": "ideal: training heads",
}
LIMITS = (("skorch", "cold", "at least", 60.0), ("warm", "heads", "at most", 1.5))


def n_epochs(quick: bool) -> int:
    return 1 if quick else N_EPOCHS


def folds(y: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(StratifiedKFold(N_FOLDS).split(y, y))


# The ways. Each runs in a process of its own.


def search(paths: np.ndarray, y: np.ndarray, cache: FeatureStore, epochs: int, probe: bool) -> Figures:
    """One grid search with featx; scores by learning rate, then by fold."""
    model = FineTuneClassifier(
        "squeezenet1_1",
        weights=WEIGHTS,
        freeze="all",
        linear_probe=probe,
        epochs=epochs,
        optimizer="adam",
        weight_decay=0.0,
        lr_schedule="constant",
        warmup=0.0,
        batch_size=BATCH,
        random_state=SEED,
        cache=cache,
    )
    grid = GridSearchCV(model, {"learning_rate": RATES}, cv=folds(y)).fit(paths, y)
    scores = [grid.cv_results_[f"split{fold}_test_score"] for fold in range(N_FOLDS)]
    return {"scores": np.transpose(scores).tolist()}


def search_ideally(paths: np.ndarray, y: np.ndarray, epochs: int) -> Figures:
    """One pass, then the same heads on ready matrices, and one more for the best learning rate."""
    with Clock() as passing:
        rows = PretrainedFeatureExtractor("squeezenet1_1", weights=WEIGHTS).transform(paths)
    with Clock() as training:
        X, codes = torch.from_numpy(rows), torch.from_numpy(y)
        scores = [
            [
                score_of(train_head(X[train], codes[train], rate, epochs), X[test], codes[test])
                for train, test in folds(y)
            ]
            for rate in RATES
        ]
        train_head(X, codes, RATES[int(np.argmax(np.mean(scores, axis=1)))], epochs)
    return {"scores": scores, "pass": passing.figures, "heads": training.figures}


def train_head(X: torch.Tensor, codes: torch.Tensor, rate: float, epochs: int) -> nn.Linear:
    seed = int(np.random.RandomState(SEED).randint(2**31 - 1))  # so that featx draws the same start and order
    torch.manual_seed(seed)
    head = nn.Linear(X.shape[1], 2)
    optimizer, order = torch.optim.Adam(head.parameters(), lr=rate), torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(X), generator=order).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(head(X[rows]), codes[rows]).backward()
            optimizer.step()
    return head


def score_of(head: nn.Linear, X: torch.Tensor, codes: torch.Tensor) -> float:
    with torch.no_grad():
        return float((head(X).argmax(1) == codes).double().mean())


class Photos(torch.utils.data.Dataset):
    """Photos decoded whenever they are asked for."""

    def __init__(self, paths: np.ndarray, y: np.ndarray) -> None:
        self.paths, self.y = paths, y

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.paths[row]) as image:
            return TRANSFORM(image.convert("RGB")), int(self.y[row])


def make_network() -> nn.Module:
    """The network with a new head; everything but the head frozen."""
    network = squeezenet1_1(weights=None)
    network.load_state_dict(load_file(WEIGHTS), strict=False)
    network.requires_grad_(False)
    network.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 2))
    return network


def fit_with_skorch(paths: np.ndarray, y: np.ndarray, epochs: int) -> Figures:
    """One fold of one learning rate."""
    from skorch import NeuralNetClassifier

    train, test = folds(y)[0]
    torch.manual_seed(SEED)
    net = NeuralNetClassifier(
        make_network,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.Adam,
        lr=RATES[TIMED_RATE],
        max_epochs=epochs,
        batch_size=BATCH,
        train_split=None,
        iterator_train__shuffle=True,
        iterator_train__num_workers=min(4, os.cpu_count() or 1),
        iterator_valid__num_workers=min(4, os.cpu_count() or 1),
        verbose=0,
    )
    net.fit(Photos(paths[train], y[train]), y=None)
    return {"score": float((net.predict(Photos(paths[test], y[test])) == y[test]).mean())}


def tune_tail(paths: np.ndarray, y: np.ndarray, epochs: int, shortcut: bool) -> Figures:
    """One fit of the last two stages and a head."""
    if not shortcut:  # no room for values at the freeze point
        featx.training.values._MOST_IN_MEMORY, featx.training.values._MOST_OF_DISK = 0, 0.0
    model = FineTuneClassifier(
        "squeezenet1_1",
        weights=WEIGHTS,
        freeze=-2,
        linear_probe=False,
        epochs=epochs,
        batch_size=BATCH,
        random_state=SEED,
    )
    return {"loss": model.fit(paths, y).history_["loss"], "epochs": epochs}


def fit_textbook(paths: np.ndarray, y: np.ndarray, epochs: int) -> Figures:
    """The textbook's recipe in one line."""
    FineTuneClassifier(
        "vgg16",
        weights=None,
        layers=-1,
        freeze="all",
        hidden_layer_sizes=(1024,),
        optimizer="adam",
        linear_probe=False,
        epochs=epochs,
        random_state=SEED,
    ).fit(paths, y)
    return {}


def fit_textbook_by_hand(paths: np.ndarray, y: np.ndarray) -> Figures:
    """One epoch of it, as a plain torch loop."""
    pooling = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 2))
    network = nn.Sequential(vgg16(weights=None).features.requires_grad_(False), *pooling, head).train()
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
    workers = min(4, os.cpu_count() or 1)
    photos = torch.utils.data.DataLoader(Photos(paths, y), batch_size=BATCH, shuffle=True, num_workers=workers)
    for images, codes in photos:
        optimizer.zero_grad()
        F.cross_entropy(network(images), codes).backward()
        optimizer.step()
    return {}


def measure_parts(paths: np.ndarray, y: np.ndarray) -> Figures:
    """Decoding, the front's and the tail's forward pass, and a training step of the tail, each over all photos once."""
    assert list_layers("squeezenet1_1")[-3] == f"features.{FRONT - 1}"
    network = make_network().to(memory_format=torch.channels_last)
    front, tail = network.features[:FRONT].eval(), network.features[FRONT:]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 2))
    trained = nn.Sequential(tail, head).requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-5)
    photos, clocks = Photos(paths, y), {name: Clock() for name in ("decoding", "front", "tail", "step")}
    with torch.no_grad():  # warm up
        trained(front(torch.zeros(BATCH, 3, 224, 224)))
    for rows in np.array_split(np.arange(len(photos)), -(-len(photos) // BATCH)):
        with clocks["decoding"]:
            images = torch.stack([photos[row][0] for row in rows]).to(memory_format=torch.channels_last)
        with torch.no_grad():
            with clocks["front"]:
                values = front(images)
            with clocks["tail"]:
                trained(values.clone())
        with clocks["step"]:
            optimizer.zero_grad()
            F.cross_entropy(trained(values), torch.from_numpy(y[rows])).backward()
            optimizer.step()
    return {name: clock.figures for name, clock in clocks.items()}


class Clock:
    """Seconds inside of ``with``, added up: of the wall's clock, and of the processors for all threads and children."""

    def __init__(self) -> None:
        self.figures = {"seconds": 0.0, "cpu_seconds": 0.0}

    def __enter__(self) -> Clock:
        self._start = self._now()
        return self

    def __exit__(self, *error: object) -> None:
        for name, value in self._now().items():
            self.figures[name] += value - self._start[name]

    def _now(self) -> dict[str, float]:
        ended = os.times()  # finer for this process is process_time
        cpu = time.process_time() + ended.children_user + ended.children_system
        return {"seconds": time.perf_counter(), "cpu_seconds": cpu}


def run(way: str, photos: Path, folder: Path, quick: bool) -> Figures:
    """Figures of one way."""
    data = load_image_folder(photos)
    paths, y = (data.data[:N_QUICK], data.target[:N_QUICK]) if quick else (data.data, data.target)
    y = y.astype(np.int64)
    epochs, tail_epochs = n_epochs(quick), 2 if quick else N_TAIL_EPOCHS
    cache = FeatureStore(folder) if way in ("cold", "warm", "probe") else None
    ways: dict[str, Callable[[], Figures]] = {
        "cold": lambda: search(paths, y, cache, epochs, False),
        "warm": lambda: search(paths, y, cache, epochs, False),
        "probe": lambda: search(paths, y, cache, epochs, True),
        "ideal": lambda: search_ideally(paths, y, epochs),
        "skorch": lambda: fit_with_skorch(paths, y, epochs),
        "tail": lambda: tune_tail(paths, y, tail_epochs, True),
        "tail, all of it": lambda: tune_tail(paths, y, tail_epochs, False),
        "parts": lambda: measure_parts(paths, y),
        "textbook": lambda: fit_textbook(paths, y, epochs),
        "by hand": lambda: fit_textbook_by_hand(paths, y),
    }
    n_seen = count_images()
    with Clock() as clock:
        figures = ways[way]()
    computed = None if cache is None else cache.info()["computed"]
    return {**clock.figures, **figures, "images": n_seen(), "n": len(paths), "computed": computed}


# All of them.


def measure(folder: Path, quick: bool) -> dict[str, list[Figures]]:
    """All runs of every way; none of skorch where it is not installed."""
    photos = unpack_photos(folder)
    short, long = (
        ("ideal", "cold", "warm", "probe"),
        ("skorch", "tail", "tail, all of it", "parts", "textbook", "by hand"),
    )
    runs: dict[str, list[Figures]] = {way: [] for way in (*short, *long)}
    for turn, way in itertools.product(range(1 if quick else TURNS), short):
        runs[way].append(run_in_process(__file__, way, photos, folder / f"store-{turn}", quick))
    for way in long:
        if way != "skorch" or importlib.util.find_spec("skorch"):
            runs[way].append(run_in_process(__file__, way, photos, folder / way, quick))
    return runs


def check_parity(runs: dict[str, list[Figures]], quick: bool) -> None:
    """No score is lost; each photo goes through the front once; the shortcut changes no loss."""
    for way, passes in (("cold", 1), ("warm", 0), ("probe", 0)):
        for run in runs[way]:
            assert run["images"] == passes * run["n"], f"{LABELS[way]}: {run['images']} images through the network"
            assert run["computed"] == run["n"], f"the store has counted {run['computed']} images"
    first, again, wanted = (np.asarray(runs[way][0]["scores"]) for way in ("cold", "warm", "ideal"))
    assert np.array_equal(first, again), "the same search has other scores in another process"
    short, whole = (np.asarray(runs[way][0]["loss"]) for way in ("tail", "tail, all of it"))
    assert np.abs(short - whole).max() <= LOSS_TOLERANCE, f"losses differ by {np.abs(short - whole).max()}"
    tail, n, epochs = runs["tail"][0], runs["tail"][0]["n"], runs["tail"][0]["epochs"]
    assert tail["images"] == n, f"{tail['images']} images through the network with the shortcut"
    assert runs["tail, all of it"][0]["images"] == epochs * n
    if quick:  # one epoch teaches too little to compare
        return
    lost = wanted.mean(axis=1) - first.mean(axis=1)  # by learning rate
    assert lost.max() <= TOLERANCE, f"mean scores are lower by {lost.tolist()}"
    for run in runs["skorch"]:
        fewer = (run["score"] - first[TIMED_RATE, 0]) * (run["n"] / N_FOLDS)
        assert fewer <= PHOTOS_TOLERATED, f"skorch has {fewer:.1f} photos more right in one fold"


def of_whole_search(timed: Figures, epochs: int) -> Figures:
    """The time of one fold of one learning rate, scaled to the search by the photos that go through the network."""
    n = timed["n"]
    whole = len(RATES) * (epochs * n * (N_FOLDS - 1) + n) + epochs * n
    scale = whole / timed["images"]
    return {"seconds": scale * timed["seconds"], "cpu_seconds": scale * timed["cpu_seconds"], "images": whole, "n": n}


def summarise(runs: dict[str, list[Figures]], quick: bool) -> dict[str, Figures]:
    """Per way the median times, their ratios to the ideal, and passes over the photos."""
    ideal = runs["ideal"]
    figures = {way: runs[way] for way in ("cold", "warm", "probe")}
    figures["skorch"] = [of_whole_search(run, n_epochs(quick)) for run in runs["skorch"]]
    figures["pass"] = [run["pass"] | {"images": run["n"], "n": run["n"]} for run in ideal]
    figures["heads"] = [run["heads"] | {"images": 0, "n": run["n"]} for run in ideal]
    return compare(figures, ideal)


def summarise_tail(runs: dict[str, list[Figures]]) -> Figures:
    """What the shortcut saves when the last two stages train, and what it could at best.

    At best, since decoding and front are then done once and not in every epoch, and the rest is the same.
    """
    short, whole, parts = runs["tail"][0], runs["tail, all of it"][0], runs["parts"][0]
    epochs = short["epochs"]

    def possible(name: str) -> float:
        once, step = parts["decoding"][name] + parts["front"][name], parts["step"][name]
        return epochs * (once + step) / (once + epochs * step)

    front, tail = parts["front"]["cpu_seconds"], parts["tail"]["cpu_seconds"]
    return {
        "epochs": epochs,
        "time": whole["seconds"] / short["seconds"],
        "cpu": whole["cpu_seconds"] / short["cpu_seconds"],
        "possible_time": possible("seconds"),
        "possible_cpu": possible("cpu_seconds"),
        "frozen_share": front / (front + tail),
        "parts": {name: parts[name] for name in ("decoding", "front", "tail", "step")},
        "seconds": {"once": short["seconds"], "every epoch": whole["seconds"]},
        "cpu_seconds": {"once": short["cpu_seconds"], "every epoch": whole["cpu_seconds"]},
    }


def summarise_textbook(runs: dict[str, list[Figures]], quick: bool) -> Figures:
    """How many times as long the loop by hand takes, were it run for all epochs."""
    (featx_,), (by_hand,) = runs["textbook"], runs["by hand"]
    return {name: n_epochs(quick) * by_hand[name] / featx_[name] for name in ("seconds", "cpu_seconds")}


def print_tail(tail: Figures) -> None:
    print(f"\nlast two stages, {tail['epochs']} epochs: without the shortcut {tail['time']:.2f} times as long ", end="")
    print(f"(CPU {tail['cpu']:.2f}); at best {tail['possible_time']:.2f} (CPU {tail['possible_cpu']:.2f}),")
    print(f"where {tail['frozen_share']:.0%} of a forward pass are frozen")


def print_textbook(textbook: Figures) -> None:
    print(f"the textbook's recipe: by hand {textbook['seconds']:.1f} times as long ", end="")
    print(f"(CPU {textbook['cpu_seconds']:.1f})")


def main() -> None:
    arguments = parse_arguments(__doc__, quick="40 photos, one epoch, and no limit on time")
    if arguments.way:
        way, photos, folder = arguments.way
        return print(json.dumps(run(way, Path(photos), Path(folder), arguments.quick)))
    with tempfile.TemporaryDirectory() as folder:
        runs = measure(Path(folder), arguments.quick)
    check_parity(runs, arguments.quick)
    ways, tail = summarise(runs, arguments.quick), summarise_tail(runs)
    textbook = summarise_textbook(runs, arguments.quick)
    limits = check_limits(ways, LIMITS)
    n_photos = runs["ideal"][0]["n"]
    print(f"{n_photos} photos, {len(RATES) * N_FOLDS} fits of {n_epochs(arguments.quick)} epochs and a refit\n")
    print_table(ways, LABELS)
    print_tail(tail)
    print_textbook(textbook)
    print_limits(limits, arguments.quick)
    scores = {way: np.mean(runs[way][0]["scores"], axis=1).tolist() for way in ("ideal", "cold", "probe")}
    scores["skorch, one fold"] = [run["score"] for run in runs["skorch"]]
    scores["featx, the same fold"] = [runs["cold"][0]["scores"][TIMED_RATE][0]]
    print("\nmean scores by learning rate")
    for way, of_way in scores.items():
        print(f"{way:22}", *(f"{score:.3f}" for score in of_way))
    if arguments.json:
        figures = {"n_photos": n_photos, "ways": ways, "tail": tail, "textbook": textbook}
        figures |= {"limits": limits, "scores": scores}
        arguments.json.write_text(json.dumps(figures | about(), indent=2))
    sys.exit(is_failed(limits, arguments.quick))


if __name__ == "__main__":
    main()
