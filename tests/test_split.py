"""The split at the freeze point: two parts that make the whole, and a front that nothing moves."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import relative_difference
from helpers_reference import reference_outputs, reference_penultimate
from networks import InPlace, Many, Stubborn
from torch import nn
from torchvision.ops import StochasticDepth

from featx import FineTuneClassifier
from featx.activations.pooling import pool_together
from featx.activations.taps import read
from featx.backbones.layers import Architecture, Layer
from featx.backbones.networks import network_spec
from featx.backbones.table import family_of, stages_of
from featx.training.split import Split, split_at
from featx.training.values import unflatten

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, size=(12, 24, 24, 3), dtype=np.uint8)
LABELS = np.arange(12) % 3

# The smallest network of each family; the slow ones only differ in their size.
_SMALL = """
featx_micro squeezenet1_0 squeezenet1_1 shufflenet_v2_x0_5 mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_y_400mf
efficientnet_b0 googlenet densenet121 resnet18
""".split()  # noqa: SIM905
_LARGE = "alexnet inception_v3 convnext_tiny swin_t swin_v2_t maxvit_t vgg11 vit_b_16".split()  # noqa: SIM905
MODELS = [*_SMALL, *(pytest.param(model, marks=pytest.mark.slow) for model in _LARGE)]


def network(model: str) -> tuple[nn.Module, Architecture, torch.Tensor]:
    """A network of one's own with random values, what can be read from it, and images that it takes."""
    spec, family = network_spec(model, None, 0), family_of(model)
    size = spec.preset.crop if family.fixed_size else max(family.min_size, 64)
    shared = spec.load("cpu", torch.float32).module
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    return copy.deepcopy(shared), spec.architecture((3, size, size)), images


def through_rows(values: torch.Tensor, layer: Layer) -> torch.Tensor:
    """Values as they come back from where features are kept: flat rows, given their shape again."""
    (rows,) = pool_together(values, layer, [("flatten", 1)])
    return unflatten(layer)(rows)


def values_at(module: nn.Module, images: torch.Tensor, layer: Layer) -> torch.Tensor:
    """What a layer puts out, as the extractor reads it."""
    with torch.no_grad():
        (values,) = read(module, images, [layer], lambda _, output: through_rows(output, layer))
    return values


def make_random(module: nn.Module) -> int:
    """Let everything that can drop values drop some; how many places that are."""
    count = 0
    for part in module.modules():
        if isinstance(part, (nn.Dropout, StochasticDepth)):
            part.p = 0.3
            count += 1
        for name in ("drop_rate", "dropout", "attention_dropout"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.3)
                count += 1
    return count


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@pytest.mark.parametrize("model", MODELS)
def test_tail_of_front_is_the_whole_network_at_every_stage(model: str) -> None:
    module, architecture, images = network(model)
    attach = architecture.penultimate
    expected = reference_penultimate(module, images, family_of(model).output)
    cuts = set()
    for count in range(1, len(stages_of(model)) + 1):
        split = split_at(module, architecture, attach, count)
        assert split.cut is not None, split.reason
        cuts.add(split.cut.label)
        split.set_modes(module, training=False, batch_norm="frozen")
        with torch.no_grad():
            found = split.tail(module)(values_at(module, images, split.cut))
        assert relative_difference(found, expected) < 1e-5, count
    assert len(cuts) == len(stages_of(model))


@pytest.mark.parametrize("model", MODELS)
def test_tail_in_training_draws_and_learns_as_the_whole_network_does(model: str) -> None:
    module, architecture, images = network(model)
    attach = architecture.penultimate
    make_random(module)
    for count in range(1, len(stages_of(model)) + 1):
        split = split_at(module, architecture, attach, count)
        split.set_modes(module, training=True, batch_norm="frozen")
        assert split.cut is not None
        results = []
        parts = {"tail": split.tail(module), "whole": replace(split, cut=None).tail(module)}
        for name, part in parts.items():
            values = values_at(module, images, split.cut) if name == "tail" else images
            module.zero_grad()
            with seeded(7):
                out = part(values)
            learns = [parameter for parameter in module.parameters() if parameter.requires_grad]
            if learns and out.requires_grad:
                out.square().mean().backward()
            slopes = [torch.zeros(1) if p.grad is None else p.grad.flatten().clone() for p in learns]
            results.append((out.detach(), torch.cat([torch.zeros(1), *slopes])[None]))
        assert relative_difference(results[0][0], results[1][0]) < 1e-5, count
        assert torch.linalg.norm(results[0][1] - results[1][1]) <= 1e-3 * torch.linalg.norm(results[1][1]), count


