"""The extractor's own laws: what a feature may depend on, what is left alone, what bad input gets."""

from __future__ import annotations

import collections
import functools
import io
import os
import pickle
import random
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import relative_difference
from networks import InPlace, Many, Permuting
from PIL import Image
from sklearn.base import clone
from sklearn.utils._param_validation import InvalidParameterError

from featx import PretrainedFeatureExtractor, list_layers
from featx.backbones import networks as shelf
from featx.backbones.micro import FeatxMicro
from featx.exceptions import BackboneError, FeatxError, ImageError, LayerError, StoreError, WeightsError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, size=(9, 40, 50, 3), dtype=np.uint8)
MICRO = PretrainedFeatureExtractor("featx_micro", layers="all")


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    """JPEG files of nine smooth pictures."""
    paths = []
    for i, colours in enumerate(RNG.integers(0, 256, size=(9, 4, 5, 3), dtype=np.uint8)):
        paths.append(str(tmp_path / f"photo {i}.jpg"))
        Image.fromarray(colours).resize((50, 40)).save(paths[-1], quality=95)
    return paths


# What a feature may depend on


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_features_do_not_depend_on_batch_size(batch_size: int) -> None:
    expected = clone(MICRO).transform(IMAGES)
    assert relative_difference(clone(MICRO).set_params(batch_size=batch_size).transform(IMAGES), expected) < 1e-5


@pytest.mark.parametrize("n_jobs", [1, 3, -1])
def test_features_do_not_depend_on_threads(n_jobs: int) -> None:
    np.testing.assert_array_equal(clone(MICRO).set_params(n_jobs=n_jobs).transform(IMAGES), MICRO.transform(IMAGES))


def test_features_do_not_depend_on_company() -> None:
    names = list_layers("featx_micro")
    together = np.split(MICRO.transform(IMAGES), np.cumsum([24, 64, 160]), axis=1)
    for name, columns in zip(names, together, strict=True):
        alone = clone(MICRO).set_params(layers=name).transform(IMAGES)
        assert relative_difference(alone, columns) < 1e-5
    backwards = clone(MICRO).set_params(layers=names[::-1]).transform(IMAGES)
    assert relative_difference(backwards, np.hstack(together[::-1])) < 1e-5


def test_every_form_of_the_same_pictures_gives_the_same_features(photos: list[str]) -> None:
    pixels = np.stack([np.asarray(Image.open(path)) for path in photos])
    expected = MICRO.transform(photos)
    forms = {
        "Path": [Path(path) for path in photos],
        "bytes": [Path(path).read_bytes() for path in photos],
        "PIL": [Image.open(path) for path in photos],
        "array": pixels,
        "list of arrays": list(pixels),
        "tensor": torch.from_numpy(pixels).permute(0, 3, 1, 2),
        "float": pixels / 255,
        "Series": pd.Series(photos, index=range(100, 109)),
        "Index": pd.Index(photos),
        "extension array": pd.Series(photos, dtype="string").array,
        "deque": collections.deque(photos),
        "frame column": pd.DataFrame({"photo": photos}),
        "object column": np.array(photos, dtype=object)[:, None],
        "mixed": [photos[0], Path(photos[1]).read_bytes(), *pixels[2:]],
    }
    for form, X in forms.items():
        # Floats are never rounded to 8 bits, which moves features a little.
        assert relative_difference(MICRO.transform(X), expected) < (5e-2 if form == "float" else 1e-5), form


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_stays_close_and_independent_of_batch_size(precision: str) -> None:
    half = clone(MICRO).set_params(precision=precision, layers=["features.2", "penultimate"])
    rows = half.transform(IMAGES)
    assert rows.dtype == np.float32
    assert relative_difference(rows, clone(half).set_params(precision="float32").transform(IMAGES)) < 2e-2
    assert relative_difference(clone(half).set_params(batch_size=2).transform(IMAGES), rows) < 2e-2


def test_random_network_depends_on_random_state_alone() -> None:
    extractor = PretrainedFeatureExtractor("featx_micro", weights=None)
    first = extractor.transform(IMAGES)
    np.testing.assert_array_equal(clone(extractor).set_params(random_state=0).transform(IMAGES), first)
    assert relative_difference(clone(extractor).set_params(random_state=1).transform(IMAGES), first) > 0.1


