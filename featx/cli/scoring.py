"""How well a logistic regression tells classes apart by some features, by cross-validation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import click
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from featx.backbones.addresses import plain_address
from featx.cli.options import typed_weights
from featx.cli.outcomes import Console, broken_of
from featx.estimators.extractor import PretrainedFeatureExtractor

_C_VALUES = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]


@dataclass(frozen=True)
class Score:
    """What cross-validation said of one choice.

    Attributes
    ----------
    backbone, layer, pooling : str
    weights : str or None
        As of an extractor; None for a random network.
    C : float
        The regularisation that did best.
    accuracy, spread : float
        Mean over the folds, and standard deviation.
    fold_accuracies : tuple of float
    """

    backbone: str
    layer: str
    pooling: str
    weights: str | None
    C: float
    accuracy: float
    spread: float
    fold_accuracies: tuple[float, ...]

    @property
    def network(self) -> str:
        """The backbone, as it is shown."""
        return self.backbone if self.weights is not None else f"{self.backbone} (random)"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def classifier(C: float = 1.0) -> Pipeline:
    """What learns from features: standardised, then a logistic regression."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=5000))


def folds_for(y: np.ndarray, n_folds: int) -> StratifiedKFold:
    """The same folds for whatever is compared, as many as the smallest class allows.

    Raises
    ------
    ClickException
        There is one class only, or one photo of a class.
    """
    classes, counts = np.unique(y, return_counts=True)
    if len(classes) < 2:
        raise click.ClickException(
            f"Readable photos of at least two classes are expected, got {' '.join(classes) or 'none'}."
        )
    if counts.min() < 2:
        raise click.ClickException(
            f"At least two readable photos of each class are expected, got one of {str(classes[counts.argmin()])!r}."
        )
    return StratifiedKFold(min(n_folds, int(counts.min())), shuffle=True, random_state=0)


def compute_once(
    extractor: PretrainedFeatureExtractor, layers: list[str], paths: Sequence[str], console: Console
) -> np.ndarray:
    """Send every photo through the network, once, and keep some layers; the rows of the photos that can be used.

    Raises
    ------
    ClickException
        The network makes finite numbers of none.
    """
    errors = extractor._extraction_of_images([*paths]).warm(layers)
    console.leave_out(broken_of(sorted(errors, key=lambda error: error.row or 0), paths))
    good = np.setdiff1d(np.arange(len(paths)), [error.row for error in errors])
    if not len(good) and any(photo.was_read for photo in console.broken):
        raise console.none_left(len(paths))
    return good


def scores_of(
    extractor: PretrainedFeatureExtractor,
    choices: Sequence[tuple[str, str]],
    paths: Sequence[str],
    y: np.ndarray,
    folds: StratifiedKFold,
) -> list[Score]:
    """Scores of (layer, pooling) choices, from features that the extractor's cache knows."""
    found = []
    for layer, pooling in choices:
        rows = extractor.set_params(layers=layer, pooling=pooling, verbose=0).transform([*paths])
        grid = {"logisticregression__C": _C_VALUES}
        search = GridSearchCV(classifier(), grid, cv=folds, refit=False).fit(rows, y)
        results, best = search.cv_results_, search.best_index_
        found.append(
            Score(
                os.fspath(extractor.backbone),
                layer,
                pooling,
                typed_weights(plain_address(extractor.weights)),
                search.best_params_["logisticregression__C"],
                float(results["mean_test_score"][best]),
                float(results["std_test_score"][best]),
                tuple(float(results[f"split{fold}_test_score"][best]) for fold in range(folds.n_splits)),
            )
        )
    return found


def candidates(extractor: PretrainedFeatureExtractor, layers: Any) -> list[str]:
    """Names of the layers that ``layers`` means, each once."""
    architecture = extractor._architecture(extractor._spec())
    specs = layers if isinstance(layers, list) else [layers]
    return list(dict.fromkeys(layer.label for spec in specs for layer in architecture.resolve(spec)))


def is_vector(extractor: PretrainedFeatureExtractor, layer: str) -> bool:
    """Whether a layer puts out vectors, which no pooling changes."""
    (found,) = extractor._architecture(extractor._spec()).resolve(layer)
    return found.layout == "vector"
