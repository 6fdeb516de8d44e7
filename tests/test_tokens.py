"""Tokens: the network says which of them stand for no place in the image and what grid the others form."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import Patches, Wrapper
from sklearn.base import clone
from torch import nn

from featx import PretrainedFeatureExtractor
from featx.backbones.networks import network_spec
from featx.exceptions import LayerError

RNG = np.random.default_rng(0)

LEADING: dict[str, dict[str, int]] = {
    "none": {},
    "torchvision": {"class_token": 1},
    "hub": {"cls_token": 1, "register_tokens": 4},
    "distilled": {"cls_token": 1, "distillation_token": 1},
    "registers only": {"reg_token": 3},
    "official": {"cls_token": 1, "storage_tokens": 2},
}
AROUND: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bare": lambda network: network,
    "sequential": nn.Sequential,
    "wrapped twice": lambda network: Wrapper(nn.Sequential(network)),
}


def extractor(network: nn.Module, **parameters: object) -> PretrainedFeatureExtractor:
    return PretrainedFeatureExtractor(network, preprocess=None, **parameters)


def tokens_of(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return network.eval()(images)


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("kind", LEADING)
def test_averages_and_maxima_leave_out_whatever_leads_the_image(kind: str, around: str) -> None:
    inner, images = Patches(LEADING[kind]), torch.rand(3, 3, 32, 32)
    network, n_leading = AROUND[around](inner), sum(LEADING[kind].values())
    places = tokens_of(inner, images)[:, n_leading:]
    expected = {"avg": places.mean(1), "max": places.amax(1), "map": places.unflatten(1, (4, 4))}
    for pooling, rows in expected.items():
        np.testing.assert_allclose(extractor(network, pooling=pooling).transform(images), rows, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (24, 40), (35, 21), (8, 8)])
def test_maps_and_grids_have_the_proportions_of_the_image(shape: tuple[int, int]) -> None:
    network, images = Patches({"cls_token": 1, "register_tokens": 2}), torch.rand(2, 3, *shape)
    rows, columns = shape[0] // 8, shape[1] // 8
    cells = tokens_of(network, images)[:, 3:].unflatten(1, (rows, columns))
    maps = extractor(network, pooling="map").transform(images)
    np.testing.assert_allclose(maps, cells, rtol=1e-4, atol=1e-4)
    halves = extractor(network, pooling="max", grid=2).transform(images).reshape(2, 6, 2, 2)
    expected = nn.functional.adaptive_max_pool2d(cells.permute(0, 3, 1, 2), 2)
    np.testing.assert_allclose(halves, expected, rtol=1e-4, atol=1e-4)


def test_a_class_token_is_read_where_there_is_one_and_registers_are_none() -> None:
    images = torch.rand(2, 3, 16, 16)
    network = Patches({"cls_token": 1, "register_tokens": 2})
    rows = extractor(network, pooling="cls").transform(images)
    np.testing.assert_allclose(rows, tokens_of(network, images)[:, 0], rtol=1e-5)
    with pytest.raises(LayerError, match="class token"):
        extractor(Patches({"register_tokens": 2}), pooling="cls").transform(images)


@pytest.mark.parametrize("pooling", ["avg", "gem", "cls", "map"])
@pytest.mark.parametrize("unsaid", [Patches({"extra": 5}), Patches({"cls_token": 1}, trailing=4)])
def test_tokens_that_nothing_tells_of_are_refused_until_it_is_said(unsaid: Patches, pooling: str) -> None:
    images = torch.rand(2, 3, 16, 16)
    with pytest.raises(LayerError, match=r"backbone\.num_prefix_tokens = 1"):
        extractor(unsaid, pooling=pooling).transform(images)
    told = Wrapper(clone(extractor(unsaid)).backbone)
    told.num_prefix_tokens = 5  # the way out
    rows = extractor(told).transform(images)
    np.testing.assert_allclose(rows, tokens_of(unsaid, images)[:, 5:].mean(1), rtol=1e-4, atol=1e-4)
    flat = extractor(unsaid, pooling="flatten").transform(images)  # and the other one
    np.testing.assert_allclose(flat, tokens_of(unsaid, images).flatten(1), rtol=1e-4)


class Trailing(nn.Module):
    """A network whose own tokens stand behind those of the image, as in vit_pytorch's SimpleViT with registers."""

    def __init__(self, name: str, count: int) -> None:
        super().__init__()
        self.projection, self.norm, self.name = nn.Conv2d(3, 6, 8, stride=8), nn.LayerNorm(6), name
        setattr(self, name, nn.Parameter(100 * torch.randn(1, count, 6)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = getattr(self, self.name).repeat(len(x), 1, 1)
        return self.norm(torch.cat([self.projection(x).flatten(2).transpose(1, 2), own], dim=1))


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize(("name", "count"), [("register_tokens", 4), ("cls_token", 1)])
def test_tokens_behind_those_of_the_image_are_not_taken_for_leading_ones(name: str, count: int, around: str) -> None:
    inner, images = Trailing(name, count), torch.rand(2, 3, 32, 32)
    for pooling in ("avg", "max", "cls", "map"):
        with pytest.raises(LayerError, match="nothing says"):
            extractor(AROUND[around](inner), layers=-1, pooling=pooling).transform(images)
    flat = extractor(AROUND[around](inner), layers=-1, pooling="flatten").transform(images)  # the way out
    np.testing.assert_allclose(flat, tokens_of(inner, images).flatten(1), rtol=1e-4, atol=1e-5)


def test_a_grid_that_nothing_tells_is_refused_until_it_is_said() -> None:
    class Pairs(nn.Module):
        """Twice as many tokens as places: 4 x 8 of a square image."""

        grid_size: tuple[int, int] | None = None

        def __init__(self) -> None:
            super().__init__()
            self.num_prefix_tokens = 0
            self.inner = Patches({})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x).repeat_interleave(2, dim=1)

    network, images = Pairs(), torch.rand(2, 3, 32, 32)
    with pytest.raises(LayerError, match=r"backbone\.grid_size = \(rows, columns\)"):
        extractor(network, pooling="map").transform(images)
    network.grid_size = (4, 8)
    expected = tokens_of(network, images).unflatten(1, (4, 8))
    np.testing.assert_allclose(extractor(network, pooling="map").transform(images), expected, rtol=1e-4, atol=1e-4)


def test_two_networks_side_by_side_each_say_it_of_their_own_tokens() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = Patches({"cls_token": 1}), Patches({"cls_token": 1, "reg_token": 4})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.left(x).mean(1), self.right(x).mean(1)], dim=1)

    network, images = Both(), torch.rand(2, 3, 16, 16)
    for name, inner, n_leading in (("left", network.left, 1), ("right", network.right, 5)):
        rows = extractor(network, layers=f"{name}.blocks.1").transform(images)
        expected = tokens_of(inner, images)[:, n_leading:].mean(1)
        np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-4)


