"""Devices: what holds on every one, on a second device whose memory is the CPU's."""

from __future__ import annotations

import gc
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import relative_difference
from networks import InPlace, Many
from second_device import NAME, SecondDevice, second_device
from sklearn.base import clone
from sklearn.datasets import load_digits

from featx import FineTuneClassifier, PretrainedFeatureExtractor
from featx.exceptions import OutOfMemory
from featx.system import devices
from featx.system.devices import FullFloat32, Setting, resolve_device, undisturbed

DIGITS = load_digits()
X, Y = DIGITS.images[:30], DIGITS.target[:30] % 3
IMAGES = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
# A tail with BatchNorm and dropout, a head alone, hidden layers, and all of the network.
WAYS: dict[str, dict[str, Any]] = {
    "head": {"freeze": "all"},
    "hidden": {"freeze": "all", "hidden_layer_sizes": (4,), "dropout": 0.2},
    "tail": {"freeze": -1, "dropout": 0.2, "ema": 0.9, "class_weight": "balanced", "max_grad_norm": 1.0},
    "whole": {"freeze": 0, "mixup": 0.4, "early_stopping": True, "validation_fraction": 0.3, "optimizer": "sgd"},
    "streamed": {"freeze": -1, "augment": "flip", "augment_views": 0, "linear_probe": False},
    "float16": {"freeze": -1, "precision": "float16"},
}


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> Iterator[SecondDevice]:
    with second_device(monkeypatch) as device:
        yield device


def extractor(backbone: Any = "featx_micro", **parameters: Any) -> PretrainedFeatureExtractor:
    return PretrainedFeatureExtractor(backbone, **({"batch_size": 3, "device": NAME} | parameters))


def classifier(**parameters: Any) -> FineTuneClassifier:
    settings = {"image_size": 16, "pixel_range": (0, 16), "epochs": 2, "batch_size": 8, "random_state": 0}
    return FineTuneClassifier("featx_micro", **{**settings, "freeze": -1, "device": NAME, **parameters})


# The same as on the CPU, and nothing moves but through one place


@pytest.mark.parametrize("pooling", ["avg", "max", "gem", "flatten"])
def test_features_are_those_of_the_cpu_and_come_back_to_it(second: SecondDevice, pooling: str) -> None:
    away = extractor(layers="all", pooling=pooling)
    rows = away.transform(IMAGES)
    assert type(rows) is np.ndarray
    assert relative_difference(rows, clone(away).set_params(device="cpu").transform(IMAGES)) < 1e-5
    assert second.events["in"] > 3
    assert not second.strangers


@pytest.mark.parametrize("module", [InPlace, Many])
def test_a_users_module_is_read_on_any_device_and_left_on_its_own(second: SecondDevice, module: Any) -> None:
    here, images = module(), torch.rand(7, 3, 8, 8)
    there = pickle.loads(pickle.dumps(here)).to(NAME)
    rows = [
        extractor(network, preprocess=None, layers=-1, device=device).transform(images)
        for network in (here, there)
        for device in ("cpu", NAME)
    ]
    for other in rows[1:]:
        assert relative_difference(other, rows[0]) < 1e-5
    assert {tensor.device.type for tensor in here.state_dict().values()} == {"cpu"}
    assert {tensor.device.type for tensor in there.state_dict().values()} == {NAME}


def test_tensors_of_a_device_are_images_like_others(second: SecondDevice) -> None:
    tensors = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)
    there = [tensor.to(NAME) for tensor in tensors]
    for device in ("cpu", NAME):
        np.testing.assert_array_equal(
            extractor(device=device).transform(there), extractor(device=device).transform(tensors)
        )


@pytest.mark.parametrize("way", WAYS)
def test_training_gives_the_classifier_of_the_cpu(second: SecondDevice, way: str) -> None:
    # What is drawn on another device differs.
    fitted = classifier(**WAYS[way] | {"dropout": 0.0}).fit(X, Y)
    on_cpu = clone(fitted).set_params(device="cpu", precision="float32").fit(X, Y)
    tolerance = 1e-2 if fitted.precision == "float16" else 1e-4
    np.testing.assert_allclose(fitted.predict_proba(X), on_cpu.predict_proba(X), rtol=0, atol=tolerance)
    np.testing.assert_allclose(fitted.history_["loss"], on_cpu.history_["loss"], rtol=0, atol=tolerance)
    assert {tensor.device.type for tensor in fitted.tensors_.values()} == {"cpu"}
    assert not second.strangers


def test_what_was_fitted_on_a_device_predicts_on_another(second: SecondDevice) -> None:
    fitted = classifier().fit(X, Y)
    expected = fitted.predict_proba(X)
    travelled = pickle.loads(pickle.dumps(fitted)).set_params(device="cpu")
    np.testing.assert_allclose(travelled.predict_proba(X), expected, atol=1e-5)
    shared = PretrainedFeatureExtractor(**fitted._shared_params(["image_size", "pixel_range"]), device="cpu")
    assert np.isfinite(shared.transform(X)).all()


def test_scores_are_made_in_double_precision_also_beside_a_device_that_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with second_device(monkeypatch, has_double=False) as second:
        fitted = classifier(hidden_layer_sizes=(4,)).fit(X, Y)
        scores = fitted.decision_function(X)
        assert not second.strangers
        np.testing.assert_allclose(clone(fitted).set_params(device="cpu").fit(X, Y).decision_function(X), scores, 1e-3)


@pytest.mark.parametrize("way", ["head", "tail", "whole"])
def test_a_step_waits_for_nothing(second: SecondDevice, way: str) -> None:
    """However many steps an epoch has, nothing but its losses comes back from the device, once."""
    parameters = WAYS[way] | {"linear_probe": False, "early_stopping": False}

    def in_an_epoch(batch_size: int) -> dict[str, int]:
        found = []
        for epochs in (1, 2):
            second.events.clear()
            classifier(**parameters, batch_size=batch_size, epochs=epochs).fit(X, Y)
            found.append(second.events.copy())
        return {event: found[1][event] - found[0][event] for event in ("read", "out", "in")}

    classifier(**parameters).fit(X, Y)  # which loads the network
    few, many = in_an_epoch(15), in_an_epoch(3)
    assert many["read"] == 0
    assert few["out"] == many["out"] == 1
    assert few["in"] < many["in"]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains_within_the_devices_autocast(second: SecondDevice, precision: str) -> None:
    classifier(precision=precision).fit(X, Y)
    assert second.events[getattr(torch, precision)] >= 8
    second.events.clear()
    classifier().fit(X, Y)
    assert not second.events[torch.float16] + second.events[torch.bfloat16]


# Which device


def test_the_best_device_is_the_first_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    best = resolve_device(None)
    kinds = dict(devices._KINDS)
    monkeypatch.setattr(devices, "_KINDS", {NAME: devices.Kind(), **kinds})
    assert resolve_device(None) == best
    monkeypatch.setattr(devices, "_KINDS", {NAME: devices.Kind(is_available=lambda: True), **kinds})
    assert resolve_device(None) == NAME


# Draws


def test_the_devices_generator_is_left_where_it_was(second: SecondDevice) -> None:
    before = second.generator.get_state(), torch.get_rng_state()
    first = classifier(**WAYS["tail"]).fit(X, Y)
    assert second.events["drawn"]
    assert torch.equal(second.generator.get_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    second.generator.manual_seed(17)
    torch.testing.assert_close(clone(first).fit(X, Y).tensors_, first.tensors_)


# Memory


@pytest.fixture
def _no_collector() -> Iterator[None]:
    """What refers to itself stays, as it may for long."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("way", WAYS)
def test_memory_is_given_back_when_nothing_of_a_fit_is_left(second: SecondDevice, way: str) -> None:
    classifier(**WAYS[way]).fit(X, Y)  # the pretrained network stays
    n_before = second.n_alive
    classifier(**WAYS[way]).fit(X, Y)
    assert second.lives == [n_before, n_before]


def test_too_little_memory_for_training_names_the_ways_out_and_they_work(second: SecondDevice) -> None:
    fitted = classifier(freeze=0, linear_probe=False, batch_size=4).fit(X, Y)
    expected, second.capacity = fitted.predict_proba(X), second.largest
    with pytest.raises(OutOfMemory, match=r"'lazy' for batch_size=30 .*Lower batch_size, or freeze more than freeze=0"):
        fitted.set_params(batch_size=30).fit(X, Y)
    np.testing.assert_allclose(fitted.set_params(batch_size=4).predict_proba(X), expected, atol=1e-6)  # still there
    assert fitted.fit(X, Y).n_iter_ == 2
    assert fitted.set_params(batch_size=30, freeze="all").fit(X[:4], Y[:4]).n_iter_ == 2


@pytest.mark.usefixtures("_no_collector")
def test_too_little_memory_leaves_nothing_on_the_device(second: SecondDevice) -> None:
    estimator = classifier(freeze=0, linear_probe=False, batch_size=4).fit(X, Y)
    second.capacity, n_before = second.largest, second.n_alive
    with pytest.raises(OutOfMemory) as caught:
        estimator.set_params(batch_size=30).fit(X, Y)
    assert caught.value.__cause__ is not None  # whose frames somebody may keep, as notebooks do
    assert second.lives[-1] == n_before


@pytest.mark.parametrize("ask", ["transform", "predict_proba"])
def test_too_little_memory_for_a_pass_names_the_way_out_and_it_works(second: SecondDevice, ask: str) -> None:
    whole = {"image_size": 16, "pixel_range": (0, 16), "batch_size": 1}
    fitted = (extractor(**whole) if ask == "transform" else classifier(freeze=0, **whole)).fit(X, Y)
    second.largest = 0
    expected, second.capacity = getattr(fitted, ask)(X), second.largest
    n_before = second.n_alive
    with pytest.raises(OutOfMemory, match=r"Memory on 'lazy' for .*30.* Lower batch_size") as caught:
        getattr(fitted.set_params(batch_size=30), ask)(X)
    assert caught.value.__cause__ is not None
    assert second.n_alive == n_before
    np.testing.assert_allclose(getattr(fitted.set_params(batch_size=1), ask)(X), expected, atol=1e-5)


class Greedy(torch.nn.Module):
    """Asks for more memory than any machine has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.last = torch.nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.conv(x) + x.new_empty(2 ** (30 if x.device.type == "meta" else 50)).mean())


