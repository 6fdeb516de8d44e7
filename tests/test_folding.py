"""BatchNorm inside convolutions: the same values at every place that can still be read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from featx import PretrainedFeatureExtractor
from featx.backbones.folding import fold, is_foldable
from featx.backbones.networks import network_spec

NETWORKS = (
    "resnet18",
    "mobilenet_v3_small",
    "densenet121",
    "efficientnet_b0",
    "regnet_y_400mf",
    "googlenet",
    "vgg11_bn",
)


def with_random_statistics(module: nn.Module) -> nn.Module:
    """In eval mode; BatchNorm that does nothing would prove nothing."""
    generator = torch.Generator().manual_seed(0)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d) and child.track_running_stats:
            for tensor, low in ((child.running_mean, -0.1), (child.running_var, 0.5), (child.weight, 0.8)):
                tensor.data.uniform_(low, low + 0.5, generator=generator)
            child.bias.data.uniform_(-0.2, 0.2, generator=generator)
    return module.eval().requires_grad_(False)


def norms_in(module: nn.Module) -> int:
    return sum(type(child) is nn.BatchNorm2d for child in module.modules())


def values_of(module: nn.Module, images: torch.Tensor, kinds: tuple[type[nn.Module], ...]) -> dict[str, torch.Tensor]:
    """What modules of some kinds put out, as it was when they did."""
    found: dict[str, torch.Tensor] = {}
    handles = [
        child.register_forward_hook(lambda _, args, out, name=name: found.__setitem__(name, out.clone()))
        for name, child in module.named_modules()
        if isinstance(child, kinds)
    ]
    with torch.inference_mode():
        module(images)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_the_values_behind_every_norm_are_the_same(name: str) -> None:
    module = with_random_statistics(copy.deepcopy(network_spec(name, None, 0).load("cpu", torch.float32).module))
    before = copy.deepcopy(module.state_dict())
    folded = fold(module)
    assert norms_in(folded.module) < norms_in(module)

    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    wanted = values_of(module, images, (nn.BatchNorm2d, nn.Linear))
    found = values_of(folded.module, images, (nn.BatchNorm2d, nn.Linear))
    for place, value in wanted.items():
        assert (found[place] - value).norm() <= 1e-5 * value.norm(), place
    for key, tensor in module.state_dict().items():  # nothing was written to
        assert torch.equal(tensor, before[key])


def test_every_norm_of_a_resnet_is_gone_and_nothing_else_is_copied() -> None:
    module = with_random_statistics(torchvision.models.resnet18(weights=None))
    twin = fold(module).module
    assert norms_in(twin) == 0
    assert twin.fc.weight is module.fc.weight


class Net(nn.Module):
    """A convolution and a norm, used as a test says."""

    def __init__(self, use: Callable[[Net, torch.Tensor], torch.Tensor], **options: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.around = nn.Sequential(nn.Conv2d(3, 3, 1))
        self.norm = nn.BatchNorm2d(3, **options)
        self.use = use

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.use(self, images)


def residual(net: Net, images: torch.Tensor) -> torch.Tensor:
    between = net.conv(images)
    return net.norm(between) + between


def twice(net: Net, images: torch.Tensor) -> torch.Tensor:
    return net.norm(net.conv(net.conv(images)))


def norm_twice(net: Net, images: torch.Tensor) -> torch.Tensor:
    return net.norm(net.norm(net.conv(images)))


def with_weight(net: Net, images: torch.Tensor) -> torch.Tensor:
    return net.norm(net.conv(images)) * net.conv.weight.sum()


def by_value(net: Net, images: torch.Tensor) -> torch.Tensor:
    return net.norm(net.conv(images)) if images.sum() > 0 else net.conv(images)


def plain(net: Net, images: torch.Tensor) -> torch.Tensor:
    return net.norm(net.conv(images))


@pytest.mark.parametrize("use", [residual, twice, norm_twice, with_weight, by_value])
def test_a_convolution_that_others_use_too_stays(use: Callable[[Net, torch.Tensor], torch.Tensor]) -> None:
    net = with_random_statistics(Net(use))
    assert fold(net).module is net


def test_without_statistics_or_with_a_second_name_it_stays() -> None:
    free, named = with_random_statistics(Net(plain, track_running_stats=False)), with_random_statistics(Net(plain))
    named.alias = named.conv
    for net in (free, named):
        assert fold(net).module is net
    assert fold(with_random_statistics(Net(plain))).hidden == {("conv", 1, "output"), ("norm", 1, "input")}


def test_what_returns_or_takes_the_values_between_is_hidden_too() -> None:
    folded = fold(with_random_statistics(Net(lambda net, images: net.norm(net.around(images)))))
    assert folded.hidden == {("around", 1, "output"), ("around.0", 1, "output"), ("norm", 1, "input")}


def in_a_list(net: Net, images: torch.Tensor) -> torch.Tensor:
    for part in net.parts:
        images = part(images)
    return images


def by_attributes(net: Net, images: torch.Tensor) -> torch.Tensor:
    found = net.norm(net.conv(images)) * net.norm.num_features
    found = nn.functional.dropout(found, 0.5, net.norm.training)
    return found if isinstance(net.norm, nn.BatchNorm2d) else found * 0


@pytest.mark.parametrize("use", [in_a_list, by_attributes])
def test_whatever_refers_to_a_folded_module_meets_the_new_one(use: Callable[[Net, torch.Tensor], torch.Tensor]) -> None:
    net = with_random_statistics(Net(use))
    net.parts = [net.conv, net.norm]
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    folded = fold(net)
    assert folded.module is not net
    torch.testing.assert_close(folded.module(images), net(images))


class Valued(nn.Module):
    """Cannot be copied to a device without values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(images))

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.conv.weight.sum().item()


def test_a_network_that_cannot_do_without_values_stays() -> None:
    net = with_random_statistics(Valued())
    assert fold(net).module is net


def test_only_code_of_the_libraries_without_hooks_is_trusted_to_do_what_a_trace_shows() -> None:
    networks = [torchvision.models.resnet18(weights=None).eval() for _ in range(3)]
    trusted, hooked, patched = networks
    assert is_foldable(trusted)
    hooked.layer1.register_forward_hook(lambda module, args, out: None)
    patched.bn1.forward = lambda images: -images
    assert not any(map(is_foldable, (hooked, patched, with_random_statistics(Net(plain)))))


@pytest.mark.parametrize("layers", ["conv1", "bn1", ["layer4", "layer1.0.conv1"], "layer1.0"])
def test_features_are_the_plain_networks_wherever_they_are_read(layers: Any) -> None:
    module = with_random_statistics(torchvision.models.resnet18(weights=None))
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    extractor = PretrainedFeatureExtractor(module, layers=layers, preprocess=None, image_size=64)
    assert is_foldable(module)
    names = [layers] if isinstance(layers, str) else layers
    found = values_of(module, images, (nn.Module,))
    wanted = np.concatenate([found[name].mean((2, 3)).numpy() for name in names], axis=1)
    np.testing.assert_allclose(extractor.transform(images), wanted, atol=1e-5 * np.linalg.norm(wanted, axis=1).max())
