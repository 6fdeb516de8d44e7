"""FineTuneClassifier: a pretrained network that learns new classes, as a scikit-learn classifier."""

from __future__ import annotations

import os
from collections.abc import Callable
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from sklearn.base import ClassifierMixin, _fit_context
from sklearn.utils._param_validation import Interval, StrOptions

from featx.estimators.tuning import TunedEstimator
from featx.exceptions import ImageError
from featx.images.sources import MAX_PIXELS
from featx.store import FeatureStore
from featx.system.compat import with_callbacks

if TYPE_CHECKING:
    from featx.training.classification import Classes, Labels


class FineTuneClassifier(ClassifierMixin, TunedEstimator):  # type: ignore[misc]
    """A pretrained network with a new output layer, fine-tuned with cross-entropy.

    The output layers are replaced by a new head; the front of the network, up to ``freeze``, stays exactly as it was,
    BatchNorm statistics included; the rest is trained. What the frozen front makes of an image is computed once and
    shared by all epochs, and with ``cache`` by folds, candidates and processes, whenever that gives the same result.

    Parameters
    ----------
    backbone, weights : as in :class:`PretrainedFeatureExtractor`
        Which network, with which weights; from a checkpoint of another task only the output layer is left out.
    layers : str or int, default="penultimate"
        Where the head attaches: ``"penultimate"``, a stage index (negative from the end) or a module's name. What lies
        behind it in the network is dropped.
    pooling, grid, normalize : as in :class:`PretrainedFeatureExtractor`
        How a spatial or token layer becomes the row that the head reads.
    image_shape, pixel_range, fourth_band, preprocess, image_size, decode, max_pixels : as in the extractor
        What X is, and how it becomes the network's input. Views of ``augment`` are made from images read in full.
    on_error : {"raise", "nan"}, default="raise"
        An unreadable image raises an error that names its row and file. With ``"nan"`` ``fit`` leaves it out, with one
        warning, ``predict_proba`` and ``transform`` give a row of NaN, and ``predict``, without such a label, raises.
        :func:`featx.find_unreadable` lists such rows beforehand.
    storage_options : dict or None, default=None
        As in :class:`PretrainedFeatureExtractor`; lets paths be URLs.
    views : {"flip"} or None, default=None
        ``"flip"`` averages, when predicting, what the head reads of each image and of its mirror image. Twice the time.
    freeze : "auto", int, "all" or str, default="auto"
        How much of the network stays as it was: a number of stages counted from the input (negative leaves the last n
        trainable), ``"all"`` (only the head trains), or a module's name (up to and including it). ``"auto"`` trains the
        last two stages below the head, ``0`` all. More is faster and needs fewer images.
    hidden_layer_sizes : tuple of int, default=()
        Widths of ReLU layers between the features and the output layer.
    dropout : float, default=0.0
        Share of the head's inputs that are dropped in training (of each hidden layer's outputs, where there are any).
    linear_probe : bool or float, default=True
        Whether the head starts from a logistic regression on the pretrained, standardised features (LP-FT [1]_); a
        number is its C. With hidden layers the head is first trained alone on these features. False starts at random.
    epochs : int or "auto", default="auto"
        Passes over the images. ``"auto"`` takes as many as make 300 steps, at least 4 and at most 30.
    optimizer : {"adamw", "adam", "sgd"}, default="adamw"
        SGD has momentum 0.9.
    learning_rate : float or "auto", default="auto"
        Peak for the head. ``"auto"`` is 1e-3; where more than the head trains and the head starts from a probe, 1e-5
        times the square root of the number of images, at least 1e-4 and at most 3e-4. SGD takes ten times as much.
    layer_decay : float, default=0.75
        What the learning rate is multiplied by for every stage further from the head.
    weight_decay : float, default=0.01
        Of matrices and filters; biases and norms are not decayed. As the optimiser means it.
    lr_schedule : {"cosine", "linear", "constant"}, default="cosine"
        How the learning rate falls after the warm-up.
    warmup : float, default=0.1
        Share of all steps in which it rises.
    max_grad_norm : float or None, default=None
        Longest gradient; longer ones are scaled down.
    label_smoothing : float, default=0.0
        Share of each target that is spread over all classes. Calibrates, and loses detail in the features.
    mixup : float, default=0.0
        Parameter of the beta distribution that pairs of images are mixed by; 0 does not mix. Mixes where training
        begins: the values at the freeze point, or the images where nothing is frozen or the network cannot be cut.
    ema : float or None, default=None
        Decay of a moving average of the tensors, which is what is kept in the end.
    augment : None, {"flip", "crop", "color"} or callable, default=None
        How training images are altered: mirrored; cut to a random part too; brightness, contrast and saturation too. A
        callable gets a PIL image and returns one; what it draws must come from torch's generator. Ready tensors
        (``preprocess=None``) can only be mirrored by name. Never active in prediction.
    augment_views : int, default=4
        Views drawn of each image; epoch e sees view e modulo this number, so that the frozen front is computed once for
        each. 0 draws a new one in every epoch, and computes everything anew.
    batch_norm : {"frozen", "train"}, default="frozen"
        Whether BatchNorm layers in the trainable part keep the statistics they were pretrained with (better for small
        batches), or learn new ones.
    class_weight : dict, "balanced" or None, default=None
        As in scikit-learn; multiplies ``sample_weight``.
    early_stopping : bool, default=False
        Hold out ``validation_fraction`` of the images, by class; keep the epoch with the least loss on them, and end
        when it has not fallen for ``n_iter_no_change`` epochs.
    validation_fraction : float, default=0.1
        Share of the images that are held out: of each class that share, but at least one image and never all of them. A
        class with a single image is trained on.
    n_iter_no_change : int, default=5
        Epochs without a better one after which training ends.
    warm_start : bool, default=False
        Whether ``fit`` goes on from the last fit; the classes must be the same.
    device, precision, engine, n_jobs, cache, verbose : as in :class:`PretrainedFeatureExtractor`
        Half precision is mixed: the weights that train stay float32. ``engine`` is that of the frozen front; what
        trains is torch's, and in ``fit`` with an int as ``random_state`` ``"auto"`` means torch for what a ``cache``
        does not know.
        ``verbose=1`` shows epochs too.
    batch_size : int, default=32
        Images per training step. It changes what is learnt.
    random_state : int, RandomState or None, default=None
        Decides the head's start, the order of the images, views, dropout and the held-out images. The same int gives
        the same result, bit for bit on one CPU with as many threads. An int is also the seed of ``weights=None``.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        Labels in the order of ``predict_proba``'s columns; for multilabel y their positions.
    history_ : dict of str to list of float
        ``loss`` (mean over the epoch, as trained) and ``learning_rate`` (of the head, at the last step) per epoch; with
        ``early_stopping`` also ``validation_loss`` and ``validation_score`` (accuracy).
    n_iter_ : int
        Epochs that were trained.
    best_epoch_ : int
        The one that was kept, counted from 0: the last without early stopping.

    Notes
    -----
    With scikit-learn 1.9 or later, callbacks given to ``set_callbacks`` are told of every epoch; with 1.7 or later,
    notebooks show the network's stages below the parameters.

    See Also
    --------
    PretrainedFeatureExtractor : The same network as a transformer.

    References
    ----------
    .. [1] A. Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution",
       ICLR 2022, section 4.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from featx import FineTuneClassifier
    >>> digits = load_digits()
    >>> model = FineTuneClassifier("featx_micro", freeze=-1, pixel_range=(0, 16), epochs=2, random_state=0)
    >>> model.fit(digits.images[:200], digits.target[:200]).predict(digits.images[200:202]).shape
    (2,)
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **TunedEstimator._parameter_constraints,
        "label_smoothing": [Interval(Real, 0, 1, closed="left")],
        "class_weight": [dict, list, StrOptions({"balanced"}), None],
    }

    _way_out = (
        'Remove it (featx.find_unreadable lists all such rows), or set on_error="nan": fit leaves it out, '
        "predict_proba gives NaN."
    )
    _saved_as = "FineTuneClassifier"
    _probe_strength = 0.01  # C of logistic regression

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
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        ema: float | None = None,
        augment: str | Callable[[Any], Any] | None = None,
        augment_views: int = 4,
        batch_norm: str = "frozen",
        class_weight: Any = None,
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
        self.label_smoothing = label_smoothing
        self.mixup = mixup
        self.ema = ema
        self.augment = augment
        self.augment_views = augment_views
        self.batch_norm = batch_norm
        self.class_weight = class_weight
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
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> FineTuneClassifier:
        """Train on images and their labels.

        Parameters
        ----------
        X : array-like of n images
            As in :meth:`PretrainedFeatureExtractor.transform`.
        y : array-like of shape (n,) or (n, n_labels)
            Labels of any kind, none of them missing; or 0 and 1 for each of several labels, of which an image can have
            any number.
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
        start = self.tensors_ if self.warm_start and hasattr(self, "tensors_") else None
        items = self._items(X, reset=True, in_full=self.augment is not None)
        labels = self._labels(y)
        same_kind = start is None or self._multilabel == labels.multilabel
        if start is not None and not (same_kind and np.array_equal(labels.classes, self.classes_)):
            raise ValueError(
                f"The classes of the last fit, {self.classes_.tolist()}, are expected with warm_start=True, got "
                f"{labels.classes.tolist()}. Set warm_start=False."
            )
        self._train(items, labels, sample_weight, start, given=(X, y))
        return self

    @with_callbacks  # type: ignore[untyped-decorator]
    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> FineTuneClassifier:
        """Train for one epoch on some more images, at the full learning rate.

        Parameters
        ----------
        X, y, sample_weight
            As in :meth:`fit`.
        classes : array-like of shape (n_classes,) or None, default=None
            All labels that there will be; needed in the first call.

        Returns
        -------
        self
        """
        from featx.training.labels import is_multilabel

        first = not hasattr(self, "tensors_")
        if first and classes is None and not is_multilabel(y):
            raise ValueError("All labels are expected in the first call of partial_fit, got classes=None. Pass them.")
        items = self._items(X, reset=first, in_full=self.augment is not None)
        labels = self._labels(y, classes if first else self.classes_)
        if not first and (labels.multilabel, len(labels.classes)) != (self._multilabel, len(self.classes_)):
            raise ValueError(f"Labels as in the first call are expected: {len(self.classes_)} classes.")
        self._train(items, labels, sample_weight, None if first else self.tensors_, given=(X, y), once=True)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Labels of images.

        Parameters
        ----------
        X : array-like of n images
            As in :meth:`fit`.

        Returns
        -------
        labels : ndarray of shape (n,), or (n, n_labels) of 0 and 1
        """
        proba = self.predict_proba(X)
        if np.isnan(proba).any():
            rows = np.flatnonzero(np.isnan(proba).any(axis=1)).tolist()
            raise ImageError(
                f"Readable images with finite scores are expected, got others at X{rows[:5]}, which have no label.",
                row=rows[0],
                remedy="Remove what featx.find_unreadable lists, or take predict_proba, which gives rows of NaN.",
            )
        return (proba > 0.5).astype(int) if self._multilabel else self.classes_[proba.argmax(axis=1)]

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Accuracy of :meth:`predict`, as of any classifier of scikit-learn; a missing label is an error."""
        from featx.training.labels import check_labelled

        check_labelled(y)
        return float(super().score(X, y, sample_weight))

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of the classes.

        Parameters
        ----------
        X : array-like of n images
            As in :meth:`fit`.

        Returns
        -------
        probabilities : ndarray of shape (n, n_classes), float32
            Rows sum to 1; for multilabel y each column is by itself.
        """
        import torch

        from featx.training.classification import probabilities

        return probabilities(torch.from_numpy(self._as_fitted()._outputs(X, scores=True)), self._multilabel)

    def decision_function(self, X: Any) -> np.ndarray:
        """Scores of the classes before they become probabilities.

        Parameters
        ----------
        X : array-like of n images
            As in :meth:`fit`.

        Returns
        -------
        scores : ndarray of shape (n, n_classes), float32
            For two classes of shape (n,), positive where the second is the likelier one.
        """
        scores = self._as_fitted()._outputs(X, scores=True)
        binary = len(self.classes_) == 2 and not self._multilabel
        return scores[:, 1] - scores[:, 0] if binary else scores

    def _labels(self, y: Any, classes: Any = None) -> Labels:
        from featx.training.classification import Labels

        how = {"class_weight": self.class_weight, "label_smoothing": self.label_smoothing}
        return Labels.of(type(self).__name__, y, classes, **how)

    def _meaning(self) -> Classes:
        from featx.training.classification import Classes

        return Classes(self.classes_, self._multilabel)

    def _set_meaning(self, meaning: Classes) -> None:
        self.classes_, self._multilabel = meaning.classes, meaning.multilabel

    @staticmethod
    def _meaning_of(stored: dict[str, Any]) -> Classes:
        from featx.training.classification import Classes

        return Classes.from_json(stored)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags
