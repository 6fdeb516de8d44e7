"""What only a GPU can show: its arithmetic, its memory, and several processes on it; ``make test-gpu`` runs these."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GPU, relative_difference
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from featx import FineTuneClassifier, PretrainedFeatureExtractor
from featx.exceptions import OutOfMemory

pytestmark = pytest.mark.gpu

DIGITS = load_digits()
X, Y = DIGITS.images[:120], DIGITS.target[:120] % 3
MORE, TRUTH = DIGITS.images[200:320], DIGITS.target[200:320] % 3
IMAGES = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
# Values that a network of the tests asks for beside each image: a gigabyte.
PER_IMAGE = 2**28


def extractor(backbone: Any = "featx_micro", **parameters: Any) -> PretrainedFeatureExtractor:
    return PretrainedFeatureExtractor(backbone, **({"batch_size": 4, "device": GPU} | parameters))


def classifier(**parameters: Any) -> FineTuneClassifier:
    settings = {"image_size": 16, "pixel_range": (0, 16), "epochs": 2, "batch_size": 16, "random_state": 0}
    return FineTuneClassifier("featx_micro", **{**settings, "freeze": -1, "device": GPU, **parameters})


def in_use() -> int:
    """Bytes that tensors take on the device."""
    return torch.cuda.memory_allocated(GPU) if GPU.startswith("cuda") else 0


@pytest.fixture
def _no_collector() -> Iterator[None]:
    """What refers to itself stays, as it may for long."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(params=["torch's own", "TF32 wherever torch has it"])
def _rounding(request: pytest.FixtureRequest) -> Iterator[None]:
    """How torch may round float32, as users set it."""
    before = torch.get_float32_matmul_precision()
    if request.param != "torch's own":
        torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


# Arithmetic


@pytest.mark.usefixtures("_rounding")
@pytest.mark.parametrize(
    ("backbone", "layers"), [("featx_micro", "all"), ("resnet18", "all"), ("vit_b_16", [-1, "penultimate"])]
)
@pytest.mark.parametrize("pooling", ["avg", "gem"])
def test_features_are_those_of_the_cpu(backbone: str, layers: Any, pooling: str) -> None:
    weights = "DEFAULT" if backbone == "featx_micro" else None
    on_gpu = extractor(backbone, weights=weights, layers=layers, pooling=pooling)
    on_cpu = clone(on_gpu).set_params(device="cpu")
    assert relative_difference(on_gpu.transform(IMAGES), on_cpu.transform(IMAGES)) < 1e-4


@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_features_do_not_depend_on_the_batch(batch_size: int) -> None:
    whole = extractor(layers="all", batch_size=9).transform(IMAGES)
    assert relative_difference(extractor(layers="all", batch_size=batch_size).transform(IMAGES), whole) < 1e-5


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_features_in_half_precision_point_the_same_way(precision: str) -> None:
    half = extractor(precision=precision, normalize="l2").transform(IMAGES)
    whole = extractor(device="cpu", normalize="l2").transform(IMAGES)
    assert (half * whole).sum(1).min() > 0.999


@pytest.mark.parametrize("way", [{"freeze": "all"}, {"freeze": -1}, {"freeze": 0}, {"freeze": -1, "mixup": 0.4}])
def test_training_gives_the_classifier_of_the_cpu(way: dict[str, Any]) -> None:
    on_gpu = classifier(optimizer="sgd", **way).fit(X, Y)
    on_cpu = clone(on_gpu).set_params(device="cpu").fit(X, Y)
    np.testing.assert_allclose(on_gpu.predict_proba(MORE), on_cpu.predict_proba(MORE), rtol=0, atol=2e-2)
    assert abs(on_gpu.score(MORE, TRUTH) - on_cpu.score(MORE, TRUTH)) < 0.03


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_training_in_half_precision_gives_nearly_the_same_losses(precision: str) -> None:
    whole = classifier(optimizer="sgd", linear_probe=False).fit(X, Y)
    half = clone(whole).set_params(precision=precision).fit(X, Y)
    first = whole.history_["loss"][0]
    np.testing.assert_allclose(half.history_["loss"], whole.history_["loss"], rtol=0, atol=0.05 * first)


def test_a_fit_with_draws_on_the_device_repeats_and_leaves_its_generator() -> None:
    fitted = classifier(dropout=0.5, hidden_layer_sizes=(8,)).fit(X, Y)
    values = torch.zeros(3, device=GPU)
    torch.manual_seed(0)
    expected = values.normal_().cpu()
    torch.manual_seed(0)
    again = clone(fitted).fit(X, Y)
    assert torch.equal(values.normal_().cpu(), expected)
    np.testing.assert_allclose(again.predict_proba(MORE), fitted.predict_proba(MORE), rtol=0, atol=1e-3)


# Memory


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("freeze", ["all", -1, 0])
def test_memory_is_given_back_after_a_fit(freeze: int | str) -> None:
    classifier(freeze=freeze).fit(X, Y)  # the pretrained network stays
    before = in_use()
    classifier(freeze=freeze).fit(X, Y)
    assert in_use() == before


class Greedy(torch.nn.Module):
    """Takes a gigabyte for each image, which nobody needs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.last = torch.nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        taken = [x.new_empty(PER_IMAGE) for _ in range(len(x))] if x.device.type != "meta" else []
        return self.last(x) + len(taken)


@pytest.mark.usefixtures("_no_collector")
def test_an_absurd_batch_is_told_in_words_and_the_device_goes_on() -> None:
    images = torch.rand(200_000, 3, 3, 3)  # more gigabytes than any device has
    greedy = extractor(Greedy(), preprocess=None, layers="last", batch_size=len(images))
    expected = greedy.set_params(batch_size=2).transform(images[:4])
    before = in_use()
    with pytest.raises(OutOfMemory, match="Lower batch_size"):
        greedy.set_params(batch_size=len(images)).transform(images)
    assert in_use() <= before + 2**20
    assert relative_difference(greedy.set_params(batch_size=2).transform(images[:4]), expected) < 1e-5


# Several processes


def rows_of(seed: int) -> np.ndarray:
    """Features of the same images, computed in a process of their own."""
    return extractor(layers="all", random_state=seed).transform(IMAGES)


def test_processes_that_share_the_device_give_the_same_rows() -> None:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        shared = list(pool.map(rows_of, [0, 0]))
    for rows in shared:
        assert relative_difference(rows, rows_of(0)) < 1e-5


def of_features() -> GridSearchCV:
    steps = make_pipeline(extractor(image_size=16, pixel_range=(0, 16)), LogisticRegression(max_iter=500))
    return GridSearchCV(steps, {"pretrainedfeatureextractor__layers": [-1, -2]}, cv=2)


def of_training() -> GridSearchCV:
    return GridSearchCV(classifier(optimizer="sgd"), {"freeze": ["all", -1]}, cv=2)


@pytest.mark.parametrize("search", [of_features, of_training])
def test_a_grid_search_in_two_processes_gives_the_scores_of_one(search: Callable[[], GridSearchCV]) -> None:
    alone, shared = search().fit(X, Y), search().set_params(n_jobs=2).fit(X, Y)
    np.testing.assert_allclose(
        shared.cv_results_["mean_test_score"], alone.cv_results_["mean_test_score"], rtol=0, atol=0.03
    )
