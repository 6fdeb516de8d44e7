"""FineTuneRegressor: what it learns, in what units, and what it refuses. What it shares is tested on the classifier."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from commands import runner
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from torch import nn

from featx import FineTuneClassifier, FineTuneRegressor, PretrainedFeatureExtractor
from featx.cli.commands import featx
from featx.exceptions import ImageError, WeightsError
from featx.training.regression import Scale, SquaredError

DIGITS = load_digits()
X, MORE = DIGITS.images[:40], DIGITS.images[100:120]
INK = np.stack([DIGITS.images.mean((1, 2)), DIGITS.images[:, :4].mean((1, 2))], axis=1)
Y, Y_MORE = INK[:40], INK[100:120]


def regressor(**parameters: Any) -> FineTuneRegressor:
    settings = {"image_size": 16, "pixel_range": (0, 16), "epochs": 2, "batch_size": 8, "random_state": 0}
    return FineTuneRegressor("featx_micro", **{**settings, "freeze": "all", **parameters})


def features(images: np.ndarray) -> np.ndarray:
    return PretrainedFeatureExtractor("featx_micro", image_size=16, pixel_range=(0, 16)).transform(images)


def dimmed(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Images, and how bright each was made."""
    brightness = np.random.default_rng(0).uniform(0.1, 1, size=n)
    return DIGITS.images[:n] * brightness[:, None, None], brightness


def seed_of(random_state: int) -> int:
    return int(check_random_state(random_state).randint(2**31 - 1))


# What is learnt


@pytest.mark.parametrize("loss", ["squared_error", "huber"])
def test_training_equals_a_loop_written_by_hand(loss: str) -> None:
    weights = np.random.default_rng(0).uniform(0.5, 2, size=len(X))
    fitted = regressor(
        loss=loss, linear_probe=False, hidden_layer_sizes=(6,), learning_rate=0.01, lr_schedule="constant", warmup=0.0,
        weight_decay=0.0, optimizer="adam", epochs=3,
    ).fit(X, 100 * Y, sample_weight=weights)  # fmt: skip

    if loss == "huber":
        low, mean, high = np.quantile(100 * Y, [0.25, 0.5, 0.75], axis=0, weights=weights, method="inverted_cdf")
        spread = (high - low) / 1.349
    else:
        mean = np.average(100 * Y, axis=0, weights=weights)
        spread = np.average((100 * Y - mean) ** 2, axis=0, weights=weights) ** 0.5
    rows, wanted = torch.from_numpy(features(X)), torch.from_numpy((100 * Y - mean) / spread).float()
    share = torch.from_numpy(weights / weights.mean()).float()
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(0))
        head = nn.Sequential(nn.Linear(rows.shape[1], 6), nn.ReLU(), nn.Linear(6, 2))
    learner = torch.optim.Adam(head.parameters(), lr=0.01)
    order, expected = torch.Generator().manual_seed(seed_of(0)), []
    for _ in range(3):
        total = 0.0
        for batch in torch.randperm(40, generator=order).split(8):
            gap = head(rows[batch]) - wanted[batch]
            error = gap**2 if loss == "squared_error" else torch.where(gap.abs() <= 1, gap**2 / 2, gap.abs() - 0.5)
            each = error.mean(1)
            learner.zero_grad()
            (each * share[batch]).mean().backward()
            learner.step()
            total += float((each.detach() * share[batch]).sum())
        expected.append(total / float(share.sum()))
    np.testing.assert_allclose(fitted.history_["loss"], expected, rtol=1e-4)
    with torch.no_grad():
        found = head(torch.from_numpy(features(MORE))).numpy() * spread + mean
    np.testing.assert_allclose(fitted.predict(MORE), found, rtol=1e-4)


