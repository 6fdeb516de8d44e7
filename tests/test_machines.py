"""What people's processes and machines do to an estimator: other libraries, other platforms, no home."""

from __future__ import annotations

import copy
import functools
import pickle
import pickletools
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from conftest import SQUEEZENET
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn.utils import parametrizations

from featx import FeatureStore, FineTuneClassifier, PretrainedFeatureExtractor

X = load_digits().images[:24]
Y = load_digits().target[:24] % 3


def classifier(**params: Any) -> FineTuneClassifier:
    usual = {"image_size": 16, "pixel_range": (0, 16), "freeze": -1, "epochs": 1, "random_state": 0}
    return FineTuneClassifier(params.pop("backbone", "featx_micro"), **(usual | params))


def modules_in(pickled: bytes) -> set[str]:
    """Roots of all modules that a pickle names."""
    texts = [argument for _, argument, _ in pickletools.genops(pickled) if isinstance(argument, str)]
    return {text.replace(" ", ".").split(".")[0] for text in texts}


# pickles

WITH_PATHS = {
    "weights": Path("a.pth"),
    "cache": Path("cache"),
    "storage_options": {"certificates": [Path("a.pem"), {"key": Path("b.pem")}]},
}


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", [PretrainedFeatureExtractor, FineTuneClassifier])
def test_pickle_holds_no_class_of_paths(kind: type, protocol: int) -> None:
    for params in (WITH_PATHS, {"weights": (Path("a.ckpt"), "model")}, {"cache": FeatureStore(Path("a"))}):
        given = kind(**params)
        pickled = pickle.dumps(given, protocol)
        assert "pathlib" not in modules_in(pickled)
        loaded = pickle.loads(pickled).get_params()
        assert {name: _as_text(value) for name, value in given.get_params().items()} == loaded
        assert given.get_params() == clone(given).get_params() == kind(**params).get_params()


def _as_text(value: Any) -> Any:
    """A value with all paths in it as texts."""
    if isinstance(value, dict):
        return {key: _as_text(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_as_text, value))
    return str(value) if isinstance(value, Path) else value


@pytest.mark.realdata
def test_pickle_of_a_fitted_classifier_holds_no_class_of_paths_and_none_of_torch(tmp_path: Path) -> None:
    fitted = classifier(backbone="squeezenet1_1", weights=SQUEEZENET, cache=tmp_path, image_size=32).fit(X, Y)
    expected = fitted.predict_proba(X)
    pickled = pickle.dumps(fitted)
    assert not {"pathlib", "torch"} & modules_in(pickled)
    loaded = pickle.loads(pickled)
    np.testing.assert_array_equal(loaded.predict_proba(X), expected)
    assert all(isinstance(value, torch.Tensor) for value in loaded.tensors_.values())
    assert fitted.weights is SQUEEZENET


def test_fitted_classifier_goes_on_from_a_file_that_is_only_mapped(tmp_path: Path) -> None:
    fitted = classifier(freeze=0).fit(X, Y)
    joblib.dump(fitted, tmp_path / "model.joblib")
    mapped = joblib.load(tmp_path / "model.joblib", mmap_mode="r")
    np.testing.assert_array_equal(mapped.predict_proba(X), fitted.predict_proba(X))
    again = mapped.set_params(warm_start=True).fit(X, Y)
    np.testing.assert_array_equal(again.predict_proba(X), fitted.set_params(warm_start=True).fit(X, Y).predict_proba(X))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copy_keeps_what_was_given_and_fitted(copied: Any) -> None:
    fitted = classifier(storage_options={"key": Path("a")}).fit(X, Y)
    found = copied(fitted)
    assert found.get_params() == fitted.get_params()
    np.testing.assert_array_equal(found.predict_proba(X), fitted.predict_proba(X))
    assert (found.tensors_ is fitted.tensors_) == (copied is copy.copy)
    found.set_params(batch_size=3).fit(X, 2 - Y)
    assert fitted.batch_size == 32
    assert set(fitted.predict(X)) <= {0, 1, 2}


def parametrized() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU())


def test_pickle_of_a_parametrized_module_says_what_to_do() -> None:
    params = {"layers": "0", "image_size": 16, "pixel_range": (0, 16)}
    extractor = PretrainedFeatureExtractor(parametrized(), **params)
    expected = extractor.transform(X)
    with pytest.raises(TypeError, match=r"got backbone=Sequential .* a function that returns the module as backbone\."):
        pickle.dumps(extractor)
    for copied in (copy.copy(extractor), copy.deepcopy(extractor), clone(extractor)):
        np.testing.assert_array_equal(copied.transform(X), expected)
    loaded = pickle.loads(pickle.dumps(extractor.set_params(backbone=parametrized)))
    np.testing.assert_array_equal(loaded.transform(X), expected)


# other libraries


def test_fit_does_not_run_what_others_wrap_around_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = classifier().fit(X, Y).predict_proba(X)
    seen, fit = [], LogisticRegression.fit

    @functools.wraps(fit)
    def logging(self: Any, *args: Any, **given: Any) -> Any:  # as mlflow.sklearn.autolog() does
        seen.append(self)
        return fit(self, *args, **given)

    monkeypatch.setattr(LogisticRegression, "fit", logging)
    np.testing.assert_array_equal(classifier().fit(X, Y).predict_proba(X), expected)
    assert not seen
    LogisticRegression().fit(X.reshape(24, -1), Y)
    assert len(seen) == 1  # the user's own is logged as ever
