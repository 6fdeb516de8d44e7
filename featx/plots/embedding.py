"""EmbeddingDisplay: a map on which similar images lie near each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.utils import get_tags
from sklearn.utils._param_validation import HasMethods, validate_params
from sklearn.utils.validation import check_consistent_length

from featx.plots.display import Display, check_matplotlib, draw_legend
from featx.plots.pictures import items_of, reader_of, thumbnail
from featx.system.fits import one_thread
from featx.training.labels import check_labelled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection
    from matplotlib.offsetbox import AnnotationBbox

# Between two pictures, as a share of the map's width; and the longer side of one, in points.
_LEAST_DISTANCE, _SIDE = 0.09, 30
# With more classes a legend hides the map.
_MOST_IN_LEGEND = 20


class EmbeddingDisplay(Display):
    """A point for every image, coloured by its class, and pictures where there is room for them.

    Parameters
    ----------
    embedding : ndarray of shape (n_readable, 2)
    indices : ndarray of shape (n_readable,) of int
        Rows in X.
    y : sequence or None, default=None
        Classes of the points.
    pictures : dict of int to ndarray of shape (height, width, 3), uint8, or None, default=None
        By position in ``embedding``.

    Attributes
    ----------
    points_ : list of PathCollection
        One for each class in sorted order; one in all without classes.
    thumbnails_ : list of AnnotationBbox
        In the order of ``pictures``.
    ax_, figure_ : matplotlib Axes and Figure

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from featx import PretrainedFeatureExtractor
    >>> from featx.plots import EmbeddingDisplay
    >>> digits = load_digits()
    >>> extractor = PretrainedFeatureExtractor("featx_micro", pixel_range=(0, 16))
    >>> display = EmbeddingDisplay.from_estimator(extractor, digits.images[:30], digits.target[:30])
    >>> display.embedding.shape, len(display.points_)
    ((30, 2), 10)
    """

    points_: list[PathCollection]
    thumbnails_: list[AnnotationBbox]

    def __init__(
        self,
        embedding: np.ndarray,
        *,
        indices: np.ndarray,
        y: Sequence[object] | np.ndarray | None = None,
        pictures: dict[int, np.ndarray] | None = None,
    ) -> None:
        self.embedding = embedding
        self.indices = indices
        self.y = y
        self.pictures = pictures

    @classmethod
    @validate_params(  # type: ignore[untyped-decorator]
        {
            "extractor": [HasMethods("transform")],
            "reducer": [HasMethods("fit_transform"), None],
            "thumbnails": ["boolean"],
        },
        prefer_skip_nested_validation=False,
    )
    def from_estimator(
        cls,
        extractor: Any,
        X: Any,
        y: Any = None,
        *,
        reducer: Any = None,
        thumbnails: bool = True,
        ax: Axes | None = None,
    ) -> EmbeddingDisplay:
        """Reduce features of images to two dimensions, and draw the map.

        Parameters
        ----------
        extractor : transformer
            A PretrainedFeatureExtractor, a fitted FineTuneClassifier, or a (fitted) pipeline that begins with one of
            them and has ``transform``.
        X : array-like of n images
            Unreadable ones are left out where the extractor has ``on_error="nan"``.
        y : array-like of shape (n,) or None, default=None
            Classes, none of them missing. They colour the map; only a reducer that cannot do without them (LDA) sees
            them.
        reducer : transformer or None, default=None
            What makes two columns of the features, by ``fit_transform`` of a clone: PCA where None; t-SNE and UMAP
            follow neighbourhoods more closely, and distances less.
        thumbnails : bool, default=True
            Whether pictures are shown, of as many images as there is room for.
        ax : matplotlib Axes or None, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        display : EmbeddingDisplay
        """
        check_matplotlib(f"{cls.__name__}.from_estimator", ax)
        items = items_of(X, reader_of(extractor))
        if y is not None:
            check_consistent_length(range(len(items)), y)
            check_labelled(y)
        features = np.asarray(extractor.transform(X))
        if features.ndim != 2:
            raise ValueError(
                f"One row of features per image is expected, got features of shape {features.shape}. Use a pooling "
                'other than "map".'
            )
        rows = np.flatnonzero(np.isfinite(features).all(axis=1))
        classes = None if y is None else np.asarray(y)[rows]
        embedding = _reduced(features[rows], classes, reducer)
        shown = _spread_out(embedding) if thumbnails else []
        pictures = {place: thumbnail(items, int(rows[place])) for place in shown}
        return cls(embedding, indices=rows, y=classes, pictures=pictures).plot(ax)

    def plot(self, ax: Axes | None = None) -> EmbeddingDisplay:
        """Draw the map.

        Parameters
        ----------
        ax : matplotlib Axes or None, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        self
        """
        ax = self._begin(ax, (7.5, 6))
        labels: list[object] = [None] if self.y is None else np.unique(np.asarray(self.y)).tolist()
        colours = _colours(len(labels))
        members = [
            np.arange(len(self.embedding)) if self.y is None else np.flatnonzero(np.asarray(self.y) == label)
            for label in labels
        ]
        self.points_ = [
            ax.scatter(self.embedding[of_class, 0], self.embedding[of_class, 1], s=18, color=colour)
            for of_class, colour in zip(members, colours, strict=True)
        ]
        colour_of = {int(place): colour for own, colour in zip(members, colours, strict=True) for place in own}
        self.thumbnails_ = [
            _draw_picture(ax, picture, self.embedding[place], colour_of[place])
            for place, picture in (self.pictures or {}).items()
        ]
        if self.y is not None and len(labels) <= _MOST_IN_LEGEND:
            draw_legend(ax, self.points_, labels)
        ax.set(xticks=[], yticks=[])
        return self


def _reduced(features: np.ndarray, y: np.ndarray | None, reducer: Any) -> np.ndarray:
    if reducer is None:
        # The seed is for PCA's randomised solver, which would otherwise draw from the global generator.
        with one_thread():
            embedding = PCA(n_components=2, random_state=0).fit_transform(features)
    elif get_tags(reducer).target_tags.required:
        embedding = clone(reducer).fit_transform(features, y)
    else:
        embedding = clone(reducer).fit_transform(features)
    embedding = np.asarray(embedding)
    if embedding.shape != (len(features), 2):
        raise ValueError(
            f"A reducer that makes two columns is expected, got reducer={reducer!r}, which makes an array of shape "
            f"{embedding.shape} of {len(features)} images. Set its n_components=2."
        )
    return embedding


def _spread_out(embedding: np.ndarray) -> list[int]:
    """Positions of points, the first ones first, none of which is close to another."""
    spread = np.ptp(embedding, axis=0)
    places = embedding / np.where(spread > 0, spread, 1)
    shown: list[int] = []
    for place, point in enumerate(places):
        if not shown or np.abs(places[shown] - point).max(axis=1).min() >= _LEAST_DISTANCE:
            shown.append(place)
    return shown


def _colours(n: int) -> np.ndarray:
    """Colours that can be told apart, as far as possible, of shape (n, 4)."""
    from matplotlib import colormaps

    name = "tab10" if n <= 10 else "tab20" if n <= 20 else "turbo"
    return np.asarray(colormaps[name](np.arange(n) if n <= 20 else np.linspace(0, 1, n)))


def _draw_picture(ax: Axes, picture: np.ndarray, point: np.ndarray, colour: np.ndarray) -> AnnotationBbox:
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    image = OffsetImage(picture, zoom=_SIDE / max(picture.shape[:2]))
    frame = {"edgecolor": colour, "linewidth": 1.5}
    box = AnnotationBbox(image, (float(point[0]), float(point[1])), pad=0.1, bboxprops=frame)
    ax.add_artist(box)
    return box
