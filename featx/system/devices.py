"""Devices that torch computes on: everything that differs from one kind to another, and between torch's releases.

Torch is imported at the top, so whatever ``import featx`` loads imports this module in functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from featx.exceptions import OutOfMemory

Movable = TypeVar("Movable", torch.Tensor, nn.Sequential, nn.Module)

HOST = "cpu"


@dataclass(frozen=True)
class Setting:
    """A setting of the process that decides whether float32 may be rounded, for speed.

    Attributes
    ----------
    read : callable () -> value
    write : callable (value) -> None
    full : object
        The value with which nothing is rounded.
    """

    read: Callable[[], Any]
    write: Callable[[Any], object]
    full: Any

    @classmethod
    def of(cls, owner: object, name: str, full: Any) -> Setting:
        """An attribute as a setting."""
        return cls(lambda: getattr(owner, name), lambda value: setattr(owner, name, value), full)


@dataclass(frozen=True)
class Kind:
    """What is special about the devices of a kind; the defaults suit a kind that featx knows nothing of.

    Attributes
    ----------
    is_available : callable () -> bool
        Whether there is one to take where nobody asked for a device.
    generators : callable (torch.device) -> list of torch.Generator
        What a device draws from, beside the CPU's.
    settings : callable () -> sequence of Setting
        Where float32 may be rounded, for speed.
    give_back : callable () -> None
        Returns memory that torch keeps for later to whoever else needs it.
    has_double : bool
        Whether it computes in float64.
    has_fused : bool
        Whether optimisers have one kernel for all tensors.
    in_pieces : bool
        Whether a batch costs less in pieces: where its memory comes anew from the system, and caches are small.
    """

    is_available: Callable[[], bool] = lambda: False
    generators: Callable[[torch.device], list[torch.Generator]] = lambda device: []
    settings: Callable[[], Sequence[Setting]] = lambda: ()
    give_back: Callable[[], None] = lambda: None
    has_double: bool = True
    has_fused: bool = False
    in_pieces: bool = False


def _cuda_generators(device: torch.device) -> list[torch.Generator]:
    index = torch.cuda.current_device() if device.index is None else device.index
    return [torch.cuda.default_generators[index]]


def _cuda_settings() -> Sequence[Setting]:
    owners = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    return [Setting.of(owner, "fp32_precision", "ieee") for owner in owners]


# By torch's names; where nobody asks for a device, the first kind of which there is one is taken.
_KINDS = {
    "cuda": Kind(
        is_available=torch.cuda.is_available,
        generators=_cuda_generators,
        settings=_cuda_settings,
        give_back=torch.cuda.empty_cache,
        has_fused=True,
    ),
    "mps": Kind(
        is_available=torch.backends.mps.is_available,
        generators=lambda device: [torch.mps._get_default_mps_generator()],
        has_double=False,
        has_fused=True,
    ),
    HOST: Kind(is_available=lambda: True, has_fused=True, in_pieces=True),
}
_OTHER = Kind()


def kind_of(device: str | torch.device) -> Kind:
    """What is special about a device."""
    return _KINDS.get(torch.device(device).type, _OTHER)


def resolve_device(device: str | None) -> str:
    """The device asked for, or the best there is.

    Raises
    ------
    ValueError
        torch does not know the device or cannot reach it.
    """
    if device is None:
        return next(name for name, kind in _KINDS.items() if kind.is_available())
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"A device that torch can use here is expected, got device={device!r}: {str(error).splitlines()[0]} "
            "Use device=None to take the best there is."
        ) from error
    return device


def move(what: Movable, device: str, dtype: torch.dtype | None = None) -> Movable:
    """A tensor or module on a device, in another dtype where one is given; a module is changed in place."""
    return what.to(device=device, dtype=dtype)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in the CPU's memory, where NumPy can read it; waits until it is computed."""
    return tensor.cpu()


def to_double(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in float64, on its device or, where that has none, on the CPU."""
    return tensor.to(tensor.device if kind_of(tensor.device).has_double else HOST, torch.float64)


def have_fused(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether optimisers have one kernel for all of these tensors."""
    return all(kind.has_fused for kind in {kind_of(parameter.device) for parameter in parameters})


def autocast(device: str, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Half precision where it is asked for, with float32 weights."""
    if dtype == torch.float32:
        return nullcontext()
    # Inside of a caller's own autocast, weights once rounded would be kept from step to step.
    return torch.autocast(torch.device(device).type, dtype=dtype, cache_enabled=False)


def gradient_scaler(device: str, dtype: torch.dtype, first: float) -> torch.amp.GradScaler:
    """What keeps gradients of float16 from vanishing, with its first scale; for other dtypes it does nothing."""
    return torch.amp.GradScaler(device, init_scale=first, enabled=dtype == torch.float16)


def undisturbed(device: str) -> AbstractContextManager[object]:
    """Full float32 whatever the caller's autocast and settings are: a feature must not depend on them."""
    without_autocast = torch.autocast(torch.device(device).type, enabled=False)
    settings = kind_of(device).settings()
    return _in_full(settings, without_autocast) if settings else without_autocast


@contextmanager
def _in_full(settings: Sequence[Setting], within: AbstractContextManager[object]) -> Iterator[None]:
    before = [setting.read() for setting in settings]
    try:
        for setting in settings:
            setting.write(setting.full)
        with within:
            yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.write(value)


def generators_of(device: str | torch.device) -> list[torch.Generator]:
    """What torch draws from where it computes on a device: the CPU's global generator first, then its own."""
    return [torch.default_generator, *kind_of(device).generators(torch.device(device))]


@contextmanager
def in_memory(device: str, what: str, advice: str) -> Iterator[None]:
    """Work for whose end memory is given back that torch would keep for later.

    Parameters
    ----------
    device : str
    what : str
        What needs the memory, such as ``batch_size=32``.
    advice : str
        What to do where there is too little.

    Raises
    ------
    OutOfMemory
        The device has too little memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"Memory on {device!r} for {what} is expected, and there is too little. {advice}") from error
    finally:
        kind_of(device).give_back()
