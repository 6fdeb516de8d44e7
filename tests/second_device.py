"""A second device, of torch's type "lazy", whose memory is the CPU's: what must hold on a GPU, without one.

As on a GPU, tensors of both devices do not compute together, NumPy cannot read the second one's, and it draws from a
generator of its own. Beyond a GPU it notes what was moved, and who moved it.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from featx.backbones import networks
from featx.system import devices

NAME = "lazy"
_SEAM = devices.__name__
_aten = torch.ops.aten


class Away(torch.Tensor):
    """A tensor on the second device; its values are those of a tensor on the CPU."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Away:
        away = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device(NAME, 0),
        )
        away.held = held
        return away

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert SecondDevice.current is not None, "the second device is gone"
        return SecondDevice.current.compute(func, args, kwargs or {})


class SecondDevice(TorchDispatchMode):
    """The device while a test has it.

    Attributes
    ----------
    events : Counter
        "in" and "out" for tensors that were moved, "read" for numbers that Python waited for, "drawn" for draws of its
        generator, "given back" for times that its memory was given back, and the dtypes that autocast was entered with.
    strangers : set of str
        Modules of featx outside `featx.system.devices` that moved a tensor.
    capacity : float
        Values of the largest tensor that it has memory for.
    largest : int
        Values of the largest tensor that it had so far.
    lives : list of int
        How many tensors were alive each time that memory was given back.
    """

    current: SecondDevice | None = None

    def __init__(self) -> None:
        super().__init__()
        self.events: Counter[object] = Counter()
        self.strangers: set[str] = set()
        self.capacity, self.largest = float("inf"), 0
        self.lives: list[int] = []
        self.generator = torch.Generator().manual_seed(1)
        self._alive: weakref.WeakSet[Away] = weakref.WeakSet()

    @property
    def n_alive(self) -> int:
        """Tensors on the device that somebody holds."""
        return len(self._alive)

    def give_back(self) -> None:
        self.events["given back"] += 1
        self.lives.append(self.n_alive)

    def kind(self, **special: Any) -> devices.Kind:
        """Its row in the table."""
        return devices.Kind(generators=lambda device: [self.generator], give_back=self.give_back, **special)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # In inference mode functions arrive that torch otherwise takes apart before.
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                out = func.decompose(*args, **(kwargs or {}))
            if out is not NotImplemented:
                return out
        return self.compute(func, args, kwargs or {})

    def compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation on the CPU, and say of its results where they are."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        away = [tensor for tensor in tensors if isinstance(tensor, Away)]
        asked = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
        to_here = asked != NAME if asked is not None else not away
        self._watch(func, tensors, away, to_here, kwargs)
        if asked == NAME:
            kwargs = kwargs | {"device": "cpu"}
        bare = [tree_map(lambda leaf: leaf.held if isinstance(leaf, Away) else leaf, given) for given in (args, kwargs)]
        with self._drawing(func) if away or not to_here else nullcontext():
            out = func(*bare[0], **bare[1])
        if not to_here:
            for leaf in tree_leaves(out):
                self._check_possible(leaf)
        known = {id(tensor.held if isinstance(tensor, Away) else tensor): tensor for tensor in tensors}
        return tree_map(lambda leaf: self._placed(leaf, known, to_here), out)

    def _check_possible(self, leaf: Any) -> None:
        if not isinstance(leaf, torch.Tensor):
            return
        if leaf.dtype == torch.float64 and not devices.kind_of(NAME).has_double:
            raise TypeError(f"{NAME} has no float64")
        if leaf.numel() > self.capacity:
            raise torch.OutOfMemoryError(f"{NAME} out of memory. Tried to allocate {leaf.numel()} values")
        self.largest = max(self.largest, leaf.numel())

    def _placed(self, leaf: Any, known: dict[int, torch.Tensor], to_here: bool) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) in known and (to_here or isinstance(known[id(leaf)], Away)):
            return known[id(leaf)]
        if to_here:
            return leaf
        placed = Away(leaf)
        self._alive.add(placed)
        return placed

    def _watch(
        self, func: Any, tensors: list[torch.Tensor], away: list[Away], to_here: bool, kwargs: dict[str, Any]
    ) -> None:
        here = [tensor for tensor in tensors if not isinstance(tensor, Away)]
        crosses = bool(away) if to_here else bool(here) and not away
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
            return
        if func is _aten.copy_.default and away and here:
            crosses = True
        elif away and any(tensor.ndim for tensor in here):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {NAME} and cpu for {func}")
        if func in (_aten._local_scalar_dense.default, _aten.is_nonzero.default):
            self.events["read"] += bool(away)
        elif crosses:
            self.events["out" if to_here or (not isinstance(tensors[0], Away) and away) else "in"] += 1
            self._note_mover()

    def _note_mover(self) -> None:
        frame = sys._getframe()
        while frame is not None:
            name = frame.f_globals.get("__name__", "")
            if name.startswith("featx."):
                if name != _SEAM:
                    self.strangers.add(f"{name}:{frame.f_lineno}")
                return
            frame = frame.f_back

    @contextmanager
    def _drawing(self, func: Any) -> Iterator[None]:
        """Where an operation draws, it draws from the device's generator."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            yield
            return
        self.events["drawn"] += 1
        before = torch.default_generator.get_state()
        torch.default_generator.set_state(self.generator.get_state())
        try:
            yield
        finally:
            self.generator.set_state(torch.default_generator.get_state())
            torch.default_generator.set_state(before)


@contextmanager
def second_device(monkeypatch: pytest.MonkeyPatch, **special: Any) -> Iterator[SecondDevice]:
    """The device for a while, with what is special about it beside what every second device has."""
    device = SecondDevice()
    monkeypatch.setitem(devices._KINDS, NAME, device.kind(**special))
    monkeypatch.setattr(networks, "_SHELF", networks._Shelf())
    monkeypatch.setattr(torch, "autocast", _noting(device, torch.autocast))
    monkeypatch.setattr(SecondDevice, "current", device)
    with device:
        yield device


def _noting(device: SecondDevice, autocast: Callable[..., Any]) -> Callable[..., AbstractContextManager[Any]]:
    """Torch has no autocast for this type."""

    def enter(kind: str, **options: Any) -> AbstractContextManager[Any]:
        if kind != NAME:
            return autocast(kind, **options)
        device.events[options["dtype"]] += 1
        return nullcontext()

    return enter