@pytest.mark.parametrize(("linear_probe", "ridge"), [(True, RidgeCV(np.logspace(0, 5, 11))), (3.0, Ridge(3.0))])
def test_head_starts_from_ridge_regression_on_features(linear_probe: bool | float, ridge: Any) -> None:
    # Steps at no speed leave the start of the head as it is.
    probe = regressor(linear_probe=linear_probe, learning_rate=1e-12, epochs=1).fit(X, Y[:, 0])
    target = StandardScaler().fit(Y[:, :1])
    scaler = StandardScaler().fit(features(X))
    scaler.scale_ = np.maximum(scaler.scale_, 0.1 * np.median(scaler.scale_[scaler.var_ > 1e-12]))
    ridge.fit(scaler.transform(features(X)), target.transform(Y[:, :1]).ravel())
    expected = target.inverse_transform(ridge.predict(scaler.transform(features(MORE)))[:, None])[:, 0]
    np.testing.assert_allclose(probe.predict(MORE), expected, rtol=1e-4)


def test_feature_that_hardly_varies_does_not_outweigh_the_others() -> None:
    rng = np.random.default_rng(0)
    rows, out = rng.normal(size=(30, 50)).astype(np.float32), nn.Linear(50, 1)
    rows[:, 0] *= 1e-4
    rows[:, 1] = 0.0
    target = rows[:, 2:].sum(1, keepdims=True)
    SquaredError().probe(rows, target, np.ones(30), 0.0, out)
    seldom = np.zeros((1, 50), dtype=np.float32)
    seldom[0, :2] = 1.0  # as the others are wide
    with torch.no_grad():
        plain, found = (float(out(torch.from_numpy(one))) for one in (np.zeros_like(seldom), seldom))
    assert abs(found - plain) < 10 * target.std()


def test_wild_target_decides_little_with_huber() -> None:
    images, brightness = dimmed(120)
    wrong = brightness.copy()
    wrong[7] = 1e4
    found = [
        regressor(loss=loss, epochs=10).fit(images[:80], wrong[:80]).predict(images[80:])
        for loss in ("squared_error", "huber")
    ]
    gaps = [np.abs(predicted - brightness[80:]).mean() for predicted in found]
    assert gaps[1] < 0.5 < gaps[0]


def test_every_target_gets_a_penalty_of_its_own() -> None:
    noise = np.random.default_rng(0).normal(size=(len(X), 1))
    both = regressor(learning_rate=1e-12, epochs=1).fit(X, np.hstack([Y[:, :1], noise])).predict(MORE)
    for column, target in enumerate((Y[:, 0], noise[:, 0])):
        alone = regressor(learning_rate=1e-12, epochs=1).fit(X, target).predict(MORE)
        np.testing.assert_allclose(both[:, column], alone, rtol=1e-3, atol=1e-4)


def test_tuning_learns_what_the_image_shows_better_than_the_probe_knows_it() -> None:
    images, brightness = dimmed(300)
    probe, tuned = (
        regressor(freeze=-1, **how).fit(images[:200], brightness[:200]).score(images[200:], brightness[200:])
        for how in ({"learning_rate": 1e-12, "epochs": 1}, {"learning_rate": 1e-3, "epochs": 10})
    )
    assert 0.5 < probe < tuned


@pytest.mark.parametrize("freeze", ["all", -1])
def test_units_of_the_target_change_nothing_else(freeze: int | str) -> None:
    plain = regressor(freeze=freeze).fit(X, Y)
    other = regressor(freeze=freeze).fit(X, Y * [1e6, 1e-6] + [5e6, -3.0])
    np.testing.assert_allclose(other.history_["loss"], plain.history_["loss"], rtol=1e-3)
    np.testing.assert_allclose((other.predict(MORE) - [5e6, -3.0]) / [1e6, 1e-6], plain.predict(MORE), rtol=1e-3)


@pytest.mark.parametrize("shape", [(40,), (40, 1), (40, 2)])
def test_predictions_have_the_shape_of_y(shape: tuple[int, ...]) -> None:
    found = regressor().fit(X, Y.ravel()[: np.prod(shape)].reshape(shape)).predict(MORE)
    assert found.shape == (20, *shape[1:])
    assert found.dtype == np.float64


