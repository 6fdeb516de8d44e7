"""Features that are not finite: an error that says why, never a row that looks like one, and never one that is kept."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from commands import runner
from conftest import counting_images
from networks import Growing
from PIL import Image
from safetensors.torch import save_file
from sklearn.base import clone

from featx import FeatureStore, FineTuneClassifier, PretrainedFeatureExtractor
from featx.backbones.networks import network_spec
from featx.cli.commands import featx
from featx.exceptions import NotFinite
from featx.store.memory import MEMORY

MICRO = "featx_micro"
RNG = np.random.default_rng(0)
# Black, white, black, grey.
IMAGES = torch.tensor([0.0, 1.0, 0.0, 0.05])[:, None, None, None].expand(4, 3, 8, 8)
IN_HALF, IN_FULL = 20.0, 200.0  # white pictures grow beyond float16, and beyond float32


def extractor(power: float = IN_FULL, **parameters: object) -> PretrainedFeatureExtractor:
    return PretrainedFeatureExtractor(Growing(power), **({"preprocess": None, "layers": "deep"} | parameters))


@pytest.fixture
def poisoned(tmp_path: Path) -> str:
    """Weights of featx_micro with one NaN in the middle."""
    state = dict(network_spec("featx_micro", "DEFAULT", 0).load("cpu", torch.float32).module.state_dict())
    name = next(name for name in state if name.startswith("features.3.") and name.endswith("weight"))
    state[name] = state[name].clone()
    state[name][(0,) * state[name].ndim] = torch.nan
    path = tmp_path / "poisoned.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return str(path)


# What the message says, and that its advice works


@pytest.mark.parametrize("cached", [False, True])
def test_overflow_of_half_precision_names_layer_row_and_precision_and_the_way_out_works(
    cached: bool, tmp_path: Path
) -> None:
    half = extractor(IN_HALF, precision="float16", cache=str(tmp_path) if cached else None)
    with pytest.raises(NotFinite, match=r'X\[1\] in layer .deep.: precision="float16"') as caught:
        half.transform(IMAGES)
    assert 'Set precision="bfloat16" or precision="float32"' in str(caught.value)
    for other in ("bfloat16", "float32"):
        assert np.isfinite(half.set_params(precision=other).transform(IMAGES)).all()


def test_nan_in_a_weights_file_names_the_file_and_the_tensor(poisoned: str) -> None:
    photos = RNG.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    broken = PretrainedFeatureExtractor("featx_micro", weights=poisoned)
    with pytest.raises(NotFinite, match=r"weights='.*poisoned.safetensors' hold NaN or infinity in features\.3\."):
        broken.transform(photos)
    for way_out in ({"layers": 1}, {"weights": "DEFAULT"}):
        assert np.isfinite(broken.set_params(**({"layers": "penultimate"} | way_out)).transform(photos)).all()


def test_nan_behind_the_layer_is_nobodys_business() -> None:
    network = Growing(1.0)
    torch.nn.init.constant_(network.head.weight, torch.nan)
    rows = PretrainedFeatureExtractor(network, preprocess=None, layers="deep").transform(IMAGES)
    assert np.isfinite(rows).all()
    broken = extractor()
    torch.nn.init.constant_(broken.backbone.head.weight, torch.nan)
    with pytest.raises(NotFinite, match="grow beyond all numbers"):  # which the head's weights are not to blame for
        broken.transform(IMAGES)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_preprocessing_that_makes_nan_is_told_from_the_network(value: float) -> None:
    def spoilt(image: object) -> torch.Tensor:
        return torch.full((3, 8, 8), value)

    with pytest.raises(NotFinite, match="preprocess has made NaN or infinity"):
        extractor(1.0, preprocess=spoilt).transform(np.zeros((2, 8, 8, 3), np.uint8))


def test_third_powers_that_overflow_name_the_pooling() -> None:
    powers = extractor(40.0, pooling="gem")
    with pytest.raises(NotFinite, match='pooling="gem"'):
        powers.transform(IMAGES)
    assert np.isfinite(powers.set_params(pooling="avg").transform(IMAGES)).all()


def test_large_finite_features_are_features() -> None:
    """Their sum overflows, they do not."""
    rows = extractor(88.0, pooling="max").transform(IMAGES)
    assert np.isfinite(rows).all()
    assert rows.sum(dtype=np.float64) > np.finfo(np.float32).max


# Rows and warnings


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_a_row_that_is_not_finite_is_nan_with_its_own_reason(cached: bool, batch_size: int, tmp_path: Path) -> None:
    cache = str(tmp_path) if cached else None
    tolerant = extractor(on_error="nan", batch_size=batch_size, cache=cache)
    images = torch.cat([IMAGES, IMAGES[1:2]])  # with a twin
    with pytest.warns(UserWarning, match=r"2 of 5 images have features that are not finite; .*X\[1\] in layer 'deep'"):
        rows = tolerant.transform(images)
    assert np.isnan(rows).all(axis=1).tolist() == [False, True, False, False, True]
    np.testing.assert_allclose(rows[[0, 2, 3]], extractor().transform(images[[0, 2, 3]]), rtol=1e-5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        errors = [error for block in tolerant._extraction_of_images(images).iter_blocks() for error in block.errors]
    assert [error.row for error in errors] == [1, 4]
    assert not any("could not be read" in str(one.message) for one in caught)


# The store


def test_nothing_that_is_not_finite_is_kept_and_everything_else_of_the_pass_is(tmp_path: Path) -> None:
    store = FeatureStore(str(tmp_path), keep="blocks")
    shallow = extractor(layers="shallow", cache=store)
    deep = clone(shallow).set_params(layers="deep")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = shallow.transform(IMAGES)  # the deep layer, which nobody asked for, is left out without a word
    MEMORY.clear()
    with counting_images("Growing") as batches:
        np.testing.assert_array_equal(shallow.transform(IMAGES), expected)
        finite = deep.transform(IMAGES[[0, 3]])
    assert np.isfinite(finite).all()
    assert not batches  # both layers of the pictures that did not overflow are there
    with pytest.raises(NotFinite):
        deep.transform(IMAGES)
    MEMORY.clear()
    with pytest.raises(NotFinite):
        deep.transform(IMAGES)
    assert _all_values(store).size
    assert np.isfinite(_all_values(store)).all()


def _all_values(store: FeatureStore) -> np.ndarray:
    """Every number in a store."""
    opened, found = store._open(), []
    for folder in (Path(store.path)).rglob("*"):
        if folder.is_dir() and len(folder.name) == 32:
            shelf = opened.shelf(bytes.fromhex(folder.name))
            digests = shelf.digests()
            for group in shelf.groups().values():
                parts = [np.zeros((len(digests), column.width), np.float32) for column in group]
                shelf.fill(digests, group, parts, np.arange(len(digests)))
                found += [part.ravel() for part in parts]
    return np.concatenate(found)


# Fine-tuning


@pytest.mark.parametrize("freeze", ["all", "shallow", 0])
def test_training_on_what_is_not_finite_is_refused_with_the_reason(freeze: str | int) -> None:
    model = FineTuneClassifier(Growing(IN_FULL), layers="deep", preprocess=None, freeze=freeze, epochs=1)
    for on_error in ("raise", "nan"):
        with pytest.raises(NotFinite, match="in layer 'deep': the network's values grow"):
            model.set_params(on_error=on_error).fit(IMAGES, [0, 1, 0, 1])


@pytest.mark.parametrize("freeze", ["all", 0])
def test_training_without_a_probe_is_not_blamed_on_the_rate_where_the_network_is_broken(
    freeze: str | int, poisoned: str
) -> None:
    photos = RNG.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    model = FineTuneClassifier(MICRO, weights=poisoned, freeze=freeze, linear_probe=False, epochs=1)
    with pytest.raises(NotFinite, match=r"poisoned.safetensors' hold NaN or infinity in features\.3\."):
        model.fit(photos, [0, 1, 0, 1])


@pytest.mark.parametrize("early_stopping", [False, True])
def test_preprocessing_that_makes_nan_is_told_from_the_tuned_network(early_stopping: bool) -> None:
    def spoilt(image: Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        return pixels * torch.nan if bool(pixels.max() > 0.5) else pixels

    dark = np.full((8, 8, 8, 3), 10, np.uint8)
    spotted = np.concatenate([dark[:7], dark[:1] + 200])
    chosen = {"early_stopping": True, "validation_fraction": 0.5} if early_stopping else {}
    model = FineTuneClassifier(
        Growing(1.0), preprocess=spoilt, freeze=0, linear_probe=False, epochs=1, random_state=0, **chosen
    )
    y = [0, 1] * 4
    with pytest.raises(NotFinite, match=r"X\[7\] in layer .*: preprocess has made NaN or infinity"):
        model.fit(spotted, y)
    with pytest.raises(NotFinite, match=r"X\[7\] in layer .*: preprocess has made NaN or infinity"):
        model.fit(dark, y).predict(spotted)


@pytest.mark.parametrize("freeze", ["all", 0])
def test_predictions_that_are_not_finite_are_refused_or_nan(freeze: str | int) -> None:
    model = FineTuneClassifier(
        Growing(IN_FULL), layers="deep", preprocess=None, freeze=freeze, epochs=1, random_state=0
    )
    dark = IMAGES * 0.1
    model.fit(dark, [0, 1, 0, 1])
    for method in ("predict", "predict_proba", "decision_function", "transform"):
        with pytest.raises(NotFinite, match=r"X\[1\] in layer 'deep'"):
            getattr(model, method)(IMAGES)
    model.set_params(on_error="nan")
    with pytest.warns(UserWarning, match="1 of 4 images have features that are not finite") as caught:
        proba = model.predict_proba(IMAGES)
    assert len(caught) == 1
    assert np.isnan(proba).all(axis=1).tolist() == [False, True, False, False]
    with (
        pytest.warns(UserWarning, match="not finite"),
        pytest.raises(ValueError, match=r"finite scores.*X\[1\], which have no label"),
    ):
        model.predict(IMAGES)


# The command line


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for name in ("ants", "bees"):
        (folder / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.mark.parametrize("command", ["extract", "extract in shards", "fit", "search", "fine-tune"])
def test_commands_say_what_is_wrong_with_the_weights_and_end_with_1(command: str, poisoned: str, photos: Path) -> None:
    out = photos.parent / "out"
    words = {
        "extract": ["extract", str(photos), "-o", f"{out}.npy"],
        "extract in shards": ["extract", str(photos), "-o", str(out)],
        "fit": ["fit", str(photos), "-o", f"{out}.joblib"],
        "search": ["search", str(photos), "--backbones", "featx_micro", "--layers", "penultimate"],
        "fine-tune": ["fit", str(photos), "-o", f"{out}.joblib", "--fine-tune", "--epochs", "1"],
    }[command]
    chosen = [] if command == "search" else ["--backbone", "featx_micro"]
    result = _run(*words, *chosen, "--weights", poisoned, "--no-cache", code=1)
    assert "poisoned.safetensors' hold NaN or infinity" in result.stderr
    assert "could not be read" not in result.stderr
    assert "None of 8 photos could" not in result.stderr
    # One reason is told once, and not for every photo.
    assert result.stderr.count("hold NaN or infinity") <= 2, result.stderr


def test_predict_says_what_is_wrong_with_weights_that_have_changed(poisoned: str, photos: Path) -> None:
    model, weights = photos.parent / "model.joblib", Path(poisoned)
    good = network_spec("featx_micro", "DEFAULT", 0).load("cpu", torch.float32).module.state_dict()
    wrong = weights.read_bytes()
    save_file({key: value.contiguous() for key, value in good.items()}, weights)
    _run("fit", photos, "-o", model, "--backbone", "featx_micro", "--weights", weights, "--no-cache", "--quick")
    weights.write_bytes(wrong)
    result = _run("predict", model, photos, "--no-cache", code=1)
    assert re.search(r"None of 8 photos can be used: .*poisoned\.safetensors' hold NaN or infinity", result.stderr)
    assert "could not be read" not in result.stderr


def _run(*words: object, code: int = 0) -> Result:
    result = runner().invoke(featx, [*map(str, words)])
    assert result.exit_code == code, result.output
    return result
