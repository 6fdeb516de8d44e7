"""Pooling: each kind against its definition written out, in all three layouts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featx.activations.plan import FeaturePlan
from featx.activations.pooling import pool_together, width_of
from featx.backbones.layers import Layer
from featx.exceptions import LayerError


def layer_for(output: torch.Tensor, layout: str, prefix: int = 0, label: str = "layer") -> Layer:
    shape = tuple(output.shape)
    grid = (math.isqrt(shape[1] - prefix),) * 2 if layout == "tokens" else None
    return Layer(label, label, 1, "output", shape, layout, prefix, 1, grid, has_class_token=prefix > 0)


def pool(output: torch.Tensor, layer: Layer, pooling: str, grid: int) -> torch.Tensor:
    (rows,) = pool_together(output, layer, [(pooling, grid)])
    return rows


def in_layout(cells: torch.Tensor, layout: str) -> tuple[torch.Tensor, Layer]:
    """The same (n, channels, height, width) cells as a network of that layout would put them out."""
    if layout == "NCHW":
        return cells, layer_for(cells, layout)
    if layout == "NHWC":
        out = cells.permute(0, 2, 3, 1)
        return out, layer_for(out, layout)
    out = torch.cat([torch.full((len(cells), 1, cells.shape[1]), 1e6), cells.flatten(2).transpose(1, 2)], dim=1)
    return out, layer_for(out, layout, prefix=1)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "tokens"])
@pytest.mark.parametrize("grid", [1, 2])
@pytest.mark.parametrize("pooling", ["avg", "max", "gem"])
def test_grid_pooling_equals_its_definition_in_every_layout(pooling: str, grid: int, layout: str) -> None:
    cells = torch.randn(2, 3, 4, 4)
    blocks = cells.numpy().reshape(2, 3, grid, 4 // grid, grid, 4 // grid)
    expected = {
        "avg": lambda: blocks.mean((3, 5)),
        "max": lambda: blocks.max((3, 5)),
        "gem": lambda: np.cbrt((np.maximum(blocks, 1e-6) ** 3).mean((3, 5))),
    }[pooling]()
    rows = pool(*in_layout(cells, layout), pooling, grid)
    np.testing.assert_allclose(rows.numpy(), expected.reshape(2, -1), rtol=1e-5)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "tokens"])
def test_map_keeps_every_cell_in_its_place(layout: str) -> None:
    cells = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(pool(*in_layout(cells, layout), "map", 1), cells.permute(0, 2, 3, 1))


def test_cls_is_the_first_token_and_flatten_holds_all_tokens() -> None:
    tokens = torch.randn(2, 5, 3)
    layer = layer_for(tokens, "tokens", prefix=1)
    torch.testing.assert_close(pool(tokens, layer, "cls", 1), tokens[:, 0])
    torch.testing.assert_close(pool(tokens, layer, "flatten", 1), tokens.flatten(1))


@pytest.mark.parametrize("pooling", ["avg", "max", "gem", "cls", "flatten"])
def test_vectors_pass_unchanged_and_unshared(pooling: str) -> None:
    vector = torch.randn(2, 7)
    rows = pool(vector, layer_for(vector, "vector"), pooling, 2)
    torch.testing.assert_close(rows, vector)
    vector.zero_()
    assert rows.any()


@given(
    layout=st.sampled_from(["NCHW", "NHWC", "tokens"]),
    pooling=st.sampled_from(["avg", "max", "gem", "flatten", "map"]),
    grid=st.integers(1, 3),
    channels=st.integers(1, 4),
    side=st.integers(1, 5),
)
def test_rows_are_as_wide_as_announced_and_share_no_memory(
    layout: str, pooling: str, grid: int, channels: int, side: int
) -> None:
    output, layer = in_layout(torch.ones(2, channels, side, side), layout)
    rows = pool(output, layer, pooling, grid)
    output.fill_(7)
    assert rows.shape[-1] == width_of(layer, pooling, grid)
    assert rows.dtype == torch.float32
    assert not (rows == 7).any()


def joined(plan: FeaturePlan, *outputs: torch.Tensor) -> np.ndarray:
    """What a plan makes of the outputs of its layers."""
    return plan.join([pool(output, *slot).flatten(1).numpy() for slot, output in zip(plan.slots, outputs, strict=True)])


@pytest.mark.parametrize("normalize", ["l2", "signed-sqrt"])
def test_each_layer_has_unit_length(normalize: str) -> None:
    outputs = [torch.randn(4, channels, 3, 3) * 100 for channels in (3, 5)]
    layers = tuple(layer_for(output, "NCHW") for output in outputs)
    rows = joined(FeaturePlan.of(layers, "avg", 2, normalize), *outputs)
    for columns in (rows[:, :12], rows[:, 12:]):
        np.testing.assert_allclose(np.linalg.norm(columns, axis=1), 1, rtol=1e-5)


def test_signed_sqrt_keeps_signs_and_flattens_magnitudes() -> None:
    vector = torch.tensor([[-9.0, 4.0, 0.0]])
    plan = FeaturePlan.of((layer_for(vector, "vector"),), "avg", 1, "signed-sqrt")
    np.testing.assert_allclose(joined(plan, vector), np.array([[-3.0, 2.0, 0.0]]) / 13**0.5, rtol=1e-6)


def test_a_row_of_zeros_stays_zero_under_l2() -> None:
    vector = torch.zeros(1, 3)
    plan = FeaturePlan.of((layer_for(vector, "vector"),), "avg", 1, "l2")
    assert not joined(plan, vector).any()


def test_maps_of_several_layers_take_the_grid_of_the_first() -> None:
    fine, coarse = torch.randn(2, 3, 8, 8), torch.ones(2, 5, 2, 2)
    plan = FeaturePlan.of((layer_for(fine, "NCHW"), layer_for(coarse, "NCHW")), "map", 1, None)
    maps = joined(plan, fine, coarse)
    assert maps.shape[1:] == plan.shape == (8, 8, 8)
    np.testing.assert_allclose(maps[..., :3], fine.permute(0, 2, 3, 1))
    assert (maps[..., 3:] == 1).all()


def test_names_tell_layer_pooling_and_position() -> None:
    spatial, vector = torch.ones(1, 2, 3, 3), torch.ones(1, 2)
    layers = (layer_for(spatial, "NCHW", label="layer4"), layer_for(vector, "vector", label="penultimate"))
    names = ["layer4_avg_0", "layer4_avg_1", "penultimate_0", "penultimate_1"]
    assert FeaturePlan.of(layers, "avg", 1, None).names().tolist() == names
    assert FeaturePlan.of(layers[:1], "max", 2, None).names()[-1] == "layer4_max2x2_7"


@pytest.mark.parametrize(
    ("shape", "layout", "pooling", "words"),
    [
        ((2, 3, 4, 4), "NCHW", "cls", "class token"),
        ((2, 16, 4), "tokens", "cls", "class token"),
        ((2, 3), "vector", "map", "spatial layer"),
        ((2, 3, 4, 4, 4), "other", "avg", "flatten"),
    ],
)
def test_meaningless_pooling_is_an_error(shape: tuple[int, ...], layout: str, pooling: str, words: str) -> None:
    with pytest.raises(LayerError, match=words):
        FeaturePlan.of((layer_for(torch.empty(shape), layout),), pooling, 1, None)
