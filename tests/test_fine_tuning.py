"""The classifier's own laws: what a fit depends on, what it leaves alone, and what comes back."""

from __future__ import annotations

import copy
import io
import pickle
import random
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from conftest import relative_difference
from networks import InPlace
from PIL import Image
from releases import needs_callbacks
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import InvalidParameterError
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.validation import check_is_fitted
from torch import nn

from featx import FeatureStore, FineTuneClassifier, PretrainedFeatureExtractor
from featx.exceptions import ImageError, LayerError, OutOfMemory
from featx.training import values
from featx.training.classification import CrossEntropy
from featx.training.model import Model

DIGITS = load_digits()
X, Y = DIGITS.images[:30], DIGITS.target[:30] % 3
MORE = DIGITS.images[100:120]
# The same as photos, which a callable gets as PIL images.
PHOTOS = (X * 15).astype(np.uint8)


def classifier(**parameters: Any) -> FineTuneClassifier:
    settings = {"image_size": 16, "pixel_range": (0, 16), "epochs": 2, "batch_size": 8, "random_state": 0}
    return FineTuneClassifier("featx_micro", **{**settings, "freeze": "all", **parameters})


def seed_of(random_state: int) -> int:
    """The seed of a fit, as the library draws it."""
    return int(check_random_state(random_state).randint(2**31 - 1))


class Recorder:
    """A callback that notes what it is told, and stops or breaks off when told to."""

    max_propagation_depth = None

    def __init__(self, stop_after: int | None = None, error: type[BaseException] | None = None) -> None:
        self.stop_after, self.error = stop_after, error
        self.ended: list[str] = []
        self.scores: list[float] = []
        self.torn_down = 0

    def setup(self, estimator: Any, context: Any) -> None:
        pass

    def teardown(self, estimator: Any, context: Any) -> None:
        self.torn_down += 1

    def on_fit_task_begin(self, estimator: Any, context: Any) -> None:
        pass

    def on_fit_task_end(self, estimator: Any, context: Any, *, fitted_estimator: Any) -> bool:
        self.ended.append(context.task_name)
        if self.error is not None:
            raise self.error
        if context.task_name == "epoch":
            self.scores.append(fitted_estimator.score(X, Y))
        return self.stop_after is not None and self.ended.count("epoch") >= self.stop_after


# What a fit depends on


