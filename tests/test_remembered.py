"""Laws of what a store remembers: where all images are known a process needs no torch, and gets the same rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import encode
from safetensors.torch import load_file, save_file
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from featx import FeatureStore, PretrainedFeatureExtractor
from featx.activations import remembered
from featx.activations.engine import Recipe
from featx.backbones import networks
from featx.exceptions import LayerError, WeightsError
from featx.store.memory import MEMORY

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def as_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process does that has not loaded torchvision yet; of what others left it knows nothing."""
    monkeypatch.setattr(remembered, "saves_time", lambda: True)
    monkeypatch.setattr(remembered, "_left", set())


@pytest.fixture
def short_ways(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call found all its rows without looking at the network."""
    taken: list[bool] = []
    rows = remembered.Remembered.rows

    def noting(self: Any, *given: Any) -> Any:
        found = rows(self, *given)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(remembered.Remembered, "rows", noting)
    return taken


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"{i}.png" for i in range(70)]
    for path in paths:
        path.write_bytes(encode(RNG.integers(0, 256, size=(40, 50, 3), dtype=np.uint8), "PNG"))
    return [*map(str, paths), str(paths[0])]


PARAMETERS: list[dict[str, Any]] = [
    {},
    {"layers": "all"},
    {"layers": "all", "normalize": "l2"},
    {"layers": ["penultimate", 0], "normalize": "signed-sqrt", "pooling": "max"},
    {"layers": [0, "penultimate"], "normalize": "signed-sqrt", "pooling": "max"},
    {"layers": [0, "penultimate"], "normalize": "signed-sqrt", "pooling": "max", "grid": 2},
    {"layers": np.array([0, 1]), "pooling": "gem"},
    {"layers": 0, "pooling": "map", "normalize": "l2"},
    {"layers": -1, "pooling": "flatten"},
    {"layers": -1, "pooling": "flatten", "image_size": 16},
    {"layers": -1, "pooling": "flatten", "image_size": 16, "decode": "fast"},
    {"weights": None},
    {"weights": None, "random_state": 3},
    {"precision": "bfloat16"},
    {"preprocess": "ResNet18_Weights.IMAGENET1K_V1", "image_size": 40},
]


def test_short_way_gives_the_same_bits(photos: list[str], tmp_path: Path, short_ways: list[bool]) -> None:
    """Whatever else one store remembers."""
    large = tmp_path / "large.jpg"
    large.write_bytes(encode(RNG.integers(0, 256, size=(90, 80, 3), dtype=np.uint8), "JPEG"))
    paths = [str(large), *photos]
    several = [
        PretrainedFeatureExtractor("featx_micro", cache=tmp_path / "store", **parameters) for parameters in PARAMETERS
    ]
    first = [extractor.fit(paths).transform(paths) for extractor in several]
    assert short_ways == []
    for extractor, wanted in zip(several, first, strict=True):
        np.testing.assert_array_equal(extractor.fit(paths).transform(paths), wanted)
        np.testing.assert_array_equal(extractor.transform(paths[::-3]), wanted[::-3])
    assert short_ways == [True] * 2 * len(several)


def test_flattened_rows_take_the_short_way(tmp_path: Path, short_ways: list[bool]) -> None:
    X = RNG.integers(0, 256, size=(6, 48))
    extractor = PretrainedFeatureExtractor("featx_micro", image_shape=(4, 4, 3), cache=tmp_path / "store")
    first = extractor.fit(X.astype(np.uint8)).transform(X.astype(np.uint8))
    np.testing.assert_array_equal(extractor.transform(X.astype(np.uint8)), first)
    assert short_ways == [True]
    with pytest.raises(ValueError, match="features"):
        extractor.transform(X[:, :24].astype(np.uint8))


def test_new_and_edited_images_are_computed(photos: list[str], tmp_path: Path, short_ways: list[bool]) -> None:
    extractor = PretrainedFeatureExtractor("featx_micro", cache=tmp_path / "store")
    extractor.transform(photos[:69])
    Path(photos[3]).write_bytes(encode(RNG.integers(0, 256, size=(40, 50, 3), dtype=np.uint8), "PNG"))
    for paths in (photos[:69], photos):
        found = extractor.transform(paths)
        wanted = PretrainedFeatureExtractor("featx_micro").transform(paths)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    Path(photos[5]).write_text("no picture")
    with pytest.warns(UserWarning, match="1 of 71"):
        found = extractor.set_params(on_error="nan").transform(photos)
    assert np.flatnonzero(np.isnan(found).any(axis=1)).tolist() == [5]
    assert short_ways == [False, False, False]
    FeatureStore(tmp_path / "store").clear()
    assert len(extractor.transform(photos[:4])) == 4


def save_weights(path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    module = PretrainedFeatureExtractor("featx_micro")._spec().load("cpu", torch.float32).module
    state = {name: value for name, value in module.state_dict().items() if value.is_floating_point()}
    save_file({name: (value + torch.rand_like(value) / 10).contiguous() for name, value in state.items()}, path)
    os.utime(path, (time.time() - 9,) * 2)


def test_another_file_of_weights_is_noticed(photos: list[str], tmp_path: Path, short_ways: list[bool]) -> None:
    weights = tmp_path / "weights.safetensors"
    extractor = PretrainedFeatureExtractor("featx_micro", weights=weights, cache=tmp_path / "store")
    save_weights(weights, 0)
    first = extractor.transform(photos)
    np.testing.assert_array_equal(extractor.transform(photos), first)
    assert short_ways == [True]
    save_weights(weights, 1)
    found = extractor.transform(photos)
    wanted = PretrainedFeatureExtractor("featx_micro", weights=weights).transform(photos)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    assert np.abs(found - first).max() > 1e-3
    weights.unlink()
    for call in (extractor.fit, extractor.transform):
        with pytest.raises(WeightsError, match="existing"):
            call(photos)


def test_place_in_a_file_belongs_to_the_question(
    photos: list[str], tmp_path: Path, short_ways: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, store = tmp_path / "last", tmp_path / "store"
    save_weights(tmp_path / "one", 0)
    states = {key: load_file(tmp_path / "one") for key in ("model", "ema")}
    states["ema"]["features.0.conv.bias"] += 1
    torch.save(states, path)
    model, average = (PretrainedFeatureExtractor("featx_micro", weights=(path, key), cache=store) for key in states)
    first = model.transform(photos)
    assert np.abs(average.transform(photos) - first).max() > 1e-3
    assert short_ways == []
    np.testing.assert_array_equal(model.transform(photos), first)
    assert short_ways == [True]
    # Whoever goes the long way does not read the file again either.
    monkeypatch.setattr(remembered, "saves_time", lambda: False)
    monkeypatch.setattr(networks, "build_with_weights", lambda *_: pytest.fail("loaded"))
    networks._renew_locks()  # forgets what was loaded
    MEMORY.clear()
    np.testing.assert_array_equal(model.transform(photos), first)


@pytest.mark.parametrize("weights", [3, ("a",), ("a", 3), "a\0b", b"a", ("absent", "key")])
def test_wrong_weights_make_no_question_and_their_own_error(photos: list[str], tmp_path: Path, weights: Any) -> None:
    extractor = PretrainedFeatureExtractor("featx_micro", weights=weights, cache=tmp_path / "store")
    remembered.question_of(extractor, FeatureStore(tmp_path / "store"), make=True)
    for call in (extractor.fit, extractor.transform):
        with pytest.raises(ValueError, match="weights"):
            call(photos)


def test_mistake_of_ones_own_is_not_taken_for_a_wrong_parameter(
    photos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "_as_loaded", lambda: [][0])
    with pytest.raises(IndexError):
        PretrainedFeatureExtractor("featx_micro", cache=tmp_path / "store").transform(photos)


def test_wrong_parameters_are_told_beside_what_is_remembered(photos: list[str], tmp_path: Path) -> None:
    extractor = PretrainedFeatureExtractor("featx_micro", cache=tmp_path / "store")
    extractor.transform(photos)
    with pytest.raises(LayerError):
        extractor.set_params(layers="nowhere").fit(photos)
    with pytest.raises(ValueError, match="device"):
        extractor.set_params(layers=0, device="nonsense").fit(photos)


@pytest.mark.parametrize("library", ["torch", "torchvision", "PIL"])
def test_another_version_is_noticed(
    photos: list[str], tmp_path: Path, short_ways: list[bool], monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    extractor = PretrainedFeatureExtractor("featx_micro", cache=tmp_path / "store")
    extractor.transform(photos)
    monkeypatch.setattr(sys.modules[library], "__version__", "0.1")
    extractor.transform(photos)
    assert short_ways == []
    assert FeatureStore(tmp_path / "store").info()["computed"] == 140


def test_damaged_answer_is_none(photos: list[str], tmp_path: Path, short_ways: list[bool]) -> None:
    extractor = PretrainedFeatureExtractor("featx_micro", cache=tmp_path / "store")
    first = extractor.transform(photos)
    index = FeatureStore(tmp_path / "store")._open().index

    def damage(txn: Any, tables: dict[str, Any]) -> int:
        keys = [bytes(key) for key, _ in txn.cursor(tables["shortcuts"]) if bytes(key).startswith(b"answer")]
        for key in keys:
            content = bytearray(txn.get(key, db=tables["shortcuts"]))
            content[5] ^= 1
            txn.put(key, bytes(content), db=tables["shortcuts"])
        return len(keys)

    assert index.database.write(damage) == 1
    np.testing.assert_array_equal(extractor.transform(photos), first)
    assert short_ways == []


def test_parameters_or_weights_that_change_during_a_call_leave_no_answer(
    photos: list[str], tmp_path: Path, short_ways: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "weights.safetensors"
    save_weights(weights, 0)
    extractor = PretrainedFeatureExtractor("featx_micro", layers=0, weights=weights, cache=tmp_path / "store")
    parts = Recipe._parts
    changes = [lambda: extractor.set_params(layers=1), lambda: save_weights(weights, 1), weights.unlink]
    for change in changes:

        def changing(self: Any, *given: Any, change: Any = change) -> Any:
            change()
            return parts(self, *given)

        with monkeypatch.context() as patched:
            patched.setattr(Recipe, "_parts", changing)
            extractor.transform(photos[:4])
        found = short_ways.copy()
        if weights.exists():
            wanted = clone(extractor).set_params(cache=None).transform(photos[:4])
            np.testing.assert_allclose(extractor.transform(photos[:4]), wanted, rtol=0, atol=1e-5 * wanted.max())
            assert short_ways == found
            save_weights(weights, 0)  # those that the question before the call was asked of
            wanted = clone(extractor).set_params(cache=None).transform(photos[:4])
            np.testing.assert_allclose(extractor.transform(photos[:4]), wanted, rtol=0, atol=1e-5 * wanted.max())
        FeatureStore(tmp_path / "store").clear()
    with pytest.raises(WeightsError, match="existing"):
        extractor.transform(photos[:4])


def test_clones_with_seeds_of_their_own_share_an_answer(
    photos: list[str], tmp_path: Path, short_ways: list[bool]
) -> None:
    for seed in range(3):
        PretrainedFeatureExtractor("featx_micro", random_state=seed, cache=tmp_path / "store").transform(photos)
    assert short_ways == [True, True]


def test_class_of_ones_own_goes_the_long_way(photos: list[str], tmp_path: Path, short_ways: list[bool]) -> None:
    class Doubled(PretrainedFeatureExtractor):
        def _plan(self, architecture: Any) -> Any:
            return super()._plan(architecture)

    PretrainedFeatureExtractor("featx_micro", cache=tmp_path / "store").transform(photos)
    Doubled("featx_micro", cache=tmp_path / "store").transform(photos)
    assert short_ways == []


def test_new_rows_are_validated_once(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    import pandas as pd

    X = RNG.integers(0, 256, size=(6, 48)).astype(np.uint8)
    extractor = PretrainedFeatureExtractor("featx_micro", image_shape=(4, 4, 3), cache=tmp_path / "store")
    extractor.fit(pd.DataFrame(X).rename(columns="p{}".format)).transform(pd.DataFrame(X).rename(columns="p{}".format))
    with pytest.warns(UserWarning, match="feature names") as told:
        extractor.transform(X[::-1] // 2)
    assert len(told) == 1


WARM = """
import json, os, sys
import joblib
opened = []
sys.addaudithook(lambda event, given: opened.append(given[0]) if event == "open" else None)
model, paths = joblib.load(sys.argv[1])
labels = model.predict(paths).tolist()
refitted = model.fit(paths, [0, 1] * (len(paths) // 2)).predict(paths).tolist()
weights = [path for path in opened if str(path).endswith("last.ckpt")]
print(json.dumps([labels, refitted, [name for name in ("torch", "torchvision") if name in sys.modules], weights]))
"""


@pytest.mark.parametrize("from_file", [False, True])
def test_warm_pipeline_predicts_and_fits_without_torch_and_weights(
    photos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, from_file: bool
) -> None:
    import joblib

    extractor = PretrainedFeatureExtractor("resnet18", weights=None, image_size=64, cache=tmp_path / "store")
    if from_file:
        state = extractor._spec().load("cpu", torch.float32).module.state_dict()
        torch.save({"model": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "last.ckpt")
        monkeypatch.setattr("featx.store.index.TRUST_AFTER_S", 0)  # as if it had been there for long
        extractor.set_params(weights=(tmp_path / "last.ckpt", "model"))
    model = make_pipeline(extractor, LogisticRegression()).fit(photos[:10], [0, 1] * 5)
    joblib.dump((model, photos[:10]), tmp_path / "model")
    done = subprocess.run([sys.executable, "-c", WARM, str(tmp_path / "model")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    labels = model.predict(photos[:10]).tolist()
    assert json.loads(done.stdout) == [labels, labels, [], []]
