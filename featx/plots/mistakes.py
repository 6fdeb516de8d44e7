"""MistakesDisplay: where a classifier is wrong and most sure of it."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.utils._param_validation import Interval, validate_params
from sklearn.utils.validation import check_consistent_length

from featx.images.sources import Items
from featx.plots.display import PLAIN, Display, check_matplotlib, draw_gallery, shortened
from featx.plots.pictures import items_of, reader_of, thumbnail
from featx.training.labels import check_labelled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage
    from matplotlib.text import Text

_MOST_COLUMNS = 6
_AT_LEAST_ONE = {"n_mistakes": [Interval(Integral, 1, None, closed="left")]}


class MistakesDisplay(Display):
    """Images with wrong predictions, the most confident first.

    Parameters
    ----------
    pictures : sequence of ndarray of shape (height, width, 3), uint8
    y_true, y_pred : sequence
        What they show, and what the classifier took it for.
    confidence : ndarray of shape (n_shown,)
        Probability of the predicted label.
    indices : ndarray of shape (n_shown,) of int
        Rows in X.
    n_wrong, n_images : int
        Of how many mistakes, among how many images, these are the worst.

    Attributes
    ----------
    images_ : list of AxesImage
    texts_ : list of Text
        Predicted label, probability and true label.
    ax_, figure_ : matplotlib Axes and Figure

    Examples
    --------
    >>> import numpy as np
    >>> from featx.plots import MistakesDisplay
    >>> images = np.zeros((3, 8, 8, 3), dtype=np.uint8)
    >>> y_true, y_pred = ["ant", "bee", "bee"], ["bee", "bee", "ant"]
    >>> display = MistakesDisplay.from_predictions(y_true, y_pred, [0.6, 0.9, 0.8], images)
    >>> display.indices.tolist()
    [2, 0]
    """

    images_: list[AxesImage]
    texts_: list[Text]

    def __init__(
        self,
        pictures: Sequence[np.ndarray],
        *,
        y_true: Sequence[object],
        y_pred: Sequence[object],
        confidence: np.ndarray,
        indices: np.ndarray,
        n_wrong: int,
        n_images: int,
    ) -> None:
        self.pictures = pictures
        self.y_true = y_true
        self.y_pred = y_pred
        self.confidence = confidence
        self.indices = indices
        self.n_wrong = n_wrong
        self.n_images = n_images

    @classmethod
    @validate_params(_AT_LEAST_ONE, prefer_skip_nested_validation=False)  # type: ignore[untyped-decorator]
    def from_estimator(
        cls, classifier: Any, X: Any, y: Any, *, n_mistakes: int = 12, images: Any = None, ax: Axes | None = None
    ) -> MistakesDisplay:
        """Predict once, and draw the worst mistakes.

        Parameters
        ----------
        classifier : fitted classifier with ``predict_proba``
            FineTuneClassifier, or a pipeline or search around an extractor. The predicted label is the likeliest one.
        X : array-like of n images
            Images that the classifier was not fitted on, or its mistakes are those that it could not even learn.
            Unreadable ones are left out where ``on_error="nan"``.
        y : array-like of shape (n,)
            True labels.
        n_mistakes : int, default=12
            How many are shown, at most.
        images : array-like of n images or None, default=None
            What to show, where X has other columns too. None shows X.
        ax : matplotlib Axes or None, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        display : MistakesDisplay
        """
        caller = f"{cls.__name__}.from_estimator"
        check_matplotlib(caller, ax)
        if not hasattr(classifier, "predict_proba"):
            raise TypeError(
                f"A fitted classifier with predict_proba is expected by {caller}, got {classifier!r}. Wrap it in "
                "scikit-learn's CalibratedClassifierCV."
            )
        reader = reader_of(classifier)
        items = items_of(X, reader) if images is None else _any_items(images, reader)
        check_consistent_length(range(len(items)), y)
        check_labelled(y)
        proba = classifier.predict_proba(X)
        if isinstance(proba, list) or np.ndim(y) != 1:
            raise ValueError(f"One label per image is expected by {caller}, got y of shape {np.shape(y)}.")
        predicted = np.asarray(classifier.classes_)[proba.argmax(axis=1)]
        return cls._of(y, predicted, proba.max(axis=1), items, n_mistakes, ax)

    @classmethod
    @validate_params(_AT_LEAST_ONE, prefer_skip_nested_validation=False)  # type: ignore[untyped-decorator]
    def from_predictions(
        cls, y_true: Any, y_pred: Any, confidence: Any, images: Any, *, n_mistakes: int = 12, ax: Axes | None = None
    ) -> MistakesDisplay:
        """Draw the worst mistakes of predictions that are there already, such as those of a cross-validation.

        Parameters
        ----------
        y_true, y_pred : array-like of shape (n,)
            True and predicted labels.
        confidence : array-like of shape (n,)
            Probability of the predicted label. Images with NaN are left out.
        images : array-like of n images
            In any form that PretrainedFeatureExtractor takes without further parameters.
        n_mistakes : int, default=12
            How many are shown, at most.
        ax : matplotlib Axes or None, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        display : MistakesDisplay
        """
        caller = f"{cls.__name__}.from_predictions"
        check_matplotlib(caller, ax)
        items = items_of(images, None)
        check_consistent_length(y_true, y_pred, confidence, range(len(items)))
        check_labelled(y_true)
        if not np.ndim(y_true) == np.ndim(y_pred) == np.ndim(confidence) == 1:
            raise ValueError(
                f"One true label, one predicted label and one probability per image are expected by {caller}, got "
                f"arrays of shape {np.shape(y_true)}, {np.shape(y_pred)} and {np.shape(confidence)}."
            )
        return cls._of(y_true, y_pred, confidence, items, n_mistakes, ax)

    @classmethod
    def _of(
        cls, y_true: Any, y_pred: Any, confidence: Any, items: Items, n_mistakes: int, ax: Axes | None
    ) -> MistakesDisplay:
        y_true, y_pred, confidence = (np.asarray(values) for values in (y_true, y_pred, confidence))
        readable = np.isfinite(confidence)
        wrong = np.flatnonzero(readable & (y_true != y_pred))
        worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:n_mistakes]
        display = cls(
            [thumbnail(items, row) for row in worst.tolist()],
            y_true=y_true[worst].tolist(),
            y_pred=y_pred[worst].tolist(),
            confidence=confidence[worst],
            indices=worst,
            n_wrong=len(wrong),
            n_images=int(readable.sum()),
        )
        return display.plot(ax)

    def plot(self, ax: Axes | None = None) -> MistakesDisplay:
        """Draw the images, each with what it was taken for and what it is.

        Parameters
        ----------
        ax : matplotlib Axes or None, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        self
        """
        captions = [
            f"{shortened(predicted)}: {sure:.1%}\ntrue: {shortened(true)}"
            for predicted, sure, true in zip(self.y_pred, self.confidence, self.y_true, strict=True)
        ]
        ax = self._begin_gallery(ax, len(captions), _MOST_COLUMNS, n_lines=2)
        self.images_, self.texts_ = draw_gallery(ax, self.pictures, captions, n_columns=_MOST_COLUMNS, n_lines=2)
        shown = "" if self.n_wrong == len(captions) else f", the {len(captions)} most confident"
        ax.set_title(f"{self.n_wrong} of {self.n_images} images wrong{shown}", fontsize="medium", **PLAIN)
        return self


def _any_items(images: Any, reader: Any) -> Items:
    """Images beside an X of another kind: as the model reads them, unless that is rows of numbers."""
    return items_of(images, None if reader is None or reader.image_shape is not None else reader)
