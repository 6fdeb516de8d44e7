"""What a store remembers of a call, so that a later process finds known rows before it loads torch or torchvision.

Loading both takes longer than everything else that a process does whose images are all known. A call whose
parameters are plain (a named network, no callables) leaves beside the rows what it found out with their help: the
recipe's description and the columns to read. Parameters, versions and the content of the weights file are the key.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from joblib import effective_n_jobs

from featx._version import __version__
from featx.activations.joining import normalised, side_by_side
from featx.exceptions import FeatxError
from featx.images.sources import Items
from featx.store import Column, FeatureStore, Session

if TYPE_CHECKING:
    from featx.activations.extraction import Extraction

# What decides features or their layout, apart from the weights.
_PARAMETERS = ("backbone", "layers", "pooling", "grid", "normalize", "preprocess", "image_size", "decode", "max_pixels")
_LIBRARIES = {"torch": "torch", "torchvision": "torchvision", "pillow": "PIL"}  # by distribution
# Images looked up first, and then at a time: whoever has new ones should not look up many before that shows.
_FIRST_ROWS, _MOST_ROWS = 64, 4096

_left: set[tuple[str, str, int]] = set()  # by this process: store, question, time of the weights file's last change


@dataclass(frozen=True)
class Remembered:
    """The part of a recipe that known rows are found by.

    Attributes
    ----------
    description : str
        The recipe's.
    columns : tuple of Column
    shapes : tuple of tuple of int
        Of one image's part in each column.
    normalize : str or None
    """

    description: str
    columns: tuple[Column, ...]
    shapes: tuple[tuple[int, ...], ...]
    normalize: str | None

    @classmethod
    def of(cls, extraction: Extraction, description: str) -> Remembered:
        """What a call has found out."""
        plan = extraction.recipe.plan
        return cls(
            description,
            tuple(slot.column for slot in plan.slots),
            tuple(slot.shape for slot in plan.slots),
            plan.normalize,
        )

    @classmethod
    def parse(cls, text: bytes) -> Remembered:
        """From JSON."""
        description, columns, shapes, normalize = json.loads(text)
        return cls(description, tuple(Column(*column) for column in columns), tuple(map(tuple, shapes)), normalize)

    def text(self) -> bytes:
        """As JSON."""
        return json.dumps([self.description, self.columns, self.shapes, self.normalize]).encode()

    def rows(self, items: Items, store: FeatureStore, n_jobs: int | None) -> np.ndarray | None:
        """Features of all items, of shape (n, ...); None where a single one is unknown."""
        session, n_threads = Session(store), effective_n_jobs(n_jobs or -1)
        session.open_recipe(self.description)
        found = None
        stop = 0
        while stop < len(items):
            start, stop = stop, min(len(items), stop + (_MOST_ROWS if stop else _FIRST_ROWS))
            some = self._known(items[start:stop], session, n_threads)
            if some is None:
                return None
            if found is None:
                found = np.empty((len(items), *some.shape[1:]), dtype=np.float32)
            found[start:stop] = some
        return found

    def _known(self, items: Items, session: Session, n_threads: int) -> np.ndarray | None:
        digests = [digest for digest in session.digests(items, n_threads) if isinstance(digest, bytes)]
        if len(digests) < len(items):  # something cannot be read
            return None
        parts = [np.empty((len(items), column.width), dtype=np.float32) for column in self.columns]
        if not session.fill(digests, self.columns, parts, np.arange(len(items))).all():
            return None
        return side_by_side(
            [
                normalised(part.reshape(-1, *shape), self.normalize)
                for part, shape in zip(parts, self.shapes, strict=True)
            ]
        )


def recall(estimator: Any, store: FeatureStore | None) -> Remembered | None:
    """What an earlier process left for these parameters.

    None where it left nothing, where parameters are not plain, or where torchvision is loaded: nothing is saved then.
    """
    if store is None or not _saves_time() or estimator.verbose:  # a progress bar is drawn by those who do the work
        return None
    if (question := _question(estimator)) is None:
        return None
    try:
        opened = store._existing()
        if opened is None:
            return None
        text = opened.index.answer(_with_weights(question, estimator, opened.index.digest_of_file))
        return None if text is None else Remembered.parse(text)
    except (FeatxError, OSError, ValueError, TypeError):  # all that is lost is time
        return None


def remember(estimator: Any, extraction: Extraction) -> None:
    """Leave for later processes what a call has found out, once per process."""
    question = _question(estimator)
    if extraction.store is None or question is None:
        return
    key = (extraction.store.path, question, _changed_ns(estimator.weights))
    if key in _left:
        return
    session = Session(extraction.store)
    description = extraction.description(session)
    if description is not None:
        asked = _with_weights(question, estimator, session.digest_of_file)
        session.leave_answer(asked, Remembered.of(extraction, description).text())
    _left.add(key)


def _saves_time() -> bool:
    return "torchvision" not in sys.modules


def _question(estimator: Any) -> str | None:
    """All that the answer depends on, apart from the content of a weights file; None where words do not say it."""
    values = {name: getattr(estimator, name) for name in _PARAMETERS}
    named = isinstance(values["backbone"], str) and not values["backbone"].startswith("timm/")
    plain = isinstance(values["preprocess"], str) and not values["preprocess"].startswith("timm/")
    one_layer = isinstance(values["layers"], str | Integral) and values["layers"] != "all"
    several_maps = values["pooling"] == "map" and not one_layer
    if not named or not plain or several_maps or estimator.device not in (None, "cpu"):
        return None
    if estimator.storage_options is not None:  # a digest of what lies elsewhere is a download, which is not made twice
        return None
    seed = estimator.random_state if isinstance(estimator.random_state, Integral) else 0
    truncated = getattr(sys.modules.get("PIL.ImageFile"), "LOAD_TRUNCATED_IMAGES", False)
    layers = values.pop("layers")
    values["layers"] = layers if isinstance(layers, str) else np.asarray(layers, dtype=object).tolist()
    weights = None if estimator.weights is None else os.fspath(estimator.weights)
    values |= {"weights": weights, "precision": estimator.precision, "seed": int(seed)}
    return repr((sorted(values.items()), truncated, _versions(), _as_loaded()))


def _with_weights(question: str, estimator: Any, digest_of_file: Callable[[str], bytes]) -> str:
    if estimator.weights is None or not os.path.isfile(estimator.weights):
        return question
    return f"{question} {digest_of_file(os.fspath(estimator.weights)).hex()}"


def _changed_ns(weights: Any) -> int:
    try:
        return 0 if weights is None else os.stat(weights).st_mtime_ns
    except OSError:  # published weights, which are no file here
        return 0


@lru_cache
def _versions() -> str:
    """Installed versions, without importing what they are of; featx's own also by the time of its last change."""
    newest = max(path.stat().st_mtime_ns for path in Path(__file__).parents[1].rglob("*.py"))
    return f"featx {__version__} {newest} " + " ".join(f"{name} {_installed(name)}" for name in _LIBRARIES)


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _as_loaded() -> list[str]:
    """Versions of libraries that say something else of themselves than what is installed, down to the release."""
    found = {name: getattr(sys.modules.get(module), "__version__", None) for name, module in _LIBRARIES.items()}
    return [
        f"{name} {loaded}"
        for name, loaded in found.items()
        if loaded is not None and str(loaded).partition("+")[0] != _installed(name).partition("+")[0]
    ]
