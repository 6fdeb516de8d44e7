"""What stands in a report: predictions of held-out photos, the worst mistakes, nearest photos, settings."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from sklearn.metrics import confusion_matrix
from sklearn.neighbors import NearestNeighbors

from featx.backbones.addresses import path_in, plain_address
from featx.choosing.probes import probabilities_of
from featx.cli.found import Found
from featx.cli.judged import Judged
from featx.cli.measures import confused_pairs
from featx.cli.outcomes import shown
from featx.images.remote import is_url
from featx.plots.pictures import thumbnail

# Thumbnails at most: a report is to be mailed. They are some 7 kB each.
MOST_MISTAKES, _MOST_QUERIES, _N_NEAREST = 24, 8, 5
_JPEG_QUALITY = 80


@dataclass(frozen=True)
class Picture:
    """A thumbnail inside the page.

    Attributes
    ----------
    name : str
        The photo's file, from the searched folder on.
    uri : str
        ``data:`` and a JPEG file.
    width, height : int
        In pixels.
    """

    name: str
    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Mistake:
    """A photo that was taken for another class.

    Attributes
    ----------
    picture : Picture
    true, predicted : str
    confidence : float
        Probability of the predicted class, in 0..1; NaN where the model gives none.
    map : Picture or None
        What speaks for the predicted class and for the true one, where a model can tell.
    """

    picture: Picture
    true: str
    predicted: str
    confidence: float
    map: Picture | None = None


@dataclass(frozen=True)
class Neighbourhood:
    """A photo and those that are most like it.

    Attributes
    ----------
    picture : Picture
    label : str
    nearest : list of (Picture, str, float)
        With class and cosine distance, nearest first.
    """

    picture: Picture
    label: str
    nearest: list[tuple[Picture, str, float]]


@dataclass(frozen=True)
class Contents:
    """What a report says beside the ranking.

    Attributes
    ----------
    confusion : ndarray of shape (n_classes, n_classes) of int
        Photos by true and by predicted class.
    mistakes : list of Mistake
        With the highest confidence first; not all of them where there are many.
    neighbourhoods : list of Neighbourhood
        For some classes, that of the photo which was recognised with the highest confidence.
    """

    confusion: np.ndarray
    mistakes: list[Mistake]
    neighbourhoods: list[Neighbourhood]

    @property
    def n_wrong(self) -> int:
        """Photos off the diagonal."""
        return int(self.confusion.sum() - np.trace(self.confusion))

    def confused(self, classes: Sequence[str], count: int) -> list[tuple[str, str, int]]:
        """The pairs of true and predicted class that are confused most often."""
        return confused_pairs(self.confusion, classes, count)


def contents_of(found: Found) -> Contents:
    """Predict every photo by a classifier that did not learn from it, with the best choice, and gather pictures."""
    best = found.best
    extractor = found.extractors[best.backbone].set_params(layers=best.layer, pooling=best.pooling, verbose=0)
    rows = extractor.transform([*found.photos.paths])  # from the cache
    proba = probabilities_of(rows, found.photos.y, found.folds, best.C)
    classes = np.asarray(found.classes)
    judged = Judged(found.photos, classes, classes[proba.argmax(axis=1)], proba)
    predicted, confidence = judged.predicted, judged.confidence
    items = extractor._items([*found.photos.paths], reset=False, in_full=True)

    def picture(row: int) -> Picture:
        return picture_of(thumbnail(items, row), name_of(found.photos.paths[row], found.source.folder))

    return Contents(
        confusion_matrix(found.photos.y, predicted, labels=classes),
        [
            Mistake(picture(row), str(found.photos.y[row]), str(predicted[row]), float(confidence[row]))
            for row in judged.worst(MOST_MISTAKES)
        ],
        [
            Neighbourhood(
                picture(query),
                str(found.photos.y[query]),
                [(picture(row), str(found.photos.y[row]), distance) for row, distance in nearest],
            )
            for query, nearest in _nearest(rows, _typical(found.photos.y, predicted, confidence))
        ],
    )


def _typical(y: np.ndarray, predicted: np.ndarray, confidence: np.ndarray) -> list[int]:
    """Of some classes the row that was recognised with the highest confidence; of those with none, nothing."""
    right = np.where(predicted == y, confidence, -1.0)
    of_class = [max(np.flatnonzero(y == label).tolist(), key=lambda row: right[row]) for label in np.unique(y)]
    return [row for row in of_class if right[row] >= 0][:_MOST_QUERIES]


def _nearest(rows: np.ndarray, queries: list[int]) -> list[tuple[int, list[tuple[int, float]]]]:
    """For each query, the rows of the nearest others with their cosine distances."""
    if not queries:
        return []
    search = NearestNeighbors(n_neighbors=min(_N_NEAREST + 1, len(rows)), metric="cosine").fit(rows)
    distances, places = search.kneighbors(rows[queries])
    return [
        (query, [(row, distance) for row, distance in zip(of_row, those, strict=True) if row != query][:_N_NEAREST])
        for query, of_row, those in zip(queries, places.tolist(), distances.tolist(), strict=True)
    ]


def picture_of(pixels: np.ndarray, name: str) -> Picture:
    """Pixels (height, width, 3), uint8, as a JPEG inside the page."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    height, width = pixels.shape[:2]
    return Picture(name, f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}", width, height)


