"""How well a logistic regression tells classes apart by some features, by cross-validation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import click
import numpy as np
from sklearn.model_selection import StratifiedKFold

from featx.activations.plan import FeaturePlan
from featx.activations.trying import why_unreadable
from featx.backbones.addresses import plain_address
from featx.choosing.probes import C_VALUES, accuracies_of
from featx.cli.options import typed_poolings, typed_weights
from featx.cli.outcomes import Console, broken_of
from featx.estimators.extractor import PretrainedFeatureExtractor


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
    extractor: PretrainedFeatureExtractor,
    layers: Sequence[str | int],
    poolings: Sequence[str | list[str]],
    paths: Sequence[str],
    console: Console,
) -> tuple[list[str], np.ndarray]:
    """Send every photo through the network, once, and keep some layers.

    Returns
    -------
    names : list of str
        Of the layers, each once. With "all" goes the penultimate one, unless it cannot be read, which is told.
    rows : ndarray of int
        Of the photos that can be used.

    Raises
    ------
    ClickException
        The network makes finite numbers of none.
    """
    names = candidates(extractor, layers)
    if "all" in layers and "penultimate" not in names:
        if reason := why_unreadable(extractor, "penultimate", poolings):
            console.note(f"The penultimate layer is not tried: {reason}")
        else:
            names.append("penultimate")
    errors = extractor.set_params(layers=names)._extraction_of_images([*paths]).warm(names)
    console.leave_out(broken_of(sorted(errors, key=lambda error: error.row or 0), paths))
    good = np.setdiff1d(np.arange(len(paths)), [error.row for error in errors])
    if not len(good) and any(photo.was_read and not photo.is_unlabelled for photo in console.broken):
        raise console.none_left(len(paths))
    return names, good


def scores_of(
    extractor: PretrainedFeatureExtractor,
    choices: Sequence[tuple[str, str | list[str]]],
    paths: Sequence[str],
    y: np.ndarray,
    folds: StratifiedKFold,
) -> list[Score]:
    """Scores of (layer, pooling) choices, from features that the extractor's cache knows."""
    found = []
    for layer, pooling in choices:
        rows = extractor.set_params(layers=layer, pooling=pooling, verbose=0).transform([*paths])
        accuracies = accuracies_of(rows, y, folds)
        best = int(np.argmax(accuracies.mean(axis=1)))
        found.append(
            Score(
                os.fspath(extractor.backbone),
                layer,
                typed_poolings(pooling),
                typed_weights(plain_address(extractor.weights)),
                C_VALUES[best],
                float(accuracies[best].mean()),
                float(accuracies[best].std()),
                tuple(accuracies[best].tolist()),
            )
        )
    return found


def candidates(extractor: PretrainedFeatureExtractor, layers: Sequence[str | int]) -> list[str]:
    """Names of the layers that ``layers`` means, each once."""
    architecture = extractor._architecture(extractor._spec())
    return list(dict.fromkeys(layer.label for spec in layers for layer in architecture.resolve(spec)))


def poolings_of(extractor: PretrainedFeatureExtractor, layer: str, poolings: Sequence[str]) -> list[str | list[str]]:
    """Poolings of one layer, "auto" resolved; the first alone of vectors, which no pooling changes."""
    architecture = extractor._architecture(extractor._spec())
    (found,) = architecture.resolve(layer)
    several = poolings[:1] if found.layout == "vector" else poolings
    return [FeaturePlan.of([found], how, 1, None, architecture.usual_poolings).pooling for how in several]