def test_iter_transform_yields_the_rows_of_transform_in_blocks() -> None:
    extractor = clone(MICRO).set_params(batch_size=4)
    blocks = list(extractor.iter_transform(IMAGES))
    assert [len(block) for block in blocks] == [4, 4, 1]
    np.testing.assert_array_equal(np.concatenate(blocks), extractor.transform(IMAGES))


def test_ready_tensors_and_callables_skip_the_preset() -> None:
    ready = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    extractor = PretrainedFeatureExtractor("featx_micro", preprocess=None)
    network = FeatxMicro()
    network.load_state_dict(
        shelf.network_spec("featx_micro", "DEFAULT", 0).load("cpu", torch.float32).module.state_dict()
    )
    with torch.inference_mode():
        expected = network.eval().features(ready).amax((2, 3)).numpy()
    assert relative_difference(extractor.transform(ready), expected) < 1e-5

    def look_up(picture: Image.Image) -> torch.Tensor:
        return ready[picture.getpixel((0, 0))[0]]

    numbered = [Image.new("RGB", (2, 2), (i, 0, 0)) for i in range(3)]
    assert relative_difference(clone(extractor).set_params(preprocess=look_up).transform(numbered), expected) < 1e-5


def test_ready_tensors_bring_their_own_size_and_channels() -> None:
    grey = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    ready = torch.randn(2, 1, 20, 30, generator=torch.Generator().manual_seed(0))
    maps = PretrainedFeatureExtractor(grey, preprocess=None, layers="0", pooling="map")
    expected = grey[0](ready).detach().permute(0, 2, 3, 1).numpy()
    assert relative_difference(maps.transform(ready), expected) < 1e-5
    assert clone(maps).set_params(pooling="avg").get_feature_names_out().tolist() == [f"0_avg_{i}" for i in range(4)]
    with pytest.raises(BackboneError, match="1 channel"):
        clone(maps).set_params(preprocess="weights").transform(IMAGES)


def test_callable_decides_the_shape_and_must_keep_to_it() -> None:
    sized = PretrainedFeatureExtractor(
        "featx_micro", layers=0, pooling="map", preprocess=lambda _: torch.zeros(3, 16, 20)
    )
    assert sized.transform(IMAGES).shape == (9, 16, 20, 24)
    sides = iter([16, 16, 24] + [16] * 9)
    moody = clone(sized).set_params(preprocess=lambda _: torch.zeros(3, next(sides), 16), batch_size=1, n_jobs=1)
    with pytest.raises(ValueError, match="one shape"):
        moody.transform(IMAGES)


def test_preset_of_other_weights_decides_the_size() -> None:
    other = PretrainedFeatureExtractor(
        "featx_micro", layers=0, pooling="map", preprocess="ResNet18_Weights.IMAGENET1K_V1"
    )
    assert other.transform(IMAGES).shape == (9, 224, 224, 24)
    with pytest.raises(BackboneError, match=r"vit_b_16.*image_size=32"):
        PretrainedFeatureExtractor("vit_b_16", preprocess="featx_micro").fit(IMAGES)


def test_grey_network_of_fixed_size_takes_a_callable() -> None:
    lenet = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 5), torch.nn.Flatten(), torch.nn.Linear(2 * 24 * 24, 7))
    assert list_layers(lenet, image_size=28) == ["0"]
    grey = PretrainedFeatureExtractor(lenet, layers="0", preprocess=lambda _: torch.zeros(1, 28, 28), image_size=28)
    assert grey.transform(IMAGES).shape == (9, len(grey.get_feature_names_out())) == (9, 2)


def test_error_in_a_users_preprocess_names_the_row(photos: list[str]) -> None:
    def broken(picture: Image.Image) -> torch.Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        PretrainedFeatureExtractor("featx_micro", preprocess=broken).transform(photos)
    assert "X[0]" in caught.value.__notes__[0]
    assert photos[0] in caught.value.__notes__[0]


def test_image_size_changes_what_the_network_sees() -> None:
    extractor = PretrainedFeatureExtractor("featx_micro", layers=0, pooling="map")
    assert extractor.transform(IMAGES).shape == (9, 32, 32, 24)
    assert clone(extractor).set_params(image_size=16).transform(IMAGES).shape == (9, 16, 16, 24)


@pytest.mark.parametrize(("backbone", "size"), [("vit_b_16", 50), ("alexnet", 32)])
def test_size_that_a_network_cannot_take_is_refused_by_name(backbone: str, size: int) -> None:
    with pytest.raises(BackboneError, match=f"{backbone}.*image_size={size}"):
        PretrainedFeatureExtractor(backbone, weights=None, image_size=size).fit(IMAGES)


