"""Networks from elsewhere with habits of their own: what can be done with them is done, and the rest is said."""

from __future__ import annotations

import pickle
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from networks import InPlace
from sklearn.base import clone
from torch import nn

from featx import FineTuneClassifier, PretrainedFeatureExtractor
from featx.exceptions import BackboneError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (4, 40, 40, 3), dtype=np.uint8)
LABELS = [0, 1, 0, 1]


# What cannot be copied


def hooked() -> nn.Module:
    """With weights that torch computes at every call, in the old way."""
    network = InPlace()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(network.conv)
    return network


def locked() -> nn.Module:
    network = InPlace()
    network.lock = threading.Lock()
    return network


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has no longer a heart for it
        return torch.jit.script(InPlace())


def recorded() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has no longer a heart for it
        return torch.jit.trace(InPlace().eval(), torch.zeros(1, 3, 8, 8))


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


WORDS = {hooked: "remove_weight_norm", locked: "deepcopy", scripted: "scripted", recorded: "scripted", lazy: "lazy"}


@pytest.mark.parametrize("make", WORDS)
@pytest.mark.parametrize("as_callable", [False, True])
def test_what_cannot_be_copied_is_told_alike_of_modules_and_callables(
    make: Callable[[], nn.Module], as_callable: bool
) -> None:
    network = make()
    backbone = (lambda: network) if as_callable else network
    for estimator in (PretrainedFeatureExtractor(backbone), FineTuneClassifier(backbone, freeze=0)):
        with pytest.raises(BackboneError, match=WORDS[make]) as caught:
            estimator.fit(IMAGES, LABELS).transform(IMAGES)
        assert "image_size" not in str(caught.value)


def test_ways_out_of_what_cannot_be_copied_work() -> None:
    network = hooked()
    torch.nn.utils.remove_weight_norm(network.conv)
    unlocked = locked()
    del unlocked.lock
    run = lazy()
    run(torch.zeros(1, 3, 8, 8))
    for backbone in (network, unlocked, run):
        assert len(PretrainedFeatureExtractor(backbone).transform(IMAGES)) == 4


# What takes images of one size only


