"""Reading layers: what is read is what the network computed there, in whatever company it is asked for."""

from __future__ import annotations

import pytest
import torch
from helpers_reference import reference_outputs, reference_penultimate
from networks import InPlace, Many, Permuting, Stubborn, Wrapper
from torch import nn

from featx.activations.taps import read
from featx.backbones.layers import Architecture
from featx.backbones.tracing import trace, with_measured_layouts
from featx.exceptions import LayerError

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def architecture_of(module: nn.Module) -> Architecture:
    shape = (3, 16, 16)
    calls = with_measured_layouts(trace(module, shape), module, shape)
    return Architecture(module, calls, None, type(module).__name__, shape)


def resolve(module: nn.Module, layers: object):
    return architecture_of(module).resolve(layers)


def outputs(module: nn.Module, layers: object) -> list[torch.Tensor]:
    return read(module.eval(), IMAGES, resolve(module, layers), lambda _, output: output.clone())


@pytest.mark.parametrize("company", [[], ["relu#2"], ["second", "relu", "relu#2"]])
@pytest.mark.parametrize("name", ["conv", "relu", "second", "relu#2"])
def test_tap_equals_plain_reference_in_any_company(name: str, company: list[str]) -> None:
    module, company = InPlace(), [other for other in company if other != name]
    expected = reference_outputs(module, IMAGES, [name])[name]
    torch.testing.assert_close(outputs(module, [name, *company])[0], expected)
    torch.testing.assert_close(outputs(module, [*company, name])[-1], expected)


def test_tap_reads_each_call_of_a_module_and_the_first_of_a_tuple() -> None:
    module = Many()
    names = ["conv", "conv#2", "again#2", "pair"]
    expected = reference_outputs(module, IMAGES, ["conv", "conv#2", "conv#2", "pair"])
    for name, found in zip(names, outputs(module, names), strict=True):
        torch.testing.assert_close(found, expected[name.replace("again", "conv")])


def test_tap_on_the_output_layer_reads_its_input() -> None:
    module = InPlace()
    expected = reference_penultimate(module, IMAGES, "head")
    torch.testing.assert_close(outputs(module, "penultimate")[0], expected)


def test_pass_ends_after_the_deepest_tap() -> None:
    module = InPlace()
    reached = []
    module.second.register_forward_hook(lambda *_: reached.append("second"))
    module.head.register_forward_hook(lambda *_: reached.append("head"))
    layers = resolve(module, ["second", "conv"])
    reached.clear()  # the trace runs the user's hooks too
    read(module, IMAGES, layers, lambda _, output: output.clone())
    assert reached == ["second"]


def test_pass_ends_even_in_a_network_that_catches_exceptions() -> None:
    module = Stubborn()
    torch.testing.assert_close(outputs(module, "conv")[0], reference_outputs(module, IMAGES, ["conv"])["conv"])


@pytest.mark.parametrize("broken", [False, True])
def test_hooks_are_gone_after_the_pass(broken: bool) -> None:
    module = InPlace()
    layers = resolve(module, ["conv", "penultimate"])
    if broken:
        module.second.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            read(module, IMAGES, layers, lambda _, output: output.clone())
    else:
        read(module, IMAGES, layers, lambda _, output: output.clone())
    assert not module.conv._forward_hooks
    assert not module.head._forward_pre_hooks


def test_layer_that_is_not_reached_is_an_error() -> None:
    module = InPlace().eval()
    layers = resolve(module, "relu#2")
    module.relu.forward = lambda x: x.relu()
    module.forward = lambda x: module.relu(x)  # one call instead of two
    with pytest.raises(LayerError, match="relu#2"):
        read(module, IMAGES, layers, lambda _, output: output.clone())


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("covn", "'conv'"),
        ("conv#9", "from 1 to 2"),
        ("never", "never called"),
        (5, "stage index"),
        ([], "At least one"),
        (None, "list of layers"),
        (1.5, "list of layers"),
        ([None], "got None"),
        ([True], "got True"),
    ],
)
def test_wrong_layer_gets_an_error_that_helps(spec: object, words: str) -> None:
    with pytest.raises(LayerError, match=words):
        resolve(Many(), spec)