# What is left alone


def test_global_state_is_left_alone() -> None:
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002  the legacy generator is the global state in question
    random.seed(3)
    torch.set_default_dtype(torch.float64)
    try:
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
        for weights in (None, "DEFAULT"):
            extractor = PretrainedFeatureExtractor("featx_micro", weights=weights, random_state=17)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                inside = extractor.fit(IMAGES).transform(IMAGES)
            np.testing.assert_array_equal(inside, extractor.transform(IMAGES))
        after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert torch.is_grad_enabled()


def test_users_module_is_left_exactly_as_it_came() -> None:
    module = torch.nn.Sequential(InPlace(), torch.nn.BatchNorm1d(5)).double()
    module[0].conv.eval()
    module[0].conv.weight.grad = torch.ones_like(module[0].conv.weight)
    modes = [child.training for child in module.modules()]
    state = {key: value.clone() for key, value in module.state_dict().items()}
    extractor = PretrainedFeatureExtractor(module, layers=["0.relu#2", "penultimate"])
    rows = extractor.fit(IMAGES).transform(IMAGES)
    assert [child.training for child in module.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert module[0].conv.weight.grad is not None
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())
    np.testing.assert_array_equal(clone(extractor).transform(IMAGES), rows)


def test_module_that_was_trained_meanwhile_gives_new_features() -> None:
    module = InPlace()
    extractor = PretrainedFeatureExtractor(module)
    before = extractor.transform(IMAGES)
    with torch.no_grad():
        module.conv.weight.mul_(-1)
    assert relative_difference(extractor.transform(IMAGES), before) > 0.1


def test_callable_is_called_once_per_process_and_shared_by_clones() -> None:
    calls = []

    def build(width: int) -> torch.nn.Module:
        calls.append(width)
        return InPlace()

    extractor = PretrainedFeatureExtractor(functools.partial(build, width=4))
    rows = extractor.transform(IMAGES)
    np.testing.assert_array_equal(clone(extractor).fit(IMAGES).transform(IMAGES), rows)
    assert calls == [4]


def test_callable_that_nothing_tells_from_another_is_called_once_per_call() -> None:
    calls = []

    def build(widths: list[int]) -> torch.nn.Module:  # which is not hashable
        calls.append(widths)
        return InPlace()

    extractor = PretrainedFeatureExtractor(functools.partial(build, [4]))
    extractor.transform(IMAGES)
    extractor.transform(IMAGES)
    assert len(calls) == 2


def test_module_that_a_callable_returns_is_left_exactly_as_it_came() -> None:
    module = InPlace().double().train()
    extractor = PretrainedFeatureExtractor(lambda: module, weights=None)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    extractor.transform(IMAGES)
    assert module.training
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_partials_that_differ_in_type_alone_are_different_networks() -> None:
    def build(width: object) -> torch.nn.Module:
        return InPlace() if width is True else torch.nn.Sequential(torch.nn.Conv2d(3, 9, 1))

    one, other = (PretrainedFeatureExtractor(functools.partial(build, width=width)) for width in (1, True))
    assert one.transform(IMAGES).shape != other.transform(IMAGES).shape


def test_seeds_of_clones_load_no_further_networks() -> None:
    loaded = len(shelf._SHELF._networks)
    for seed in range(5):
        PretrainedFeatureExtractor("featx_micro", random_state=seed).transform(IMAGES[:1])
    assert len(shelf._SHELF._networks) <= loaded + 1


@pytest.mark.parametrize("backbone", ["swin_t", "vit_b_16", "convnext_tiny", "googlenet", "mnasnet0_5"])
def test_fit_leaves_the_global_generator_alone(backbone: str) -> None:
    shelf._named_architecture.cache_clear()
    before = torch.get_rng_state()
    PretrainedFeatureExtractor(backbone).fit(IMAGES)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_network_does_not_depend_on_the_default_dtype() -> None:
    extractor = PretrainedFeatureExtractor("featx_micro", weights=None, random_state=91)
    module = PretrainedFeatureExtractor(InPlace())
    torch.set_default_dtype(torch.float64)
    try:
        under_float64 = extractor.transform(IMAGES)
        module.transform(IMAGES)
    finally:
        torch.set_default_dtype(torch.float32)
    shelf._renew_locks()
    np.testing.assert_array_equal(extractor.transform(IMAGES), under_float64)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
