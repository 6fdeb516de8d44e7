"""What accuracies are measured on: networks with real weights, and photos of four kinds."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from _ways import DATA, WEIGHTS
from PIL import Image

NETWORKS: dict[str, dict[str, Any]] = {
    "lite0": {
        "backbone": "timm/tf_efficientnet_lite0",
        "weights": DATA / "weights" / "tf_efficientnet_lite0-imagenet.safetensors",
    },
    "squeezenet1_1": {"backbone": "squeezenet1_1", "weights": WEIGHTS},
}

Files = np.ndarray  # of bytes


@dataclass(frozen=True)
class Part:
    """Images to train on, and images to be judged by."""

    X: Files
    y: np.ndarray
    X_test: Files
    y_test: np.ndarray


@dataclass(frozen=True)
class Task:
    """Photos, of which some are never trained on.

    Attributes
    ----------
    X, y
        What training draws from.
    X_test, y_test
        What judges a recipe once it is frozen.
    n_each : ndarray of shape (n_classes,) of int
        Images that are drawn of each class.
    image_size : int
        Side in pixels that the network sees.
    balanced : bool
        Whether every class counts as much as any other, however rare it is.
    """

    X: Files
    y: np.ndarray
    X_test: Files
    y_test: np.ndarray
    n_each: np.ndarray
    image_size: int
    balanced: bool = False

    def part(self, seed: int, development: bool, n_test: int) -> Part:
        """What one seed trains on; judged, while recipes are being made, by what it leaves of the training photos."""
        drawn = _draw(self.y, self.n_each, seed)
        if not development:
            return Part(self.X[drawn], self.y[drawn], self.X_test, self.y_test)
        left = np.setdiff1d(np.arange(len(self.y)), drawn)
        left = np.random.default_rng(seed).permutation(left)[:n_test]
        return Part(self.X[drawn], self.y[drawn], self.X[left], self.y[left])

    def weights(self, y: np.ndarray) -> np.ndarray:
        """What each image counts for in the score, 1 on average."""
        if not self.balanced:
            return np.ones(len(y))
        counts = np.bincount(y)
        return len(y) / (np.count_nonzero(counts) * counts[y])


def _draw(y: np.ndarray, n_each: np.ndarray, seed: int) -> np.ndarray:
    """Rows of some images of each class, ascending."""
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(np.flatnonzero(y == code))[:n] for code, n in enumerate(n_each)]
    return np.sort(np.concatenate(chosen))


def _read(name: str) -> tuple[Files, np.ndarray]:
    """Files and classes, in the order of their names."""
    with zipfile.ZipFile(DATA / "data" / name) as archive:
        names = sorted(entry for entry in archive.namelist() if entry.endswith(".jpg"))
        X = np.array([archive.read(entry) for entry in names], dtype=object)
    return X, np.unique([entry.split("/")[0] for entry in names], return_inverse=True)[1]


def ants_bees(n_test: int) -> Task:
    """Large photos, few of them: a third judges, four fifths of the rest are drawn."""
    X, y = _read("ants-bees.zip")
    test = _draw(y, np.bincount(y) // 3, 0)
    pool = np.setdiff1d(np.arange(len(y)), test)
    return Task(X[pool], y[pool], X[test], y[test], np.bincount(y[pool]) * 4 // 5, image_size=160)


def cifar(n_labels: int) -> Callable[[int], Task]:
    """Small photos of ten classes, made three times as large: what networks for photos expect, and no more detail."""

    def task(n_test: int) -> Task:
        X, y = _read("cifar10-train.zip")
        X_test, y_test = _read("cifar10-test.zip")
        test = _draw(y_test, np.full(10, n_test // 10), 0)
        return Task(X, y, X_test[test], y_test[test], np.full(10, n_labels), image_size=96)

    return task


def blood_cells(n_test: int) -> Task:
    """Cells cut out of photos by their boxes, by the set's own lists: three classes, one of them six cells in seven."""
    (X, y), (X_test, y_test) = _cells(["train", "val"]), _cells(["test"])
    test = _draw(y_test, _shares(y_test, min(1000, n_test)), 0)
    return Task(X, y, X_test[test], y_test[test], _shares(y, 1000), image_size=96, balanced=True)


def _shares(y: np.ndarray, n: int) -> np.ndarray:
    counts = np.bincount(y)
    return np.maximum(1, counts * min(n, len(y)) // len(y))


@dataclass(frozen=True)
class Photo:
    """A photo of blood.

    Attributes
    ----------
    file : bytes
    boxes : list of (str, (left, top, right, bottom))
        Kinds of cells, and where they lie in pixels; those without an area are left out.
    n_empty : int
        Boxes that were.
    """

    file: bytes
    boxes: list[tuple[str, tuple[int, int, int, int]]]
    n_empty: int


def read_blood(lists: list[str]) -> Iterator[Photo]:
    """Photos of the set's own lists, "train", "val" or "test"."""
    with zipfile.ZipFile(DATA / "data" / "bccd.zip") as archive:
        for name in lists:
            for photo in archive.read(f"BCCD/ImageSets/Main/{name}.txt").decode().split():
                root = ET.fromstring(archive.read(f"BCCD/Annotations/{photo}.xml"))
                found = [_box(entry) for entry in root.iter("object")]
                boxes = [(kind, box) for kind, box in found if box[0] < box[2] and box[1] < box[3]]
                yield Photo(archive.read(f"BCCD/JPEGImages/{photo}.jpg"), boxes, len(found) - len(boxes))


def _box(entry: ET.Element) -> tuple[str, tuple[int, int, int, int]]:
    left, top, right, bottom = (int(entry.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax"))
    return entry.findtext("name", ""), (left, top, right, bottom)


def _cells(lists: list[str]) -> tuple[Files, np.ndarray]:
    crops, kinds, n_empty = [], [], 0
    for photo in read_blood(lists):
        n_empty += photo.n_empty
        image = Image.open(io.BytesIO(photo.file)).convert("RGB")
        for kind, box in photo.boxes:
            file = io.BytesIO()
            image.crop(box).save(file, "PNG")
            crops.append(file.getvalue())
            kinds.append(kind)
    if n_empty:
        print(f"BCCD, {' and '.join(lists)}: {n_empty} boxes without an area are left out.", flush=True)
    return np.array(crops, dtype=object), np.unique(kinds, return_inverse=True)[1]


TASKS: dict[str, Callable[[int], Task]] = {
    "ants-bees": ants_bees,
    **{f"cifar-10/{n}": cifar(n) for n in (10, 100, 1000)},
    "blood cells": blood_cells,
}