def test_generic_rule_finds_blocks_and_stages() -> None:
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU())
    trunk = nn.Sequential(stem, nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Conv2d(6, 6, 3, padding=1))
    module = nn.Sequential(trunk, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5))
    architecture = architecture_of(module)
    assert architecture.blocks == ["0.0.0", "0.0.1", "0.1", "0.2"]
    assert architecture.stages == ["0.0.1", "0.2"]
    assert architecture.penultimate.shape == (2, 24)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_headless_network_is_its_own_penultimate_layer(kernel_size: int) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, kernel_size), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    expected = module.eval()(IMAGES)
    torch.testing.assert_close(outputs(module, "penultimate")[0], expected)


def test_pointwise_convolution_in_front_of_a_global_pool_is_the_output_layer() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    (layer,) = resolve(module, "penultimate")
    assert (layer.name, layer.side, layer.channels) == ("1", "input", 4)


def test_trace_falls_back_to_a_real_run_where_values_decide() -> None:
    assert [call.name for call in trace(Stubborn(), (3, 16, 16))] == ["conv", "deep", ""]


@pytest.mark.parametrize("wrap", [nn.Sequential, nn.DataParallel, Wrapper])
def test_wrapper_around_a_network_changes_no_stage(wrap) -> None:
    network = nn.Sequential()
    network.add_module("stem", nn.Conv2d(3, 4, 3, stride=2, padding=1))
    network.add_module("deep", nn.Conv2d(4, 6, 3, stride=2, padding=1))
    network.add_module("pool", nn.AdaptiveAvgPool2d(1))
    network.add_module("flat", nn.Flatten())
    network.add_module("head", nn.Linear(6, 5))
    found = outputs(wrap(network), "all")
    for expected, stage in zip(outputs(network, "all"), found, strict=True):
        torch.testing.assert_close(stage, expected)
    assert len(found) == 2


def test_network_of_vectors_has_no_stages_and_says_so() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4), nn.ReLU(), nn.Linear(4, 2))
    assert outputs(module, "penultimate")[0].shape == (3, 4)
    for layers in (-1, "all"):
        with pytest.raises(LayerError, match=r"spatial|stages"):
            resolve(module, layers)


class Windows(nn.Module):
    """Folds places into the batch, as window attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, channels, height, width = x.shape
        folded = x.permute(0, 2, 3, 1).reshape(n * height, width, channels)
        return self.inner(folded).reshape(n, height, width, channels).mean((1, 2))


def test_layout_of_foreign_blocks_is_measured_and_not_guessed() -> None:
    module = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), Permuting(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    layers = {layer.label: layer.layout for layer in resolve(module, ["0", "1", "1.norm", "1.linear"])}
    assert layers == {"0": "NCHW", "1": "NCHW", "1.norm": "NHWC", "1.linear": "NHWC"}


def test_layer_without_one_row_per_image_is_refused() -> None:
    with pytest.raises(LayerError, match="one row per image"):
        resolve(Windows(), "inner")


class TwoHeads(nn.Module):
    """The scores first, and an auxiliary head that runs later."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.scores = nn.Linear(4, 2)
        self.shared = nn.Linear(4, 4)
        self.aux = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        pooled = self.shared(self.shared(self.conv(x).mean((2, 3))).relu())
        return {"scores": self.scores(input=pooled), "aux": self.aux(pooled)}


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 1), nn.Linear(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.b(self.a(x))


def headed(*head: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        (TwoHeads(), "scores", 1),
        (headed(LowRank()), "3", 1),
        (headed(nn.Linear(4, 2), nn.Softmax(1)), "3", 1),
        (headed(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 7, bias=False))), "3", 1),
    ],
)
def test_penultimate_is_the_input_of_what_makes_the_scores(module: nn.Module, name: str, call: int) -> None:
    (layer,) = resolve(module, "penultimate")
    assert (layer.name, layer.call, layer.side, layer.shape) == (name, call, "input", (2, 4))
    assert outputs(module, "penultimate")[0].shape == (3, 4)


def test_tied_output_layer_is_read_at_its_last_call() -> None:
    tied = nn.Linear(4, 4)
    (layer,) = resolve(headed(tied, nn.ReLU(), tied), "penultimate")
    assert (layer.name, layer.call) == ("3", 2)


def test_network_that_swallows_everything_is_read_all_the_same() -> None:
    class Swallowing(InPlace):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                return super().forward(x)
            except:  # noqa: E722  the habit under test
                return x.new_zeros(len(x), 5)

    assert outputs(Swallowing(), "conv")[0].shape == (3, 4, 16, 16)


def test_same_place_twice_is_an_error() -> None:
    with pytest.raises(LayerError, match="Each layer once"):
        resolve(InPlace(), ["conv", "conv"])