@pytest.mark.parametrize(
    "make", [lambda: torch.nn.Sequential(torch.nn.LazyConv2d(4, 3)), lambda: torch.jit.script(torch.nn.ReLU())]
)
def test_module_that_cannot_be_copied_is_refused_with_a_way_out(make) -> None:
    with pytest.raises(BackboneError, match="scripted or lazy"):
        PretrainedFeatureExtractor(make).transform(IMAGES)


def test_block_that_permutes_inside_is_pooled_over_places() -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 12, 3, padding=1), Permuting()).eval()
    ready = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    expected = module(ready).mean((2, 3)).detach()
    for layers in ("1", -1):
        rows = PretrainedFeatureExtractor(module, preprocess=None, layers=layers).transform(ready)
        assert relative_difference(rows, expected) < 1e-5


def test_parallel_wrappers_are_taken_off() -> None:
    module = InPlace()
    wrapped = PretrainedFeatureExtractor(torch.nn.DataParallel(module), layers="conv")
    expected = PretrainedFeatureExtractor(module, layers="conv").transform(IMAGES)
    np.testing.assert_array_equal(wrapped.transform(IMAGES), expected)


def test_pickle_of_a_named_backbone_carries_no_network() -> None:
    extractor = PretrainedFeatureExtractor("featx_micro").fit(IMAGES)
    extractor.transform(IMAGES)
    assert len(pickle.dumps(extractor)) < 5_000


def test_round_trip_through_joblib_in_a_new_process(tmp_path: Path) -> None:
    joblib.dump((MICRO.fit(IMAGES), IMAGES), tmp_path / "model.joblib")
    code = f"""
        import joblib, numpy
        extractor, images = joblib.load({str(tmp_path / "model.joblib")!r})
        numpy.save({str(tmp_path / "rows.npy")!r}, extractor.transform(images))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
    assert relative_difference(np.load(tmp_path / "rows.npy"), MICRO.transform(IMAGES)) < 1e-5


@pytest.mark.parametrize("extractor", [MICRO, PretrainedFeatureExtractor(InPlace, layers=["conv", "penultimate"])])
def test_threads_that_share_a_network_do_not_mix_up_their_rows(extractor: PretrainedFeatureExtractor) -> None:
    expected = {i: extractor.transform(IMAGES[i : i + 1]) for i in range(9)}
    found: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: extractor.transform(IMAGES[i : i + 1])})) for i in range(9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, rows in expected.items():
        np.testing.assert_array_equal(found[i], rows)


def test_progress_bar_counts_images(capsys: pytest.CaptureFixture[str]) -> None:
    clone(MICRO).set_params(verbose=1).transform(IMAGES)
    assert "9/9" in capsys.readouterr().err
    MICRO.transform(IMAGES)
    assert capsys.readouterr().err == ""


def test_fit_and_import_decode_nothing_and_load_no_weights() -> None:
    code = """
        import sys
        import featx
        assert "torch" not in sys.modules, "import featx pulled in torch"
        extractor = featx.PretrainedFeatureExtractor("resnet50").fit(["no such file.jpg"])
        names = extractor.get_feature_names_out()
        from featx.backbones.networks import _SHELF
        assert not _SHELF._networks
        assert len(names) == 2048
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


# Column names


def test_names_match_columns_for_every_pooling() -> None:
    for pooling in ("avg", "max", "gem", "flatten"):
        extractor = clone(MICRO).set_params(pooling=pooling, grid=2, layers=["features.4", "penultimate"])
        names = extractor.get_feature_names_out()
        assert len(set(names)) == len(names) == extractor.transform(IMAGES[:1]).shape[1]


def test_flattened_tensors_have_no_names_without_their_size() -> None:
    ready = PretrainedFeatureExtractor("featx_micro", preprocess=None, pooling="flatten", layers=-1)
    with pytest.raises(ValueError, match="image_size"):
        ready.get_feature_names_out()
    rows = ready.set_params(image_size=16).transform(torch.zeros(1, 3, 16, 16))
    assert rows.shape == (1, len(ready.get_feature_names_out()))


def test_names_check_parameters_first() -> None:
    with pytest.raises(InvalidParameterError):
        clone(MICRO).set_params(grid=0).get_feature_names_out()