class OneSize(nn.Module):
    """Takes 20 x 12 pixels and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 4, stride=4)
        self.flat = nn.Linear(4 * 5 * 3, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.flat(self.conv(x).flatten(1))))


@pytest.mark.parametrize("preprocess", [None, "callable"])
@pytest.mark.parametrize("freeze", ["all", 0, "conv"])
def test_tuned_networks_of_one_size_become_extractors_without_predicting_first(
    freeze: int | str, preprocess: str | None
) -> None:
    ready = torch.rand(4, 3, 20, 12)
    given = ready if preprocess is None else IMAGES
    own = None if preprocess is None else _to_20_by_12
    tuned = FineTuneClassifier(OneSize(), preprocess=own, freeze=freeze, epochs=1, random_state=0).fit(given, LABELS)
    for fitted in (tuned, pickle.loads(pickle.dumps(tuned))):
        assert len(fitted.get_feature_names_out()) == 6
        rows = fitted.to_extractor().transform(given)
        np.testing.assert_allclose(rows, fitted.transform(given), rtol=1e-4, atol=1e-5)


def test_saved_classifiers_remember_the_shape_of_their_images(tmp_path: Path) -> None:
    ready = torch.rand(4, 3, 24, 16)
    tuned = FineTuneClassifier(
        "featx_micro", preprocess=None, layers=1, pooling="flatten", freeze="all", epochs=1, random_state=0
    ).fit(ready, LABELS)
    tuned.save(tmp_path / "model.safetensors")
    loaded = FineTuneClassifier.load(tmp_path / "model.safetensors")
    assert len(loaded.get_feature_names_out()) == tuned.transform(ready).shape[1]


def _to_20_by_12(image: object) -> torch.Tensor:
    return torch.from_numpy(np.array(image.resize((12, 20)))).permute(2, 0, 1) / 255


# Branches that run in training and are not read


class Auxiliary(nn.Module):
    """Its second head runs in training mode alone, and takes larger images than the rest."""

    def __init__(self, in_front: bool) -> None:
        super().__init__()
        self.conv, self.deep = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.second = nn.Sequential(nn.Conv2d(4, 4, 64), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 2)
        self.in_front = in_front

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...] | torch.Tensor:
        x = torch.relu(self.conv(x))
        beside = self.second(x) if self.training else None
        scores = self.head(torch.relu(self.deep(x)).mean((2, 3)))
        if beside is None:
            return scores
        return (beside, scores) if self.in_front else (scores, beside)


@pytest.mark.parametrize("in_front", [False, True])
@pytest.mark.parametrize("trained_before", [False, True])
def test_branches_that_nobody_reads_do_not_run_in_training(in_front: bool, trained_before: bool) -> None:
    network = Auxiliary(in_front).train(trained_before)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    model = FineTuneClassifier(network, freeze=0, epochs=2, image_size=24, random_state=0, linear_probe=False)
    model.fit(IMAGES, LABELS)
    after = model.to_extractor().backbone.state_dict()
    assert not torch.equal(after["conv.weight"], before["conv.weight"])
    for name, value in before.items():
        if name.startswith("second."):
            assert torch.equal(after[name], value)


#: Ways to write over a value, or over a part of it, whose result nobody takes.
WRITE = {
    "the value": lambda relu, x: relu(x),
    "a slice": lambda relu, x: relu(x[:, :2]),
    "a view": lambda relu, x: x.flatten(2).sub_(0.2),
    "a part": lambda relu, x: x.narrow(1, 0, 2).mul_(0.5),
    "its data": lambda relu, x: x.data.mul_(0.5),
}


class Writing(nn.Module):
    """Writes over a value without taking what that returns."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.conv, self.deep, self.relu = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True)
        self.beside, self.head = nn.Conv2d(4, 1, 3), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.deep(self.conv(x))
        self.beside(x)
        WRITE[self.way](self.relu, x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("way", WRITE)
@pytest.mark.parametrize("freeze", [0, "conv"])
def test_layers_that_write_in_place_without_being_read_still_run_when_tuned(freeze: int | str, way: str) -> None:
    network, images = Writing(way), torch.rand(4, 3, 8, 8)
    model = FineTuneClassifier(
        network, freeze=freeze, epochs=1, learning_rate=1e-12, preprocess=None, linear_probe=False, random_state=0
    )
    fitted = model.fit(images, LABELS)
    expected = PretrainedFeatureExtractor(network, preprocess=None).transform(images)  # hardly changed
    np.testing.assert_allclose(fitted.transform(images), expected, rtol=1e-4, atol=1e-6)
    scores = fitted.decision_function(images)
    loss = np.log1p(np.exp(-scores * (2 * np.array(LABELS) - 1))).mean()
    np.testing.assert_allclose(fitted.history_["loss"], [loss], rtol=1e-4)  # training saw what prediction sees


def test_auxiliary_classifier_of_torchvision_stops_no_training() -> None:
    network = torchvision.models.inception_v3(weights=None, aux_logits=True, init_weights=False)
    model = FineTuneClassifier(network, freeze=0, epochs=1, image_size=128, linear_probe=False, random_state=0)
    assert np.isfinite(model.fit(IMAGES[:2], [0, 1]).predict_proba(IMAGES[:2])).all()


# Batches of one


@pytest.mark.parametrize(("n", "batch_size"), [(1, 32), (4, 1)])
def test_batches_of_one_name_batch_norm_and_batch_size_and_the_ways_out_work(n: int, batch_size: int) -> None:
    model = FineTuneClassifier(
        "resnet18", weights=None, image_size=32, epochs=1, batch_size=batch_size, batch_norm="train", random_state=0
    )
    with pytest.raises(ValueError, match=rf"batch_norm='train', got one image.*batch_size={batch_size}\. Set"):
        model.partial_fit(IMAGES[:n], LABELS[:n], classes=[0, 1])
    clone(model).set_params(batch_norm="frozen").partial_fit(IMAGES[:n], LABELS[:n], classes=[0, 1])
    clone(model).set_params(batch_size=2).partial_fit(IMAGES[:3], LABELS[:3], classes=[0, 1])  # 2 + 1 are one batch
