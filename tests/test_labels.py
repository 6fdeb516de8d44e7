"""A user's y: what is held out of it, codes that are none, and labels that are missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV
from sklearn.multioutput import MultiOutputClassifier

from featx import FineTuneClassifier, PretrainedFeatureExtractor
from featx.plots import EmbeddingDisplay, LayerScoreDisplay, MistakesDisplay
from featx.training.classification import Labels
from featx.training.labels import check_labelled
from featx.training.validation import hold_out

mpl.use("agg")
IMAGES = load_digits().images
MULTILABEL = np.array([[0, 1], [1, 0], [1, 1], [0, 0]] * 3)


def classifier(**parameters: Any) -> FineTuneClassifier:
    usual = {"image_size": 16, "pixel_range": (0, 16), "freeze": "all", "epochs": 1, "batch_size": 8}
    return FineTuneClassifier("featx_micro", random_state=0, **{**usual, **parameters})


# What is held out


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=15),
    st.floats(0.001, 0.999),
    st.integers(0, 2**31 - 2),
    st.randoms(use_true_random=False),
)
def test_held_out_images_are_of_every_class_that_can_spare_one(
    sizes: list[int], fraction: float, seed: int, random: Any
) -> None:
    codes = np.repeat(np.arange(len(sizes)) * 3, sizes)  # not every class there is has images
    codes = codes[random.sample(range(len(codes)), len(codes))]
    if max(sizes) == 1:
        with pytest.raises(ValueError, match="early_stopping=False"):
            hold_out(codes, fraction, seed)
        return
    training, held_out = hold_out(codes, fraction, seed)
    assert sorted([*training, *held_out]) == list(range(len(codes)))
    for code, size in enumerate(sizes):
        held = int((codes[held_out] == 3 * code).sum())
        if size == 1:
            assert held == 0
        else:
            assert 1 <= held < size
            assert held in (1, size - 1) or abs(held - fraction * size) < 1
    if min(min(sizes) * fraction, min(sizes) * (1 - fraction)) >= 1:  # nothing stands against the share of all
        assert abs(len(held_out) - fraction * len(codes)) < 1 + 1e-9
    for first, again in zip((training, held_out), hold_out(codes, fraction, seed), strict=True):
        np.testing.assert_array_equal(first, again)


def test_held_out_images_are_drawn_by_the_seed() -> None:
    codes = np.arange(60) % 3
    drawn = {tuple(hold_out(codes, 0.3, seed)[1].tolist()) for seed in range(20)}
    assert len(drawn) == 20


def test_images_with_several_labels_are_held_out_by_their_number() -> None:
    assert len(hold_out(MULTILABEL, 0.25, 0)[1]) == 3


@pytest.mark.parametrize("counts", [[4] * 10, [20, 20, 1], [2, 1, 1, 1], [3]], ids=str)
def test_early_stopping_trains_on_small_classes(counts: list[int]) -> None:
    y = np.repeat(np.arange(len(counts)), counts)
    fitted = classifier(early_stopping=True).fit(IMAGES[: len(y)], y)
    assert fitted.classes_.tolist() == list(range(len(counts)))
    assert len(fitted.history_["validation_loss"]) == fitted.n_iter_


def test_early_stopping_in_a_search_over_small_classes_gives_scores() -> None:
    search = GridSearchCV(
        classifier(early_stopping=True), {"dropout": [0.0, 0.5]}, cv=2, error_score="raise", refit=False
    )
    assert np.isfinite(search.fit(IMAGES[:40], np.arange(40) % 10).cv_results_["mean_test_score"]).all()


def test_early_stopping_without_two_images_of_a_class_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"Two images .* got 3 of 3 classes\. Set early_stopping=False\.$"):
        classifier(early_stopping=True).fit(IMAGES[:3], [0, 1, 2])
    assert classifier(early_stopping=False).fit(IMAGES[:3], [0, 1, 2]).n_iter_ == 1


# Codes that are none


_FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    "array": np.asarray,
    "floats": lambda y: y.astype(float),
    "list": np.ndarray.tolist,
    "frame": pd.DataFrame,
    "nullable frame": lambda y: pd.DataFrame(y).astype("Int64"),
    "polars": pl.DataFrame,
    "csr": sparse.csr_matrix,
    "coo": sparse.coo_array,
}


@pytest.mark.parametrize("form", _FORMS.values(), ids=_FORMS)
def test_labels_coded_otherwise_than_0_and_1_are_refused_with_a_way_out(form: Callable[[np.ndarray], Any]) -> None:
    for low, high in ((-1, 1), (0, 2), (1, 2), (0, 255)):
        y = form(np.where(MULTILABEL, high, low))
        with pytest.raises(ValueError, match=f"^0 and 1 are expected .* got y with {low}") as caught:
            classifier().fit(IMAGES[:12], y)
        way_out = str(caught.value).partition("Pass ")[2].removesuffix(".")
        mended = eval(way_out, {"numpy": np, "y": y})  # as a user would type it
        np.testing.assert_array_equal(Labels.of("x", mended).codes, MULTILABEL)
        with pytest.raises(ValueError, match=r"^0 and 1 are expected"):
            classifier().partial_fit(IMAGES[:12], y)
    np.testing.assert_array_equal(Labels.of("x", form(MULTILABEL)).codes, MULTILABEL)


def test_mended_labels_train() -> None:
    y = np.where(MULTILABEL, 1, -1)
    fitted = classifier(epochs=3).fit(IMAGES[:12], np.asarray(y) == 1)
    assert min(fitted.history_["loss"]) >= 0
    assert fitted.predict(IMAGES[:2]).shape == (2, 2)


def test_columns_of_more_than_two_codes_are_refused_with_a_way_out() -> None:
    y = MULTILABEL + np.arange(12)[:, np.newaxis] % 2
    with pytest.raises(ValueError, match=r"got y with 0, 1, 2\. Fit one classifier a column, as MultiOutputClassifier"):
        classifier().fit(IMAGES[:12], y)
    fitted = MultiOutputClassifier(classifier()).fit(IMAGES[:12], y)
    assert fitted.predict(IMAGES[:3]).shape == (3, 2)


@pytest.mark.parametrize("given", [np.asarray, sparse.csr_matrix])
def test_shares_are_refused_with_a_way_out_that_keeps_what_they_say(given: Callable[[np.ndarray], Any]) -> None:
    shares = np.array([[0.25, 1.0], [0.75, 0.5], [0.0, 0.1]] * 2)
    y = given(shares)
    with pytest.raises(ValueError, match=r"Pass (.*)\.$") as caught:
        classifier().fit(IMAGES[:6], y)
    mended = eval(str(caught.value).rpartition("Pass ")[2].rstrip("."), {"numpy": np, "y": y})
    assert classifier().fit(IMAGES[:6], mended).predict(IMAGES[:6]).shape == (6, 2)
    np.testing.assert_array_equal(Labels.of("x", mended).y, shares >= 0.5)


@pytest.mark.parametrize(
    ("classes", "words"), [(["ant", None], "missing"), ([0.0, np.nan], "missing"), (np.array(["a", 1], object), "kind")]
)
def test_classes_that_are_no_labels_are_refused(classes: Any, words: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s){words}.*got classes=|got classes=.*{words}"):
        classifier().partial_fit(IMAGES[:2], ["ant", "ant"], classes=classes)


def test_weights_of_0_are_told_with_the_images_that_have_them() -> None:
    labels = Labels.of("x", ["a", "a", "b"], class_weight={"a": 0, "b": 1})
    with pytest.raises(ValueError, match=r"got 2 of 3 images, .* class_weight or sample_weight is 0"):
        labels.targets(np.array([0, 1]), np.ones(3))


def test_labels_of_several_kinds_are_refused_with_a_way_out() -> None:
    y: Any = np.array(["ant", 1, "bee"], dtype=object)
    with pytest.raises(ValueError, match=r"got y with int and str\. Pass numpy\.asarray\(y, dtype=str\)\.$"):
        classifier().fit(IMAGES[:3], y)
    assert classifier().fit(IMAGES[:3], np.asarray(y, dtype=str)).classes_.tolist() == ["1", "ant", "bee"]


# Labels that are missing


_TEXTS = ["ant", None, "bee", "ant"]
_UNLABELLED = {
    "str Series": lambda: pd.Series(_TEXTS, dtype="str"),
    "string Series": lambda: pd.Series(_TEXTS, dtype="string"),
    "category": lambda: pd.Series(_TEXTS, dtype="category"),
    "category of numbers": lambda: pd.Series([1, None, 2, 1], dtype="category"),
    "object, None": lambda: pd.Series(_TEXTS, dtype=object),
    "object, NaN": lambda: pd.Series(["ant", np.nan, "bee", "ant"], dtype=object),
    "object, NA": lambda: pd.Series(["ant", pd.NA, "bee", "ant"], dtype=object),
    "Int64": lambda: pd.Series([1, None, 2, 1], dtype="Int64"),
    "boolean": lambda: pd.Series([True, None, False, True], dtype="boolean"),
    "dates": lambda: pd.to_datetime(pd.Series(["2020-01-01", None, "2021-01-01", "2020-01-01"])),
    "frame": lambda: pd.DataFrame({"label": _TEXTS}),
    "index": lambda: pd.Index(_TEXTS),
    "polars": lambda: pl.Series(_TEXTS),
    "polars, category": lambda: pl.Series(_TEXTS, dtype=pl.Categorical),
    "polars, numbers": lambda: pl.Series([1, None, 2, 1]),
    "list, None": lambda: _TEXTS,
    "list, NaN": lambda: ["ant", float("nan"), "bee", "ant"],
    "tuple of numbers": lambda: (1, float("nan"), 2, 1),
    "floats": lambda: np.array([1, np.nan, 2, 1]),
    "objects": lambda: np.array(_TEXTS, dtype=object),
    "strings of numpy": lambda: np.array(["ant", np.nan, "bee", "ant"], dtype=np.dtypes.StringDType(na_object=np.nan)),
    "masked": lambda: np.ma.masked_array([1, 7, 2, 1], mask=[False, True, False, False]),
    "two labels": lambda: [[0, 1], [None, 1], [1, 0], [1, 1]],
    "two labels, frame": lambda: pd.DataFrame({"a": [0, None, 1, 1], "b": [1, 1, 0, 1]}),
}


@pytest.mark.parametrize("kind", _UNLABELLED)
def test_missing_label_is_told_as_scikit_learn_does(kind: str) -> None:
    y = _UNLABELLED[kind]()
    with pytest.raises(ValueError, match=r"^Input y contains NaN: 1 of 4 images have no label, those in rows \[1\]\."):
        classifier().fit(IMAGES[:4], y)
    with pytest.raises(ValueError, match=r"^Input y contains NaN"):
        classifier().partial_fit(IMAGES[:4], y, classes=[1, 2])


def test_rows_without_a_label_removed_as_advised_train() -> None:
    y = pd.Series(_TEXTS * 3, dtype="category")
    with pytest.raises(ValueError, match=r"3 of 12 .*rows \[1, 5, 9\]\. Remove these rows from X and y\.$"):
        classifier().fit(IMAGES[:12], y)
    fitted = classifier().fit(np.delete(IMAGES[:12], [1, 5, 9], axis=0), y.drop([1, 5, 9]))
    assert fitted.classes_.tolist() == ["ant", "bee"]


def test_many_missing_labels_are_counted_and_the_first_are_named() -> None:
    with pytest.raises(ValueError, match=r"8 of 9 images .* rows \[1, 2, 3, 4, 5\] and 3 more\."):
        check_labelled(["ant", *[None] * 8])


@pytest.mark.parametrize("y", [[0, np.inf, 1], np.array([0, -np.inf]), sparse.csr_matrix([[0, np.inf], [1, 0]])])
def test_infinite_label_is_told_as_scikit_learn_does(y: Any) -> None:
    with pytest.raises(ValueError, match=r"^Input y contains infinity"):
        Labels.of("x", y)


def test_missing_label_is_told_by_score_and_displays_too() -> None:
    X, y = IMAGES[:6], pd.Series(["ant", None, "bee"] * 2, dtype="str")
    fitted = classifier().fit(X, np.arange(6) % 2)
    extractor = PretrainedFeatureExtractor("featx_micro", pixel_range=(0, 16), image_size=16)
    for labels in (y, [*y], y.astype(object)):
        with pytest.raises(ValueError, match=r"^Input y contains NaN"):
            fitted.score(X, labels)
    with pytest.raises(ValueError, match=r"^Input y contains NaN"):
        MistakesDisplay.from_estimator(fitted, X, y)
    with pytest.raises(ValueError, match=r"^Input y contains NaN"):
        MistakesDisplay.from_predictions(y, ["ant"] * 6, np.ones(6), X / 16)
    with pytest.raises(ValueError, match=r"^Input y contains NaN"):
        EmbeddingDisplay.from_estimator(extractor, X, y)
    with pytest.raises(ValueError, match=r"^Input y contains NaN"):
        LayerScoreDisplay.from_estimator(extractor, X, y, cv=2)
