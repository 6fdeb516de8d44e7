"""Reading layers while a network runs, without changing what it computes and no further than needed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import nn

from featx.backbones.layers import Layer
from featx.backbones.tracing import first_tensor
from featx.exceptions import LayerError

T = TypeVar("T")


class _Finished(BaseException):
    """The deepest layer was read. Not an Exception, so that no network can catch it by mistake."""


def read(
    module: nn.Module,
    images: torch.Tensor,
    layers: Sequence[Layer],
    reduce: Callable[[int, torch.Tensor], T],
    *,
    stop: bool = True,
) -> list[T]:
    """Run a network until the deepest of some layers is known and return what ``reduce`` makes of each.

    ``reduce`` is called at the moment of capture and must copy: networks write into their outputs later on
    (``relu(inplace=True)``, ``out += identity``).

    Parameters
    ----------
    module : nn.Module
        In eval mode; hooks are attached during the call and gone after it.
    images : tensor of shape (n, channels, height, width)
    layers : sequence of Layer
        One may stand there several times.
    reduce : callable (position, output) -> object
        ``position`` indexes ``layers``.
    stop : bool, default=True
        Whether the pass ends at the deepest layer; whoever traces it needs it to end where the network does.

    Raises
    ------
    LayerError
        The pass ended before a layer was reached.
    """
    found: dict[int, T] = {}

    def capture(position: int, value: Any) -> None:
        tensor = first_tensor(value)
        if tensor is not None:
            found[position] = reduce(position, tensor)  # now: the next module may write into it
        if stop and len(found) == len(layers):
            raise _Finished

    with _attached(module, layers, capture), suppress(_Finished):
        module(images)
    unread = [layer.label for position, layer in enumerate(layers) if position not in found]
    if unread:
        raise LayerError(f"Layers that run for every image are expected, got layers={unread}, which did not run for X.")
    return [found[position] for position in range(len(layers))]


@contextmanager
def _attached(module: nn.Module, layers: Sequence[Layer], capture: Callable[[int, Any], None]) -> Iterator[None]:
    # One hook a module and side: it counts the calls, of which several layers may want different ones.
    wanted: dict[tuple[nn.Module, str], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for position, layer in enumerate(layers):
        wanted[module.get_submodule(layer.name), layer.side][layer.call].append(position)
    handles = [_hook(child, side, calls, capture) for (child, side), calls in wanted.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(
    child: nn.Module, side: str, calls: dict[int, list[int]], capture: Callable[[int, Any], None]
) -> torch.utils.hooks.RemovableHandle:
    count = 0

    def notice(value: Any) -> None:
        nonlocal count
        count += 1
        for position in calls.get(count, ()):
            capture(position, value)

    if side == "input":
        return child.register_forward_pre_hook(lambda _, args, kwargs: notice((args, kwargs)), with_kwargs=True)
    return child.register_forward_hook(lambda _, args, output: notice(output))
