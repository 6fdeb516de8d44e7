"""LayerScoreDisplay: which layer, and which pooling, transfers best."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.base import clone
from sklearn.utils._param_validation import validate_params

from featx.plots.display import PLAIN, Display, check_matplotlib, draw_legend
from featx.plots.pictures import network_estimators
from featx.system.fits import one_thread
from featx.training.labels import check_labelled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import FillBetweenPolyCollection
    from matplotlib.lines import Line2D

    from featx.estimators.extractor import PretrainedFeatureExtractor

# (where in the network, how it is called), of a value of the parameter ``layers``
_Place = tuple[float, str]


class LayerScoreDisplay(Display):
    """Cross-validated score against layer, one line for each pooling.

    Parameters
    ----------
    layers : sequence of str
        From left to right.
    poolings : sequence of str or None
        One line each; None where pooling was not searched.
    scores : ndarray of shape (n_poolings, n_layers, n_folds)
        NaN where a combination was not tried.
    score_name : str, default="score"

    Attributes
    ----------
    lines_ : list of Line2D
        Means over the folds, one line for each pooling.
    bands_ : list of FillBetweenPolyCollection
        One standard deviation over the folds below and above them.
    ax_, figure_ : matplotlib Axes and Figure

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from featx import PretrainedFeatureExtractor
    >>> from featx.plots import LayerScoreDisplay
    >>> X, y = load_digits(return_X_y=True)
    >>> extractor = PretrainedFeatureExtractor("featx_micro", image_shape=(8, 8), pixel_range=(0, 16))
    >>> display = LayerScoreDisplay.from_estimator(extractor, X[:60], y[:60], cv=3)
    >>> display.layers
    ['features.0', 'features.2', 'features.4', 'features', 'penultimate']
    """

    lines_: list[Line2D]
    bands_: list[FillBetweenPolyCollection]

    def __init__(
        self,
        layers: Sequence[str],
        poolings: Sequence[str | None],
        scores: np.ndarray,
        *,
        score_name: str = "score",
    ) -> None:
        self.layers = layers
        self.poolings = poolings
        self.scores = scores
        self.score_name = score_name

    @classmethod
    def from_cv_results(
        cls,
        cv_results: Mapping[str, Any],
        *,
        layers_param: str | None = None,
        pooling_param: str | None = None,
        scoring: str = "score",
        estimator: Any = None,
        ax: Axes | None = None,
    ) -> LayerScoreDisplay:
        """Draw what a search over layers found.

        Where other hyper-parameters were searched too (C, networks, ...), each layer with each pooling is shown with
        the best of them by mean score; in a halving search, the best of its last round. Maxima over many candidates
        are optimistic, for layers as for anything else.

        Parameters
        ----------
        cv_results : dict
            ``cv_results_`` of a search, such as GridSearchCV.
        layers_param, pooling_param : str or None, default=None
            Names of the parameters, such as ``"pretrainedfeatureextractor__layers"``. None finds them: the only one
            called ``layers``, and the ``pooling`` beside it if that was searched.
        scoring : str, default="score"
            Which score, where a search had several.
        estimator : PretrainedFeatureExtractor, or what holds one, or None, default=None
            What was searched: decides the order of the layers and their names. Without it, stage indices are sorted if
            all count from the same end, and other layers stand in the order in which they were tried.
        ax : matplotlib Axes or None, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        display : LayerScoreDisplay
        """
        check_matplotlib(f"{cls.__name__}.from_cv_results", ax)
        layers_param = _name_of_layers(cv_results, layers_param)
        pooling_param = _name_of_pooling(cv_results, layers_param, pooling_param)
        splits = _scores(cv_results, scoring)  # (n_candidates, n_folds)
        n = len(splits)
        layers = cv_results[f"param_{layers_param}"]
        poolings = [None] * n if pooling_param is None else list(cv_results[f"param_{pooling_param}"])
        rows = [row for row in range(n) if layers[row] is not np.ma.masked]
        place_of = _by_network(estimator) if estimator is not None else _by_value([layers[row] for row in rows])
        places = {row: place_of(layers[row]) for row in rows}
        names = list(dict.fromkeys(name for _, name in sorted(places.values(), key=lambda place: place[0])))
        lines = list(dict.fromkeys(_pooling_name(poolings[row]) for row in rows))
        best = np.full((len(lines), len(names), splits.shape[1]), np.nan)
        rounds = np.asarray(cv_results.get("iter", np.zeros(n)))
        means = np.where(np.isnan(splits).any(axis=1), -np.inf, splits.mean(axis=1))
        for row in sorted(rows, key=lambda row: (rounds[row], means[row])):  # the best comes last, and stays
            best[lines.index(_pooling_name(poolings[row])), names.index(places[row][1])] = splits[row]
        return cls(names, lines, best, score_name=scoring).plot(ax)

    @classmethod
    @validate_params({"cv": ["cv_object"]}, prefer_skip_nested_validation=False)  # type: ignore[untyped-decorator]
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        y: Any,
        *,
        layers: Sequence[Any] | None = None,
        poolings: Sequence[str] = ("avg",),
        classifier: Any = None,
        cv: Any = None,
        scoring: Any = None,
        ax: Axes | None = None,
    ) -> LayerScoreDisplay:
        """Cross-validate layers with every pooling, and draw the scores.

        Each fit has one thread of BLAS, which for a linear model is several times as fast as two; networks keep theirs.
        Within ``joblib.parallel_config(n_jobs=...)`` candidates and folds are shared out as in GridSearchCV.

        Parameters
        ----------
        estimator : PretrainedFeatureExtractor, or a pipeline with one
            Where it has no cache, a temporary one serves this call, so that each image passes through the network once.
        X : array-like of n images
        y : array-like of shape (n,)
        layers : list or None, default=None
            Values of the parameter ``layers`` to try; None takes every stage, and the penultimate layer unless it
            cannot be pooled or a file of weights has nothing for it.
        poolings : sequence of str, default=("avg",)
        classifier : estimator or None, default=None
            What follows a bare extractor; None standardises its features and takes a logistic regression with C=0.01.
        cv, scoring
            As in GridSearchCV; ``scoring`` is one score.
        ax : matplotlib Axes or None, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        display : LayerScoreDisplay
        """
        from sklearn.model_selection import GridSearchCV

        from featx.activations.trying import why_unreadable

        caller = f"{cls.__name__}.from_estimator"
        check_matplotlib(caller, ax)
        check_labelled(y)
        model = _with_classifier(estimator, classifier, caller)
        ((name, extractor),) = _extractors(model, caller).items()
        prefix = name and f"{name}__"
        if layers is None:
            unreadable = why_unreadable(extractor, "penultimate", poolings)
            stages = extractor._architecture(extractor._spec()).stages
            layers = stages if unreadable else [*stages, "penultimate"]
        grid = {f"{prefix}layers": list(layers), f"{prefix}pooling": list(poolings)}
        with _cached(model, extractor, prefix), one_thread():
            search = GridSearchCV(model, grid, cv=cv, scoring=scoring, refit=False, error_score="raise").fit(X, y)
        display = cls.from_cv_results(search.cv_results_, layers_param=f"{prefix}layers", estimator=extractor, ax=ax)
        if isinstance(scoring, str):
            display.score_name = scoring
            display.ax_.set_ylabel(scoring, **PLAIN)
        return display

    def plot(self, ax: Axes | None = None) -> LayerScoreDisplay:
        """Draw the lines.

        Parameters
        ----------
        ax : matplotlib Axes or None, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        self
        """
        ax = self._begin(ax)
        places = np.arange(len(self.layers))
        self.lines_, self.bands_ = [], []
        for scores in self.scores:
            mean, spread = scores.mean(axis=1), scores.std(axis=1)
            (line,) = ax.plot(places, mean, marker="o")
            self.lines_.append(line)
            self.bands_.append(
                ax.fill_between(places, mean - spread, mean + spread, color=line.get_color(), alpha=0.15, linewidth=0)
            )
        if list(self.poolings) != [None]:
            draw_legend(ax, self.lines_, [_pooling_name(pooling) for pooling in self.poolings], title="pooling")
        long = sum(map(len, self.layers)) > 45
        turned: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if long else {}
        ax.set_xticks(places, list(self.layers), **turned, **PLAIN)
        ax.set_xlabel("layer, from input to output")
        ax.set_ylabel(self.score_name, **PLAIN)
        return self


def _name_of_layers(cv_results: Mapping[str, Any], given: str | None) -> str:
    tried = [key.removeprefix("param_") for key in cv_results if key.startswith("param_")]
    found = [name for name in tried if name.split("__")[-1] == "layers"] if given is None else [given]
    if len(found) != 1 or found[0] not in tried:
        raise ValueError(
            f"Results of a search over one parameter of layers are expected, got layers_param={given!r} and a search "
            f"over {tried}. Set layers_param to one of these."
        )
    return found[0]


def _name_of_pooling(cv_results: Mapping[str, Any], layers_param: str, given: str | None) -> str | None:
    beside = layers_param.removesuffix("layers") + "pooling" if given is None else given
    if f"param_{beside}" in cv_results:
        return beside
    if given is not None:
        raise ValueError(f"The name of a parameter that was searched is expected, got pooling_param={given!r}.")
    return None


def _scores(cv_results: Mapping[str, Any], scoring: str) -> np.ndarray:
    """Scores of shape (n_candidates, n_folds)."""
    folds: list[np.ndarray] = []
    while (key := f"split{len(folds)}_test_{scoring}") in cv_results:
        folds.append(np.asarray(cv_results[key], dtype=float))
    if not folds:
        names = [key.removeprefix("split0_test_") for key in cv_results if key.startswith("split0_test_")]
        raise ValueError(f"One of the scores {names} of the search is expected, got scoring={scoring!r}.")
    return np.stack(folds, axis=1)


def _pooling_name(pooling: Any) -> str | None:
    """How a line is called; a search over several grids need not set pooling in each."""
    return None if pooling is None else "not searched" if pooling is np.ma.masked else str(pooling)


def _by_value(values: Sequence[Any]) -> Callable[[Any], _Place]:
    """Places of layers when nothing is known of the network."""
    indices = [value for value in values if isinstance(value, Integral)]
    if len(indices) == len(values) and len({value < 0 for value in indices}) == 1:
        return lambda value: (float(value), f"stage {value}")
    order = list(dict.fromkeys(map(_written, values)))
    return lambda value: (float(order.index(_written(value))), _written(value))


def _written(value: Any) -> str:
    if isinstance(value, Integral):
        return f"stage {value}"
    return value if isinstance(value, str) else " + ".join(map(_written, value))


def _by_network(estimator: Any) -> Callable[[Any], _Place]:
    ((_, extractor),) = _extractors(estimator, "LayerScoreDisplay.from_cv_results").items()
    architecture = extractor._architecture(extractor._spec())

    def place_of(value: Any) -> _Place:
        found = architecture.resolve(value)
        return float(max(layer.position for layer in found)), " + ".join(layer.label for layer in found)

    return place_of


def _extractors(model: Any, caller: str) -> dict[str, PretrainedFeatureExtractor]:
    from featx.estimators.extractor import PretrainedFeatureExtractor

    found = network_estimators(model, PretrainedFeatureExtractor)
    if len(found) != 1:
        raise TypeError(
            f"A PretrainedFeatureExtractor, or what holds just one, is expected by {caller}, got {model!r}."
        )
    return found


def _with_classifier(estimator: Any, classifier: Any, caller: str) -> Any:
    """A model that predicts: the one given, or a pipeline from the extractor given and a classifier."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    bare = "" in _extractors(estimator, caller)
    if not bare and classifier is not None:
        raise ValueError(
            f"A bare PretrainedFeatureExtractor is expected by {caller} beside a classifier, got {estimator!r}. Make "
            "the classifier the last step of the pipeline, and leave classifier=None."
        )
    if not bare:
        return clone(estimator)
    steps = [StandardScaler(), LogisticRegression(C=0.01, max_iter=1000)] if classifier is None else [classifier]
    return make_pipeline(clone(estimator), *map(clone, steps))


@contextmanager
def _cached(model: Any, extractor: PretrainedFeatureExtractor, prefix: str) -> Iterator[None]:
    """While the search runs, features are kept: in the extractor's own cache, or in a temporary one."""
    if extractor.cache is not None:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="featx-") as folder:
        model.set_params(**{f"{prefix}cache": folder})
        yield
