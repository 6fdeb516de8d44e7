"""Stages of networks that have one resolution: four by depth, whoever wrote the network."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import relative_difference
from networks import Wrapper
from releases import needs_network
from torch import nn

from featx import FineTuneClassifier, PretrainedFeatureExtractor, list_layers
from featx.backbones.table import by_depth
from featx.exceptions import LayerError

RNG = np.random.default_rng(0)
QUARTERS = {1: [1], 2: [1, 2], 3: [1, 2, 3], 4: [1, 2, 3, 4], 5: [2, 3, 4, 5], 6: [2, 3, 5, 6], 12: [3, 6, 9, 12]}


def oblong() -> nn.Module:
    """2 x 8 patches."""
    return timm.create_model("vit_tiny_patch16_224", img_size=(32, 128)).eval()


#: By what is special about each: networks of timm's, and how many images of what shape tell enough.
TRANSFORMERS: dict[str, str | Callable[[], nn.Module]] = {
    "class token": "vit_tiny_patch16_224",
    "distillation token": "deit_tiny_distilled_patch16_224",
    "registers, rotated positions": "vit_small_patch16_dinov3",
    "registers, no class token": "vit_little_patch16_reg4_gap_256",
    "attention head": "vit_base_patch16_siglip_224",
    "relative positions": "beit_base_patch16_224",
    "positions learnt and rotated": "eva02_tiny_patch14_224",
    "parallel branches": "vit_small_patch16_18x2_224",
    "class token that joins late": "cait_xxs24_224",
    "covariance": "xcit_nano_12_p16_224",
    "no attention": "mixer_s32_224",
    "2 x 8 patches": oblong,
}


def needs(kind: str) -> list[pytest.MarkDecorator]:
    name = TRANSFORMERS[kind]
    return [needs_network(name)] if isinstance(name, str) else []


@pytest.mark.parametrize("n", [*QUARTERS, 24, 31, 48])
def test_quarters_are_each_once_and_end_with_the_last(n: int) -> None:
    blocks = [str(i) for i in range(1, n + 1)]
    wanted = QUARTERS.get(n) or sorted({math.ceil(k * n / 4) for k in range(1, 5)})
    assert by_depth(blocks, "end") == [*map(str, wanted[:-1]), "end"]


def test_end_stands_alone_where_no_block_repeats() -> None:
    assert by_depth([], "end") == ["end"]


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=needs(kind)) for kind in TRANSFORMERS])
def test_stages_are_what_timm_calls_intermediates(kind: str) -> None:
    given = TRANSFORMERS[kind]
    module = timm.create_model(given).eval() if isinstance(given, str) else given()
    height, width = module.patch_embed.img_size if hasattr(module, "patch_embed") else module.stem.img_size
    images = torch.from_numpy(RNG.normal(size=(2, 3, height, width)).astype(np.float32))
    n = len(module.blocks)
    depths = [math.ceil(k * n / 4) for k in (1, 2, 3, 4)]
    with torch.inference_mode():
        options: dict[str, Any] = {"norm": False, "intermediates_only": True, "output_fmt": "NCHW"}
        maps = module.forward_intermediates(images, indices=[depth - 1 for depth in depths], **options)
    extractor = PretrainedFeatureExtractor(module, preprocess=None, engine="torch")
    assert list_layers(module) == [f"blocks.{depth - 1}" for depth in depths]
    for pooling, reduced in {"avg": (m.mean((2, 3)) for m in maps), "max": (m.amax((2, 3)) for m in maps)}.items():
        rows = extractor.set_params(layers="all", pooling=pooling).transform(images)
        assert relative_difference(rows, torch.cat([*reduced], dim=1).numpy()) < 1e-5
    for index in (-1, 2, 1, 0):
        alone = extractor.set_params(layers=index, pooling="map").transform(images)
        assert relative_difference(alone, maps[index].permute(0, 2, 3, 1).numpy()) < 1e-5


def test_stages_by_name_are_those_of_the_module() -> None:
    for name in ("vit_tiny_patch16_224", "mixer_s32_224"):
        assert list_layers(f"timm/{name}") == list_layers(timm.create_model(name))


class Block(nn.Module):
    """Adds to what comes in, as a transformer's does; its parts are as many as all blocks, or more."""

    def __init__(self, width: int = 6, n_parts: int = 2) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Part(width, width) for _ in range(n_parts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = x + part(x)
        return x


class Part(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x))


class Foreign(nn.Module):
    """A transformer by nobody known: a norm ends its trunk."""

    def __init__(self, depth: int, make: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 8, stride=8)
        self.trunk = nn.ModuleDict({"layers": nn.ModuleList(make() for _ in range(depth))})
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for layer in self.trunk["layers"]:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


@pytest.mark.parametrize("around", [lambda network: network, nn.Sequential, Wrapper])
@pytest.mark.parametrize("depth", [2, 5, 12])
def test_networks_from_elsewhere_have_stages_too(depth: int, around: Callable[[nn.Module], nn.Module]) -> None:
    found = list_layers(around(Foreign(depth)))
    inside = [name.rpartition("layers.")[2] for name in found[:-1]]
    assert inside == [str(block - 1) for block in QUARTERS[depth][:-1]]
    assert found[-1].endswith("norm")


