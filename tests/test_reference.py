"""Every network of torchvision below 100 million parameters against a plain reference, one layer at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import relative_difference
from helpers_reference import plain_copy, reference_outputs, reference_penultimate
from torch import nn

from featx import PretrainedFeatureExtractor
from featx.backbones.networks import network_spec
from featx.backbones.table import FAMILIES, family_of, stages_of

# Small enough for two cores; the laws under test hold at any size, and some networks take only their own.
SIDE = 128
MOST_PARAMETERS = 100_000_000


def size_of(model: str) -> int:
    own = network_spec(model, None, 0).preset.crop
    return own if family_of(model).fixed_size else min(own, SIDE)


def models() -> list[Any]:
    """Networks below the limit, the smallest of each family first and by default."""
    chosen = []
    for family in FAMILIES:
        counts = {}
        for model in family.channels:
            module = network_spec(model, None, 0).architecture((3, size_of(model), size_of(model))).module
            counts[model] = sum(parameter.numel() for parameter in module.parameters())
        ordered = [model for model in sorted(counts, key=counts.__getitem__) if counts[model] < MOST_PARAMETERS]
        chosen += [pytest.param(model, marks=pytest.mark.slow if i else ()) for i, model in enumerate(ordered)]
    return chosen


def average(output: torch.Tensor, layout: str) -> torch.Tensor:
    """Average pooling written out, by the table's layout."""
    if output.ndim == 2:
        return output
    return output.mean({"NCHW": (2, 3), "NHWC": (1, 2), "tokens": (1,)}[layout])


@pytest.mark.parametrize("model", models())
def test_features_equal_plain_reference_alone_and_in_company(model: str, record_property: Any) -> None:
    size, family = size_of(model), family_of(model)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    extractor = PretrainedFeatureExtractor(model, weights=None, preprocess=None, image_size=size)
    plain = plain_copy(network_spec(model, None, 0).load("cpu", torch.float32).module)
    plain = plain.to(memory_format=torch.contiguous_format)
    # ViT's output layer starts at zero, and zero scores would prove nothing.
    nn.init.normal_(plain.get_submodule(family.output).weight, generator=torch.Generator().manual_seed(1))
    names = [name for name, _, _ in stages_of(model)]

    raw = reference_outputs(plain, images, names)
    expected = {
        name: average(raw[name][:, family.n_prefix_tokens :], family.layout)
        if raw[name].ndim == 3
        else average(raw[name], family.layout)
        for name in names
    }
    before_output = reference_penultimate(plain, images, family.output)
    expected["penultimate"] = average(before_output, "NCHW")

    together = extractor.set_params(layers=[*names, "penultimate"]).transform(images)
    columns = torch.from_numpy(together).split([value.shape[1] for value in expected.values()], dim=1)
    worst = 0.0
    for (name, value), company in zip(expected.items(), columns, strict=True):
        alone = extractor.set_params(layers=name).transform(images)
        worst = max(worst, relative_difference(alone, value), relative_difference(company, value))

    read = extractor.set_params(layers="penultimate", pooling="flatten").transform(images)
    with torch.inference_mode():
        logits = plain.get_submodule(family.output)(torch.from_numpy(read).reshape(before_output.shape))
        logits = logits.relu().mean((2, 3)) if logits.ndim == 4 else logits
        worst = max(worst, relative_difference(logits, plain(images)))
    record_property("worst", worst)
    assert worst < 1e-5


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_list_of_stages_is_the_tables(family: Any) -> None:
    for model in family.channels:
        spec = network_spec(model, None, 0)
        architecture = spec.architecture((3, size_of(model), size_of(model)))
        found = [(name, architecture.layer(name).channels) for name in architecture.stages]
        assert found == [(name, channels) for name, _, channels in stages_of(model)]
