"""Fitted models: in files, and what they make of photos."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import joblib
import numpy as np
from sklearn.pipeline import Pipeline

from featx.backbones.addresses import path_in, plain_address
from featx.cli.options import Machine
from featx.cli.outcomes import Console, broken_of, one_line, shown
from featx.estimators.base import NetworkEstimator
from featx.estimators.classifier import FineTuneClassifier
from featx.estimators.extractor import PretrainedFeatureExtractor
from featx.estimators.fitted import FittedNetwork
from featx.estimators.recipes import Mean
from featx.estimators.regressor import FineTuneRegressor
from featx.estimators.transfer import TransferClassifier
from featx.exceptions import WeightsError
from featx.system.shell import typed
from featx.system.writing import replacing

SAFE = ".safetensors"
_EXPECTED = "A model that featx fit wrote is expected (.joblib or .safetensors)"
_ANYWHERE: dict[str, Any] = {"cache": None, "device": None, "n_jobs": None, "verbose": 0}


def save_model(model: Any, path: Path) -> None:
    """Write a fitted model, without what belongs to this machine."""
    for network in networks_of(model):
        network.set_params(**_ANYWHERE)
    with replacing(path) as part:
        if path.suffix.lower() == SAFE:
            model.save(part)
        else:
            joblib.dump(model, part)


def networks_of(model: Any) -> list[NetworkEstimator]:
    """What passes photos through a network in a model that the commands know, itself included; none in another."""
    if isinstance(model, TransferClassifier):
        return [model, *networks_of(model.estimator_)]
    if isinstance(model, Mean):
        return [network for part in model.estimators for network in networks_of(part)]
    first = model[0] if isinstance(model, Pipeline) else model
    return [first] if isinstance(first, PretrainedFeatureExtractor | FittedNetwork) else []


def load_model(path: str) -> Any:
    """A fitted model from its file.

    Raises
    ------
    ClickException
        The file holds something else.
    """
    try:
        model = _load_tuned(path) if path.lower().endswith(SAFE) else joblib.load(path)
    except Exception as error:  # a pickle can raise anything
        told = f"{type(error).__name__}: {one_line(error)}"
        other = click.ClickException(f"{_EXPECTED}, got {path}, which cannot be loaded ({told}).")
        raise _no_model(path) or other from error
    known = model.estimator_ if isinstance(model, TransferClassifier) else model
    if not networks_of(known):
        raise _no_model(path) or click.ClickException(
            "A TransferClassifier, a FineTuneClassifier, a FineTuneRegressor or a Pipeline that begins with a "
            f"PretrainedFeatureExtractor is expected in {path}, got {_named(model, known)}. Make one with: featx fit "
            "photos/ -o model.joblib"
        )
    return known


def _named(model: Any, known: Any) -> str:
    what = type(model).__name__
    return what if known is model else f"{what} whose best recipe is a {type(known).__name__}"


def _load_tuned(path: str) -> FittedNetwork:
    from featx.training.sharing import saved_as

    kind = FineTuneRegressor if saved_as(path) == FineTuneRegressor._saved_as else FineTuneClassifier
    return kind.load(path)


def _no_model(path: str) -> click.ClickException | None:
    """What to raise where a file is no model but what one is learnt with."""
    from featx.backbones.checkpoints import is_written_by_torch
    from featx.training.sharing import holds_tensors_alone

    kinds = ((is_written_by_torch, "a checkpoint of torch's"), (holds_tensors_alone, "a file of tensors alone"))
    what = next((what for is_of_it, what in kinds if is_of_it(path)), None)
    if what is None:
        return None
    return click.ClickException(
        f"{_EXPECTED}, got {path}, {what}. Learn with it first: featx fit photos/ -o model.joblib "
        f"--backbone NAME --weights {typed([path])}"
    )


@contextmanager
def _with_its_weights(model: Any) -> Iterator[None]:
    """Say what to do where the file is gone that a model's network reads."""
    try:
        yield
    except WeightsError as error:
        weights = path_in(plain_address(networks_of(model)[0].weights))
        if not os.path.isabs(weights) or os.path.exists(weights):
            raise
        raise click.ClickException(
            f"The file of weights that the model was learnt with is expected at {shown(weights)}, where it is no more. "
            "Put it there again, or a link to it, or learn the model anew with featx fit --weights FILE."
        ) from error