def test_fit_on_images_forgets_the_columns_of_an_earlier_fit() -> None:
    extractor = PretrainedFeatureExtractor("featx_micro", image_shape=(2, 2), pixel_range=(0, 1))
    extractor.fit(pd.DataFrame(np.zeros((3, 4)), columns=list("abcd")))
    assert extractor.n_features_in_ == 4
    extractor.set_params(image_shape=None).fit(IMAGES)
    assert not hasattr(extractor, "n_features_in_")
    assert not hasattr(extractor, "feature_names_in_")


def test_row_with_nan_is_a_row_of_nan_on_request() -> None:
    rows = np.full((3, 4), 0.5)
    rows[1, 2] = np.nan
    extractor = PretrainedFeatureExtractor("featx_micro", image_shape=(2, 2), on_error="nan")
    with pytest.warns(UserWarning, match="1 of 3"):
        features = extractor.transform(rows)
    assert np.isnan(features).any(axis=1).tolist() == [False, True, False]
    with pytest.raises(ValueError, match="NaN"):
        clone(extractor).set_params(on_error="raise").transform(rows)


def test_map_has_no_column_names() -> None:
    with pytest.raises(ValueError, match="one row per image"):
        clone(MICRO).set_params(pooling="map").get_feature_names_out()


# What bad input gets