def test_randomness_of_the_tail_is_really_on() -> None:
    for model in ("densenet121", "efficientnet_b0", "mobilenet_v2", "mnasnet0_5"):
        module, architecture, images = network(model)
        assert make_random(module) > 0
        # mobilenet and mnasnet drop in the classifier alone, which is what the head replaces.
        attach = architecture.penultimate
        split = split_at(module, architecture, attach, 1)
        split.set_modes(module, training=True, batch_norm="frozen")
        values = values_at(module, images, split.cut)
        tail = split.tail(module)
        with torch.no_grad():
            with seeded(0):
                one = tail(values.clone())
            with seeded(1):
                other = tail(values.clone())
        assert relative_difference(one, other) > 1e-3, model


@pytest.mark.parametrize("model", MODELS)
def test_what_trains_is_what_lies_behind_the_freeze_point(model: str) -> None:
    """Gradients that cannot pass the freeze point reach the same parameters."""
    module, architecture, images = network(model)
    for count in range(len(stages_of(model)) + 1):
        split = split_at(module, architecture, architecture.penultimate, count)
        module.eval().requires_grad_(True)
        module.zero_grad()
        handle = None
        if count:
            place = module.get_submodule(stages_of(model)[count - 1][0])
            handle = place.register_forward_hook(lambda _, args, output: output.detach())
        tail = replace(split, cut=None).tail(module)
        out = tail(images)
        if out.requires_grad:
            out.square().mean().backward()
        if handle is not None:
            handle.remove()
        reached = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
        split.set_modes(module, training=True, batch_norm="frozen")
        assert {name for name, parameter in module.named_parameters() if parameter.requires_grad} == reached, count


@pytest.mark.parametrize(
    ("model", "attach", "like"),
    [("featx_micro", "penultimate", -2), ("vit_b_16", "penultimate", -2), ("featx_micro", 1, 0), ("featx_micro", 0, 0)],
)
def test_last_two_stages_below_the_head_train_by_default(model: str, attach: str | int, like: int) -> None:
    """All of them where the head reads the first or the second."""
    module, architecture, _ = network(model)
    (layer,) = architecture.resolve(attach)
    splits = [split_at(module, architecture, layer, freeze) for freeze in ("auto", like)]
    assert splits[0].names(module) == splits[1].names(module)
    assert FineTuneClassifier().freeze == "auto"


def test_frozen_values_do_not_move_in_training_mode() -> None:
    module, architecture, images = network("densenet121")
    make_random(module)
    split = split_at(module, architecture, architecture.penultimate, 3)
    before = values_at(module.eval(), images, split.frozen)
    split.set_modes(module, training=True, batch_norm="train")
    for _ in range(2):
        replace(split, cut=None).tail(module)(images)
    np.testing.assert_array_equal(values_at(module, images, split.frozen), before)
    assert any(part.training for part in module.modules())


@pytest.mark.slow
def test_cut_that_several_values_cross_moves_before_them() -> None:
    module, architecture, images = network("vit_b_16")
    split = split_at(module, architecture, architecture.penultimate, "conv_proj")
    assert split.cut is None or split.cut.position <= split.frozen.position
    assert not any(name.startswith("conv_proj") for name in split.names(module))
    if split.cut is None:
        assert split.reason
        return
    split.set_modes(module, training=False, batch_norm="frozen")
    with torch.no_grad():
        found = split.tail(module)(values_at(module, images, split.cut))
    assert relative_difference(found, reference_penultimate(module, images, "heads.head")) < 1e-5


class Crossing(nn.Module):
    """A value from before ``second`` is used after it, and each has a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.third = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.head((x + self.third(self.second(x))).mean((2, 3)))


class Undecided(nn.Module):
    """Which way it goes depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = self.second(x) if x.sum() > -1e9 else x
        return self.head(x.mean((2, 3)))


def split_of_own(module: nn.Module, freeze: object) -> tuple[Split, Architecture]:
    architecture = network_spec(module, "DEFAULT", 0).architecture((3, 24, 24))
    return split_at(module, architecture, architecture.penultimate, freeze), architecture


class Masked(InPlace):
    """Hands an argument that nobody passes on to every layer, as transformers do."""

    def forward(self, x: torch.Tensor | None = None, mask: torch.Tensor | None = None) -> torch.Tensor:
        for layer in (self.conv, self.relu, self.second):
            x = layer(x) if mask is None else layer(x) * mask
        return self.head(x.mean((2, 3)))


def test_argument_that_nobody_passes_does_not_cross_the_cut() -> None:
    module = Masked()
    architecture = network_spec(module, "DEFAULT", 0).architecture((3, 24, 24))
    split = split_at(module, architecture, architecture.penultimate, "relu")
    assert split.cut == split.frozen == architecture.layer("relu")


def test_cut_before_a_residual_moves_to_where_one_value_passes() -> None:
    torch_images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with seeded(0):
        module = Crossing().eval()
    split, architecture = split_of_own(module, "second")
    assert split.cut is not None
    assert split.cut.name.startswith("first")
    assert split.frozen.name == "second"
    trains = split.names(module)
    assert trains
    assert all(name.startswith("third") for name in trains)
    split.set_modes(module, training=False, batch_norm="frozen")
    with torch.no_grad():
        found = split.tail(module)(values_at(module, torch_images, split.cut))
    assert relative_difference(found, reference_penultimate(module, torch_images, "head")) < 1e-5
    assert architecture.penultimate.side == "input"


def test_untraceable_network_has_no_cut_and_says_why() -> None:
    for module, freeze, trains in ((Undecided(), "first", "second"), (Stubborn(), "conv", "deep")):
        split, _ = split_of_own(module, freeze)
        assert split.cut is None
        assert split.reason
        assert {name.partition(".")[0] for name in split.names(module)} == {trains}


# After fit


def classifier(backbone: Any, **parameters: Any) -> FineTuneClassifier:
    settings = {"image_size": 24, "epochs": 2, "batch_size": 6, "random_state": 0, "learning_rate": 1e-2}
    return FineTuneClassifier(backbone, **{**settings, **parameters})


def check_only_the_tail_changed(
    fitted: FineTuneClassifier, before: dict[str, torch.Tensor], frozen: set[str], unused: set[str]
) -> None:
    """``frozen`` and ``unused`` are prefixes of names in the state dict."""
    after = fitted.to_extractor().backbone.state_dict()
    assert list(after) == list(before)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    still = {name for name in before if any(name.startswith(prefix) for prefix in frozen | unused)}
    assert not moved & still
    expected = {name for name in set(before) - still if before[name].is_floating_point()}
    if fitted.batch_norm == "frozen":
        expected = {name for name in expected if not name.endswith(("running_mean", "running_var"))}
        assert not [name for name in moved if "running" in name or "num_batches" in name]
    assert expected <= moved


@pytest.mark.parametrize("batch_norm", ["frozen", "train"])
@pytest.mark.parametrize("count", range(4))
def test_frozen_part_of_featx_micro_is_byte_identical_after_fit(count: int, batch_norm: str) -> None:
    before = network_spec("featx_micro", "DEFAULT", 0).load("cpu", torch.float32).module.state_dict()
    fitted = classifier("featx_micro", freeze=count, batch_norm=batch_norm, image_size=16).fit(IMAGES, LABELS)
    blocks = [f"features.{i}." for i in range(7)]
    frozen = set(blocks[: [0, 1, 3, 5][count]])
    check_only_the_tail_changed(fitted, before, frozen, {"head."})


@pytest.mark.parametrize("batch_norm", ["frozen", "train"])
@pytest.mark.parametrize("count", range(5))
def test_frozen_part_of_resnet_is_byte_identical_after_fit(count: int, batch_norm: str) -> None:
    before = network_spec("resnet18", None, 0).load("cpu", torch.float32).module.state_dict()
    fitted = classifier(
        "resnet18", weights=None, freeze=count, batch_norm=batch_norm, image_size=32, epochs=1, optimizer="adam"
    ).fit(IMAGES[:8], LABELS[:8])
    parts = ["conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4."]
    check_only_the_tail_changed(fitted, before, set(parts[: count + 1 if count else 0]), {"fc."})


@pytest.mark.parametrize("freeze", [4, "all"])
def test_network_is_as_it_was_where_only_the_head_trains(freeze: object) -> None:
    fitted = classifier("featx_micro", freeze=freeze, image_size=16).fit(IMAGES, LABELS)
    assert fitted.to_extractor().backbone == "featx_micro"
    assert all(name.startswith("head.") for name in fitted.tensors_)


@pytest.mark.parametrize(
    ("module", "freeze", "frozen"),
    [
        (Undecided, "first", {"first."}),
        (Undecided, 0, set()),
        (Stubborn, "conv", {"conv."}),
        (Crossing, "second", {"first.", "second."}),
        (Crossing, "first.0", {"first.0."}),
        (InPlace, "relu", {"conv."}),
    ],
)
@pytest.mark.parametrize("batch_norm", ["frozen", "train"])
def test_networks_from_elsewhere_train_behind_the_freeze_point(
    module: type[nn.Module], freeze: object, frozen: set[str], batch_norm: str
) -> None:
    with seeded(0):
        own = module()
    before = copy.deepcopy(own.state_dict())
    fitted = classifier(own, freeze=freeze, batch_norm=batch_norm).fit(IMAGES, LABELS)
    check_only_the_tail_changed(fitted, before, frozen, {"head."})
    np.testing.assert_allclose(fitted.predict_proba(IMAGES).sum(axis=1), 1, rtol=1e-5)


def test_module_that_is_called_on_both_sides_stays_frozen() -> None:
    with seeded(0):
        own = Many()
    before = copy.deepcopy(own.state_dict())
    # ``conv`` runs twice; frozen after its first call, its second lies behind the freeze point.
    fitted = classifier(own, freeze="conv").fit(IMAGES, LABELS)
    after = fitted.to_extractor().backbone
    tensors = (before if after is own or isinstance(after, str) else after.state_dict()).items()
    assert all(torch.equal(value, before[name]) for name, value in tensors)


def test_stored_values_are_not_damaged_by_writing_in_place() -> None:
    with seeded(0):
        module = InPlace().eval()
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    split, _ = split_of_own(module, "second")
    split.set_modes(module, training=False, batch_norm="frozen")
    plain = reference_outputs(module, images, ["second"])["second"]
    if split.cut is not None and split.cut.name == "second":  # pragma: no cover  relu's output crosses, too
        np.testing.assert_allclose(values_at(module, images, split.cut), plain, rtol=1e-5)
    with torch.no_grad():
        found = split.tail(module)(images if split.cut is None else values_at(module, images, split.cut))
    assert relative_difference(found, reference_penultimate(module, images, "head")) < 1e-5


def test_tracing_in_threads_disturbs_nobody() -> None:
    """torch.fx replaces nn.Module.__call__ for everybody while it traces; two at once can leave it replaced."""
    before = nn.Module.__call__, nn.Module.__getattr__
    architecture = network_spec("featx_micro", "DEFAULT", 0).architecture((3, 16, 16))
    bystander, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(1, 3, 8, 8)
    problems: list[object] = []
    stop = threading.Event()

    def trace() -> None:
        module = network("featx_micro")[0]
        for _ in range(15):
            try:
                split = split_at(module, architecture, architecture.penultimate, 2)
                if split.cut is None:
                    problems.append(split.reason)
            except Exception as error:
                problems.append(error)

    def run() -> None:
        while not stop.is_set():
            try:
                bystander(images)
            except Exception as error:
                problems.append(error)

    tracers = [threading.Thread(target=trace) for _ in range(3)]
    other = threading.Thread(target=run)
    try:
        for thread in (other, *tracers):
            thread.start()
        for thread in tracers:
            thread.join()
    finally:
        stop.set()
        other.join()
        after = nn.Module.__call__, nn.Module.__getattr__
        nn.Module.__call__, nn.Module.__getattr__ = before
    assert after == before
    assert not problems, problems[0]
