"""ClassMapDisplay: which places of a photo speak for a class, and which against it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from featx.exceptions import LayerError
from featx.plots.display import PLAIN, Display, check_matplotlib, draw_gallery, shortened
from featx.plots.pictures import extractor_of, input_of, network_estimators, only
from featx.system.threads import one_thread_after_fork

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage
    from matplotlib.text import Text

    from featx.estimators.classifier import FineTuneClassifier
    from featx.estimators.extractor import PretrainedFeatureExtractor

_MOST_COLUMNS = 4
# Rows that a model is asked about at once.
_AT_ONCE = 512
# Of a row's norm, and of a score.
_SAME, _LINEAR = 1e-5, 1e-4


class ClassMapDisplay(Display):
    """What speaks for some classes and against them, place by place, over the part of the photo that the network saw.

    Of a linear model on averaged maps the maps are exact [1]_: what each place adds to the decision value, which is
    drawn with the intercept, as what the model would decide if the photo were like that place all over. Of a fine-tuned
    network they are Grad-CAM [2]_: channels weighted by how much the score grows with them, and what speaks against the
    class left out.

    Parameters
    ----------
    maps : ndarray of shape (n_labels, map_height, map_width)
        Each cell lies over its share of the picture.
    picture : ndarray of shape (height, width, 3), uint8
        The network's own input before it was normalised: upright, resized, and cropped to the centre where the
        preprocessing does that.
    labels : sequence
        The classes, one for each map.
    scores : ndarray of shape (n_labels,)
        Their decision values, of the picture as it is shown: without other ``views``.
    intercepts : ndarray of shape (n_labels,) or None, default=None
        Of a linear model: the mean of a map plus its intercept is the score.

    Attributes
    ----------
    images_ : list of AxesImage
        The picture, once for each class.
    overlays_ : list of AxesImage
        The maps; all have the same colours.
    texts_ : list of Text
        Labels and scores.
    ax_, figure_ : matplotlib Axes and Figure

    References
    ----------
    .. [1] B. Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016.
    .. [2] R. Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-Based Localization",
       ICCV 2017.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn.linear_model import RidgeClassifier
    >>> from sklearn.pipeline import make_pipeline
    >>> from featx import PretrainedFeatureExtractor
    >>> from featx.plots import ClassMapDisplay
    >>> X, y = load_digits(return_X_y=True)
    >>> features = PretrainedFeatureExtractor("featx_micro", layers=2, image_shape=(8, 8), pixel_range=(0, 16))
    >>> model = make_pipeline(features, RidgeClassifier()).fit(X[:100], y[:100])
    >>> display = ClassMapDisplay.from_estimator(model, X[100], label=[4, 9])
    >>> display.maps.shape, display.labels
    ((2, 8, 8), [4, 9])
    """

    images_: list[AxesImage]
    overlays_: list[AxesImage]
    texts_: list[Text]

    def __init__(
        self,
        maps: np.ndarray,
        picture: np.ndarray,
        *,
        labels: Sequence[object],
        scores: np.ndarray,
        intercepts: np.ndarray | None = None,
    ) -> None:
        self.maps = maps
        self.picture = picture
        self.labels = labels
        self.scores = scores
        self.intercepts = intercepts

    @classmethod
    @one_thread_after_fork()
    def from_estimator(cls, model: Any, image: Any, label: Any = None, *, ax: Axes | None = None) -> ClassMapDisplay:
        """Send an image through the network, and draw where it looks like some classes.

        Parameters
        ----------
        model : fitted pipeline or FineTuneClassifier
            A pipeline, or a search over one: a PretrainedFeatureExtractor that averages one layer (``pooling="avg"``,
            ``grid=1``, ``normalize=None``), then steps that are linear up to the ``decision_function``
            (StandardScaler, PCA, LogisticRegression, LinearSVC, RidgeClassifier, ...).
        image : path, bytes, PIL image, array or tensor
            One image, in a form that X may hold.
        label : label or list of labels or None, default=None
            Classes to draw side by side; None takes the one with the highest score.
        ax : matplotlib Axes or None, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        display : ClassMapDisplay

        Raises
        ------
        TypeError
            The model is none of these.
        LayerError
            The features are no averages over places.
        ValueError
            The model does not know a label.
        """
        from featx.estimators.classifier import FineTuneClassifier

        caller = f"{cls.__name__}.from_estimator"
        check_matplotlib(caller, ax)
        tuned = next(iter(network_estimators(model, FineTuneClassifier).values()), None)
        if tuned is not None:
            return cls._of_tuned(tuned, image, label, caller).plot(ax)
        return cls._of_linear(getattr(model, "best_estimator_", model), image, label, caller).plot(ax)

    @classmethod
    def _of_linear(cls, model: Any, image: Any, label: Any, caller: str) -> ClassMapDisplay:
        extractor = extractor_of(model, caller).set_params(on_error="raise", views=None).set_output(transform="default")
        decide = _decision_of(model, caller)
        X = only(image, extractor)
        rows = extractor.transform(X)
        values = _averaged_map(extractor, X, rows, caller)
        weights, intercepts = _linear_form(decide, rows.astype(float), caller)
        scores = rows[0] @ weights + intercepts
        chosen = _chosen(label, model.classes_, scores)
        return cls(
            np.moveaxis(values @ weights[:, chosen], 2, 0),
            input_of(extractor, X)[0],
            labels=[model.classes_.tolist()[i] for i in chosen],
            scores=scores[chosen],
            intercepts=intercepts[chosen],
        )

    @classmethod
    def _of_tuned(cls, classifier: FineTuneClassifier, image: Any, label: Any, caller: str) -> ClassMapDisplay:
        from sklearn.utils.validation import check_is_fitted

        from featx.system.devices import move, to_host
        from featx.training.gradients import slopes_of

        check_is_fitted(classifier)
        fitted = classifier._as_fitted().set_params(views=None)  # of the picture as it is shown
        X = only(image, fitted)
        picture, tile = input_of(fitted, X)
        built_model = fitted._model(fitted._items(X, reset=False))
        scores = fitted.decision_function(X)
        scores = np.stack([-scores, scores], axis=1)[0] if scores.ndim == 1 else scores[0]
        chosen = _chosen(label, fitted.classes_, scores)
        found = slopes_of(built_model.build(fitted.tensors_), move(tile, built_model.device), chosen)
        if found is None:
            raise LayerError(f"A network with a layer that has places is expected by {caller}, got {classifier!r}.")
        weights = found.slopes.mean((2, 3))  # of each channel
        maps = (weights[:, :, None, None] * found.values).sum(1).relu()
        return cls(
            to_host(maps).numpy(), picture, labels=[fitted.classes_.tolist()[i] for i in chosen], scores=scores[chosen]
        )

    def plot(self, ax: Axes | None = None, *, alpha: float = 0.8, cmap: Any = "RdBu_r") -> ClassMapDisplay:
        """Draw the picture once for each class, and the map over it.

        Parameters
        ----------
        ax : matplotlib Axes or None, default=None
            Where to draw; None makes a figure.
        alpha : float, default=0.8
            How much of the picture the strongest place hides, from 0 to 1; one that says nothing hides nothing.
        cmap : str or Colormap, default="RdBu_r"
            Colours from what speaks most against a class, over nothing in the middle, to what speaks most for one.

        Returns
        -------
        self
        """
        n = len(self.maps)
        ax = self._begin_gallery(ax, n, _MOST_COLUMNS, n_lines=1)
        captions = [f"{shortened(label)}: {score:.2f}" for label, score in zip(self.labels, self.scores, strict=True)]
        self.images_, self.texts_ = draw_gallery(ax, [self.picture] * n, captions, n_columns=_MOST_COLUMNS, n_lines=1)
        limits = ax.get_xlim(), ax.get_ylim()
        shown = self.maps if self.intercepts is None else self.maps + self.intercepts[:, None, None]
        most = float(np.abs(shown).max()) or 1.0
        self.overlays_ = [
            ax.imshow(
                values,
                extent=image.get_extent(),
                cmap=cmap,
                vmin=-most,
                vmax=most,
                alpha=alpha * np.abs(values) / most,
                interpolation="bilinear",
            )
            for image, values in zip(self.images_, shown, strict=True)
        ]
        ax.set(xlim=limits[0], ylim=limits[1])
        how = "Grad-CAM" if self.intercepts is None else "what speaks for a class, and against it"
        ax.set_title(how, fontsize="medium", **PLAIN)
        return self


def _decision_of(model: Any, caller: str) -> Callable[[np.ndarray], np.ndarray]:
    """What the steps behind the extractor decide, one column a class."""
    from sklearn.pipeline import Pipeline

    from featx.estimators.extractor import PretrainedFeatureExtractor

    steps = [step for _, step in model.steps] if isinstance(model, Pipeline) else []
    at = next((i for i, step in enumerate(steps) if isinstance(step, PretrainedFeatureExtractor)), None)
    behind = None if at is None or any(step not in ("passthrough", None) for step in steps[:at]) else model[at + 1 :]
    if behind is None or not hasattr(behind, "decision_function"):
        raise TypeError(
            "A pipeline of a PretrainedFeatureExtractor and a classifier with decision_function, such as "
            f"LogisticRegression, or a FineTuneClassifier is expected by {caller}, got {model!r}."
        )

    def decide(rows: np.ndarray) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "X does not have valid feature names")
            found = np.asarray(behind.decision_function(rows), dtype=float)
        return np.stack([-found, found], axis=1) if found.ndim == 1 else found

    return decide


def _linear_form(
    decide: Callable[[np.ndarray], np.ndarray], rows: np.ndarray, caller: str
) -> tuple[np.ndarray, np.ndarray]:
    """Weights (n_features, n_classes) and intercepts (n_classes,), from what a model makes of unit vectors."""
    n = rows.shape[1]
    intercepts = decide(np.zeros((1, n)))[0]
    parts = []
    for start in range(0, n, _AT_ONCE):
        units = np.zeros((min(_AT_ONCE, n - start), n))
        units[np.arange(len(units)), start + np.arange(len(units))] = 1
        parts.append(decide(units) - intercepts)
    weights = np.concatenate(parts)
    wanted = decide(rows)[0]
    if not np.allclose(rows[0] @ weights + intercepts, wanted, rtol=_LINEAR, atol=_LINEAR):
        raise TypeError(
            f"Steps that are linear up to the decision are expected by {caller}, got some that are not. Take "
            "StandardScaler and LogisticRegression, or a FineTuneClassifier."
        )
    return weights, intercepts


def _averaged_map(extractor: PretrainedFeatureExtractor, X: Any, rows: np.ndarray, caller: str) -> np.ndarray:
    """The map (height, width, channels) whose averages are the features."""
    architecture = extractor._architecture(extractor._spec(), extractor._items(X, reset=False))
    layer, *more = architecture.resolve(extractor.layers)
    how = f"layers={extractor.layers!r}, pooling={extractor.pooling!r}, grid={extractor.grid}"
    advice = f'got {how}, normalize={extractor.normalize!r}. Set layers=-1, pooling="avg", grid=1, normalize=None.'
    wanted = LayerError(f"The averages of one layer are expected as features by {caller}, {advice}")
    if more or extractor.normalize is not None:
        raise wanted
    before = [architecture.resolve(name)[0] for name in architecture.names]
    places = [layer] if layer.layout != "vector" else [it for it in before if it.position < layer.position]
    width = rows.shape[1]
    # What a pool puts out is its own average, and is looked at last.
    fitting = sorted(
        (it for it in places if it.layout in ("NCHW", "NHWC", "tokens") and it.channels == width),
        key=lambda it: it.spatial != (1, 1),
    )
    reader = extractor.set_params(grid=1)
    for place in reversed(fitting):
        try:
            (values,) = reader.set_params(layers=place.label, pooling="map").transform(X)
        except LayerError:  # tokens that fill no grid
            continue
        if np.linalg.norm(values.mean((0, 1)) - rows[0]) <= _SAME * np.linalg.norm(rows[0]):
            return values.astype(float)
    raise wanted


def _chosen(label: Any, classes: np.ndarray, scores: np.ndarray) -> list[int]:
    known = classes.tolist()
    if label is None:
        return [int(np.argmax(scores))]
    asked = list(label) if isinstance(label, list | tuple | np.ndarray) else [label]
    if not asked or any(one not in known for one in asked):
        raise ValueError(f"Some of the labels {known} are expected, got label={label!r}.")
    return [known.index(one) for one in asked]
