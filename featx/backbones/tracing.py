"""One pass over a network without weights or pixels: which modules run, in what order, and what they put out."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from featx.exceptions import BackboneError

# Modules whose 4-D output is (n, channels, height, width) whatever came before, and those that work on the last axis.
_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.GroupNorm,
)
_CHANNELS_LAST = (nn.LayerNorm, nn.Linear)
_PERMUTED = {(0, 2, 3, 1): "NHWC", (0, 3, 1, 2): "NCHW"}  # by the dims of torchvision's Permute


@dataclass(frozen=True)
class Call:
    """One call of a module during a pass.

    Attributes
    ----------
    names : tuple of str
        Qualified names of the module; several where it is shared.
    index : int
        1 for the module's first call in the pass, 2 for its second, ...
    shape : tuple of int
        Of the (first) output, for a batch of two images.
    layout : {"NCHW", "NHWC", "tokens", "vector", "other"}
    input_shape : tuple of int
        Of the first input; empty where it is not a tensor.
    input_layout : str
    module : nn.Module
        On the meta device: type and structure, no values.
    is_result : bool
        Whether what it puts out is, unchanged, the first tensor that the network puts out.
    """

    names: tuple[str, ...]
    index: int
    shape: tuple[int, ...]
    layout: str
    input_shape: tuple[int, ...]
    input_layout: str
    module: nn.Module
    is_result: bool = False

    @property
    def name(self) -> str:
        """The first of the qualified names."""
        return self.names[0]


def first_tensor(value: Any) -> torch.Tensor | None:
    """The tensor a module puts out, or the first one of a tuple, list or mapping."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return next((found for found in map(first_tensor, value) if found is not None), None)
    return None


def trace(module: nn.Module, shape: tuple[int, int, int]) -> tuple[Call, ...]:
    """Calls in the order in which they return, for images of a shape (channels, height, width).

    Runs a copy on PyTorch's meta device, so neither values nor time are needed; a module that cannot run there is run
    on black images instead.

    Raises
    ------
    BackboneError
        The network does not take images of that shape.
    """
    try:
        return _run(copy_to_meta(module), torch.empty(2, *shape, dtype=torch.float32, device="meta"))
    except Exception as error:
        if any(parameter.is_meta for parameter in module.parameters()):
            raise _refused(module, shape, error) from error
    return _run_on_black_images(module, shape)  # where values decide, only real ones can tell


def with_measured_layouts(calls: tuple[Call, ...], module: nn.Module, shape: tuple[int, int, int]) -> tuple[Call, ...]:
    """Calls whose 4-D layouts were measured: the axes that double with the image are its height and width.

    In networks that take one size only, they are the two that are equal where the image is square.
    """
    channels, height, width = shape
    try:
        larger = _run(
            copy_to_meta(module), torch.empty(2, channels, 2 * height, 2 * width, dtype=torch.float32, device="meta")
        )
    except Exception:  # a size that it does not take
        square = height == width
        return tuple(replace(call, layout=_of_square(call.shape, call.layout)) for call in calls) if square else calls
    if [call.names for call in larger] != [call.names for call in calls]:
        return calls
    return tuple(
        replace(call, layout=_measured(call.shape, other.shape, call.layout))
        for call, other in zip(calls, larger, strict=True)
    )


def _measured(shape: tuple[int, ...], larger: tuple[int, ...], layout: str) -> str:
    if not len(shape) == len(larger) == 4:
        return layout
    grown = [axis for axis in range(4) if larger[axis] > shape[axis]]
    return "NCHW" if grown == [2, 3] else "NHWC" if grown == [1, 2] else layout


def _of_square(shape: tuple[int, ...], layout: str) -> str:
    if len(shape) != 4 or shape[1] == shape[3]:
        return layout
    return "NCHW" if shape[2] == shape[3] else "NHWC" if shape[1] == shape[2] else layout


def lengths_with_trailing(module: nn.Module, shape: tuple[int, int, int]) -> frozenset[int]:
    """Lengths of sequences in which something stands behind what comes from the image, as a class token may.

    What comes from the image is told by gradients; a network that computes none is not told of.
    """
    images = torch.empty(2, *shape, dtype=torch.float32, device="meta", requires_grad=True)
    joins = _Joins()
    try:
        with torch.inference_mode(False), torch.enable_grad(), joins:
            copy_to_meta(module).eval()(images.clone())
    except Exception:  # where values decide
        return frozenset()
    return frozenset(joins.lengths)


