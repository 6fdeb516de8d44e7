"""Devices that torch computes on: everything that differs from one kind to another, and between torch's releases.

Torch is imported at the top, so whatever ``import featx`` loads imports this module in functions.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from featx.exceptions import OutOfMemory
from featx.system.forks import at_fork
from featx.system.locks import ForkSafeLock

Movable = TypeVar("Movable", torch.Tensor, nn.Sequential, nn.Module)

HOST = "cpu"
#: What to do about too little memory for a pass.
LESS = 'Lower batch_size; precision="bfloat16" halves most of it.'


@dataclass(frozen=True)
class Setting:
    """A setting of the process that decides whether float32 may be rounded, for speed.

    Attributes
    ----------
    read : callable () -> value
    write : callable (value) -> None
    full : tuple of values
        With which nothing is rounded; the first is the one to write.
    """

    read: Callable[[], Any]
    write: Callable[[Any], object]
    full: tuple[Any, ...]

    @classmethod
    def of(cls, owner: object, name: str, *full: Any) -> Setting:
        """An attribute as a setting."""
        return cls(lambda: getattr(owner, name), lambda value: setattr(owner, name, value), full)


class FullFloat32:
    """While anyone is inside, in whatever thread, settings are full; the last one to leave puts them back."""

    def __init__(self, *settings: Setting) -> None:
        self._settings = settings
        self._lock = ForkSafeLock()
        self._inside: list[int] = []  # threads
        self._before: list[tuple[Setting, Any]] = []

    def __enter__(self) -> None:
        with self._lock.held():
            if not self._inside:
                # From the widest setting to the narrowest: what only follows a wider one is full by then and stays.
                for setting in self._settings:
                    if (value := setting.read()) not in setting.full:
                        self._before.append((setting, value))
                        setting.write(setting.full[0])
            self._inside.append(threading.get_ident())

    def __exit__(self, *_: object) -> None:
        with self._lock.held():
            self._inside.remove(threading.get_ident())
            self._put_back()

    def _put_back(self) -> None:
        if not self._inside:
            for setting, value in reversed(self._before):
                setting.write(value)
            self._before = []

    def after_fork(self) -> None:
        """In a forked child nobody is left to put back what another thread of the parent changed."""
        self._inside = [thread for thread in self._inside if thread == threading.get_ident()]
        self._put_back()


@dataclass(frozen=True)
class Kind:
    """What is special about the devices of a kind; the defaults suit a kind that featx knows nothing of.

    Attributes
    ----------
    is_available : callable () -> bool
        Whether there is one to take where nobody asked for a device.
    generators : callable (torch.device) -> list of torch.Generator
        What a device draws from, beside the CPU's.
    full_float32 : FullFloat32
        Keeps float32 from being rounded for speed.
    give_back : callable () -> None
        Returns memory that torch keeps for later to whoever else needs it.
    too_little : tuple of str
        What torch says of too little memory where it has no class of errors for that.
    has_double : bool
        Whether it computes in float64.
    has_fused : bool
        Whether optimisers have one kernel for all tensors.
    in_pieces : bool
        Whether a batch costs less in pieces: where its memory comes anew from the system, and caches are small.
    """

    is_available: Callable[[], bool] = lambda: False
    generators: Callable[[torch.device], list[torch.Generator]] = lambda device: []
    full_float32: FullFloat32 = field(default_factory=FullFloat32)
    give_back: Callable[[], None] = lambda: None
    too_little: tuple[str, ...] = ()
    has_double: bool = True
    has_fused: bool = False
    in_pieces: bool = False


def _cuda_generators(device: torch.device) -> list[torch.Generator]:
    index = torch.cuda.current_device() if device.index is None else device.index
    return [torch.cuda.default_generators[index]]


_CUDNN, _CUBLAS, _ONEDNN = torch.backends.cudnn, torch.backends.cuda.matmul, torch.backends.mkldnn


def _settings_of(*owners: object, older: Sequence[Setting] = ()) -> FullFloat32:
    """Settings of parts of torch, the widest first; those of older releases where parts have none."""
    if not hasattr(_CUBLAS, "fp32_precision"):
        return FullFloat32(*older)
    return FullFloat32(*(Setting.of(owner, "fp32_precision", "ieee", "none") for owner in owners))


# Of all devices at once, in releases that know no setting for each.
_PRODUCTS = Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, ("highest",))
# Of all devices at once, which settings of a device follow where they have not been set themselves.
_EVERYWHERE = _settings_of(torch.backends)

# By torch's names; where nobody asks for a device, the first kind of which there is one is taken.
_KINDS = {
    "cuda": Kind(
        is_available=torch.cuda.is_available,
        generators=_cuda_generators,
        full_float32=_settings_of(
            _CUDNN, getattr(_CUDNN, "conv", None), _CUBLAS, older=[Setting.of(_CUDNN, "allow_tf32", False), _PRODUCTS]
        ),
        give_back=torch.cuda.empty_cache,
        too_little=("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"),
        has_fused=True,
    ),
    "mps": Kind(
        is_available=torch.backends.mps.is_available,
        generators=lambda device: [torch.mps._get_default_mps_generator()],
        give_back=torch.mps.empty_cache,
        too_little=("MPS backend out of memory",),
        has_double=False,
        has_fused=True,
    ),
    HOST: Kind(
        is_available=lambda: True,
        full_float32=_settings_of(
            _ONEDNN, getattr(_ONEDNN, "conv", None), getattr(_ONEDNN, "matmul", None), older=[_PRODUCTS]
        ),
        too_little=("DefaultCPUAllocator",),
        has_fused=True,
        in_pieces=True,
    ),
}
_OTHER = Kind()

for _kind in _KINDS.values():
    at_fork(after_in_child=_kind.full_float32.after_fork)
at_fork(after_in_child=_EVERYWHERE.after_fork)


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
            "Leave device out to take the best there is."
        ) from error
    return device


def move(what: Movable, device: str | torch.device, dtype: torch.dtype | None = None) -> Movable:
    """A tensor or module on a device, in another dtype where one is given; a module is changed in place."""
    return what.to(device=device, dtype=dtype)


def fill(target: torch.Tensor, values: torch.Tensor) -> None:
    """Put values into a tensor, wherever both lie."""
    target.copy_(values.to(target.dtype))


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


@contextmanager
def undisturbed(device: str) -> Iterator[None]:
    """Full float32 whatever the caller's autocast and settings are: a feature must not depend on them."""
    name = torch.device(device).type
    with _EVERYWHERE, kind_of(device).full_float32:
        if not (torch.amp.is_autocast_available(name) and torch.is_autocast_enabled(name)):
            yield  # entering what changes nothing takes as long as a step of a small head
            return
        with torch.autocast(name, enabled=False):
            yield


def generators_of(device: str | torch.device) -> list[torch.Generator]:
    """What torch draws from where it computes on a device: the CPU's global generator first, then its own."""
    return [torch.default_generator, *kind_of(device).generators(torch.device(device))]


def give_back(device: str) -> None:
    """Return memory of a device that torch keeps for later to whoever else needs it."""
    kind_of(device).give_back()


@contextmanager
def in_memory(device: str, what: str, advice: str = LESS) -> Iterator[None]:
    """Work for which the memory of a device may not suffice; if so, what was taken is given back.

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
    except RuntimeError as error:
        if not _is_out_of_memory(device, error):
            raise
        # What was computed so far lies in the frames of the calls, which live as long as somebody keeps the error.
        traceback.clear_frames(error.__traceback__)
        give_back(device)
        raise OutOfMemory(f"Memory on {device!r} for {what} is expected, and there is too little. {advice}") from error


def _is_out_of_memory(device: str, error: RuntimeError) -> bool:
    words = {*kind_of(device).too_little, *kind_of(HOST).too_little}  # the host's memory may be what is short
    return isinstance(error, torch.OutOfMemoryError) or any(of in str(error) for of in words)