@pytest.mark.parametrize(
    "parameters",
    [
        {"epochs": 3},
        {"augment": "crop", "augment_views": 2, "epochs": 3},
        {"augment": "color", "augment_views": 2, "linear_probe": False},
        {"mixup": 0.4},
        {"mixup": 0.4, "linear_probe": False, "dropout": 0.3},
        {"hidden_layer_sizes": (8,), "batch_norm": "train", "ema": 0.9},
    ],
    ids=lambda parameters: "-".join(parameters),
)
@pytest.mark.parametrize("freeze", ["all", -1, 2])
def test_shortcut_changes_no_result(
    freeze: int | str, parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = classifier(freeze=freeze, **parameters).fit(X, Y)
    monkeypatch.setattr(values, "_MOST_IN_MEMORY", 0)
    monkeypatch.setattr(values, "_MOST_OF_DISK", 0)
    whole = classifier(freeze=freeze, **parameters).fit(X, Y)
    np.testing.assert_allclose(whole.history_["loss"], short.history_["loss"], rtol=1e-4)
    assert np.abs(whole.predict_proba(MORE) - short.predict_proba(MORE)).max() < 1e-3
    np.testing.assert_array_equal(whole.predict(MORE), short.predict(MORE))


@pytest.mark.parametrize("freeze", ["all", -1, 0])
def test_values_in_a_file_give_the_same_result(freeze: int | str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = classifier(freeze=freeze).fit(X, Y).predict_proba(MORE)
    monkeypatch.setattr(values, "_MOST_IN_MEMORY", 0)
    np.testing.assert_array_equal(classifier(freeze=freeze).fit(X, Y).predict_proba(MORE), expected)


@pytest.mark.parametrize("freeze", ["all", -1])
def test_cache_changes_no_result(freeze: int | str, tmp_path: Path) -> None:
    parameters = {"freeze": freeze, "augment": "flip", "augment_views": 2, "early_stopping": True}
    expected = classifier(**parameters).fit(X, Y)
    cached = classifier(**parameters, cache=str(tmp_path))
    for _ in range(2):
        cached.fit(X, Y)
        np.testing.assert_allclose(cached.history_["loss"], expected.history_["loss"], rtol=1e-4)
        assert np.abs(cached.predict_proba(MORE) - expected.predict_proba(MORE)).max() < 1e-3


@pytest.mark.parametrize(
    "parameters",
    [
        {"freeze": "all"},
        {"freeze": -1, "dropout": 0.5, "mixup": 0.2, "augment": "color"},
        {"freeze": 0, "augment": "crop", "augment_views": 0, "batch_norm": "train", "early_stopping": True},
        {"freeze": -1, "hidden_layer_sizes": (5,), "dropout": 0.5, "linear_probe": False},
    ],
)
def test_same_random_state_gives_the_same_network_bit_for_bit(parameters: dict[str, Any]) -> None:
    first = classifier(**parameters).fit(X, Y).predict_proba(MORE)
    torch.manual_seed(5)
    np.testing.assert_array_equal(classifier(**parameters).fit(X, Y).predict_proba(MORE), first)
    again = classifier(**parameters).fit(MORE, np.arange(20) % 2).fit(X, Y)
    np.testing.assert_array_equal(again.predict_proba(MORE), first)
    other = classifier(**parameters, n_jobs=3).fit(X, Y).predict_proba(MORE)
    np.testing.assert_array_equal(other, first)
    parameters = {**parameters, "linear_probe": False, "random_state": 1}
    assert np.abs(classifier(**parameters).fit(X, Y).predict_proba(MORE) - first).max() > 1e-4


def test_prediction_does_not_depend_on_company_or_batch_size() -> None:
    for freeze in ("all", -1, 0):
        fitted = classifier(freeze=freeze).fit(X, Y)
        expected = fitted.predict_proba(MORE)
        for batch_size in (1, 3, 64):
            changed = pickle.loads(pickle.dumps(fitted)).set_params(batch_size=batch_size)
            np.testing.assert_allclose(changed.predict_proba(MORE), expected, atol=1e-5)
        alone = np.concatenate([fitted.predict_proba(MORE[i : i + 1]) for i in range(4)])
        np.testing.assert_allclose(alone, expected[:4], atol=1e-5)


@pytest.mark.parametrize("hidden", [(), (100,)])
@pytest.mark.parametrize("freeze", ["all", -1])
def test_score_near_zero_does_not_depend_on_company(freeze: int | str, hidden: tuple[int, ...]) -> None:
    """Three rows are multiplied in another order than twenty by every BLAS; where terms cancel, it shows."""
    tuned = classifier(freeze=freeze, hidden_layer_sizes=hidden, batch_size=20).fit(X, Y)
    scores = tuned.decision_function(MORE)
    bias = [name for name in tuned.tensors_ if name.startswith("head.") and name.endswith(".bias")][-1]
    for row in range(0, len(MORE), 4):  # this row's scores are then what rounding leaves of them
        tuned.tensors_ = tuned.tensors_ | {bias: tuned.tensors_[bias] - torch.from_numpy(scores[row])}
        scores = tuned.decision_function(MORE)
        for size in (1, 2, 3, 4, 16):
            some = slice(row, row + size)
            alike = tuned.set_params(batch_size=size).decision_function(MORE[some])
            # As scikit-learn's check of the order of samples has it for float32.
            np.testing.assert_allclose(alike, scores[some], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("optimizer", "weight_decay"), [("adam", 0.0), ("adamw", 0.1), ("sgd", 0.0)])
def test_training_equals_a_loop_written_by_hand(optimizer: str, weight_decay: float) -> None:
    weights = np.random.default_rng(0).uniform(0.5, 2, size=len(X))
    fitted = classifier(
        hidden_layer_sizes=(6,),
        linear_probe=False,
        optimizer=optimizer,
        weight_decay=weight_decay,
        learning_rate=0.01,
        warmup=0.0,
        lr_schedule="linear",
        label_smoothing=0.1,
        max_grad_norm=0.5,
        epochs=3,
    ).fit(X, Y, sample_weight=weights)

    extractor = PretrainedFeatureExtractor("featx_micro", image_size=16, pixel_range=(0, 16))
    rows, codes = torch.from_numpy(extractor.transform(X)), torch.from_numpy(Y)
    share = torch.from_numpy(weights / weights.mean()).float()
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(0))
        head = nn.Sequential(nn.Linear(rows.shape[1], 6), nn.ReLU(), nn.Linear(6, 3))
    groups = [
        {"params": [layer.weight for layer in (head[0], head[2])], "weight_decay": weight_decay},
        {"params": [layer.bias for layer in (head[0], head[2])], "weight_decay": 0.0},
    ]
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    learner = kinds[optimizer](groups, lr=0.01, **({"momentum": 0.9} if optimizer == "sgd" else {}))
    order, step, expected = torch.Generator().manual_seed(seed_of(0)), 0, []
    for _ in range(3):
        total = 0.0
        for batch in torch.randperm(30, generator=order).split(8):
            for group in learner.param_groups:
                group["lr"] = 0.01 * (1 - step / 12)
            each = nn.functional.cross_entropy(head(rows[batch]), codes[batch], reduction="none", label_smoothing=0.1)
            learner.zero_grad()
            (each * share[batch]).mean().backward()
            nn.utils.clip_grad_norm_(head.parameters(), 0.5)
            learner.step()
            total += float((each.detach() * share[batch]).sum())
            step += 1
        expected.append(total / float(share.sum()))
    np.testing.assert_allclose(fitted.history_["loss"], expected, rtol=1e-4)
    with torch.no_grad():
        probabilities = head(torch.from_numpy(extractor.transform(MORE))).softmax(1).numpy()
    np.testing.assert_allclose(fitted.predict_proba(MORE), probabilities, atol=1e-4)


def test_freezing_every_stage_equals_freezing_all() -> None:
    """Nothing with weights lies between the last stage and the head."""
    head_only, stages = classifier(freeze="all").fit(X, Y), classifier(freeze=4).fit(X, Y)
    assert stages.history_["learning_rate"] == head_only.history_["learning_rate"]
    np.testing.assert_allclose(stages.history_["loss"], head_only.history_["loss"], rtol=1e-4)
    np.testing.assert_allclose(stages.predict_proba(MORE), head_only.predict_proba(MORE), atol=1e-3)


def test_linear_probe_is_the_logistic_regression_on_features() -> None:
    # Steps at no speed leave the start of the head as it is; the two solvers stop at tolerances of their own.
    probe = classifier(linear_probe=True, learning_rate=1e-12, epochs=1).fit(X, Y)
    pipeline = make_pipeline(
        PretrainedFeatureExtractor("featx_micro", image_size=16, pixel_range=(0, 16)),
        StandardScaler(),
        LogisticRegression(C=0.01),
    ).fit(X, Y)
    np.testing.assert_array_equal(probe.predict(MORE), pipeline.predict(MORE))
    np.testing.assert_allclose(probe.predict_proba(MORE), pipeline.predict_proba(MORE), atol=1e-2)
    two = classifier(linear_probe=0.1, learning_rate=1e-12, epochs=1).fit(X, Y > 0)
    pipeline.set_params(logisticregression__C=0.1).fit(X, Y > 0)
    np.testing.assert_allclose(two.predict_proba(MORE), pipeline.predict_proba(MORE), atol=1e-2)


# Weights and labels


@pytest.mark.parametrize("freeze", ["all", -1])
def test_weight_of_zero_leaves_an_image_out(freeze: int | str) -> None:
    weights = np.ones(len(X))
    weights[::4] = 0
    whole = classifier(freeze=freeze, batch_size=64).fit(X, Y, sample_weight=weights)
    part = classifier(freeze=freeze, batch_size=64).fit(X[weights > 0], Y[weights > 0])
    np.testing.assert_allclose(whole.predict_proba(MORE), part.predict_proba(MORE), atol=1e-6)
    assert whole.history_["loss"] == pytest.approx(part.history_["loss"])


def test_class_without_a_weighing_image_is_still_a_class() -> None:
    fitted = classifier().fit(X, Y, sample_weight=(Y != 1).astype(float))
    assert fitted.classes_.tolist() == [0, 1, 2]
    assert not (fitted.predict(MORE) == 1).any()


def test_balanced_class_weight_equals_the_sample_weight() -> None:
    y = np.array(["a"] * 20 + ["b"] * 10)
    for freeze in ("all", -1):
        balanced = classifier(freeze=freeze, class_weight="balanced").fit(X, y)
        weighted = classifier(freeze=freeze).fit(X, y, sample_weight=compute_sample_weight("balanced", y))
        np.testing.assert_allclose(balanced.predict_proba(MORE), weighted.predict_proba(MORE), atol=1e-6)
        named = classifier(freeze=freeze, class_weight={"a": 0.75, "b": 1.5}).fit(X, y)
        np.testing.assert_allclose(named.predict_proba(MORE), weighted.predict_proba(MORE), atol=1e-6)
        plain = classifier(freeze=freeze).fit(X, y)
        assert np.abs(plain.predict_proba(MORE) - weighted.predict_proba(MORE)).max() > 1e-3


def test_scale_of_weights_changes_nothing() -> None:
    weights = np.random.default_rng(0).uniform(0.5, 2, size=len(X))
    one = classifier().fit(X, Y, sample_weight=weights).predict_proba(MORE)
    np.testing.assert_allclose(classifier().fit(X, Y, sample_weight=1000 * weights).predict_proba(MORE), one, atol=1e-5)


@pytest.mark.parametrize(
    "names",
    [
        np.array(["ant", "bee", "cat"]),
        np.array([-7, 3, 10**9]),
        np.array(["ant", "bee", "cat"], dtype=object),
        np.array([0.0, 1.0, 2.0]),
    ],
    ids=["str", "int", "object", "float"],
)
def test_labels_come_back_as_given(names: np.ndarray) -> None:
    expected = classifier().fit(X, Y).predict(MORE)
    for y in (names[Y], list(names[Y])):
        fitted = classifier().fit(X, y)
        assert fitted.classes_.tolist() == names.tolist()
        np.testing.assert_array_equal(fitted.predict(MORE), names[expected])
    assert classifier().fit(X, names[Y]).predict(MORE).dtype == names.dtype


def test_bool_labels_come_back_as_bool() -> None:
    fitted = classifier().fit(X, Y == 1)
    assert fitted.classes_.dtype == bool
    assert fitted.predict(MORE).dtype == bool
    assert fitted.score(X, Y == 1) > 0.8


def test_probabilities_are_probabilities() -> None:
    for parameters in ({}, {"freeze": 0, "precision": "bfloat16"}, {"freeze": -1, "label_smoothing": 0.2}):
        found = classifier(**parameters).fit(X, Y).predict_proba(MORE)
        assert found.dtype == np.float32
        assert found.shape == (20, 3)
        assert (found >= 0).all()
        np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("freeze", ["all", -1])
def test_multilabel_learns_each_label_by_itself(freeze: int | str) -> None:
    y = np.stack([Y == 0, Y == 1, Y > 0, np.zeros(30)], axis=1).astype(int)
    fitted = classifier(freeze=freeze, learning_rate=1e-3).fit(X, y)
    assert fitted.predict(X).shape == (30, 4)
    assert set(np.unique(fitted.predict(X))) <= {0, 1}
    assert fitted.classes_.tolist() == [0, 1, 2, 3]
    assert (fitted.predict(X) == y).mean() > 0.9
    assert fitted.score(X, y) == accuracy_score(y, fitted.predict(X))
    assert not fitted.predict(MORE)[:, 3].any()
    sums = fitted.predict_proba(X).sum(axis=1)
    assert np.ptp(sums) > 1e-3


def test_one_class_only_is_always_predicted() -> None:
    for freeze in ("all", -1):
        for probe in (True, False):
            fitted = classifier(freeze=freeze, linear_probe=probe).fit(X, ["only"] * 30)
            assert set(fitted.predict(MORE)) == {"only"}
            np.testing.assert_allclose(fitted.predict_proba(MORE), 1)


@pytest.mark.filterwarnings(
    "ignore:The number of unique classes is greater:UserWarning"
)  # scikit-learn's, as it should
def test_many_classes_of_one_image_each() -> None:
    images, y = DIGITS.images[:50], np.array([f"class {i:02}" for i in range(50)])
    for probe in (True, False):
        fitted = classifier(linear_probe=probe).fit(images, y)
        assert fitted.predict_proba(images).shape == (50, 50)
    assert classifier(linear_probe=10.0, epochs=1).fit(images, y).score(images, y) > 0.9
    with pytest.raises(ValueError, match=r"Set early_stopping=False"):
        classifier(early_stopping=True).fit(images, y)


def test_batch_of_one_image_trains() -> None:
    for parameters in ({"batch_size": 1}, {"batch_size": 29, "batch_norm": "train"}, {"batch_size": 8, "mixup": 0.2}):
        assert classifier(freeze=-1, epochs=1, **parameters).fit(X, Y).score(X, Y) > 0.5
    assert classifier(freeze=-1, epochs=1).fit(X[:1], Y[:1]).predict(X[:1]) == Y[:1]


# Early stopping, going on


@pytest.mark.parametrize("parameters", [{}, {"freeze": -1, "batch_norm": "train"}, {"freeze": -1, "ema": 0.5}])
def test_early_stopping_keeps_the_best_epoch(parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[np.ndarray] = []
    hold_out = FineTuneClassifier._hold_out

    def noting(self: FineTuneClassifier, *arguments: Any) -> Any:
        training, held_out = hold_out(self, *arguments)
        assert not set(training) & set(held_out)
        held.append(held_out)
        return training, held_out

    monkeypatch.setattr(FineTuneClassifier, "_hold_out", noting)
    # So fast that the loss goes up and down.
    fitted = classifier(
        **parameters,
        early_stopping=True,
        validation_fraction=0.3,
        n_iter_no_change=3,
        epochs=8,
        optimizer="sgd",
        learning_rate=0.03,
    ).fit(X, Y)
    losses = fitted.history_["validation_loss"]
    assert np.isfinite(losses).all()
    assert losses != sorted(losses, reverse=True)
    assert fitted.n_iter_ == len(losses) == len(fitted.history_["loss"]) <= 8
    assert fitted.best_epoch_ == int(np.argmin(losses))
    if fitted.n_iter_ < 8:
        assert fitted.n_iter_ == fitted.best_epoch_ + 1 + 3
    (rows,) = held
    assert np.bincount(Y[rows]).tolist() == [3, 3, 3]
    proba = fitted.predict_proba(X[rows]).astype(float)
    assert log_loss(Y[rows], proba / proba.sum(1, keepdims=True)) == pytest.approx(min(losses), rel=1e-3, abs=1e-5)
    score = fitted.history_["validation_score"][fitted.best_epoch_]
    assert fitted.score(X[rows], Y[rows]) == pytest.approx(score)


def test_without_early_stopping_the_last_epoch_is_kept() -> None:
    fitted = classifier(epochs=3).fit(X, Y)
    assert (fitted.n_iter_, fitted.best_epoch_) == (3, 2)
    assert set(fitted.history_) == {"loss", "learning_rate"}


@pytest.mark.parametrize("freeze", ["all", -1])
def test_warm_start_goes_on(freeze: int | str) -> None:
    going_on = classifier(freeze=freeze, warm_start=True, linear_probe=False, learning_rate=1e-3)
    losses = [going_on.fit(X, Y).history_["loss"] for _ in range(3)]
    assert all(later[0] < before[0] for before, later in pairwise(losses))
    assert going_on.n_iter_ == 2
    cold = classifier(freeze=freeze, linear_probe=False, learning_rate=1e-3)
    assert cold.fit(X, Y).fit(X, Y).history_["loss"] == losses[0]
    with pytest.raises(ValueError, match="warm_start"):
        going_on.fit(X, Y + 1)


def test_warm_start_with_more_to_train_keeps_what_was_learnt() -> None:
    """Gradual unfreezing: what earlier fits changed is neither lost nor trained against a network that is gone."""
    stepwise = classifier(freeze=-1, warm_start=True, learning_rate=1e-2, epochs=3).fit(X, Y)
    expected = stepwise.predict_proba(MORE)
    stepwise.set_params(freeze=-2, learning_rate=1e-12, epochs=1).fit(X, Y)
    np.testing.assert_allclose(stepwise.predict_proba(MORE), expected, atol=1e-4)
    with pytest.raises(ValueError, match="another freeze"):  # the tuned stages would be lost
        stepwise.set_params(freeze="all").fit(X, Y)
    np.testing.assert_allclose(stepwise.predict_proba(MORE), expected, atol=1e-4)


@pytest.mark.parametrize("freeze", ["all", -1])
def test_partial_fit_goes_on_with_all_classes(freeze: int | str) -> None:
    online = classifier(freeze=freeze, learning_rate=1e-3)
    with pytest.raises(ValueError, match="classes=None"):
        online.partial_fit(X[:10], Y[:10])
    online.partial_fit(X[:10], Y[:10], classes=[0, 1, 2, 3])
    assert online.classes_.tolist() == [0, 1, 2, 3]
    for _ in range(3):
        online.partial_fit(X[10:], Y[10:])
    assert online.n_iter_ == len(online.history_["loss"]) == 4
    assert online.best_epoch_ == 3
    assert online.history_["loss"][3] < online.history_["loss"][1]
    assert online.predict_proba(MORE).shape == (20, 4)
    with pytest.raises(ValueError, match=r"got y with \[9\]"):
        online.partial_fit(X[:2], [1, 9])
    assert online.n_iter_ == 4


def test_partial_fit_sees_new_views_of_the_same_images() -> None:
    seen: list[bytes] = []

    def note(picture: Image.Image) -> Image.Image:
        shift = int(torch.randint(0, 8, ()))
        seen.append(f"{shift}".encode())
        return picture.rotate(shift)

    online = classifier(augment=note, augment_views=0, n_jobs=1, linear_probe=False, pixel_range="auto")
    online.partial_fit(PHOTOS, Y, classes=[0, 1, 2])
    first, _ = sorted(seen), seen.clear()
    online.partial_fit(PHOTOS, Y)
    assert sorted(seen) != first


def test_augmentation_makes_no_views_that_no_epoch_sees() -> None:
    seen = []

    def note(picture: Image.Image) -> Image.Image:
        seen.append(picture)
        return picture

    classifier(augment=note, augment_views=4, epochs=2, n_jobs=1, pixel_range="auto").fit(PHOTOS, Y)
    assert len(seen) == 2 * len(PHOTOS)


# What is left alone


def test_global_generators_are_left_alone() -> None:
    fitted = classifier(freeze=-1, dropout=0.2, augment="crop").fit(X, Y)
    travelled = pickle.loads(pickle.dumps(fitted))
    alone = pickle.loads(pickle.dumps(classifier(hidden_layer_sizes=(4,)).fit(X, Y)))
    steps = {
        "fit": lambda: classifier(freeze=-1, dropout=0.2, augment="crop", mixup=0.2).fit(X, Y),
        "fit head": lambda: classifier(hidden_layer_sizes=(4,), early_stopping=True).fit(X, Y),
        "partial_fit": lambda: classifier().partial_fit(X, Y, classes=[0, 1, 2]),
        "predict": lambda: fitted.predict(MORE),
        "predict in another process": lambda: travelled.predict(MORE),
        "predict of a head": lambda: alone.predict_proba(MORE),
        "transform": lambda: alone.transform(MORE),
        "to_extractor": lambda: fitted.to_extractor().transform(MORE),
        "names": lambda: alone.get_feature_names_out(),
    }
    moved = []
    for step, do in steps.items():
        torch.manual_seed(3)
        np.random.seed(3)  # noqa: NPY002  the legacy generator is the global state in question
        random.seed(3)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
        do()
        after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
        if not torch.equal(before[0], after[0]) or before[1:] != after[1:]:
            moved.append(step)
    assert not moved
    assert torch.is_grad_enabled()


@contextmanager
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "surroundings",
    [torch.no_grad, torch.inference_mode, float64_by_default, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
    ids=["no_grad", "inference_mode", "float64", "autocast"],
)
def test_callers_surroundings_change_no_result(surroundings: Callable[[], Any]) -> None:
    expected = classifier(freeze=-1).fit(X, Y).predict_proba(MORE)
    with surroundings():
        found = classifier(freeze=-1).fit(X, Y).predict_proba(MORE)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("freeze", [0, "conv", "all"])
def test_users_module_is_left_exactly_as_it_came(freeze: int | str) -> None:
    module = nn.Sequential(InPlace(), nn.BatchNorm1d(5)).double()
    module[0].conv.eval()
    module[0].conv.weight.requires_grad_(False)
    freeze = "0.conv" if freeze == "conv" else freeze
    modes = [child.training for child in module.modules()]
    slopes = [parameter.requires_grad for parameter in module.parameters()]
    state = copy.deepcopy(module.state_dict())
    fitted = FineTuneClassifier(module, image_size=16, pixel_range=(0, 16), freeze=freeze, epochs=2, batch_norm="train")
    fitted.fit(X, Y).predict(MORE)
    fitted.to_extractor().transform(MORE)
    assert fitted.backbone is module
    assert [child.training for child in module.modules()] == modes
    assert [parameter.requires_grad for parameter in module.parameters()] == slopes
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())


def test_images_and_labels_are_left_alone() -> None:
    images, y, weights = X.copy(), Y.copy(), np.linspace(0, 1, 30)
    for array in (images, y, weights):
        array.setflags(write=False)
    classifier(freeze=0, augment="color").fit(images, y, sample_weight=weights)
    np.testing.assert_array_equal(images, X)


def test_augmentation_is_off_in_prediction() -> None:
    calls = []

    def black(picture: Image.Image) -> Image.Image:
        calls.append(1)
        return Image.new("RGB", picture.size)

    fitted = classifier(augment=black, pixel_range="auto").fit(PHOTOS, Y)
    assert calls
    calls.clear()
    fitted.predict_proba(PHOTOS)
    fitted.transform(PHOTOS)
    fitted.to_extractor().transform(PHOTOS)
    assert not calls


class Interrupting:
    """Breaks off at the n-th image."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, picture: Image.Image) -> Image.Image:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return picture


def test_failed_fit_leaves_the_earlier_one_whole() -> None:
    fitted = classifier(freeze=-1).fit(X, np.array(["ant", "bee", "cat"])[Y])
    expected, history = fitted.predict(MORE), dict(fitted.history_)
    fitted.set_params(augment=Interrupting(after=40), augment_views=2)
    with pytest.raises(KeyboardInterrupt):
        fitted.fit(X, np.array(["dog", "elk", "fox"])[Y])
    assert fitted.history_ == history
    np.testing.assert_array_equal(fitted.predict(MORE), expected)


@pytest.mark.parametrize("where", [pytest.param("callback", marks=needs_callbacks), "first image", "later image"])
@pytest.mark.parametrize("freeze", ["all", -1, 0])
def test_interruption_leaves_nothing_behind(
    freeze: int | str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(values, "_MOST_IN_MEMORY", 0)
    threads = set(threading.enumerate())
    broken = classifier(freeze=freeze, n_jobs=2, verbose=0)
    recorder = Recorder(error=KeyboardInterrupt)
    if where == "callback":
        broken.set_callbacks(recorder)
    else:
        broken.set_params(augment=Interrupting(0 if where == "first image" else 40), augment_views=2)
    with pytest.raises(KeyboardInterrupt):
        broken.fit(X, Y)
    assert set(threading.enumerate()) <= threads
    assert not list(tmp_path.iterdir())
    assert recorder.torn_down == (where == "callback")
    with pytest.raises(NotFittedError):
        check_is_fitted(broken)
    with pytest.raises(NotFittedError):
        broken.predict(MORE)


# Round trips


def test_clone_and_get_params_carry_no_fitted_state() -> None:
    fitted = classifier(freeze=-1).fit(X, Y)
    copied = clone(fitted)
    assert set(vars(copied)) - set(copied.get_params()) == set()
    assert {name for name in vars(copied) if name.endswith("_")} == set()
    with pytest.raises(NotFittedError):
        copied.predict(MORE)
    assert copied.get_params() == fitted.get_params()


@pytest.mark.parametrize("freeze", ["all", -1, 0])
def test_pickle_is_as_large_as_what_was_tuned(freeze: int | str) -> None:
    fitted = classifier(freeze=freeze).fit(X, Y)
    fitted.predict(MORE)
    tuned = sum(value.numel() * value.element_size() for value in fitted.tensors_.values())
    assert len(pickle.dumps(fitted)) < tuned + 50_000
    written = io.BytesIO()
    joblib.dump(fitted, written)
    assert len(written.getvalue()) < tuned + 50_000
    if freeze == "all":
        assert len(pickle.dumps(fitted)) < 30_000


def test_fitted_classifier_survives_a_round_trip_into_a_new_process(tmp_path: Path) -> None:
    fitted = {str(freeze): classifier(freeze=freeze).fit(X, Y) for freeze in ("all", -1, 0)}
    joblib.dump((fitted, MORE), tmp_path / "fitted.joblib")
    code = f"""
        import joblib, numpy
        fitted, images = joblib.load({str(tmp_path / "fitted.joblib")!r})
        found = dict((name, one.predict_proba(images)) for name, one in fitted.items())
        numpy.savez({str(tmp_path / "found.npz")!r}, **found)
    """
    subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(code)], check=True)
    with np.load(tmp_path / "found.npz") as found:
        for name, one in fitted.items():
            np.testing.assert_allclose(found[name], one.predict_proba(MORE), atol=1e-5)


@pytest.mark.parametrize("layers", ["penultimate", 1, "features.3.conv"])
@pytest.mark.parametrize("freeze", ["all", -1, 0])
def test_transform_equals_the_extractors(freeze: int | str, layers: str | int) -> None:
    fitted = classifier(freeze=freeze, layers=layers, pooling="gem", grid=2, normalize="l2", learning_rate=1e-2)
    fitted.fit(X, Y)
    rows = fitted.transform(MORE)
    assert rows.dtype == np.float32
    assert rows.shape == (20, len(fitted.get_feature_names_out()))
    extractor = fitted.to_extractor()
    assert isinstance(extractor, PretrainedFeatureExtractor)
    assert relative_difference(rows, extractor.transform(MORE)) < 1e-5
    pretrained = clone(extractor).set_params(backbone="featx_micro", layers=layers).transform(MORE)
    assert (relative_difference(rows, pretrained) > 1e-3) == (freeze != "all")


@pytest.mark.parametrize(
    "model",
    [
        "resnet18",
        "squeezenet1_1",
        pytest.param("mobilenet_v3_small", marks=pytest.mark.slow),
        pytest.param("shufflenet_v2_x0_5", marks=pytest.mark.slow),
        pytest.param("densenet121", marks=pytest.mark.slow),
        pytest.param("googlenet", marks=pytest.mark.slow),
        pytest.param("efficientnet_b0", marks=pytest.mark.slow),
        pytest.param("regnet_y_400mf", marks=pytest.mark.slow),
        pytest.param("mnasnet0_5", marks=pytest.mark.slow),
        pytest.param("mobilenet_v2", marks=pytest.mark.slow),
        pytest.param("convnext_tiny", marks=pytest.mark.slow),
        pytest.param("swin_t", marks=pytest.mark.slow),
        pytest.param("vgg11", marks=pytest.mark.slow),
        pytest.param("alexnet", marks=pytest.mark.slow),
    ],
)
def test_extractor_of_a_tuned_network_reads_the_same_layer(model: str) -> None:
    for layers in ("penultimate", -2):
        fitted = FineTuneClassifier(
            model, weights=None, layers=layers, freeze=-1, image_size=64, pixel_range=(0, 16), epochs=1, random_state=0
        ).fit(X[:6], Y[:6])
        assert relative_difference(fitted.transform(X[:4]), fitted.to_extractor().transform(X[:4])) < 1e-5


def test_extractor_reads_the_call_that_the_head_reads() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = InPlace()
    fitted = FineTuneClassifier(module, layers="relu#2", image_size=16, pixel_range=(0, 16), epochs=1, random_state=0)
    fitted.fit(X, Y)
    assert relative_difference(fitted.transform(MORE), fitted.to_extractor().transform(MORE)) < 1e-5


def test_network_is_built_once_for_all_that_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = classifier(freeze=-1).fit(X, Y)
    built, build = [], Model.build
    monkeypatch.setattr(Model, "build", lambda *arguments, **named: built.append(1) or build(*arguments, **named))
    for call in (fitted.predict, fitted.predict_proba, fitted.transform, fitted.decision_function, fitted.predict):
        call(MORE)
    assert len(built) == 1
    fitted.fit(X, Y).predict(MORE)
    assert len(built) == 3  # what is fitted again, and what it became
    fitted.tensors_ = {name: 0 * value for name, value in fitted.tensors_.items()}
    assert np.ptp(fitted.decision_function(MORE)) == 0


@pytest.mark.parametrize("freeze", [0, -1, "all"])
def test_threads_that_predict_at_once_do_not_mix(freeze: int | str) -> None:
    fitted = classifier(freeze=freeze, batch_size=2, n_jobs=1).fit(X, Y)
    sets = [np.roll(DIGITS.images[:20], 7 * number, axis=0) for number in range(3)]
    expected = [fitted.predict_proba(images) for images in sets]
    fitted = pickle.loads(pickle.dumps(fitted))  # whose first call of all is made by three at once
    found: dict[int, Any] = {}

    def work(number: int) -> None:
        try:
            found[number] = [fitted.predict_proba(sets[number]) for _ in range(3)]
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, several in found.items():
        assert not isinstance(several, Exception), several
        for one in several:
            np.testing.assert_allclose(one, expected[number], atol=1e-5)


@pytest.mark.parametrize("change", [{"freeze": "all"}, {"freeze": 0}, {"random_state": 5}, {"dropout": 0.9}])
def test_parameters_of_the_next_fit_do_not_change_the_fitted_network(change: dict[str, Any]) -> None:
    fitted = classifier(freeze=-1, learning_rate=1e-2, weights=None).fit(X, Y)
    expected = fitted.predict_proba(MORE)
    np.testing.assert_allclose(fitted.set_params(**change).predict_proba(MORE), expected, atol=1e-6)


class Single(nn.Module):
    """Copies of it are itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def __deepcopy__(self, _: dict[int, Any]) -> Single:
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def test_modules_that_share_tensors_with_their_copies_keep_them() -> None:
    network = nn.Sequential(
        OrderedDict(front=Single(), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(4, 2))
    )
    FineTuneClassifier(network, freeze=0, epochs=1, image_size=16).fit(X[:8] / 16, Y[:8] % 2)
    assert network.front.conv.weight.shape == (4, 3, 3, 3)


# Callbacks


@needs_callbacks
def test_callback_sees_every_epoch_and_may_stop() -> None:
    recorder = Recorder()
    fitted = classifier(epochs=3).set_callbacks(recorder).fit(X, Y)
    assert recorder.ended == ["epoch", "epoch", "epoch", "fit"]
    assert recorder.scores[-1] == fitted.score(X, Y)
    assert recorder.torn_down == 1
    stopping = Recorder(stop_after=2)
    fitted = classifier(epochs=5, freeze=-1).set_callbacks(stopping).fit(X, Y)
    assert stopping.ended == ["epoch", "epoch", "fit"]
    assert (fitted.n_iter_, fitted.best_epoch_) == (2, 1)


# What bad input gets


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    paths = []
    for i, colours in enumerate(np.random.default_rng(0).integers(0, 256, size=(12, 4, 5, 3), dtype=np.uint8)):
        paths.append(str(tmp_path / f"photo {i}.png"))
        Image.fromarray(colours).resize((20, 16)).save(paths[-1])
    Path(paths[4]).write_bytes(b"no image")
    return paths


@pytest.mark.parametrize("freeze", ["all", -1, 0])
def test_unreadable_image_is_named_or_left_out(photos: list[str], freeze: int | str) -> None:
    y = np.arange(12) % 2
    careful = classifier(freeze=freeze, pixel_range="auto")
    for augment in (None, "flip"):
        with pytest.raises(ImageError, match=r"X\[4\].*photo 4\.png"):
            clone(careful).set_params(augment=augment).fit(photos, y)
    good = [path for i, path in enumerate(photos) if i != 4]
    expected = clone(careful).fit(good, np.delete(y, 4))
    lenient = clone(careful).set_params(on_error="nan")
    with pytest.warns(UserWarning, match="1 of 12 images could not be read"):
        lenient.fit(photos, y)
    with pytest.warns(UserWarning, match="1 of 12 images could not be read"):
        proba = lenient.predict_proba(photos)
    assert np.isnan(proba[4]).all()
    np.testing.assert_allclose(np.delete(proba, 4, axis=0), expected.predict_proba(good), atol=1e-5)
    with pytest.warns(UserWarning, match="1 of 12"):
        assert np.isnan(lenient.transform(photos)[4]).all()
    with pytest.warns(UserWarning, match="1 of 12"), pytest.raises(ImageError, match=r"X\[4\]"):
        lenient.predict(photos)


def test_diverged_training_is_not_blamed_on_the_images() -> None:
    diverging = classifier(freeze=-1, optimizer="sgd", learning_rate=1e30, warmup=0.0, epochs=3)
    with pytest.raises(ValueError, match="learning_rate"):
        diverging.fit(X, Y).predict(MORE)


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"freeze": 9}, LayerError, r"from -4 to 4 .* freeze=9"),
        ({"freeze": -9}, LayerError, r"from -4 to 4 .* freeze=-9"),
        ({"freeze": "features.9"}, LayerError, r"features\.9"),
        ({"freeze": 1.5}, InvalidParameterError, "freeze"),
        ({"freeze": True}, LayerError, "freeze"),
        ({"layers": [0, 1]}, InvalidParameterError, "layers"),
        ({"layers": "all"}, ValueError, "layers"),
        ({"pooling": "map"}, ValueError, 'pooling="map"'),
        ({"learning_rate": 0.0}, InvalidParameterError, "learning_rate"),
        ({"augment": "flop"}, InvalidParameterError, "augment"),
        ({"hidden_layer_sizes": (0,)}, ValueError, "hidden_layer_sizes"),
        ({"hidden_layer_sizes": (1.5,)}, ValueError, "hidden_layer_sizes"),
        ({"epochs": 0}, InvalidParameterError, "epochs"),
    ],
    ids=str,
)
def test_wrong_parameter_is_named(parameters: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        classifier(**parameters).fit(X, Y)


def test_wrong_data_is_named() -> None:
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        classifier().fit(X, Y[:-1])
    with pytest.raises(ValueError, match="y"):
        classifier().fit(X, None)
    with pytest.raises(ValueError, match="sample_weight"):
        classifier().fit(X, Y, sample_weight=np.ones(7))
    with pytest.raises(ValueError, match=r"sample_weight|[Nn]egative"):
        classifier().fit(X, Y, sample_weight=-np.ones(30))
    with pytest.raises(ValueError, match=r"weighs something|non-zero"):
        classifier().fit(X, Y, sample_weight=np.zeros(30))
    with pytest.raises(NotFittedError):
        classifier().predict(MORE)


def test_partial_fit_refuses_labels_of_another_kind() -> None:
    online = classifier().partial_fit(X, Y % 2, classes=[0, 1])
    expected = online.predict_proba(MORE)
    with pytest.raises(ValueError, match="Labels as in"):
        online.partial_fit(X, np.stack([Y == 0, Y == 1], axis=1).astype(int))
    np.testing.assert_array_equal(online.predict_proba(MORE), expected)


def test_loaded_classifier_heeds_parameters_of_this_machine(tmp_path: Path) -> None:
    classifier().fit(X, Y).save(tmp_path / "model.safetensors")
    loaded = FineTuneClassifier.load(tmp_path / "model.safetensors").set_params(cache=str(tmp_path / "store"))
    loaded.predict(MORE)
    assert FeatureStore(tmp_path / "store").info()["images"] == len(MORE)


@pytest.mark.parametrize(
    ("precision", "optimizer", "tolerance"),
    [("bfloat16", "adamw", 5e-2), ("float16", "adamw", 1e-2), ("float16", "sgd", 1e-2)],
)
@pytest.mark.parametrize("freeze", ["all", -1, 0])
def test_half_precision_trains_the_same_float32_network(
    precision: str, optimizer: str, tolerance: float, freeze: int | str
) -> None:
    whole = classifier(freeze=freeze, optimizer=optimizer, linear_probe=False, max_grad_norm=1.0).fit(X, Y)
    half = clone(whole).set_params(precision=precision).fit(X, Y)
    assert {tensor.dtype for tensor in half.tensors_.values() if tensor.is_floating_point()} == {torch.float32}
    # Of the loss that training began with: how half precision rounds depends on the processor.
    first = whole.history_["loss"][0]
    np.testing.assert_allclose(half.history_["loss"], whole.history_["loss"], rtol=0, atol=tolerance * first)
    assert half.history_["loss"] != whole.history_["loss"]


def test_too_little_memory_is_told_in_words_that_help(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = classifier(freeze=-1).fit(X, Y)
    expected = fitted.predict_proba(MORE)

    def too_much(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(CrossEntropy, "__call__", too_much)
    with pytest.raises(OutOfMemory, match=r"batch_size=8.*freeze=-1") as caught:
        fitted.fit(X, Y)
    assert isinstance(caught.value, MemoryError | RuntimeError)
    np.testing.assert_array_equal(fitted.predict_proba(MORE), expected)  # the last fit is still there


def test_ready_tensors_take_only_views_of_their_shape() -> None:
    ready = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"preprocess=None, got augment='crop'"):
        classifier(preprocess=None, image_size=None, augment="crop").fit(ready, Y[:12])
    assert classifier(preprocess=None, image_size=None, augment="flip").fit(ready, Y[:12]).n_iter_ == 2