class _Joins(TorchFunctionMode):
    """Notes the lengths of sequences (n, tokens, channels) that end with what does not come from the image."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: set[int] = set()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if function in (torch.cat, torch.concat, torch.concatenate) and out.ndim == 3:
            parts = [part for part in (args[0] if args else (kwargs or {})["tensors"]) if part.numel()]
            joined = out.shape[1] > max(part.shape[1] for part in parts)
            if joined and out.requires_grad and not parts[-1].requires_grad:
                self.lengths.add(out.shape[1])
        return out


def private_copy(module: nn.Module, label: str) -> nn.Module:
    """A copy to switch modes, devices and dtypes of; even a callable may return a module that somebody else trains.

    Raises
    ------
    BackboneError
        The module is scripted, lazy, or computes some of its weights at every call.
    """
    tensors = [*module.parameters(), *module.buffers()]
    if isinstance(module, torch.jit.ScriptModule) or any(map(is_lazy, tensors)):
        raise BackboneError(
            f"A torch.nn.Module with its parameters set is expected as backbone, got {label}, which is scripted or "
            "lazy. Pass the module before torch.jit.script, or run one batch through it first."
        )
    try:
        return copy.deepcopy(module)
    except (RuntimeError, TypeError, ValueError, copy.Error) as error:
        raise BackboneError(
            f"A module that can be copied is expected as backbone, got {label}: {error} Remove what computes its "
            "weights at every call (torch.nn.utils.remove_weight_norm), tensors that require gradients, and what "
            "copy.deepcopy cannot take."
        ) from error


def copy_to_meta(module: nn.Module) -> nn.Module:
    """A copy of the structure, whose tensors have shapes and no values."""
    # The memo makes deepcopy take empty tensors in place of copying the weights.
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): _empty_like(tensor) for tensor in tensors})


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    empty = torch.empty_like(tensor, dtype=dtype, device="meta", requires_grad=False)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _run_on_black_images(module: nn.Module, shape: tuple[int, int, int]) -> tuple[Call, ...]:
    copied = private_copy(module, type(module).__name__).to("cpu", torch.float32)
    try:
        return _run(copied, torch.zeros(2, *shape, dtype=torch.float32, device="cpu"))
    except Exception as error:
        raise _refused(module, shape, error) from error


def _refused(module: nn.Module, shape: tuple[int, int, int], error: Exception) -> BackboneError:
    return BackboneError(
        f"A network that takes a batch of shape (n, {', '.join(map(str, shape))}) is expected, got "
        f"{type(module).__name__}, which fails on it: {error}. Set image_size to a side that it takes, or "
        "preprocess to what makes its input."
    )


def _run(module: nn.Module, images: torch.Tensor) -> tuple[Call, ...]:
    names: dict[nn.Module, list[str]] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        names.setdefault(child, []).append(name)
    recorder = _Recorder({child: tuple(aliases) for child, aliases in names.items()})
    module.eval()
    for child in names:
        child.register_forward_hook(recorder, with_kwargs=True)
    with torch.inference_mode():
        result = first_tensor(module(images))
    return tuple(
        replace(call, is_result=out is result) for call, out in zip(recorder.calls, recorder.outs, strict=True)
    )


class _Recorder:
    """Forward hook that notes every call, with the layout of what went in and what came out."""

    def __init__(self, names: dict[nn.Module, tuple[str, ...]]) -> None:
        self.names = names
        self.calls: list[Call] = []
        self.outs: list[torch.Tensor] = []
        self.counts: dict[nn.Module, int] = {}
        self.last_image_layout = "NCHW"

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.counts[module] = self.counts.get(module, 0) + 1
        out, given = first_tensor(output), first_tensor((args, kwargs))
        if out is None:
            return
        self.outs.append(out)
        before = self.last_image_layout
        layout = self._layout(module, out)
        self.calls.append(
            Call(
                self.names[module],
                self.counts[module],
                tuple(out.shape),
                layout,
                () if given is None else tuple(given.shape),
                "other" if given is None else _layout_of_shape(given.ndim, before),
                module,
            )
        )

    def _layout(self, module: nn.Module, out: torch.Tensor) -> str:
        if out.ndim == 4 and not any(True for _ in module.children()):
            if isinstance(module, _CHANNELS_FIRST):
                self.last_image_layout = "NCHW"
            elif type(module) in _CHANNELS_LAST:
                self.last_image_layout = "NHWC"
            elif (turned := _PERMUTED.get(tuple(getattr(module, "dims", ())))) is not None:
                self.last_image_layout = turned
        return _layout_of_shape(out.ndim, self.last_image_layout)


def _layout_of_shape(ndim: int, image_layout: str) -> str:
    return {2: "vector", 3: "tokens", 4: image_layout}.get(ndim, "other")