def test_target_in_any_container_is_the_same() -> None:
    expected = regressor().fit(X, Y).predict(MORE)
    for y in (Y.tolist(), pd.DataFrame(Y), np.asfortranarray(Y)):
        np.testing.assert_array_equal(regressor().fit(X, y).predict(MORE), expected)


@pytest.mark.parametrize("value", [0.0, 7.0, 0.1, -3e9])
def test_target_that_never_varies_is_predicted(value: float) -> None:
    found = regressor(epochs=1).fit(X, np.full(40, value)).predict(MORE)
    np.testing.assert_allclose(found, value, atol=1e-3, rtol=1e-6)


@pytest.mark.parametrize("unit", [1e200, 1e-200])
def test_very_large_and_very_small_targets_are_learnt_like_others(unit: float) -> None:
    found = regressor(freeze="all").fit(X, Y * unit).predict(MORE)
    np.testing.assert_allclose(found / unit, regressor(freeze="all").fit(X, Y).predict(MORE), rtol=1e-4)


def test_small_changes_of_large_numbers_are_changes() -> None:
    seconds = 1.7e9 + np.tile([-0.2, 0.2], 500_000)[:, None]
    assert Scale.of(seconds, np.ones(len(seconds)), single=True).spread == pytest.approx(0.2, rel=1e-3)


def test_spread_of_equal_numbers_is_none_though_their_mean_is_rounded() -> None:
    values = np.full((1001, 1), 0.1) * [1, 1e9]
    assert Scale.of(values, np.full(1001, 0.3), single=False).spread.tolist() == [1, 1]
    assert Scale.of(1e9 + np.arange(4.0)[:, None], np.ones(4), single=True).spread == pytest.approx(np.std(range(4)))


@pytest.mark.parametrize("freeze", ["all", -1])
def test_weight_of_zero_leaves_an_image_out(freeze: int | str) -> None:
    weights = np.ones(40)
    weights[30:] = 0
    wild = Y.copy()
    wild[30:] = 1e9
    left_out = regressor(freeze=freeze).fit(X, wild, sample_weight=weights).predict(MORE)
    np.testing.assert_allclose(left_out, regressor(freeze=freeze).fit(X[:30], Y[:30]).predict(MORE), rtol=1e-5)


def test_mixed_images_have_mixed_targets() -> None:
    """A linear target of linear features stays linear: mixing pairs of them moves no solution."""
    rows = features(X)
    target = rows @ np.random.default_rng(0).normal(size=rows.shape[1])
    mixed = regressor(mixup=1.0, learning_rate=1e-5, linear_probe=1e-3).fit(X, target)
    assert max(mixed.history_["loss"]) < 1e-3


# Early stopping, going on


def test_early_stopping_keeps_the_epoch_of_the_least_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[np.ndarray] = []
    hold_out = FineTuneRegressor._hold_out

    def noting(self: FineTuneRegressor, *arguments: Any) -> Any:
        held.append(hold_out(self, *arguments)[1])
        return hold_out(self, *arguments)

    monkeypatch.setattr(FineTuneRegressor, "_hold_out", noting)
    fitted = regressor(
        early_stopping=True, validation_fraction=0.3, n_iter_no_change=3, epochs=8, optimizer="sgd", learning_rate=0.05
    ).fit(X, Y)
    losses, (rows,) = fitted.history_["validation_loss"], held
    assert fitted.best_epoch_ == int(np.argmin(losses))
    left = np.setdiff1d(np.arange(40), rows)
    assert len(rows) == 12
    # In the units of the images that are trained on, whose held-out company must not decide them.
    gaps = (fitted.predict(X[rows]) - Y[rows]) / Y[left].std(0)
    assert min(losses) == pytest.approx((gaps**2).mean(), rel=1e-4)
    score = fitted.history_["validation_score"][fitted.best_epoch_]
    assert score == pytest.approx(r2_score(Y[rows], fitted.predict(X[rows])), rel=1e-4)
    assert fitted.score(X[rows], Y[rows]) == pytest.approx(score, rel=1e-4)


