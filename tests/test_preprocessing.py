"""Preprocessing and loading: the weights' own transform, strips that do not explode, order and errors under threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from torchvision.models import ResNet18_Weights, ResNet50_Weights

from featx.backbones.networks import network_spec
from featx.backbones.weights import preset_named
from featx.exceptions import ImageError
from featx.images import as_items
from featx.images.loading import iter_batches
from featx.images.preprocessing import CustomPreprocessing, Preset, collate

RNG = np.random.default_rng(0)


def smooth(height: int, width: int) -> torch.Tensor:
    """A picture of slow waves, uint8 (3, height, width)."""
    y, x = torch.meshgrid(torch.linspace(0, 6, height), torch.linspace(0, 9, width), indexing="ij")
    return torch.stack([127 + 120 * torch.sin(x), 127 + 120 * torch.cos(y), 127 + 120 * torch.sin(x + y)]).byte()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_bytes_are_resized_alike_on_every_processor(interpolation: str) -> None:
    """Torch's capability is chosen when a process begins."""
    script = f"""
import hashlib, torch
from featx.images.preprocessing import Preset, SquashPreset
image = torch.randint(0, 256, (3, 60, 91), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
for preset in (Preset(32, 24, interpolation={interpolation!r}), SquashPreset(80, 64, interpolation={interpolation!r})):
    for view in (image, image.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
        print(hashlib.sha256(preset.tile(view).numpy().tobytes()).hexdigest())
"""

    def printed(capability: dict[str, str]) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", script], env=os.environ | capability, capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    usual = printed({})
    assert usual == printed({"ATEN_CPU_CAPABILITY": "default"})
    assert usual[::2] == usual[1::2]


@pytest.mark.parametrize(("height", "width"), [(375, 500), (640, 480), (100, 90), (224, 224)])
def test_preset_equals_the_weights_own_transform(height: int, width: int) -> None:
    image, preset = smooth(height, width), network_spec("resnet18", "DEFAULT", 0).preset
    expected = ResNet18_Weights.DEFAULT.transforms()(image)
    found = preset.finish(preset.tile(image, stretch=False)[None])[0]
    step = 1 / 255 / 0.224  # one 8-bit level: torchvision's two resize routines round differently
    assert (found - expected).abs().max() <= 1.01 * step


def test_preset_by_name_equals_that_of_the_weights() -> None:
    transform = ResNet50_Weights.IMAGENET1K_V2.transforms()
    preset = preset_named("ResNet50_Weights.IMAGENET1K_V2")
    assert [preset.resize] == transform.resize_size
    assert [preset.crop] == transform.crop_size
    assert list(preset.mean) == transform.mean


def test_floats_are_never_rounded_to_8_bits() -> None:
    preset = Preset(resize=8, crop=8)
    image = torch.full((3, 8, 8), 0.1234567)
    assert preset.tile(image, stretch=False).dtype == torch.float32
    np.testing.assert_allclose(preset.tile(image, stretch=False), 0.1234567, rtol=1e-5)


def test_scaled_preset_keeps_the_proportion_of_resize_and_crop() -> None:
    scaled = Preset(resize=256, crop=224).scaled(112)
    assert (scaled.resize, scaled.crop) == (128, 112)
    assert Preset(resize=32, crop=32).scaled(None) == Preset(resize=32, crop=32)


