"""TransferClassifier: a pretrained network and new classes, and the best way between them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from sklearn.base import ClassifierMixin, _fit_context
from sklearn.metrics import check_scoring
from sklearn.utils import _safe_indexing, check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import _check_sample_weight, check_consistent_length, check_is_fitted

from featx.estimators.base import NetworkEstimator
from featx.estimators.classifier import FineTuneClassifier
from featx.estimators.extractor import PretrainedFeatureExtractor
from featx.images.sources import MAX_PIXELS, Items
from featx.store import FeatureStore, passing_store, resolve_store
from featx.system.compat import with_callbacks

if TYPE_CHECKING:
    from featx.choosing.following import Follower
    from featx.choosing.search import Entry, Recipe, Search
    from featx.choosing.task import Task
    from featx.estimators.asked import Asked
    from featx.estimators.recipes import Images
    from featx.training.classification import Labels

# Parameters that the recipes' estimators take over, and what a fitted network knows.
_SHARED = (
    *("backbone", "weights", "pooling", "grid", "image_shape", "pixel_range", "fourth_band", "preprocess"),
    *("image_size", "decode", "max_pixels", "storage_options", "views", "device", "precision", "engine"),
    *("batch_size", "n_jobs", "cache"),
)
_OF_NETWORK = ("classes_", "_multilabel", "n_features_in_", "feature_names_in_")


def _gives_probabilities(transfer: Any) -> bool:
    """Whether what has won does; before a fit it is not known."""
    return not hasattr(transfer, "estimator_") or hasattr(transfer.estimator_, "predict_proba")


class TransferClassifier(ClassifierMixin, NetworkEstimator):  # type: ignore[misc]
    """A classifier of images that chooses how to transfer a pretrained network to its classes.

    Several recipes are tried, cheap ones first, and judged by the same folds of a cross-validation: linear models on
    features of one layer or of several, and the network's last stages tuned. A dearer recipe is taken only where it is
    better than all before it by more than the standard error of the difference. What has won then learns from all
    images. Features, and what a frozen front makes of an image, are computed once for all recipes and folds.

    Parameters
    ----------
    backbone, weights : as in :class:`PretrainedFeatureExtractor`
        Which network, with which weights.
    pooling, grid : as in :class:`PretrainedFeatureExtractor`
        How a spatial or token layer becomes a row. Which layers are read is for the recipes to say.
    image_shape, pixel_range, fourth_band, preprocess, image_size, decode, max_pixels : as in the extractor
        What X is, and how it becomes the network's input.
    on_error : {"raise", "nan"}, default="raise"
        An unreadable image raises an error that names its row and file. With ``"nan"`` ``fit`` leaves it out, with one
        warning.
    storage_options : dict or None, default=None
        As in :class:`PretrainedFeatureExtractor`; lets paths be URLs.
    views : {"flip"} or None, default=None
        As in :class:`FineTuneClassifier`, of all recipes.
    recipes : "auto", list of str or list of (str, classifier), default="auto"
        What is tried, in this order. Names are ``"probe"`` (a logistic regression on the penultimate layer),
        ``"layers"`` (one on the few best layers side by side), ``"lda"`` (linear discriminant analysis with a shrunk
        covariance), ``"last-stage"`` and ``"last-two"`` (so many stages are tuned, from the probe),
        ``"last-two-flip"`` (with mirrored views) and ``"mean"`` (probabilities of the two best averaged). A pair is a
        name and any classifier of images. ``"auto"`` tries all names.
    cv : int, splitter or iterable, default=5
        Folds. An int means so many stratified ones, fewer where the rarest class has fewer images; with ``groups`` no
        group is in two of them. Recipes that train the network are judged by as many of them as there is time for.
    scoring : str, callable or None, default=None
        What recipes are compared by, as in scikit-learn; None means accuracy. What is scored knows the answers to row
        numbers, which is what a callable gets as X.
    class_weight : dict, list of dict, "balanced" or None, default=None
        As in scikit-learn (a list for several labels); multiplies ``sample_weight``, also when recipes are judged.
    time_budget : float or None, default=None
        Seconds for the search and for learning from all images, beyond the first pass. A recipe that would not be
        ready in time, by the measured cost of its steps, is not begun; the first is judged in any case, and what a
        classifier of the user's takes is known after its first fold. None tries everything on all folds.
    device, precision, engine, batch_size, n_jobs, cache, verbose : as in :class:`FineTuneClassifier`
        Without a ``cache`` features are kept in a folder for temporary files as long as ``fit`` takes. ``verbose=1``
        prints a line for each recipe too.
    random_state : int, RandomState or None, default=None
        Decides the folds, and what training draws. The same int gives the same result without a ``time_budget``.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        Labels in the order of ``predict_proba``'s columns; for multilabel y their positions.
    leaderboard_ : dict of str to list
        A row for each recipe, for ``pandas.DataFrame``: ``recipe``, ``choice`` (what it was set to), ``n_folds``,
        ``mean`` and ``spread`` of the score over these folds (NaN where it was not judged), ``seconds``, ``n_images``
        that passed through the network because of it, and ``not_tried`` (why not, or why not on all folds). A recipe
        that fails is listed there too, with a warning.
    best_recipe_ : str
    best_score_ : float
        Mean score of the best recipe over its folds. That of the best of several, hence a little high: by 0.020 with a
        standard error of 0.009 over thirty draws of 100 photos of ten classes, with the recipes on features, and by
        0.025 with one of 0.028 over five with all (``benchmarks/bench_transfer.py``). Photos outside of the search
        tell more.
    estimator_ : classifier of images
        The best recipe, fitted to all images.

    See Also
    --------
    FineTuneClassifier : One of the recipes, with all its parameters.
    PretrainedFeatureExtractor : Features for a classifier of one's own.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from featx import TransferClassifier
    >>> digits = load_digits()
    >>> model = TransferClassifier("featx_micro", recipes=["probe", "layers"], pixel_range=(0, 16), random_state=0)
    >>> model.fit(digits.images[:200], digits.target[:200]).predict(digits.images[200:202]).shape
    (2,)
    """

    # Who follows the search of the next fit; None prints where ``verbose`` says so.
    _follower: Follower | None = None

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **{name: value for name, value in NetworkEstimator._parameter_constraints.items() if name != "layers"},
        "recipes": [StrOptions({"auto"}), list, tuple],
        "cv": ["cv_object"],
        "scoring": [str, callable, None],
        "class_weight": [dict, list, StrOptions({"balanced"}), None],
        "time_budget": [Interval(Real, 0, None, closed="left"), None],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        backbone: Any = "resnet18",
        *,
        weights: str | os.PathLike[str] | tuple[str | os.PathLike[str], str] | None = "DEFAULT",
        pooling: str | list[str] = "avg",
        grid: int = 1,
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
        recipes: Any = "auto",
        cv: Any = 5,
        scoring: Any = None,
        class_weight: Any = None,
        time_budget: float | None = None,
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
        self.pooling = pooling
        self.grid = grid
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
        self.recipes = recipes
        self.cv = cv
        self.scoring = scoring
        self.class_weight = class_weight
        self.time_budget = time_budget
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
    def fit(self, X: Any, y: Any, sample_weight: Any = None, groups: Any = None) -> TransferClassifier:
        """Try the recipes, and let the best one learn from all images.

        Parameters
        ----------
        X : array-like of n images
            As in :meth:`PretrainedFeatureExtractor.transform`.
        y : array-like of shape (n,) or (n, n_labels)
            As in :meth:`FineTuneClassifier.fit`.
        sample_weight : array-like of shape (n,) or None, default=None
            What each image weighs, when learning and when judging. Those that weigh nothing are left out.
        groups : array-like of shape (n,) or None, default=None
            Which images belong together and must not be learnt from and judged by at once.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            X, y or a parameter is wrong, or there are not two images of two classes.
            An unreadable image raises :class:`featx.exceptions.ImageError`, one of them.
        """
        from featx.activations.engine import TALLY
        from featx.choosing.budget import Budget
        from featx.choosing.following import Follower, Printing
        from featx.choosing.search import Search
        from featx.estimators.named_recipes import check_recipes

        wanted, asked = check_recipes(self.recipes), self._asked(X, y, sample_weight, groups)
        context = self._init_callback_context()
        context.call_on_fit_task_begin(estimator=self, X=X, y=y)
        with self._store() as store:
            images, good = self._images(X, asked, store)
            task = asked.task(asked.rows[good])
            follower = self._follower or (Printing() if self.verbose else Follower())
            budget = Budget.from_now(self.time_budget)
            search = Search(task, budget, follower=follower, n_images=lambda: TALLY.n_images)
            best = search.run(self._recipes(wanted, images, asked.seed), with_mean=("mean", None) in wanted)
            estimators = search.refit(best)
        self._be_fitted(task, search, best, estimators)
        context.call_on_fit_task_end(estimator=self, X=X, y=y, reconstruction_attributes=dict)
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
        check_is_fitted(self)
        return np.asarray(self.estimator_.predict(self._plain(X)))

    @available_if(_gives_probabilities)  # type: ignore[untyped-decorator]
    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of the classes.

        Parameters
        ----------
        X : array-like of n images
            As in :meth:`fit`.

        Returns
        -------
        probabilities : ndarray of shape (n, n_classes)
            Rows sum to 1; for multilabel y each column is by itself. There is no such method where a classifier of the
            user's has won that gives none.
        """
        from featx.choosing.predicted import proba_of

        check_is_fitted(self)
        return proba_of(self.estimator_, self._plain(X))

    def decision_function(self, X: Any) -> np.ndarray:
        """Scores of the classes: logarithms of the probabilities, whatever has won that gives some.

        Parameters
        ----------
        X : array-like of n images
            As in :meth:`fit`.

        Returns
        -------
        scores : ndarray of shape (n, n_classes)
            For two classes of shape (n,), and for multilabel y each column by itself, positive where likelier than not.
        """
        from featx.choosing.predicted import scores_of

        check_is_fitted(self)
        if not _gives_probabilities(self):
            return np.asarray(self.estimator_.decision_function(self._plain(X)))
        return scores_of(self.predict_proba(X), self._multilabel)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what has won as safetensors, where that is one tuned network; FineTuneClassifier can load it, too.

        Parameters
        ----------
        path : str or path

        Raises
        ------
        TypeError
            Something else has won.
        """
        check_is_fitted(self)
        if not isinstance(self.estimator_, FineTuneClassifier):
            raise TypeError(
                f"One tuned network is expected, got {type(self.estimator_).__name__} as what has won. Write it with "
                'joblib.dump, or leave other names out of recipes, as in recipes=["last-two"].'
            )
        self.estimator_.save(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TransferClassifier:
        """A fitted estimator from a file that :meth:`save` wrote, which holds the network alone: without a leaderboard.

        Parameters
        ----------
        path : str or path

        Raises
        ------
        WeightsError
            The file is something else.
        """
        network = FineTuneClassifier.load(path)
        loaded = cls(**{name: getattr(network, name) for name in _SHARED})
        loaded.__dict__.update({name: value for name, value in vars(network).items() if name in _OF_NETWORK})
        loaded.estimator_ = network
        return loaded

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Score of images by ``scoring``, or the accuracy; a missing label is an error."""
        from featx.training.labels import check_labelled

        check_labelled(y)
        if self.scoring is None:
            return float(super().score(X, y, sample_weight))
        given = {} if sample_weight is None else {"sample_weight": sample_weight}
        return float(check_scoring(self, self.scoring)(self, X, y, **given))

    def _plain(self, X: Any) -> Any:
        """A 2-D X as an array, once its columns are those of the last fit; any other as it is."""
        return X if self.image_shape is None else self._checked_rows(X, reset=False)

    def _scorer(self) -> Any:
        """None for accuracy."""
        return None if self.scoring in (None, "accuracy") else check_scoring(self, self.scoring)

    def _asked(self, X: Any, y: Any, sample_weight: Any, groups: Any) -> Asked:
        """What is to be learnt; raises where something is wrong, before the first image is read."""
        from featx.estimators.asked import Asked
        from featx.training.classification import Labels

        scorer = self._scorer()
        cv = [*self.cv] if isinstance(self.cv, Iterator) else self.cv  # looked at twice
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        items = self._items(X, reset=True)
        labels = Labels.of(type(self).__name__, y)
        rows, weights = self._used(items, labels, sample_weight, scorer)
        if groups is not None:
            check_consistent_length(range(len(labels)), groups)
            groups = np.asarray(groups)
        asked = Asked(items, labels, rows, weights, groups, cv, scorer, seed)
        asked.task(rows).check(self.scoring)
        return asked

    def _used(
        self, items: Items, labels: Labels, sample_weight: Any, scorer: Any
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows of readable images that weigh something, and the weights of all, classes included."""
        from featx.choosing.task import check_takes_weights

        check_consistent_length(range(len(items)), range(len(labels)))
        rows, weights = np.arange(len(items)), None
        if sample_weight is not None or self.class_weight is not None:
            check_takes_weights(scorer)
            weights = _check_sample_weight(sample_weight, rows, dtype=np.float64, ensure_non_negative=True)
            if self.class_weight is not None:
                weights = weights * compute_sample_weight(self.class_weight, labels.y)
            rows = np.flatnonzero(weights > 0)
        rows = rows[self._readable(items.take(rows.tolist()), " and are left out.")]
        if len(rows) < 2:
            raise ValueError(
                f"Two readable images or more that weigh something are expected, got n_samples={len(rows)}."
            )
        return rows, weights

    def _store(self) -> AbstractContextManager[FeatureStore]:
        """The user's own, or one for this fit: to lend to estimators that have none."""
        store = resolve_store(self.cache)
        return passing_store() if store is None else nullcontext(store)

    def _images(self, X: Any, asked: Asked, store: FeatureStore | None) -> tuple[Images, np.ndarray]:
        """Features of all layers in one pass, and which images have some."""
        from featx.estimators.recipes import Images

        extractor = PretrainedFeatureExtractor(**self._common(PretrainedFeatureExtractor), random_state=self._fixed())
        extractor.set_params(on_error=self.on_error, verbose=self.verbose)
        plain, rows = self._plain(X), asked.rows
        used = plain if len(rows) == len(asked.items) else _safe_indexing(plain, rows)
        return Images.of(extractor, used, asked.items.take(rows.tolist()), store)

    def _common(self, kind: type[NetworkEstimator]) -> dict[str, Any]:
        """Parameters that a recipe's estimator has from this one."""
        return {name: getattr(self, name) for name in _SHARED if name in kind._get_param_names()}

    def _fixed(self) -> int | None:
        return int(self.random_state) if isinstance(self.random_state, Integral) else None

    def _recipes(self, wanted: list[tuple[str, Any]], images: Images, seed: int) -> list[Recipe]:
        from featx.estimators.named_recipes import recipes_of

        state = np.random.RandomState(seed) if self._fixed() is None else self._fixed()
        return recipes_of(wanted, images, {**self._common(FineTuneClassifier), "random_state": state})

    def _be_fitted(self, task: Task, search: Search, best: Entry, estimators: list[Any]) -> None:
        from featx.estimators.recipes import Mean

        self.classes_, self._multilabel = task.classes, task.multilabel
        self.leaderboard_ = search.leaderboard()
        self.best_recipe_, self.best_score_ = best.name, float(best.scores(task).mean())
        self.estimator_ = estimators[0] if len(estimators) == 1 else Mean(estimators, task.classes, task.multilabel)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags
