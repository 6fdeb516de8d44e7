"""The table of networks against the networks, run on the meta device: shapes without weights or arithmetic."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
import torchvision
from releases import sizes_are_checked
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision.models import WeightsEnum, get_model_builder, get_model_weights, list_models
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.maxvit import SwapAxes, WindowDepartition, WindowPartition
from torchvision.ops import Permute
from torchvision.ops.misc import Conv2dNormActivation

from featx.backbones.micro import INPUT_SIZE, FeatxMicro
from featx.backbones.table import FAMILIES, family_of, stages_of

MICRO = "featx_micro"
MODELS = [model for family in FAMILIES for model in family.channels]
CHOSEN = {next(iter(family.channels)) for family in FAMILIES} | {"efficientnet_v2_s", "swin_v2_t", "vgg11_bn"}
EACH_FAMILY = [next(iter(family.channels)) for family in FAMILIES]
EACH_MODEL = [pytest.param(model, marks=() if model in CHOSEN else pytest.mark.slow) for model in MODELS]

CHANNELS_FIRST = (nn.Conv2d, nn.BatchNorm2d, LayerNorm2d, Conv2dNormActivation, WindowDepartition)
CHANNELS_LAST = (nn.Linear, nn.LayerNorm, WindowPartition, SwapAxes)

#: What feeds the trunk and is neither a trunk block nor the head: a weights file must have it.
BEFORE_THE_TRUNK = {"vit": ("class_token", "conv_proj", "encoder.pos_embedding")}


class MetaParameters(TorchFunctionMode):
    """Parameters without memory, and every other tensor real: builders compute with some of them (RegNet's widths)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = {"device": "meta"} if func is torch.empty else {}
        return func(*args, **{**(kwargs or {}), **device})


@dataclass
class Trace:
    """One pass: the modules in the order of their first call, and each one's first output."""

    model: nn.Module
    side: int
    outputs: dict[str, torch.Tensor]
    logits: torch.Tensor


def build(model: str, **options: Any) -> nn.Module:
    builder = FeatxMicro if model == MICRO else get_model_builder(model)
    with MetaParameters():
        return builder(**options).eval().to("meta")


def run(network: nn.Module, side: int) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = network(torch.empty(1, 3, side, side, device="meta"))
    return logits


def sides_of(model: str) -> list[int]:
    """Input sizes of the weights; the first is that of IMAGENET1K_V1 where there is such a preset."""
    if model == MICRO:
        return [INPUT_SIZE]
    presets = sorted(get_model_weights(model), key=lambda preset: preset.name != "IMAGENET1K_V1")
    return list(dict.fromkeys(preset.transforms.keywords["crop_size"] for preset in presets))


def build_for(model: str, side: int) -> nn.Module:
    family = family_of(model)
    options = dict(family.build_options)
    if family.name == "vit":
        options["image_size"] = side
    return build(model, **options)


@cache
def trace(model: str, side: int) -> Trace:
    network = build_for(model, side)
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                outputs.setdefault(name, output)

        return hook

    for name, module in network.named_modules():
        module.register_forward_hook(keep(name))
    logits = run(network, side)
    del outputs[""]
    return Trace(network, side, outputs, logits)


def traces(model: str) -> Iterator[Trace]:
    for side in sides_of(model):
        yield trace(model, side)


def channels_and_side(model: str, name: str, output: torch.Tensor) -> tuple[int, int]:
    shape, layout = tuple(output.shape), family_of(model).layout_of(name)
    if layout == "tokens":
        grid = math.isqrt(shape[1] - family_of(model).n_prefix_tokens)
        assert grid**2 == shape[1] - family_of(model).n_prefix_tokens
        return shape[2], grid
    channels, *sides = (shape[1], *shape[2:]) if layout == "NCHW" else (shape[3], *shape[1:3])
    assert len(sides) == 2
    assert sides[0] == sides[1]
    return channels, sides[0]


def reduction_of(model: str, side: int, output_side: int) -> int:
    """Patch side for tokens; else the power of two that unpadded borders and odd sides blur."""
    if family_of(model).layout == "tokens":
        return side // output_side
    return int(2 ** round(math.log2(side / output_side)))


def trunk_blocks(network: nn.Module, names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        module = network.get_submodule(name)
        if type(module) in (nn.Sequential, nn.ModuleList):
            yield from trunk_blocks(network, tuple(f"{name}.{child}" for child, _ in module.named_children()))
        else:
            yield name


def downsampler_norms(network: nn.Module, blocks: list[str]) -> list[str]:
    """Normalisations that a strided convolution, their sibling, follows."""
    pairs = [(name, network.get_submodule(name), network.get_submodule(after)) for name, after in pairwise(blocks)]
    return [
        name
        for name, module, after in pairs
        if isinstance(module, nn.LayerNorm) and isinstance(after, nn.Conv2d) and after.stride != (1, 1)
    ]


def derived_stages(model: str, found: Trace) -> list[tuple[str, int, int]]:
    """The stage rule, from the trunk blocks and one pass alone."""
    blocks = list(trunk_blocks(found.model, family_of(model).trunk))
    last: dict[int, tuple[str, int]] = {}
    for name in [name for name in blocks if name not in downsampler_norms(found.model, blocks)]:
        channels, side = channels_and_side(model, name, found.outputs[name])
        last[reduction_of(model, found.side, side)] = name, channels
    ends = [(outermost(name, found), reduction, channels) for reduction, (name, channels) in last.items()]
    return ends if len(ends) > 1 else [*quarters(model, found, blocks), *ends]


def quarters(model: str, found: Trace, blocks: list[str]) -> Iterator[tuple[str, int, int]]:
    """The ends of the first three quarters of those blocks that repeat."""
    (kind, n), *_ = Counter(type(found.model.get_submodule(name)) for name in blocks).most_common(1)
    repeated = [name for name in blocks if type(found.model.get_submodule(name)) is kind]
    for end in {12: (3, 6, 9), 24: (6, 12, 18), 32: (8, 16, 24)}[n]:
        channels, side = channels_and_side(model, repeated[end - 1], found.outputs[repeated[end - 1]])
        yield repeated[end - 1], reduction_of(model, found.side, side), channels


def outermost(name: str, found: Trace) -> str:
    parts = name.split(".")
    enclosing = [".".join(parts[: depth + 1]) for depth in range(len(parts))]
    return next(path for path in enclosing if found.outputs.get(path) is found.outputs[name])


def under(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def test_table_has_every_classification_model_once() -> None:
    assert sorted(MODELS) == sorted([*list_models(module=torchvision.models), MICRO])
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


def test_table_import_leaves_torch_alone() -> None:
    code = "import sys, featx.backbones.table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("model", EACH_MODEL)
def test_stages_have_the_channels_and_reductions_of_a_run(model: str) -> None:
    for found in traces(model):
        for name, reduction, channels in stages_of(model):
            width, side = channels_and_side(model, name, found.outputs[name])
            assert (name, reduction_of(model, found.side, side), width) == (name, reduction, channels)


@pytest.mark.parametrize("model", EACH_MODEL)
def test_stages_follow_from_the_rule(model: str) -> None:
    for found in traces(model):
        assert derived_stages(model, found) == list(stages_of(model))


@pytest.mark.parametrize("model", EACH_MODEL)
def test_trunk_blocks_run_in_order_and_once(model: str) -> None:
    found = trace(model, sides_of(model)[0])
    blocks = list(trunk_blocks(found.model, family_of(model).trunk))
    assert blocks == [name for name in found.outputs if name in set(blocks)]
    assert len(blocks) == len(set(blocks))


@pytest.mark.parametrize("model", EACH_MODEL)
def test_downsampler_norms_are_those_before_strided_convolutions(model: str) -> None:
    network = trace(model, sides_of(model)[0]).model
    blocks = list(trunk_blocks(network, family_of(model).trunk))
    assert list(family_of(model).downsampler_norms) == downsampler_norms(network, blocks)


@pytest.mark.parametrize("model", EACH_MODEL)
def test_output_is_the_last_layer_with_parameters_and_gives_the_logits(model: str) -> None:
    found = trace(model, sides_of(model)[0])
    called = [name for name in found.outputs if any(True for _ in found.model.get_submodule(name).parameters(False))]
    assert family_of(model).output == called[-1]
    assert found.outputs[called[-1]].shape[1] == found.logits.shape[1] == (10 if model == MICRO else 1000)


@pytest.mark.parametrize("model", EACH_MODEL)
def test_weights_lie_under_trunk_or_head(model: str) -> None:
    family = family_of(model)
    # Files hold the auxiliary classifiers too, which build_options leaves out.
    options = {name: value for name, value in family.build_options.items() if name != "aux_logits"}
    network = build(model, **options)
    names = (*family.trunk, *family.head, *BEFORE_THE_TRUNK.get(family.name, ()))
    assert [key for key in network.state_dict() if not under(key, names)] == []
    assert set(family.head) <= {name for name, _ in network.named_children()}
    assert under(family.output, family.head)


@pytest.mark.parametrize("model", EACH_MODEL)
def test_layouts_put_the_channels_where_the_module_does(model: str) -> None:
    found = trace(model, sides_of(model)[0])
    layouts = {name: own_layout(found.model.get_submodule(name), output) for name, output in found.outputs.items()}
    known = {name: layout for name, layout in layouts.items() if layout}
    assert {name: "NCHW" if family_of(model).layout_of(name) == "NCHW" else "last" for name in known} == known


def own_layout(module: nn.Module, output: torch.Tensor) -> str | None:
    """Place of the channels as far as the module's class tells."""
    if output.ndim < 3:
        return None
    if isinstance(module, Permute):
        return "NCHW" if module.dims == [0, 3, 1, 2] else "last"
    if isinstance(module, CHANNELS_FIRST):
        return "NCHW"
    return "last" if isinstance(module, CHANNELS_LAST) else None


@pytest.mark.parametrize("model", EACH_FAMILY)
def test_min_size_runs_and_one_pixel_less_does_not(model: str) -> None:
    family = family_of(model)
    network = build(model, **family.build_options)
    run(network, family.min_size)
    if not sizes_are_checked():
        pytest.skip(f"torch {torch.__version__} does not tell sizes that do not fit before there are values")
    with pytest.raises((RuntimeError, AssertionError)):
        run(network, family.min_size - 1)


@pytest.mark.parametrize("model", EACH_FAMILY)
def test_fixed_size_networks_alone_refuse_another_side(model: str) -> None:
    family = family_of(model)
    network = build(model, **family.build_options)
    with pytest.raises((RuntimeError, AssertionError)) if family.fixed_size else nullcontext():
        run(network, 2 * sides_of(model)[0])


@pytest.mark.parametrize("model", EACH_MODEL)
def test_build_options_silence_the_builder(model: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(model, **family_of(model).build_options)


@pytest.mark.parametrize("model", [model for model in EACH_FAMILY if model != MICRO])
def test_pretrained_attributes_are_those_that_weights_change(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *args, **kwargs: {})
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *args, **kwargs: None)
    side = sides_of(model)[0]
    weights = next(w for w in get_model_weights(model) if w.transforms.keywords["crop_size"] == side)
    pretrained, plain = settings(build(model, weights=weights)), settings(build_for(model, side))
    changed = {name: value for name, value in pretrained.items() if plain.get(name) != value}
    assert changed == dict(family_of(model).pretrained_attributes)


def settings(network: nn.Module) -> dict[str, Any]:
    """Plain attributes; whether there are auxiliary classifiers matters in training alone."""
    plain = {name: value for name, value in vars(network).items() if isinstance(value, bool | int | float | str)}
    return {name: value for name, value in plain.items() if name != "aux_logits"}


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter:UserWarning")
@pytest.mark.parametrize(
    ("model", "old_names"),
    [
        ("densenet121", {f"{layer}{i}.": f"{layer}.{i}." for layer in ("norm", "conv") for i in (1, 2)}),
        ("vit_b_16", {"mlp.0.": "mlp.linear_1.", "mlp.3.": "mlp.linear_2."}),
    ],
)
def test_renames_read_the_old_names_that_the_builder_reads(
    model: str, old_names: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Files of that age are without num_batches_tracked.
    state = {key: value for key, value in build(model).state_dict().items() if not key.endswith("_tracked")}
    old = {in_old_words(key, old_names): torch.zeros(()).expand(value.shape) for key, value in state.items()}
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *args, **kwargs: dict(old))
    build(model, weights="IMAGENET1K_V1")  # strict: fails on a name that torchvision does not know
    assert list(map(family_of(model).renamed, old)) == list(state)
    assert set(old) != set(state)


def in_old_words(key: str, old_names: dict[str, str]) -> str:
    for new, old in old_names.items():
        if "denselayer" in key or "encoder_layer" in key:
            key = key.replace(new, old)
    return key


@pytest.mark.parametrize("model", EACH_FAMILY)
def test_renames_leave_the_names_of_today_alone(model: str) -> None:
    keys = list(build(model, **family_of(model).build_options).state_dict())
    assert list(map(family_of(model).renamed, keys)) == keys


@pytest.mark.parametrize(("wrong", "near"), [("resnet81", "'resnet18'"), ("featx-micro", "'featx_micro'")])
def test_family_of_names_the_nearest_of_a_misspelt_model(wrong: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"got backbone='{wrong}'") as caught:
        family_of(wrong)
    assert near in str(caught.value)


def test_family_of_is_the_row_that_holds_the_model() -> None:
    assert all(model in family_of(model).channels for model in MODELS)