def name_of(path: str, folder: str) -> str:
    """Of a photo, from its folder on; URLs stay whole."""
    if is_url(path):
        return path
    return shown(os.path.relpath(path, folder))


def code_of(found: Found) -> str:
    """Python that makes the best choice's model and finds its accuracy again."""
    best = found.best
    extractor = found.extractors[best.backbone].set_params(layers=best.layer, pooling=best.pooling)
    names = ("weights", "layers", "pooling", "image_size", "precision", "decode", "pixel_range", "fourth_band")
    usual = type(extractor)().get_params()
    params = {name: getattr(extractor, name) for name in names if getattr(extractor, name) != usual[name]}
    if file := path_in(address := plain_address(params.get("weights"))):
        typed = _typed(file, found.command)
        params["weights"] = (typed, address[1]) if isinstance(address, tuple) else typed
    listed = "".join(f", {name}={value!r}" for name, value in (params | {"cache": found.cached or None}).items())
    imports, lines = found.source.code
    packages = [
        "from sklearn.linear_model import LogisticRegression",
        "from sklearn.model_selection import StratifiedKFold, cross_val_score",
        "from sklearn.pipeline import make_pipeline",
        "from sklearn.preprocessing import StandardScaler",
    ]
    code = [
        *packages,
        *imports,
        "from featx import PretrainedFeatureExtractor",
        "",
        *lines,
        *_leaving_out(found),
        f"features = PretrainedFeatureExtractor({best.backbone!r}{listed})",
        f"model = make_pipeline(features, StandardScaler(), LogisticRegression(C={best.C:g}, max_iter=5000))",
        f"folds = StratifiedKFold({found.folds.n_splits}, shuffle=True, random_state=0)",
        f"print(cross_val_score(model, paths, labels, cv=folds).mean())  # {best.accuracy:.3f}",
    ]
    return shown("\n".join(code))


def _leaving_out(found: Found) -> list[str]:
    if not found.broken:
        return []
    broken = sorted(photo.path for photo in found.broken)
    lines = ["broken = {", *(f"    {path!r}," for path in broken), "}"]
    lines += ["good = [row for row, path in enumerate(paths) if path not in broken]"]
    return [*lines, "paths, labels = [paths[row] for row in good], labels[good]"]


def _typed(file: str, command: Sequence[str]) -> str:
    """A file by the name that it has in a command, so that a report tells no more of a machine than its reader did."""
    words = [word.rpartition("=")[2] for word in command]
    words += [word.rpartition("#")[0] for word in words]  # with a key of the file's content behind it
    return next((word for word in words if word and os.path.abspath(word) == file), file)


def about_photos(found: Found) -> list[dict[str, Any]]:
    """How many photos each class has."""
    labels, counts = np.unique(found.photos.y, return_counts=True)
    return [{"label": label, "n": n} for label, n in zip(labels.tolist(), counts.tolist(), strict=True)]
