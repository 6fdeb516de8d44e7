"""FineTuneRegressor: a pretrained network that learns real numbers, as a scikit-learn regressor."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from sklearn.base import RegressorMixin, _fit_context
from sklearn.metrics import r2_score
from sklearn.utils._param_validation import StrOptions

from featx.estimators.tuning import TunedEstimator
from featx.exceptions import ImageError
from featx.images.sources import MAX_PIXELS
from featx.store import FeatureStore
from featx.system.compat import with_callbacks

if TYPE_CHECKING:
    from featx.training.regression import Scale


class FineTuneRegressor(RegressorMixin, TunedEstimator):  # type: ignore[misc]
    """A pretrained network with a new output layer, fine-tuned to one real target or several.

    As :class:`FineTuneClassifier` with numbers for labels: a price, an age, a count. Targets are standardised for
    training, to mean 0 and standard deviation 1 over the training images, and predictions are in the targets' units.
    Look at scikit-learn's DummyRegressor beside it: with few images for what they are to tell, the mean can be better.

    Parameters
    ----------
    loss : {"squared_error", "huber"}, default="squared_error"
        What is minimised, of standardised targets, on average over several. Huber's is half the squared error up to one
        standard deviation and grows linearly beyond, so that a few wild targets decide less; median and quartiles then
        stand for mean and standard deviation.
    linear_probe : bool or float, default=True
        Whether the head starts from a ridge regression on the pretrained, standardised features, of which those that
        vary less than a tenth of the usual one count for less. A number is its alpha; True chooses one for each target,
        between 1 and 100,000, by leaving one image out. With hidden layers the head is first trained alone on these
        features. False starts at random.
    early_stopping : bool, default=False
        Hold out ``validation_fraction`` of the images; keep the epoch with the least loss on them, and end when it has
        not fallen for ``n_iter_no_change`` epochs.
    validation_fraction : float, default=0.1
        Share of the images that are held out: at least one image and never all of them.
    on_error : {"raise", "nan"}, default="raise"
        An unreadable image raises an error that names its row and file. With ``"nan"`` ``fit`` leaves it out, with one
        warning, and ``predict`` and ``transform`` give NaN. :func:`featx.find_unreadable` lists such rows beforehand.
    warm_start : bool, default=False
        Whether ``fit`` goes on from the last fit, with its targets' mean and standard deviation; there must be as many
        targets.
    random_state : int, RandomState or None, default=None
        As in :class:`FineTuneClassifier`.
    backbone, weights, layers, pooling, grid, normalize, image_shape, pixel_range, fourth_band, preprocess : as there
    image_size, decode, max_pixels, storage_options, views, freeze, hidden_layer_sizes, dropout, epochs : as there
    optimizer, learning_rate, layer_decay, weight_decay, lr_schedule, warmup, max_grad_norm, mixup, ema : as there
    augment, augment_views, batch_norm, n_iter_no_change, device, precision, engine, batch_size, n_jobs, cache, verbose
        As in :class:`FineTuneClassifier`. Pairs of ``mixup`` share their targets in the same proportion.

    Attributes
    ----------
    history_ : dict of str to list of float
        ``loss`` (mean over the epoch, as trained, of standardised targets) and ``learning_rate`` (of the head, at the
        last step) per epoch; with ``early_stopping`` also ``validation_loss`` and ``validation_score`` (R2; NaN of one
        image).
    n_iter_ : int
        Epochs that were trained.
    best_epoch_ : int
        The one that was kept, counted from 0: the last without early stopping.

    See Also
    --------
    FineTuneClassifier : The same for labels.
    PretrainedFeatureExtractor : The same network as a transformer, to go before any regressor of scikit-learn.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from featx import FineTuneRegressor
    >>> digits = load_digits()
    >>> ink = digits.data.mean(axis=1)
    >>> model = FineTuneRegressor("featx_micro", freeze=-1, pixel_range=(0, 16), epochs=2, random_state=0)
    >>> model.fit(digits.images[:200], ink[:200]).predict(digits.images[200:202]).shape
    (2,)
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **TunedEstimator._parameter_constraints,
        "loss": [StrOptions({"squared_error", "huber"})],
    }

    _way_out = (
        'Remove it (featx.find_unreadable lists all such rows), or set on_error="nan": fit leaves it out, '
        "predict gives NaN."
    )
    _saved_as = "FineTuneRegressor"
    _probe_strength = 0.0  # ridge regression chooses its alpha

    def __init__(
        self,
        backbone: Any = "resnet18",
        *,
        weights: str | os.PathLike[str] | tuple[str | os.PathLike[str], str] | None = "DEFAULT",
        layers: str | int = "penultimate",
        pooling: str | list[str] = "avg",
        grid: int = 1,
        normalize: str | None = None,
        image_shape: tuple[int, ...] | None = None,
        pixel_range: str | tuple[float, float] = "auto",
        fourth_band: str = "alpha",
        preprocess: str | Callable[[Any], Any] | None = "weights",
        image_size: int | None = None,
        decode: str = "exact",
        max_pixels: int = MAX_PIXELS,
        on_error: str = "raise",
        storage_options: dict[str, Any] | None = None,
        views: str | None = None,
        loss: str = "squared_error",
        freeze: int | str = "auto",
        hidden_layer_sizes: Any = (),
        dropout: float = 0.0,
        linear_probe: bool | float = True,
        epochs: int | str = "auto",
        optimizer: str = "adamw",
        learning_rate: float | str = "auto",
        layer_decay: float = 0.75,
        weight_decay: float = 0.01,
        lr_schedule: str = "cosine",
        warmup: float = 0.1,
        max_grad_norm: float | None = None,
        mixup: float = 0.0,
        ema: float | None = None,
        augment: str | Callable[[Any], Any] | None = None,
        augment_views: int = 4,
        batch_norm: str = "frozen",
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 5,
        warm_start: bool = False,
        device: str | None = None,
        precision: str = "float32",
        engine: str = "auto",
        batch_size: int = 32,
        n_jobs: int | None = None,
        cache: bool | str | os.PathLike[str] | FeatureStore | None = None,
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
    ) -> None:
        self.backbone = backbone
        self.weights = weights
        self.layers = layers
        self.pooling = pooling
        self.grid = grid
        self.normalize = normalize
        self.image_shape = image_shape
        self.pixel_range = pixel_range
        self.fourth_band = fourth_band
        self.preprocess = preprocess
        self.image_size = image_size
        self.decode = decode
        self.max_pixels = max_pixels
        self.on_error = on_error
        self.storage_options = storage_options
        self.views = views
        self.loss = loss
        self.freeze = freeze
        self.hidden_layer_sizes = hidden_layer_sizes
        self.dropout = dropout
        self.linear_probe = linear_probe
        self.epochs = epochs
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.layer_decay = layer_decay
        self.weight_decay = weight_decay
        self.lr_schedule = lr_schedule
        self.warmup = warmup
        self.max_grad_norm = max_grad_norm
        self.mixup = mixup
        self.ema = ema
        self.augment = augment
        self.augment_views = augment_views
        self.batch_norm = batch_norm
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.warm_start = warm_start
        self.device = device
        self.precision = precision
        self.engine = engine
        self.batch_size = batch_size
        self.n_jobs = n_jobs
        self.cache = cache
        self.random_state = random_state
        self.verbose = verbose

    @with_callbacks  # type: ignore[untyped-decorator]
    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> FineTuneRegressor:
        """Train on images and their targets.

        Parameters
        ----------
        X : array-like of n images
            As in :meth:`PretrainedFeatureExtractor.transform`.
        y : array-like of shape (n,) or (n, n_targets)
            Finite numbers.
        sample_weight : array-like of shape (n,) or None, default=None
            What each image weighs. Those that weigh nothing are left out.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            X, y or a parameter is wrong. An unreadable image raises :class:`featx.exceptions.ImageError`, one of them.
        """
        goes_on = self.warm_start and hasattr(self, "tensors_")
        self._learn(X, y, sample_weight, goes_on)
        return self

    @with_callbacks  # type: ignore[untyped-decorator]
    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> FineTuneRegressor:
        """Train for one epoch on some more images, at the full learning rate.

        Targets keep the mean and the standard deviation of the first call, whose images should be a fair sample.

        Parameters
        ----------
        X, y, sample_weight
            As in :meth:`fit`.

        Returns
        -------
        self
        """
        self._learn(X, y, sample_weight, hasattr(self, "tensors_"), once=True)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Targets of images.

        Parameters
        ----------
        X : array-like of n images
            As in :meth:`fit`.

        Returns
        -------
        targets : ndarray of shape (n,) or (n, n_targets), float64
            Of the shape that y had; NaN for unreadable images with ``on_error="nan"``.
        """
        fitted = self._as_fitted()
        return fitted._scale.restore(fitted._outputs(X, scores=True))

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """R2 of :meth:`predict`, as of any regressor of scikit-learn; an image that cannot be read is an error."""
        found = self.predict(X)
        unread = np.flatnonzero(np.isnan(found.reshape(len(found), -1)).any(axis=1)).tolist()
        if unread:
            raise ImageError(
                f"Readable images with finite outputs are expected, got others at X{unread[:5]}, which have no score.",
                row=unread[0],
                remedy="Remove what featx.find_unreadable lists.",
            )
        return float(r2_score(y, found, sample_weight=sample_weight))

    def _learn(self, X: Any, y: Any, sample_weight: Any, goes_on: bool, once: bool = False) -> None:
        from featx.training.regression import Numbers

        items = self._items(X, reset=not (once and goes_on), in_full=self.augment is not None)
        scale = self._scale if goes_on else None
        numbers = Numbers.of(type(self).__name__, y, huber=self.loss == "huber", scale=scale)
        if scale is not None and (numbers.single, numbers.values.shape[1]) != (scale.single, scale.n_outputs):
            raise ValueError(
                f"Targets as in the last fit are expected, of shape {_shape(scale)}, got y of shape "
                f"{np.shape(y)}. " + ("Fit anew with fit." if once else "Set warm_start=False.")
            )
        self._train(items, numbers, sample_weight, self.tensors_ if goes_on else None, given=(X, y), once=once)

    def _meaning(self) -> Scale:
        return self._scale

    def _set_meaning(self, meaning: Scale) -> None:
        self._scale = meaning

    @staticmethod
    def _meaning_of(stored: dict[str, Any]) -> Scale:
        from featx.training.regression import Scale

        return Scale.from_json(stored)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


def _shape(scale: Scale) -> str:
    return "(n,)" if scale.single else f"(n, {scale.n_outputs})"