def test_going_on_keeps_the_first_units() -> None:
    online = regressor(learning_rate=1e-3, linear_probe=False)
    online.partial_fit(X[:20], Y[:20])
    mean, spread = online._scale.mean, online._scale.spread
    for _ in range(3):
        online.partial_fit(X[20:], Y[20:] + 100)
    np.testing.assert_array_equal((online._scale.mean, online._scale.spread), (mean, spread))
    assert online.n_iter_ == 4
    assert online.history_["loss"][3] < online.history_["loss"][1]
    with pytest.raises(ValueError, match=r"shape \(n, 2\), got y of shape \(10,\)"):
        online.partial_fit(X[:10], Y[:10, 0])
    warm = regressor(warm_start=True, learning_rate=1e-3, linear_probe=False)
    first = warm.fit(X, Y).history_["loss"]
    assert warm.fit(X, Y).history_["loss"][0] < first[0]
    with pytest.raises(ValueError, match="Set warm_start=False"):
        warm.fit(X, Y[:, 0])


@pytest.mark.parametrize("rate", [1e2, 1e19])
def test_divergence_is_told_as_such(rate: float) -> None:
    wild = {"linear_probe": False, "optimizer": "sgd", "batch_size": 40, "epochs": 3, "learning_rate": rate}
    for early_stopping in (False, True):
        with pytest.raises(ValueError, match="training diverged"):
            regressor(freeze=-1, early_stopping=early_stopping, **wild).fit(X, Y)


# In and out


def test_round_trips_give_the_same_predictions(tmp_path: Path) -> None:
    for freeze in ("all", -1):
        fitted = regressor(freeze=freeze, loss="huber").fit(X, Y)
        expected = fitted.predict(MORE)
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(fitted)).predict(MORE), expected)
        fitted.save(tmp_path / f"{freeze}.safetensors")
        np.save(tmp_path / "expected.npy", expected)
        np.save(tmp_path / "more.npy", MORE)
        code = f"""
            import numpy
            from featx import FineTuneRegressor
            loaded = FineTuneRegressor.load({str(tmp_path / f"{freeze}.safetensors")!r})
            assert loaded.loss == "huber"
            images, expected = (numpy.load({str(tmp_path)!r} + "/" + name) for name in ("more.npy", "expected.npy"))
            numpy.testing.assert_allclose(loaded.predict(images), expected, rtol=1e-5)
        """
        subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(code)], check=True)


def test_file_of_another_estimator_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fitted.safetensors"
    regressor().fit(X, Y).save(path)
    with pytest.raises(WeightsError, match=r"FineTuneClassifier\.save.*it is of FineTuneRegressor"):
        FineTuneClassifier.load(path)
    FineTuneClassifier("featx_micro", freeze="all", epochs=1, pixel_range=(0, 16)).fit(X, Y[:, 0] > 5).save(path)
    with pytest.raises(WeightsError, match=r"FineTuneRegressor\.save.*it is of FineTuneClassifier"):
        FineTuneRegressor.load(path)


def test_command_line_predicts_numbers(tmp_path: Path) -> None:
    paths = []
    for row, image in enumerate((X[:6] * 15).astype(np.uint8)):
        Image.fromarray(image).save(tmp_path / f"{row}.png")
        paths.append(str(tmp_path / f"{row}.png"))
    fitted = FineTuneRegressor("featx_micro", freeze="all", image_size=16, epochs=1, random_state=0).fit(
        paths, Y[:6, 0]
    )
    fitted.save(tmp_path / "model.safetensors")
    given = ["predict", str(tmp_path / "model.safetensors"), "--no-cache"]
    assert runner().invoke(featx, [*given, *paths, "-o", str(tmp_path / "found.csv")]).exit_code == 0
    np.testing.assert_allclose(pd.read_csv(tmp_path / "found.csv")["label"], fitted.predict(paths), rtol=1e-5)
    refused = runner().invoke(featx, [*given, str(tmp_path), "--score"])
    assert refused.exit_code == 2
    assert "learnt with labels" in refused.output


