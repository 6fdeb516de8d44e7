"""Weights: what a file may lack, what it may not, and that what was saved is what is read."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative_difference
from networks import InPlace
from safetensors.torch import load_file, save_file
from sklearn.base import clone
from torch import nn

from featx import PretrainedFeatureExtractor
from featx.backbones import networks as shelf
from featx.backbones.fingerprint import fingerprint
from featx.backbones.networks import network_spec
from featx.exceptions import WeightsError

IMAGES = np.random.default_rng(0).integers(0, 256, size=(2, 40, 40, 3), dtype=np.uint8)
SMALLEST = ["googlenet", "mnasnet0_5", "densenet121", "inception_v3", "mobilenet_v3_small", "featx_micro"]


def random_network(model: str, seed: int = 0) -> nn.Module:
    return network_spec(model, None, seed).load("cpu", torch.float32).module


def save(state: dict[str, torch.Tensor], path: Path) -> str:
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("model", SMALLEST)
def test_what_was_saved_is_what_is_read(model: str, suffix: str, tmp_path: Path) -> None:
    network = random_network(model, seed=5)
    path = save(network.state_dict(), tmp_path / f"weights{suffix}")
    read = network_spec(model, path, 0).load("cpu", torch.float32)
    assert not read.missing
    for key, value in network.state_dict().items():
        assert torch.equal(value, read.module.state_dict()[key]), key


def test_file_that_was_written_again_is_read_again(tmp_path: Path) -> None:
    path = save(random_network("featx_micro", seed=1).state_dict(), tmp_path / "weights.safetensors")
    extractor = PretrainedFeatureExtractor("featx_micro", weights=path)
    before = extractor.transform(IMAGES)
    save(random_network("featx_micro", seed=2).state_dict(), tmp_path / "new.safetensors")
    shutil.move(tmp_path / "new.safetensors", path)
    assert relative_difference(extractor.transform(IMAGES), before) > 0.1


def test_file_may_lack_the_head_and_nothing_else(tmp_path: Path) -> None:
    state = random_network("alexnet").state_dict()
    headless = {key: value for key, value in state.items() if not key.startswith("classifier")}
    path = save(headless, tmp_path / "headless.pth")
    extractor = PretrainedFeatureExtractor("alexnet", weights=path, layers=-1)
    expected = clone(extractor).set_params(weights=None).transform(IMAGES)
    np.testing.assert_array_equal(extractor.transform(IMAGES), expected)
    with pytest.raises(WeightsError, match=r"penultimate.*classifier\.1, classifier\.4"):
        clone(extractor).set_params(layers="penultimate").transform(IMAGES)
    del headless["features.0.weight"]
    save(headless, tmp_path / "headless.pth")
    with pytest.raises(WeightsError, match=r"missing: features\.0\.weight"):
        extractor.transform(IMAGES)


def test_head_of_nan_counts_as_none(tmp_path: Path) -> None:
    state = dict(random_network("alexnet").state_dict())
    state["classifier.1.weight"] = torch.full_like(state["classifier.1.weight"], torch.nan)
    path = save(state, tmp_path / "nan.pth")
    with pytest.raises(WeightsError, match=r"classifier\.1"):
        PretrainedFeatureExtractor("alexnet", weights=path).transform(IMAGES)


def test_head_of_nan_is_told_from_one_of_another_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = dict(random_network("featx_micro").state_dict())
    path = save({**state, "head.weight": state["head.weight"] * torch.nan}, tmp_path / "nan.pth")
    PretrainedFeatureExtractor("featx_micro", weights=path, verbose=1).transform(IMAGES)
    told = capsys.readouterr().err
    assert "without head, which hold NaN or infinity in the file" in told
    assert "shape" not in told
    with pytest.raises(WeightsError, match="has NaN or infinity, none or of another shape for head"):
        PretrainedFeatureExtractor("featx_micro", weights=path, layers="head").transform(IMAGES)


def test_published_head_of_nan_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    state = dict(random_network("alexnet").state_dict())  # as torchvision publishes features of VGG16
    state["classifier.1.weight"] = torch.full_like(state["classifier.1.weight"], torch.nan)
    monkeypatch.setattr("featx.backbones.entries._TableEntry.state", lambda *_: state)
    shelf._renew_locks()  # forgets what was loaded
    with pytest.raises(WeightsError, match=r"classifier\.1"):
        PretrainedFeatureExtractor("alexnet").transform(IMAGES)
    shelf._renew_locks()


def test_wrong_shape_is_an_error_that_names_key_and_shapes(tmp_path: Path) -> None:
    state = dict(random_network("featx_micro").state_dict())
    state["features.0.conv.bias"] = torch.zeros(3)
    path = save(state, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"features\.0\.conv\.bias \(3,\) in place of \(24,\)"):
        PretrainedFeatureExtractor("featx_micro", weights=path).transform(IMAGES)


def test_random_weights_of_a_module_come_from_the_seed() -> None:
    extractor = PretrainedFeatureExtractor(InPlace(), weights=None, random_state=1)
    first = extractor.transform(IMAGES)
    other = PretrainedFeatureExtractor(InPlace(), weights=None, random_state=1)
    np.testing.assert_array_equal(other.transform(IMAGES), first)
    with pytest.raises(WeightsError, match="reset_parameters"):
        PretrainedFeatureExtractor(network_spec("vit_b_16", None, 0).architecture().module, weights=None).transform(
            IMAGES
        )


def test_fingerprint_follows_content_and_code_alone() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    first = fingerprint(module)
    assert fingerprint(module.eval().requires_grad_(False)) == first
    assert fingerprint(module.to(memory_format=torch.channels_last)) == first
    with torch.no_grad():
        module[1].running_mean[2] += 1e-6
    changed = fingerprint(module)
    assert changed != first

    class Other(InPlace):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(2 * x)

    one, two = InPlace(), Other()
    two.load_state_dict(one.state_dict())
    assert fingerprint(one) != fingerprint(two)


def test_shelf_keeps_a_few_networks_and_no_more() -> None:
    for seed in range(shelf._MOST_LOADED + 3):
        random_network("featx_micro", seed)
    assert len(shelf._SHELF._networks) == shelf._MOST_LOADED
    assert random_network("featx_micro", seed) is random_network("featx_micro", seed)


def test_embedded_weights_are_at_most_two_megabytes() -> None:
    path = Path(shelf.__file__).with_name("featx_micro.safetensors")
    assert path.stat().st_size <= 2_000_000
    assert all(value.isfinite().all() for value in load_file(path).values())
