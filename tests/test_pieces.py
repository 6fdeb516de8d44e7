"""A batch passes through a CPU in pieces; nothing but speed may tell."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import counting_images, relative_difference
from networks import Prototypes
from sklearn.base import clone

from featx import PretrainedFeatureExtractor
from featx.activations import torch_pass
from featx.exceptions import LayerError

IMAGES = np.random.default_rng(0).integers(0, 256, size=(9, 40, 50, 3), dtype=np.uint8)
# The largest output of featx_micro, of its first block's convolution before the pool: 64 x 32 x 32 float32.
IMAGE_BYTES = 64 * 32 * 32 * 4


@pytest.fixture
def pieces_of(monkeypatch: pytest.MonkeyPatch):
    def fix(n_images: float) -> None:
        monkeypatch.setattr(torch_pass, "_LARGEST_BYTES", int(n_images * IMAGE_BYTES))
        monkeypatch.setattr(torch_pass, "_FEWEST_AT_ONCE", 1)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)

    return fix


@pytest.mark.parametrize("n_images", [1, 2, 4])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("pooling", ["avg", "gem", "flatten", "map"])
def test_features_do_not_depend_on_pieces(pieces_of, pooling: str, precision: str, n_images: int) -> None:
    extractor = PretrainedFeatureExtractor("featx_micro", layers=[0, 2, -1], pooling=pooling, precision=precision)
    whole = extractor.transform(IMAGES)
    # In half precision a value takes half the room.
    pieces_of(n_images if precision == "float32" else n_images / 2)
    with counting_images("FeatxMicro") as passes:
        cut = clone(extractor).transform(IMAGES)
    assert len(passes) == -(-9 // n_images)
    assert cut.shape == whole.shape
    assert relative_difference(cut, whole) < (1e-5 if precision == "float32" else 2e-2)


def test_pieces_too_small_to_keep_the_cores_busy_are_not_made(pieces_of, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces_of(4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    with counting_images("FeatxMicro") as passes:
        PretrainedFeatureExtractor("featx_micro", n_jobs=2).transform(IMAGES)
    assert passes == [9]


def test_layer_without_one_row_per_image_is_refused(pieces_of) -> None:
    """Two rows, whatever the batch: in pieces of two they would pass for features of every image."""
    extractor = PretrainedFeatureExtractor(Prototypes(), layers="prototypes", image_size=32)
    with pytest.raises(LayerError, match="one row per image"):
        extractor.transform(IMAGES)


def test_lone_small_image_may_be_written_into() -> None:
    module = torch.nn.Sequential(torch.nn.ReLU(inplace=True), torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(2))
    extractor = PretrainedFeatureExtractor(module, layers="1", preprocess=None)
    tensors = torch.rand(3, 3, 16, 16) - 0.5
    rows = extractor.transform(tensors)
    assert relative_difference(extractor.transform(tensors[:1]), rows[:1]) < 1e-5
