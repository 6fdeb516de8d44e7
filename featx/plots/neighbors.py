"""NeighborsDisplay: an image, and those that are most like it."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.neighbors import NearestNeighbors
from sklearn.utils._param_validation import HasMethods, Interval, validate_params
from sklearn.utils.validation import check_consistent_length

from featx.plots.display import Display, check_matplotlib, draw_gallery, shortened
from featx.plots.pictures import items_of, only, reader_of, thumbnail

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage
    from matplotlib.text import Text

_MOST_COLUMNS = 6


class NeighborsDisplay(Display):
    """A query image and its nearest images, nearest first.

    Parameters
    ----------
    query : ndarray of shape (height, width, 3), uint8
    pictures : sequence of ndarray of shape (height, width, 3), uint8
        The nearest images.
    distances : ndarray of shape (n_neighbors,)
    indices : ndarray of shape (n_neighbors,) of int
        Their rows in X.
    labels : sequence or None, default=None
        What stands under each of them.

    Attributes
    ----------
    images_ : list of AxesImage
        The query, then its neighbours.
    texts_ : list of Text
        What stands below them.
    ax_, figure_ : matplotlib Axes and Figure

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from featx import PretrainedFeatureExtractor
    >>> from featx.plots import NeighborsDisplay
    >>> images = load_digits().images / 16
    >>> extractor = PretrainedFeatureExtractor("featx_micro")
    >>> NeighborsDisplay.from_estimator(extractor, images[0], images[1:50], n_neighbors=3).indices.shape
    (3,)
    """

    images_: list[AxesImage]
    texts_: list[Text]

    def __init__(
        self,
        query: np.ndarray,
        pictures: Sequence[np.ndarray],
        distances: np.ndarray,
        *,
        indices: np.ndarray,
        labels: Sequence[object] | None = None,
    ) -> None:
        self.query = query
        self.pictures = pictures
        self.distances = distances
        self.indices = indices
        self.labels = labels

    @classmethod
    @validate_params(  # type: ignore[untyped-decorator]
        {"extractor": [HasMethods("transform")], "n_neighbors": [Interval(Integral, 1, None, closed="left")]},
        prefer_skip_nested_validation=False,
    )
    def from_estimator(
        cls,
        extractor: Any,
        query: Any,
        X: Any,
        n_neighbors: int = 5,
        *,
        y: Any = None,
        metric: str = "cosine",
        ax: Axes | None = None,
    ) -> NeighborsDisplay:
        """Find the nearest images by their features, and draw them.

        Parameters
        ----------
        extractor : transformer
            A PretrainedFeatureExtractor, a fitted FineTuneClassifier, or a (fitted) pipeline that begins with one of
            them and has ``transform``. One with a cache sees each image of X only once for all queries.
        query : path, bytes, PIL image, array or tensor
            One image, in a form that X may hold. If X holds it too, it is its own nearest.
        X : array-like of n images
            Where to search. Unreadable images are left out where the extractor has ``on_error="nan"``.
        n_neighbors : int, default=5
        y : array-like of shape (n,) or None, default=None
            Labels to show below the neighbours.
        metric : str, default="cosine"
            As in scikit-learn's NearestNeighbors.
        ax : matplotlib Axes or None, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        display : NeighborsDisplay
        """
        check_matplotlib(f"{cls.__name__}.from_estimator", ax)
        reader = reader_of(extractor)
        items = items_of(X, reader)
        if y is not None:
            check_consistent_length(range(len(items)), y)
        wanted = only(query, reader)
        distances, indices = _nearest(extractor.transform(wanted), extractor.transform(X), n_neighbors, metric)
        display = cls(
            thumbnail(items_of(wanted, reader), 0),
            [thumbnail(items, row) for row in indices.tolist()],
            distances,
            indices=indices,
            labels=None if y is None else np.asarray(y)[indices].tolist(),
        )
        return display.plot(ax)

    def plot(self, ax: Axes | None = None) -> NeighborsDisplay:
        """Draw the query and its neighbours side by side.

        Parameters
        ----------
        ax : matplotlib Axes or None, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        self
        """
        n_lines = 1 if self.labels is None else 2
        captions = [f"distance {distance:.3f}" for distance in self.distances]
        if self.labels is not None:
            captions = [f"{shortened(label)}\n{told}" for label, told in zip(self.labels, captions, strict=True)]
        pictures = [self.query, *self.pictures]
        ax = self._begin_gallery(ax, len(pictures), _MOST_COLUMNS, n_lines)
        self.images_, self.texts_ = draw_gallery(
            ax, pictures, ["query", *captions], n_columns=_MOST_COLUMNS, n_lines=n_lines
        )
        self.texts_[0].set_fontweight("bold")
        return self


def _nearest(query: Any, features: Any, n_neighbors: int, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Distances and rows of the nearest of those rows that could be read."""
    query, features = np.asarray(query), np.asarray(features)
    if features.ndim != 2:
        raise ValueError(
            f"One row of features per image is expected, got features of shape {features.shape}. Use a pooling other "
            'than "map".'
        )
    rows = np.flatnonzero(np.isfinite(features).all(axis=1))
    if not np.isfinite(query).all() or len(rows) < n_neighbors:
        raise ValueError(
            f"A readable query and n_neighbors of at most {len(rows)}, the readable images of X, are expected, got "
            f"n_neighbors={n_neighbors}."
        )
    search = NearestNeighbors(n_neighbors=n_neighbors, metric=metric).fit(features[rows])
    distances, places = search.kneighbors(query)
    return distances[0], rows[places[0]]