@dataclass(frozen=True)
class Said:
    """What a model says of photos.

    Attributes
    ----------
    rows : ndarray of int
        Of the photos that it can say something of.
    labels : ndarray of shape (n_rows,)
        Classes, or numbers.
    proba : ndarray of shape (n_rows, n_classes) or None
    """

    rows: np.ndarray
    labels: np.ndarray
    proba: np.ndarray | None


def said_of(model: Any, paths: Sequence[str], machine: Machine, console: Console) -> Said:
    """Labels of the photos that can be read; the console is told of the others."""
    with _with_its_weights(model):
        if isinstance(model, Mean):
            return _said_by_both(model, paths, machine, console)
        rows, inputs = _inputs(model, paths, machine, console)
        last = model[1:] if isinstance(model, Pipeline) else model
        if not len(rows):
            return Said(rows, np.array([]), None)
        if not hasattr(last, "predict_proba"):
            return Said(rows, np.asarray(last.predict(inputs)), None)
        proba = last.predict_proba(inputs)
        return Said(rows, last.classes_[proba.argmax(axis=1)], proba)


def _said_by_both(model: Mean, paths: Sequence[str], machine: Machine, console: Console) -> Said:
    """Each part is asked of the photos that those before could use."""
    rows, found = np.arange(len(paths)), list[np.ndarray]()
    for part in model.estimators:
        said = said_of(part, [paths[row] for row in rows.tolist()], machine, console)
        if said.proba is None:
            return Said(said.rows, said.labels, None)
        found = [*(proba[said.rows] for proba in found), said.proba]
        rows = rows[said.rows]
    proba = np.mean(found, axis=0)
    return Said(rows, model.classes_[proba.argmax(axis=1)], proba)


def features(model: Any, paths: Sequence[str], machine: Machine, console: Console) -> np.ndarray:
    """What the model's last step reads of every photo, and of a mean its first part's; NaN of unreadable ones."""
    if isinstance(model, Mean):
        return features(model.estimators[0], paths, machine, console)
    with _with_its_weights(model):
        rows, inputs = _inputs(model, paths, machine, console)
        if not len(rows):
            return np.full((len(paths), 1), np.nan)
        if isinstance(model, Pipeline):
            found = model[1:-1].transform(inputs) if len(model) > 2 else inputs
        else:
            found = model.transform(inputs)
    out = np.full((len(paths), found.shape[1]), np.nan)
    out[rows] = found
    return out


def read_features(extractor: PretrainedFeatureExtractor, paths: Sequence[str], console: Console) -> np.ndarray:
    """Features of photos, NaN for those that cannot be read, which the console is told of."""
    blocks = []
    for block in extractor._extraction_of_images([*paths]).iter_blocks():
        console.leave_out(broken_of(block.errors, paths))
        blocks.append(block.rows)
    return np.concatenate(blocks)


def readable(estimator: Any, paths: Sequence[str], console: Console) -> np.ndarray:
    """Rows of the photos that can be read, by reading them; the console is told of the others."""
    from featx.activations.engine import n_threads
    from featx.images.unreadable import unreadable_rows

    errors = unreadable_rows(estimator._items([*paths], reset=False), n_threads(estimator.n_jobs))
    console.leave_out(broken_of(errors.values(), paths))
    return np.setdiff1d(np.arange(len(paths)), list(errors))


def _inputs(model: Any, paths: Sequence[str], machine: Machine, console: Console) -> tuple[np.ndarray, Any]:
    """Rows of the readable photos, and what of them goes on: features in a pipeline, paths in fine-tuning."""
    params = machine.params(console)
    if isinstance(model, Pipeline):
        features = read_features(model[0].set_params(**params, on_error="nan"), paths, console)
        rows = np.flatnonzero(~np.isnan(features).any(axis=1))
        return rows, features[rows]
    rows = readable(model.set_params(**params, on_error="raise"), paths, console)
    return rows, [paths[row] for row in rows.tolist()]
