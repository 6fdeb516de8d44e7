"""Pictures to look at, read from whatever X is exactly as the estimator reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image

from featx.estimators.base import NetworkEstimator
from featx.exceptions import ImageError
from featx.images.sources import Items, as_items
from featx.system.threads import one_thread_after_fork

if TYPE_CHECKING:
    import torch

    from featx.estimators.extractor import PretrainedFeatureExtractor

_Estimator = TypeVar("_Estimator", bound=NetworkEstimator)

# Pixels of the longer side of a picture among others.
THUMBNAIL = 160


def network_estimators(model: Any, kind: type[_Estimator]) -> dict[str, _Estimator]:
    """Estimators of a kind inside a pipeline, a search or whatever else has parameters.

    Parameters
    ----------
    model : estimator
    kind : type
        NetworkEstimator or a subclass of it.

    Returns
    -------
    dict of str to estimator
        By the name that the model's ``set_params`` knows them by, empty for the model itself. Of a fitted search those
        of its best estimator.
    """
    if isinstance(model, kind):
        return {"": model}
    model = getattr(model, "best_estimator_", model)
    if isinstance(model, kind):
        return {"": model}
    params = model.get_params(deep=True) if hasattr(model, "get_params") else {}
    return {name: value for name, value in params.items() if isinstance(value, kind)}


def reader_of(model: Any) -> NetworkEstimator | None:
    """The estimator of featx that reads a model's images, if there is one."""
    return next(iter(network_estimators(model, NetworkEstimator).values()), None)


def items_of(X: Any, reader: NetworkEstimator | None) -> Items:
    """X as images in full, in the form that ``reader`` takes; without one, in any that featx knows."""
    return as_items(X) if reader is None else reader._items(X, reset=False, in_full=True)


def only(image: Any, reader: NetworkEstimator | None) -> Any:
    """An X that holds one image.

    Raises
    ------
    ImageError
        It cannot be read.
    """
    rows = reader is not None and reader.image_shape is not None
    X = np.reshape(image, (1, -1)) if rows else [image]
    try:
        items_of(X, reader).load(0)
    except ImageError as error:
        raise ImageError(
            f"A readable image is expected, got {error.source or type(image).__name__!r}: {error.reason}.",
            source=error.source,
            reason=error.reason,
            remedy="Pass another one.",
        ) from error
    return X


def extractor_of(model: Any, caller: str) -> PretrainedFeatureExtractor:
    """The one extractor inside a model, a copy of it; of a tuned network, what that extracts.

    Raises
    ------
    TypeError
        There is none.
    """
    from sklearn.base import clone

    from featx.estimators.extractor import PretrainedFeatureExtractor
    from featx.estimators.fitted import FittedNetwork

    for extractor in network_estimators(model, PretrainedFeatureExtractor).values():
        return clone(extractor)
    for tuned in network_estimators(model, FittedNetwork).values():
        return tuned.to_extractor()
    raise TypeError(
        f"A PretrainedFeatureExtractor or a FineTuneClassifier, or what holds one, is expected by {caller}, got "
        f"{model!r}."
    )


def input_of(reader: NetworkEstimator, X: Any) -> tuple[np.ndarray, torch.Tensor]:
    """What the network of an estimator sees of an X that holds one image.

    Returns
    -------
    picture : ndarray of shape (height, width, 3), uint8
        Before it is normalised.
    tile : Tensor of shape (1, channels, height, width)
        Normalised.
    """
    items, preprocessing = reader._items(X, reset=False), reader._preprocessing(reader._spec())
    tile = preprocessing.tile(items.load(0), items[0].stretch)  # exactly what extraction makes of the image
    return as_picture(tile), preprocessing.finish(tile[None])


def as_picture(pixels: torch.Tensor) -> np.ndarray:
    """Pixels of an image as a picture.

    Parameters
    ----------
    pixels : Tensor of shape (channels, height, width)
        uint8, or floats nominally in 0..1. Others, such as normalised ones, are brought there from their own range.
        More than three channels, or two, become their mean.

    Returns
    -------
    ndarray of shape (height, width, 3), uint8
    """
    values = pixels.permute(1, 2, 0).numpy()
    if values.dtype != np.uint8:
        low, high = min(0.0, float(values.min())), max(1.0, float(values.max()))
        values = np.rint((values - low) / (high - low) * 255).astype(np.uint8)
    if values.shape[2] != 3:
        values = values.mean(axis=2, keepdims=True).astype(np.uint8).repeat(3, axis=2)
    return np.ascontiguousarray(values)


@one_thread_after_fork()
def thumbnail(items: Items, row: int) -> np.ndarray:
    """One of the items, upright and in colour, (height, width, 3) uint8; its longer side is THUMBNAIL at most."""
    picture = Image.fromarray(as_picture(items.load(row)))
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return np.asarray(picture)