def test_what_is_said_of_tokens_is_part_of_the_recipe(tmp_path: Path) -> None:
    network, images = Patches({"cls_token": 1, "register_tokens": 2}), torch.rand(2, 3, 16, 16)
    cached = extractor(network, cache=str(tmp_path))
    tokens = tokens_of(network, images)
    np.testing.assert_allclose(cached.transform(images), tokens[:, 3:].mean(1), rtol=1e-4, atol=1e-4)
    network.num_prefix_tokens = 1
    np.testing.assert_allclose(cached.transform(images), tokens[:, 1:].mean(1), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason='timm is not installed: pip install "featx[timm]"')
@pytest.mark.parametrize("around", AROUND)
def test_networks_of_timm_say_it_inside_of_others_too(around: str) -> None:
    import timm

    options = {"img_size": (32, 128), "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0, "reg_tokens": 4}
    inner, images = timm.create_model("vit_tiny_patch16_224", **options).eval(), torch.rand(2, 3, 32, 128)
    with torch.inference_mode():
        places = inner.forward_features(images)[:, 5:]
    name = {"bare": "norm", "sequential": "0.norm", "wrapped twice": "network.0.norm"}[around]
    network = AROUND[around](inner)
    expected = {"avg": places.mean(1), "map": places.unflatten(1, (2, 8))}
    for pooling, rows in expected.items():
        found = extractor(network, layers=name, pooling=pooling).transform(images)
        np.testing.assert_allclose(found, rows, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason='timm is not installed: pip install "featx[timm]"')
@pytest.mark.parametrize(
    ("name", "layer", "n_prefix", "grid"),
    [
        ("pit_xs_distilled_224", "transformers.1.blocks.0", 2, (14, 14)),  # cells merged, tokens kept aside
        ("pit_xs_distilled_224", "norm", 0, (2, 1)),  # the tokens in front, alone
        ("cait_xxs24_224", "blocks.3", 0, (14, 14)),  # the class token joins later
        ("coat_lite_tiny", "serial_blocks2.1", 1, (28, 28)),  # a class token for each stage
    ],
)
def test_tokens_of_published_networks_are_those_of_their_papers(
    name: str, layer: str, n_prefix: int, grid: tuple[int, int]
) -> None:
    found = network_spec(f"timm/{name}", None, 0).architecture().layer(layer)
    assert (found.n_prefix_tokens, found.grid) == (n_prefix, grid)