@pytest.mark.parametrize("n_parts", [1, 2, 3])
def test_parts_are_no_blocks_however_many_they_are(n_parts: int) -> None:
    found = list_layers(Foreign(12, lambda: Block(n_parts=n_parts)))
    assert found == ["trunk.layers.2", "trunk.layers.5", "trunk.layers.8", "norm"]


class Pairs(nn.Module):
    """As vit-pytorch writes it: no module puts out what a block does."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 8, stride=8)
        self.layers = nn.ModuleList(nn.ModuleList([Part(6, 6), Part(6, 6)]) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for attention, mlp in self.layers:
            x = attention(x) + x
            x = mlp(x) + x
        return self.head(self.norm(x).mean(1))


def test_networks_whose_blocks_are_no_modules_have_one_stage() -> None:
    assert list_layers(Pairs(12)) == ["norm"]


def test_a_lone_block_is_no_depth() -> None:
    assert list_layers(Foreign(1, lambda: Block(n_parts=1))) == ["norm"]


def test_a_block_that_runs_several_times_is_no_depth() -> None:
    shared = Block()
    assert list_layers(Foreign(12, lambda: shared)) == ["norm"]


class Scores(nn.Module):
    """A network without an output layer, and one on top of it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.backbone, self.linear = network, nn.Linear(2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.backbone(x))


@pytest.mark.parametrize("around", [Scores, lambda network: nn.Sequential(network, nn.Linear(2, 3))])
def test_networks_below_another_layer_have_their_stages(around: Callable[[nn.Module], nn.Module]) -> None:
    found = list_layers(around(Foreign(12)))
    inside = [name.rpartition("trunk.")[2] for name in found]
    assert inside[:-1] == ["layers.2", "layers.5", "layers.8"]
    assert found[-1].endswith("norm")


def test_parameters_of_containers_train_as_slowly_as_what_is_beside_them() -> None:
    """Those of the embeddings belong to the network itself, which returns last."""
    tuned = FineTuneClassifier("timm/vit_tiny_patch16_224", weights=None, image_size=32, freeze=0)
    tuned.classes_, tuned._runtime = np.arange(2), {}
    built = tuned._new_model(None, 2).build()
    built.network(True)
    assert built.module is not None
    factors = {id(parameter): factor for factor, parameter in built.parameters_with_factors(0.5)}
    of = {name: factors[id(parameter)] for name, parameter in built.module.named_parameters() if "head" not in name}
    assert of["cls_token"] == of["pos_embed"] == of["patch_embed.proj.weight"] == of["blocks.0.norm1.weight"] == 0.5**4
    assert (of["blocks.3.norm1.weight"], of["blocks.11.norm1.weight"], of["norm.weight"]) == (0.5**3, 0.5, 1.0)


def test_what_repeats_as_a_sequence_is_a_block() -> None:
    found = list_layers(Foreign(12, lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6))))
    assert found == ["trunk.layers.2", "trunk.layers.5", "trunk.layers.8", "norm"]


def test_parts_of_blocks_that_cannot_be_read_are_no_stages() -> None:
    assert list_layers("timm/tnt_s_patch16_224") == ["norm"]  # its blocks put out pixels first, as rows of their own


def test_networks_with_resolutions_keep_theirs() -> None:
    assert list_layers("resnet18") == ["relu", "layer1", "layer2", "layer3", "layer4"]
    assert list_layers("timm/vit_base_r26_s32_224")[-1] == "blocks.11"
    for name in ("swin_tiny_patch4_window7_224", "levit_128s", "mobilevit_xs"):
        wanted = {stage["reduction"]: stage["module"] for stage in timm.create_model(name).feature_info}
        assert list_layers(f"timm/{name}") == [*wanted.values()]


@pytest.mark.parametrize("backbone", ["vit_b_16", "timm/vit_tiny_patch16_224"])
def test_frozen_stages_of_transformers_are_frozen_and_the_last_trains(backbone: str) -> None:
    X, y = RNG.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8), [0, 1, 0, 1]
    tuned = FineTuneClassifier(
        backbone, weights=None, freeze=-1, image_size=32, epochs=1, linear_probe=False, random_state=0
    )
    changed = {name.removeprefix("network.") for name in tuned.fit(X, y).tensors_}
    blocks = {name.split("blocks.")[-1].split("encoder_layer_")[-1].split(".")[0] for name in changed}
    assert {"9", "10", "11"} <= blocks
    assert not blocks & {str(i) for i in range(9)}
    assert len(tuned.set_params(freeze=-2).fit(X, y).tensors_) > len(changed)


def test_a_stage_that_is_not_there_is_told() -> None:
    with pytest.raises(LayerError, match="from -4 to 3"):
        PretrainedFeatureExtractor("vit_b_16", weights=None, layers=4).transform(np.zeros((1, 8, 8, 3), np.uint8))