def truncated(path: str) -> bytes:
    data = Path(path).read_bytes()
    return data[: len(data) // 2]


def bad_checksum() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(IMAGES[0]).save(buffer, format="PNG")
    data = bytearray(buffer.getvalue())
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


def broken_elements(photos: list[str], tmp_path: Path) -> dict[str, object]:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("This is not a picture.")
    os.mkfifo(tmp_path / "pipe.jpg")
    nan = np.full((4, 4, 3), np.nan)
    return {
        "missing": str(tmp_path / "missing.jpg"),
        "directory": str(tmp_path),
        "empty": str(tmp_path / "empty.jpg"),
        "text": str(tmp_path / "text.jpg"),
        "pipe": str(tmp_path / "pipe.jpg"),
        "truncated": truncated(photos[0]),
        "checksum": bad_checksum(),
        "None": None,
        "NaN": float("nan"),
        "number": 7,
        "NaN pixels": nan,
        "channels": np.zeros((4, 4, 5), dtype=np.uint8),
        "dimensions": np.zeros((4, 4, 3, 1), dtype=np.uint8),
        "range": np.full((4, 4, 3), 3.0),
        "url": "https://example.org/cat.jpg",
    }


def test_broken_element_is_one_error_that_names_its_row(photos: list[str], tmp_path: Path) -> None:
    for kind, element in broken_elements(photos, tmp_path).items():
        with pytest.raises(ImageError) as caught:
            MICRO.transform([*photos[:3], element, *photos[3:]])
        message = str(caught.value)
        assert "X[3]" in message, kind
        if isinstance(element, str):
            assert os.path.basename(element) in message, kind


def test_broken_elements_become_nan_with_one_warning_that_counts_them(photos: list[str], tmp_path: Path) -> None:
    broken = list(broken_elements(photos, tmp_path).values())
    extractor = clone(MICRO).set_params(on_error="nan", batch_size=4)
    with pytest.warns(UserWarning, match=f"^{len(broken)} of {len(broken) + 9} images") as caught:
        rows = extractor.transform([photos[0], *broken, *photos[1:]])
    assert len(caught) == 1
    good = np.r_[0, len(broken) + 1 : len(rows)]
    assert np.isnan(np.delete(rows, good, axis=0)).all()
    assert relative_difference(rows[good], MICRO.transform(photos)) < 1e-5


def test_nothing_readable_gives_rows_of_nan_and_loads_no_network() -> None:
    extractor = PretrainedFeatureExtractor("resnet50", on_error="nan")
    with pytest.warns(UserWarning, match="2 of 2"):
        assert np.isnan(extractor.transform([None, b"no picture"])).all()


def test_image_above_the_limit_is_refused_before_it_is_decoded(photos: list[str]) -> None:
    with pytest.raises(ImageError, match=r"X\[0\].*50 x 40 pixels.*max_pixels=100"):
        clone(MICRO).set_params(max_pixels=100).transform(photos)


@pytest.mark.parametrize(
    ("X", "words"),
    [
        (np.zeros((3, 64)), "image_shape"),
        (pd.DataFrame({"a": [1.0, 2.0]}), "image_shape"),
        ([[1, 2], [3, 4]], "image_shape"),
        (np.zeros((2, 4, 4, 5)), "channels"),
        (np.zeros((2, 2, 2, 2, 2)), "dimensions|shape"),
        ([], r"0 sample\(s\)"),
        (pd.DataFrame({"a": ["x.jpg"], "b": ["y.jpg"]}), "one column|ColumnTransformer"),
        ([[1, 2], [3]], "agged|row|X\\[1\\]"),
        ("photo.jpg", "list"),
    ],
)
def test_wrong_form_of_X_is_an_error_that_says_what_to_do(X: object, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        MICRO.fit(X)


@pytest.mark.parametrize(
    ("parameters", "error", "words"),
    [
        ({"pooling": "mean"}, InvalidParameterError, "'pooling' parameter"),
        ({"batch_size": 0}, InvalidParameterError, "'batch_size' parameter"),
        ({"backbone": "resnet51"}, BackboneError, "resnet50|resnet18|resnet152"),
        ({"backbone": "featx_micro", "weights": "IMAGENET1K_V9"}, WeightsError, "DEFAULT"),
        ({"backbone": "featx_micro", "weights": "no/such.pth"}, WeightsError, "no/such.pth"),
        ({"backbone": "featx_micro", "layers": "feature.2"}, LayerError, "features.2"),
        ({"backbone": "featx_micro", "layers": 7}, LayerError, "-4 to 3"),
        ({"backbone": "featx_micro", "preprocess": "nothing"}, WeightsError, "preprocess"),
        ({"backbone": "featx_micro", "device": "toaster"}, ValueError, "toaster"),
        ({"backbone": "featx_micro", "image_shape": (7, 7)}, ValueError, "image_shape"),
        ({"backbone": "featx_micro", "image_shape": ("a", 8)}, ValueError, "image_shape"),
        ({"backbone": "featx_micro", "pixel_range": (0, None)}, ValueError, "pixel_range"),
        ({"backbone": "featx_micro", "pixel_range": (0, 1, 2)}, ValueError, "pixel_range"),
        ({"backbone": "featx_micro", "n_jobs": 0}, InvalidParameterError, "'n_jobs' parameter"),
    ],
)
def test_wrong_parameter_is_an_error_before_any_work(parameters: dict, error: type, words: str) -> None:
    extractor = PretrainedFeatureExtractor(**parameters)
    X = np.zeros((2, 64), dtype=np.uint8) if "image_shape" in parameters else IMAGES
    with pytest.raises(error, match=words):
        extractor.transform(X)


def test_every_error_of_the_package_is_also_the_builtin_it_comes_closest_to() -> None:
    for kind in (ImageError, LayerError, BackboneError, WeightsError):
        assert issubclass(kind, FeatxError)
        assert issubclass(kind, ValueError)
    assert issubclass(StoreError, FeatxError)
    assert issubclass(StoreError, OSError)


def test_weights_that_cannot_be_fetched_name_the_file_and_two_ways_out(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def unreachable(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    with pytest.raises(WeightsError) as caught:
        PretrainedFeatureExtractor("squeezenet1_1").transform(IMAGES)
    for words in (str(tmp_path), "squeezenet1_1-b8a52dc0.pth", 'weights="PATH"', 'backbone="featx_micro"'):
        assert words in str(caught.value)


def test_error_in_the_network_leaves_no_thread() -> None:
    module = Many()
    module.pair.register_forward_hook(lambda _, args, output: 1 / 0 if args[0].device.type == "cpu" else None)
    with pytest.raises(ZeroDivisionError) as caught:
        PretrainedFeatureExtractor(module, batch_size=1).transform(IMAGES)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("featx")]
    del caught


def test_abandoned_iterator_leaves_no_thread() -> None:
    blocks = clone(MICRO).set_params(batch_size=1).iter_transform(IMAGES)
    next(blocks)
    blocks.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("featx")]


def test_interrupt_ends_the_call_and_its_threads(tmp_path: Path) -> None:
    code = """
        import os, signal, threading
        import numpy as np
        from featx import PretrainedFeatureExtractor
        extractor = PretrainedFeatureExtractor("featx_micro", batch_size=1)
        X = np.zeros((100_000, 32, 32, 3), dtype=np.uint8)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background start with Ctrl-C ignored
        try:
            for i, block in enumerate(extractor.iter_transform(X)):
                if i == 3:
                    os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            left = [t.name for t in threading.enumerate() if t.name.startswith("featx")]
            print("interrupted, left:", left)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "interrupted, left: []", done.stderr