def test_plots_know_it() -> None:
    plots = pytest.importorskip("featx.plots")
    fitted = regressor().fit(X, Y)
    assert plots.TrainingCurveDisplay.from_estimator(fitted).loss == fitted.history_["loss"]
    with pytest.raises(TypeError, match="FineTuneClassifier is expected"):
        plots.ClassMapDisplay.from_estimator(fitted, X[0])


def test_grid_search_ranks_by_r2() -> None:
    bright, target = dimmed(60)
    untrained = regressor(learning_rate=1e-12, epochs=1)
    search = GridSearchCV(untrained, {"linear_probe": [False, True]}, cv=3).fit(bright, target)
    assert search.best_params_ == {"linear_probe": True}
    expected = r2_score(target[:20], untrained.fit(bright[20:], target[20:]).predict(bright[:20]))
    assert search.cv_results_["split0_test_score"][1] == pytest.approx(expected, rel=1e-3)


def test_shared_parameters_have_the_classifiers_defaults() -> None:
    mine, its = (inspect.signature(cls).parameters for cls in (FineTuneRegressor, FineTuneClassifier))
    assert set(its) - set(mine) == {"label_smoothing", "class_weight"}
    assert set(mine) - set(its) == {"loss"}
    shared = [name for name in its if name in mine]
    assert [name for name in mine if name in its] == shared
    assert {name: mine[name].default for name in shared} == {name: its[name].default for name in shared}


@pytest.mark.filterwarnings("ignore:1 of 4 images")
def test_unreadable_image_is_left_out_and_predicted_as_nan() -> None:
    photos = list((X[:4] * 15).astype(np.uint8))
    photos[1] = None
    given = {"pixel_range": "auto", "on_error": "nan"}
    fitted = regressor(**given).fit(photos, Y[:4])
    kept = [0, 2, 3]
    alone = regressor(**given).fit([photos[row] for row in kept], Y[kept])
    found = fitted.predict(photos)
    assert np.isnan(found[1]).all()
    np.testing.assert_allclose(found[kept], alone.predict([photos[row] for row in kept]), rtol=1e-5)


# What is refused


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (None, "requires y to be passed"),
        (["many", "few"] * 20, "FineTuneClassifier learns labels"),
        (Y[:, 0].astype(str), "FineTuneClassifier learns labels"),
        (np.arange(40).astype("datetime64[D]"), "Numbers are expected in y"),
        ([None] + [1.0] * 39, "1 of 40 images have no"),
        ([np.inf] + [1.0] * 39, "infinity"),
        (np.zeros((40, 2, 2)), "3"),
        (Y[:30], "inconsistent numbers of samples"),
        (np.zeros((40, 0)), "0 feature"),
    ],
)
def test_wrong_target_is_named(y: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        regressor().fit(X, y)


def test_unfitted_regressor_says_so() -> None:
    with pytest.raises(NotFittedError):
        regressor().predict(X)


def test_score_of_an_unreadable_image_is_refused() -> None:
    photos = list((X[:4] * 15).astype(np.uint8))
    fitted = regressor(pixel_range="auto", on_error="nan").fit(photos, Y[:4])
    photos[1] = None
    with pytest.warns(match="1 of 4"), pytest.raises(ImageError, match=r"X\[1\]"):
        fitted.score(photos, Y[:4])


def test_wrong_loss_is_named() -> None:
    with pytest.raises(ValueError, match="'huber'"):
        regressor(loss="absolute").fit(X, Y)


def test_huber_is_half_the_square_near_zero_and_linear_far_away() -> None:
    gaps = torch.tensor([[0.5], [-3.0]])
    assert SquaredError(huber=True)(gaps, torch.zeros(2, 1)).tolist() == [0.125, 2.5]
    assert float(SquaredError()(gaps, torch.zeros(2, 1), mean=True)) == pytest.approx((0.25 + 9) / 2)