@pytest.mark.parametrize(("height", "width"), [(10, 100_000), (100_000, 10), (1, 3_000_000)])
def test_strip_is_cropped_before_it_is_resized(height: int, width: int) -> None:
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    middle = (slice(None), slice(height // 2, height // 2 + 1), slice(width // 2, width // 2 + 1))
    image[middle] = 255
    tile = Preset(resize=256, crop=224).tile(image, stretch=False)
    assert tile.shape == (3, 224, 224)
    assert tile.any()  # the middle is what is kept


def test_crop_before_resize_changes_next_to_nothing() -> None:
    image = smooth(60, 300)
    preset = Preset(resize=256, crop=224)
    whole = ResNet18_Weights.DEFAULT.transforms()(image)
    assert (preset.finish(preset.tile(image, stretch=False)[None])[0] - whole).abs().max() < 0.1


def test_rows_are_stretched_and_never_cropped() -> None:
    image = torch.zeros(3, 1, 30, dtype=torch.uint8)
    image[:, :, 0] = image[:, :, -1] = 255
    tile = Preset(resize=32, crop=16).tile(image, stretch=True)
    assert tile.shape == (3, 16, 16)
    assert tile[:, :, 0].any()
    assert tile[:, :, -1].any()


def test_mixed_tiles_become_floats_in_the_same_range() -> None:
    mixed = collate([torch.full((3, 2, 2), 255, dtype=torch.uint8), torch.full((3, 2, 2), 0.5)])
    assert mixed.dtype == torch.float32
    assert mixed.amax((1, 2, 3)).tolist() == [1.0, 0.5]


def test_tiles_of_different_shapes_are_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="one shape"):
        collate([torch.zeros(3, 2, 2), torch.zeros(3, 2, 3)])
    with pytest.raises(TypeError, match="ToTensor"):
        CustomPreprocessing(lambda image: "no tensor").tile(torch.zeros(3, 2, 2), stretch=False)


# Loading


def loading(
    X: object, tile=lambda image, stretch: image, batch_size: int = 4, n_jobs: int = 3, on_error: str = "raise"
):
    """Batches of consecutive rows."""
    rows = [range(start, min(start + batch_size, len(X))) for start in range(0, len(X), batch_size)]
    return iter_batches(as_items(X), rows, tile, n_jobs=n_jobs, on_error=on_error)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_batches_keep_the_order_whatever_the_threads_do(batch_size: int) -> None:
    X = [np.full((2, 2, 3), i, dtype=np.uint8) for i in range(23)]
    delays = iter(RNG.uniform(0, 0.002, size=23).tolist())

    def slow(image: torch.Tensor, stretch: bool) -> torch.Tensor:
        time.sleep(next(delays))  # threads finish out of order
        return image

    found = list(loading(X, slow, batch_size=batch_size, n_jobs=4))
    assert [row for batch in found for row in batch.rows] == list(range(23))
    assert torch.cat([batch.tiles for batch in found])[:, 0, 0, 0].tolist() == list(range(23))


def test_first_broken_row_is_the_one_that_is_raised() -> None:
    X = [np.zeros((2, 2, 3), dtype=np.uint8)] * 10
    X[3], X[7] = None, None
    with pytest.raises(ImageError, match=r"X\[3\]"):
        list(loading(X))


def test_broken_rows_are_left_out_and_recorded() -> None:
    X = [np.zeros((2, 2, 3), dtype=np.uint8)] * 6
    X[1], X[4], X[5] = None, None, None
    first, second = loading(X, on_error="nan")
    assert (first.rows, list(first.errors), len(first.tiles)) == ([0, 2, 3], [1], 3)
    assert (second.rows, list(second.errors), second.tiles) == ([], [4, 5], None)


def test_decoding_stays_a_bounded_distance_ahead() -> None:
    started = []

    def note(image: torch.Tensor, stretch: bool) -> torch.Tensor:
        started.append(1)
        return image

    X = np.zeros((500, 2, 2, 3), dtype=np.uint8)
    iterator = loading(X, note, batch_size=8, n_jobs=2)
    next(iterator)
    assert len(started) <= 8 + 2 * 8 + 2 * 4
    iterator.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("featx")]


def test_what_nobody_waits_for_is_not_decoded() -> None:
    started, gate = [], threading.Event()

    def slow(image: torch.Tensor, stretch: bool) -> torch.Tensor:
        started.append(1)
        if image.amax() >= 8:  # behind the first batch
            gate.wait()
        return image

    X = np.broadcast_to(np.arange(200, dtype=np.uint8)[:, None, None, None], (200, 2, 2, 3))
    iterator = loading(X, slow, batch_size=8, n_jobs=2)
    next(iterator)
    threading.Timer(0.2, gate.set).start()
    iterator.close()
    assert len(started) <= 8 + 2 * 4  # what the two threads had in hand, and none of what was queued


def test_error_of_the_users_callable_comes_through_and_ends_the_threads() -> None:
    def broken(image: torch.Tensor, stretch: bool) -> torch.Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(loading(np.zeros((9, 2, 2, 3), np.uint8), broken, batch_size=2, n_jobs=2))
