"""What a network is, in 32 hexadecimal digits: its architecture, the content of its weights, and foreign code."""

from __future__ import annotations

import inspect
import pickle
import sys
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import packages_distributions
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn

from featx.system.devices import to_host

_LIBRARIES = ("torch", "torchvision", "timm")
_CONSTANTS = (type(None), type(...), bool, int, float, complex, str, bytes)
# What every module has: tensors, children and hooks are looked at separately, the mode does not count.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class NoFingerprint(Exception):
    """Part of a network cannot be told from another; the message says which."""


def fingerprint(module: nn.Module) -> str:
    """xxh3-128 of a network's structure, tensors and settings.

    Covers the printed structure, every parameter and buffer (name, dtype, shape, bytes), the plain attributes of every
    module, and for classes from outside torch, torchvision and timm their code with that of the functions, classes and
    values that it names. Mode, device and gradients do not count. Two networks with the same fingerprint give the same
    features.

    Parameters
    ----------
    module : nn.Module

    Returns
    -------
    digest : str of length 32

    Raises
    ------
    NoFingerprint
        The module has hooks, or refers to something that cannot be told from another.
    """
    teller = _Teller()
    hasher = xxhash.xxh3_128(str(module).encode())
    for name, child in module.named_modules():
        if child._forward_hooks or child._forward_pre_hooks:
            raise NoFingerprint(f"forward hooks of {name or 'the backbone'} can do anything; put them into a module")
        hasher.update(f"\0{name}\0{teller.tell(type(child))}\0".encode())
        for attribute, value in sorted(vars(child).items()):
            if attribute not in _OF_EVERY_MODULE:
                hasher.update(f"\0{attribute}\0{teller.tell(value)}".encode())
    _add_tensors(hasher, {**module.state_dict(keep_vars=True), **dict(module.named_buffers())}, teller)
    return hasher.hexdigest()


def digest_of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """xxh3-128 of tensors with their names, dtypes and shapes, in any order: 32 hexadecimal digits."""
    hasher = xxhash.xxh3_128()
    _add_tensors(hasher, tensors, _Teller())
    return hasher.hexdigest()


def _add_tensors(hasher: xxhash.xxh3_128, tensors: Mapping[str, torch.Tensor], teller: _Teller) -> None:
    for name, tensor in sorted(tensors.items()):
        hasher.update(f"\0{name}\0{teller.tell(tensor)}".encode())


class _Teller:
    """Values, functions and classes as text that differs where they do; each function and class once."""

    def __init__(self) -> None:
        self._told: dict[int, Any] = {}  # holds what it has seen, so that no number is given to another

    def tell(self, value: Any) -> str:
        if isinstance(value, _CONSTANTS):
            return repr(value)
        if isinstance(value, torch.Tensor):
            content = xxhash.xxh3_128_hexdigest(_bytes_of(value).data)
            return f"{value.dtype} {tuple(value.shape)} {content}"
        if id(value) in self._told:
            return "again"
        self._told[id(value)] = value
        if isinstance(value, (list, tuple, set, frozenset, dict)):
            text = self._tell_container(value)
            del self._told[id(value)]  # equal ones are equal whether they are the same object or not
            return text
        return self._tell_code(value)

    def _tell_container(self, value: Any) -> str:
        if isinstance(value, dict):
            elements = [f"{self.tell(key)}: {self.tell(element)}" for key, element in value.items()]
        elif isinstance(value, (list, tuple)):
            elements = [self.tell(element) for element in value]
        else:
            elements = sorted(self.tell(element) for element in value)
        return f"{type(value).__name__}({', '.join(elements)})"

    def _tell_code(self, value: Any) -> str:
        if isinstance(value, ModuleType):
            return f"module {value.__name__} {_source(value) if _is_foreign(value.__name__) else ''}"
        if isinstance(value, FunctionType):
            return f"{value.__qualname__} {self._function(value) if _is_foreign(value.__module__) else ''}"
        if isinstance(value, type):
            return f"{value.__module__}.{value.__qualname__} {self._class(value)}"
        if isinstance(value, CodeType):
            return f"{value.co_code!r} {value.co_names!r} {', '.join(map(self.tell, value.co_consts))}"
        return f"{self.tell(type(value))} {self._content(value)}"

    def _function(self, function: FunctionType) -> str:
        named = [function.__globals__[name] for name in _names(function.__code__) if name in function.__globals__]
        cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        return self.tell(
            (function.__code__, function.__defaults__, function.__kwdefaults__, cells, named, vars(function))
        )

    def _class(self, kind: type) -> str:
        foreign = [base for base in kind.__mro__ if _is_foreign(base.__module__)]
        members = [(name, member) for base in foreign for name, member in sorted(vars(base).items())]
        return ", ".join(f"{name} {self._member(member)}" for name, member in members if name not in _OF_EVERY_CLASS)

    def _member(self, member: Any) -> str:
        if isinstance(member, property):
            return self.tell((member.fget, member.fset))
        if isinstance(member, (staticmethod, classmethod)):
            return self.tell(member.__func__)
        return self.tell(member)

    def _content(self, value: Any) -> str:
        if isinstance(value, nn.Module):
            return fingerprint(value)
        if _is_foreign(type(value).__module__) and hasattr(value, "__dict__"):
            return self.tell(vars(value))
        try:
            return xxhash.xxh3_128_hexdigest(pickle.dumps(value))
        except Exception as error:  # pickle lets every class fail in its own way
            raise NoFingerprint(f"{value!r}, which the backbone refers to, cannot be told from another") from error


_OF_EVERY_CLASS = frozenset(
    {"__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__firstlineno__", "__static_attributes__"}
)


def _names(code: CodeType) -> list[str]:
    """Names that a function's code and the code inside it refer to."""
    inner = [name for constant in code.co_consts if isinstance(constant, CodeType) for name in _names(constant)]
    return [*code.co_names, *inner]


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _is_foreign(module_name: str | None) -> bool:
    """Whether code belongs to the user rather than to the standard library or an installed distribution."""
    root = str(module_name).partition(".")[0]
    return root not in _LIBRARIES and root not in sys.stdlib_module_names and root not in _installed()


@lru_cache
def _installed() -> frozenset[str]:
    return frozenset({*packages_distributions(), "builtins"} - {"featx", "__main__"})


def _source(module: ModuleType) -> str:
    try:
        return inspect.getsource(module)
    except (OSError, TypeError):
        return ""


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    return to_host(tensor.detach()).contiguous().reshape(-1).view(torch.uint8).numpy()
