"""What a store remembers of a call, so that a later process finds known rows before it loads torch or torchvision.

Loading both takes longer than everything else that a process does whose images are all known. A call whose
parameters are plain (a named network, no callables) leaves beside the rows what it found out with their help: the
recipe's description and the columns to read. Parameters, versions and the content of the weights file are the
question that this answers. (Pillow images need torchvision all the same, for the digests of their pixels.)
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from featx._version import __version__
from featx.activations.joining import normalised, side_by_side
from featx.backbones.addresses import path_in, plain_address
from featx.exceptions import FeatxError, StoreError
from featx.images.sources import Items
from featx.store import MOST_ROWS, Column, FeatureStore, Session, resolve_store, rows_in_memory
from featx.system.packages import installed

if TYPE_CHECKING:
    from featx.activations.extraction import Extraction

# What decides features or their layout, apart from the weights; and the engine, of which `fit` tells what is wrong.
_PARAMETERS = ("backbone", "layers", "pooling", "grid", "normalize", "preprocess", "image_size", "decode", "max_pixels")
_LIBRARIES = {"torch": "torch", "torchvision": "torchvision", "pillow": "PIL"}  # by distribution
_FIRST_ROWS = 64  # looked up: new images should show before many were

# What a wrong parameter, a file or a store makes of a look at it; the long way says it better.
_TOLD_LATER = (FeatxError, OSError, ValueError, TypeError)

_left: set[tuple[str, str]] = set()  # by this process: store and question


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
        columns, shapes = zip(*((slot.column, slot.shape) for slot in plan.slots), strict=True)
        return cls(description, columns, shapes, plan.normalize)

    @classmethod
    def parse(cls, text: bytes) -> Remembered:
        """From JSON."""
        description, columns, shapes, normalize = json.loads(text)
        return cls(description, tuple(Column(*column) for column in columns), tuple(map(tuple, shapes)), normalize)

    def text(self) -> bytes:
        """As JSON."""
        return json.dumps([self.description, self.columns, self.shapes, self.normalize]).encode()

    def rows(self, items: Items, store: FeatureStore, n_threads: int) -> np.ndarray | None:
        """Features of all items, of shape (n, ...); None where a single one is unknown."""
        session, found, stop = Session(store), None, 0
        session.open_recipe(self.description)
        most = min(MOST_ROWS, rows_in_memory(self.columns))
        while stop < len(items):
            start, stop = stop, min(len(items), stop + (most if stop else min(most, _FIRST_ROWS)))
            some = self._known(items[start:stop], session, n_threads)
            if some is None:
                return None
            if found is None:
                found = np.empty((len(items), *some.shape[1:]), dtype=np.float32)
            found[start:stop] = some
        return found

    def _known(self, items: Items, session: Session, n_threads: int) -> np.ndarray | None:
        digests = session.digests(items, n_threads)
        place_of: dict[bytes, int] = {}
        places = [place_of.setdefault(digest, len(place_of)) for digest in digests if isinstance(digest, bytes)]
        if len(places) < len(items):  # something cannot be read
            return None
        parts = [np.empty((len(place_of), column.width), dtype=np.float32) for column in self.columns]
        if not session.fill([*place_of], self.columns, parts, np.arange(len(place_of))).all():
            return None
        shaped = [part.reshape(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True)]
        rows = side_by_side([normalised(part, self.normalize) for part in shaped])
        return rows if len(place_of) == len(items) else rows[places]


def store_of(estimator: Any) -> FeatureStore | None:
    """Where an estimator keeps features; None also where it cannot be told, which is an error later."""
    try:
        return resolve_store(estimator.cache)
    except (RuntimeError, OSError, ValueError):
        return None


def question_of(estimator: Any, store: FeatureStore | None, *, make: bool) -> str | None:
    """All that an answer depends on; None where there is no store, or where words do not say it.

    ``make`` lets the store be made, which a digest of the weights file needs.
    """
    try:
        if store is None or not _is_plain(estimator):
            return None
        return f"{_parameters(estimator)} {_versions()} {_as_loaded()} {_content(estimator.weights, store, make)}"
    except _TOLD_LATER:
        return None


def recall(question: str | None, store: FeatureStore | None) -> Remembered | None:
    """What an earlier process left; None also where torchvision is loaded, since nothing is saved then."""
    if store is None or question is None or not saves_time():
        return None
    try:
        opened = store._existing()
        text = None if opened is None else opened.index.answer(question)
        return None if text is None else Remembered.parse(text)
    except _TOLD_LATER:  # all that is lost is time
        return None


def remember(question: str | None, estimator: Any, extraction: Extraction) -> None:
    """Leave for later processes what a call has found out, once per process.

    ``question`` is that of before the call: nothing is left where the parameters or the weights changed during it.
    """
    store = extraction.store
    if store is None or question is None or (store.path, question) in _left:
        return
    with suppress(FeatxError, OSError):  # a weights file that is gone by now
        session = Session(store)
        description = extraction.description(session)
        if description is not None and question_of(estimator, store, make=True) == question:
            session.leave_answer(question, Remembered.of(extraction, description).text())
    _left.add((store.path, question))


def saves_time() -> bool:
    """Whether there is something to save: torchvision takes its time where it is first loaded."""
    return "torchvision" not in sys.modules


def _is_plain(estimator: Any) -> bool:
    of_ours = type(estimator).__module__.partition(".")[0] == "featx"
    names = (estimator.backbone, estimator.preprocess)
    named = all(isinstance(name, str) and not name.startswith("timm/") for name in names)
    one_layer = isinstance(estimator.layers, str | Integral) and estimator.layers != "all"
    several_maps = estimator.pooling == "map" and not one_layer
    # A digest of what lies elsewhere is a download, which is not made twice. Who shows progress does the work.
    near = estimator.storage_options is None and estimator.device in (None, "cpu") and not estimator.verbose
    return of_ours and named and near and not several_maps and estimator.views is None


def _parameters(estimator: Any) -> str:
    values = {name: getattr(estimator, name) for name in (*_PARAMETERS, "precision", "engine")}
    if not isinstance(values["layers"], str):
        values["layers"] = np.asarray(values["layers"], dtype=object).tolist()
    drawn = estimator.weights is None and isinstance(estimator.random_state, Integral)
    values["seed"] = int(estimator.random_state) if drawn else 0
    values["truncated"] = getattr(sys.modules.get("PIL.ImageFile"), "LOAD_TRUNCATED_IMAGES", False)
    return repr(sorted(values.items()))


def _content(weights: Any, store: FeatureStore, make: bool) -> str:
    """The name of published weights, or the content of a file and where in it to look.

    Raises
    ------
    FeatxError, OSError
        The file cannot be read, or there is no store yet.
    TypeError
        The weights are nothing that one can pass.
    """
    address = plain_address(weights)
    if not os.path.isfile(path_in(address)):
        return repr(address)
    opened = store._open() if make else store._existing()
    if opened is None:
        raise StoreError("there is none yet")
    return f"{address!r} {opened.index.digest_of_file(path_in(address)).hex()}"


@lru_cache
def _versions() -> str:
    """Installed versions, without importing what they are of."""
    return f"featx {__version__} {_PACKAGE} {' '.join(f'{name} {installed(name)}' for name in _LIBRARIES)}"


def _state_of_package() -> str:
    """What changes when a file of featx does: a checkout is edited without a new version."""
    hasher = xxhash.xxh3_64()
    for folder, _, names in sorted(os.walk(os.path.dirname(os.path.dirname(__file__)))):
        for name in sorted(names):
            if name.endswith((".py", ".safetensors")):
                try:
                    status = os.stat(os.path.join(folder, name))
                except OSError:  # a link to nowhere, as editors make
                    continue
                hasher.update(f"{folder}/{name} {status.st_size} {status.st_mtime_ns}\0".encode(errors="replace"))
    return hasher.hexdigest()


_PACKAGE = _state_of_package()  # of the code that is being loaded


def _as_loaded() -> list[str]:
    """Versions of libraries that say something else of themselves than what is installed, down to the release."""
    found = {name: getattr(sys.modules.get(module), "__version__", None) for name, module in _LIBRARIES.items()}
    return [
        f"{name} {loaded}"
        for name, loaded in found.items()
        if loaded is not None and str(loaded).partition("+")[0] != installed(name).partition("+")[0]
    ]
