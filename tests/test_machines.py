"""What people's processes and machines do to an estimator: other libraries, other platforms, no home."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import pickletools
import pwd
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from children import in_child
from commands import runner
from conftest import SQUEEZENET
from PIL import Image
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from torch import nn
from torch.nn.utils import parametrizations

from featx import FeatureStore, FineTuneClassifier, PretrainedFeatureExtractor
from featx.cli.commands import featx
from featx.exceptions import ImageError, NotFinite, StoreError, StoreWarning, UnreadableImage
from featx.store import places, session, why_unusable
from featx.store.places import NoPlace, OnNetwork
from featx.system import temporary
from featx.system.temporary import has_temporary_folder

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


@pytest.mark.parametrize("kind", [PretrainedFeatureExtractor, FineTuneClassifier])
def test_pickle_of_a_version_without_a_parameter_has_its_default(kind: type) -> None:
    for missing, default in kind().get_params().items():
        earlier = kind(verbose=3)
        del earlier.__dict__[missing]
        state = earlier.__dict__.copy()
        later = kind.__new__(kind)
        later.__setstate__(state)
        assert later.get_params() == kind(verbose=3).get_params() | {missing: default}


def test_fitted_classifier_with_tensors_of_a_user_is_pickled() -> None:
    fitted = FineTuneClassifier("featx_micro", freeze="all", image_size=16, pixel_range=(0, 16), epochs=1).fit(X, Y)
    expected = fitted.predict_proba(X)
    fitted.tensors_ = {name: nn.Parameter(value) for name, value in fitted.tensors_.items()}
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fitted)).predict_proba(X), expected)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_store_of_another_user_is_told_as_one_that_keeps_nothing() -> None:
    def as_another_user() -> str | None:
        os.setgid(54321)
        os.setuid(54321)
        return why_unusable(store)

    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(folder)
        assert why_unusable(store) is None
        for place, _, files in os.walk(folder):  # as in an image that others built
            os.chmod(place, 0o755)
            for name in files:
                os.chmod(os.path.join(place, name), 0o644)
        assert "ermission denied" in (in_child(as_another_user) or "")


ERRORS = [
    UnreadableImage("truncated JPEG", "Fetch it again."),
    ImageError.at(3, "a.jpg", "truncated JPEG", "Remove it."),
    NotFinite.of(3, None, "in layer 'deep'", "Take other weights."),
    NoPlace("No place.", "it is full"),
    OnNetwork("No place.", "it is far"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_error_of_a_worker_arrives_whole(error: Exception) -> None:
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        arrived = pickle.loads(pickle.dumps(error, protocol))
        assert (type(arrived), str(arrived), vars(arrived)) == (type(error), str(error), vars(error))


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


class Counted(nn.Module):
    """Counts its passes."""

    passes: list[int] = []  # noqa: RUF012  # of all copies

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.passes.append(len(images))
        return self.pool(images)


def test_memory_of_a_pipeline_finds_what_a_callable_gave(tmp_path: Path) -> None:
    Counted.passes.clear()
    extractor = PretrainedFeatureExtractor(Counted, layers="pool", image_size=16, pixel_range=(0, 16))
    model = Pipeline([("extractor", extractor), ("classifier", LogisticRegression())], memory=str(tmp_path))
    model.fit(X, Y)
    first = list(Counted.passes)
    model.fit(X, Y)
    assert first == Counted.passes != []


# homes


def _no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No HOME, and a user whom the system does not know."""

    def unknown(uid: int) -> Any:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def _no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home that cannot be made."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))


def _network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home on a network disk."""
    monkeypatch.setenv("HOME", str(tmp_path / "network"))
    _put_on_network(tmp_path / "network", monkeypatch)


def _network_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home and a folder for temporary files on a network disk."""
    _network(tmp_path, monkeypatch)
    (tmp_path / "network").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "network"))


def _put_on_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places.check_local.cache_clear()
    monkeypatch.setattr(
        places, "_file_system", lambda asked, _: "lustre" if asked.is_relative_to(folder.resolve()) else "ext4"
    )


WITHOUT_STORE = [_no_home, _no_folder]
IN_TROUBLE = [*WITHOUT_STORE, _network, _network_alone]


@pytest.fixture(autouse=True)
def _nothing_told_yet(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("FEATX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(session, "_WARNED", set())
    yield
    places.check_local.cache_clear()


@pytest.fixture
def trouble(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return request.param(tmp_path, monkeypatch)


@pytest.mark.parametrize("trouble", WITHOUT_STORE, indirect=True)
@pytest.mark.parametrize("cache", [True, "~/features"])
def test_where_nothing_can_be_kept_one_warning_names_the_way_out(
    trouble: None, cache: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = {"image_size": 16, "pixel_range": (0, 16)}
    expected = PretrainedFeatureExtractor("featx_micro", **params).transform(X)
    extractor = PretrainedFeatureExtractor("featx_micro", cache=cache, **params)
    with pytest.warns(StoreWarning, match="FEATX_CACHE"):
        np.testing.assert_array_equal(extractor.fit(X).transform(X), expected)
    np.testing.assert_array_equal(extractor.transform(X), expected)  # a second warning would be an error
    classifier(cache=cache).fit(X, Y).predict(X)
    monkeypatch.setenv("FEATX_CACHE", str(tmp_path / "elsewhere"))
    np.testing.assert_array_equal(extractor.set_params(cache=True).transform(X), expected)
    assert FeatureStore(tmp_path / "elsewhere").info()["images"] == len(np.unique(X, axis=0))


@pytest.mark.parametrize("trouble", [_network], indirect=True)
def test_store_that_was_asked_for_on_a_network_disk_is_refused(trouble: None) -> None:
    for cache in (True, "~/features"):
        with pytest.raises(StoreError, match="on a network file system"):
            PretrainedFeatureExtractor("featx_micro", image_size=16, pixel_range=(0, 16), cache=cache).transform(X)


def test_store_without_a_home_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _no_home(tmp_path, monkeypatch)
    for method in ("info", "clear", "prune", "verify"):
        with pytest.raises(StoreError, match=r"got '~/features'\. Set FEATX_CACHE \(or cache=\)"):
            getattr(FeatureStore("~/features"), method)()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 90, (2, 4, 24, 24, 3)) + np.array([0, 150]).reshape(2, 1, 1, 1, 1)
    for name, of_class in zip("ab", pixels.astype(np.uint8), strict=True):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i, picture in enumerate(of_class):
            Image.fromarray(picture).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


@pytest.mark.filterwarnings("always::featx.exceptions.StoreWarning")
@pytest.mark.parametrize("trouble", IN_TROUBLE, indirect=True)
def test_commands_go_on_without_keeping_and_say_so_once(trouble: None, photos: Path, tmp_path: Path) -> None:
    model, one = tmp_path / "model.joblib", photos / "a" / "0.png"
    commands = [
        ["fit", photos, "-o", model, "--backbone", "featx_micro", "--layers", "penultimate", "--folds", "2"],
        ["predict", model, photos],
        ["search", photos, "--backbones", "featx_micro", "--layers", "penultimate,-1", "--folds", "2"],
        ["extract", photos, "-o", tmp_path / "features.npy", "--backbone", "featx_micro"],
        ["similar", "featx_micro", photos, one],
    ]
    for command in commands:
        results = [runner().invoke(featx, [*map(str, command), *more]) for more in ([], ["--no-cache"])]
        assert [result.exit_code for result in results] == [0, 0], [result.output for result in results]
        kept, alone = results
        assert kept.stderr.count("FEATX_CACHE") == kept.stderr.count("--no-cache") == 1
        assert "FEATX_CACHE" not in alone.stderr
        assert [line for line in kept.stdout.splitlines() if "Next" not in line] == [
            line for line in alone.stdout.splitlines() if "Next" not in line
        ]
    assert not list(tmp_path.glob("network/**/data.mdb"))


@pytest.mark.filterwarnings("always::featx.exceptions.StoreWarning")
@pytest.mark.parametrize("trouble", IN_TROUBLE, indirect=True)
def test_interrupt_ends_as_ever_where_nothing_is_kept(
    trouble: None, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("featx.activations.engine.Recipe._parts", interrupt)
    for more in ([], ["--no-cache"]):
        result = runner().invoke(featx, ["search", str(photos), "--backbones", "featx_micro", *more])
        assert result.exit_code == 130
        assert result.stderr.splitlines()[-1] == "Interrupted."


def test_command_takes_the_folder_in_memory_where_no_other_can_be_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    with monkeypatch.context() as patched:
        patched.setattr(temporary, "tempfile", SimpleNamespace(gettempdir=nowhere, tempdir=None))
        patched.setattr(temporary, "_IN_MEMORY", tempfile.gettempdir())
        patched.setenv("TMPDIR", "/nowhere")
        assert has_temporary_folder()
        patched.setattr(temporary, "_IN_MEMORY", "/nowhere")
        assert not has_temporary_folder()