def test_too_little_memory_of_the_machine_is_told_in_the_same_words() -> None:
    with pytest.raises(OutOfMemory, match=r"Memory on 'cpu' for a batch of 3 images .* Lower batch_size"):
        extractor(Greedy(), preprocess=None, device="cpu", layers="last").transform(torch.rand(3, 3, 8, 8))


def test_other_errors_of_a_device_are_not_taken_for_too_little_memory() -> None:
    with pytest.raises(RuntimeError, match="asleep"), devices.in_memory("cpu", "a batch"):
        raise RuntimeError("the device is asleep")


# Full float32


class Precise:
    """A setting of a process."""

    def __init__(self, value: str) -> None:
        self.value = value


@pytest.mark.parametrize("value", ["tf32", "ieee", "none"])
def test_settings_are_full_inside_and_afterwards_as_before(value: str) -> None:
    owner = Precise(value)
    full = FullFloat32(Setting.of(owner, "value", "ieee", "none"))

    def fail() -> None:
        with full, full:
            assert owner.value in ("ieee", "none")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert owner.value == value


def test_settings_stay_full_until_the_last_thread_has_left() -> None:
    owner = Precise("tf32")
    full, entered, leave = FullFloat32(Setting.of(owner, "value", "ieee")), threading.Event(), threading.Event()

    def other() -> None:
        with full:
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with full:
        thread.start()
        assert entered.wait(10)
    assert owner.value == "ieee"
    leave.set()
    thread.join()
    assert owner.value == "tf32"


def test_a_forked_child_finds_as_before_what_another_thread_had_changed() -> None:
    owner = Precise("tf32")
    full = FullFloat32(Setting.of(owner, "value", "ieee"))
    gone = threading.Thread(target=full.__enter__)  # which never leaves, as in a child
    gone.start()
    gone.join()
    assert owner.value == "ieee"
    full.after_fork()
    assert owner.value == "tf32"
    with full:
        assert owner.value == "ieee"
    assert owner.value == "tf32"


def global_precision(value: str) -> Callable[[], object]:
    return lambda: torch.set_float32_matmul_precision(value)


def of_cublas() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def of_cudnn() -> None:
    torch.backends.cudnn.allow_tf32 = True


def read_settings() -> list[object]:
    """As users of any release of torch read them."""
    return [
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
    ]


@pytest.fixture
def _settings() -> Iterator[None]:
    before = read_settings()
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[2]


@pytest.mark.usefixtures("_settings")
@pytest.mark.parametrize("device", ["cuda", "cpu", "mps"])
@pytest.mark.parametrize("change", [global_precision("high"), global_precision("medium"), of_cublas, of_cudnn])
def test_torchs_settings_are_afterwards_as_before(device: str, change: Callable[[], object]) -> None:
    change()
    before = read_settings()
    with undisturbed(device):
        full = devices.kind_of(device).full_float32
        assert all(setting.read() in setting.full for setting in full._settings)
    assert read_settings() == before


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch < 2.9 has no wider settings")
@pytest.mark.usefixtures("_settings")
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_settings_that_follow_a_wider_one_still_do_afterwards(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends, "fp32_precision", "tf32" if device == "cuda" else "bf16")
    narrow = torch.backends.cuda.matmul if device == "cuda" else torch.backends.mkldnn.matmul
    before = narrow.fp32_precision
    with undisturbed(device):
        assert narrow.fp32_precision in ("ieee", "none")
    assert narrow.fp32_precision == before
    monkeypatch.setattr(torch.backends, "fp32_precision", "ieee")
    assert narrow.fp32_precision == "ieee"


@pytest.mark.usefixtures("_settings")
@pytest.mark.parametrize("value", ["high", "medium"])
def test_features_do_not_depend_on_how_torch_may_round(value: str) -> None:
    """On processors that compute in bfloat16, "medium" moved features of ViTs by 7e-3 of their norm."""
    vit = extractor("vit_b_16", weights=None, device="cpu", batch_size=8)
    photos = np.repeat(IMAGES, 2, axis=0)[:8]
    expected = vit.transform(photos)
    torch.set_float32_matmul_precision(value)
    np.testing.assert_array_equal(vit.transform(photos), expected)
    assert torch.get_float32_matmul_precision() == value
