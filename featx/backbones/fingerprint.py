"""What a network is, in 32 hexadecimal digits: its architecture, the content of its weights, and foreign code."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn

_LIBRARIES = ("torch", "torchvision", "timm")
_CONSTANTS = (type(None), bool, int, float, complex, str, bytes)
# What every module has: tensors, children and hooks are looked at separately, the mode does not count.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class NoFingerprint(Exception):
    """Part of a network cannot be told from another; the message says which."""


def fingerprint(module: nn.Module) -> str:
    """xxh3-128 of a network's structure, tensors and settings.

    Covers the printed structure, every parameter and buffer (name, dtype, shape, bytes), the plain attributes of every
    module, and for classes from outside torch, torchvision and timm their source with that of the functions and
    constants it names. Mode, device and gradients do not count. Two networks with the same fingerprint give the same
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
        The module has hooks, or an attribute that cannot be told from another.
    """
    hasher = xxhash.xxh3_128()
    hasher.update(str(module).encode())
    codes: dict[type, str] = {}
    for name, child in module.named_modules():
        if child._forward_hooks or child._forward_pre_hooks:
            raise NoFingerprint(f"forward hooks of {name or 'the backbone'} can do anything; put them into a module")
        code = codes.setdefault(type(child), _code_of(type(child)))
        hasher.update(f"\0{name}\0{code}\0".encode())
        for attribute, value in sorted(vars(child).items()):
            if attribute not in _OF_EVERY_MODULE:
                hasher.update(f"\0{attribute}\0{_told(value, f'{name}.{attribute}')}".encode())
    for name, tensor in sorted({**module.state_dict(keep_vars=True), **dict(module.named_buffers())}.items()):
        if isinstance(tensor, torch.Tensor):
            hasher.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            hasher.update(_bytes_of(tensor).data)
        else:  # a module's extra state
            hasher.update(f"\0{name}\0{_told(tensor, name)}".encode())
    return hasher.hexdigest()


def _told(value: Any, where: str) -> str:
    """A setting as text that differs where the setting does."""
    if isinstance(value, _CONSTANTS):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} {xxhash.xxh3_128_hexdigest(_bytes_of(value).data)}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({', '.join(_told(element, where) for element in value)})"
    if isinstance(value, (set, frozenset)):
        return f"set({', '.join(sorted(_told(element, where) for element in value))})"
    if isinstance(value, dict):
        return f"dict({', '.join(f'{key!r}: {_told(element, where)}' for key, element in value.items())})"
    if isinstance(value, FunctionType) and not _is_known(value):
        return "\0".join(_sources(value, set()))
    try:
        return xxhash.xxh3_128_hexdigest(pickle.dumps(value))
    except Exception as error:  # pickle lets every class fail in its own way
        raise NoFingerprint(f"attribute {where!r} of the backbone cannot be told from another: {error}") from error


def _code_of(kind: type) -> str:
    """Name of a class from a library, or the code of one from elsewhere."""
    foreign = [base for base in kind.__mro__ if base is not object and not _is_known(base)]
    if not foreign:
        return f"{kind.__module__}.{kind.__qualname__}"
    visited: set[int] = set()
    return "\0".join(text for base in foreign for text in _sources_of_class(base, visited))


def _sources_of_class(kind: type, visited: set[int]) -> Iterator[str]:
    yield f"{kind.__module__}.{kind.__qualname__}"
    for name, member in sorted(vars(kind).items()):
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if isinstance(function, FunctionType):
            yield from _sources(function, visited)
        elif isinstance(member, _CONSTANTS) and not name.startswith("__"):
            yield f"{name} = {member!r}"


def _sources(function: FunctionType, visited: set[int]) -> Iterator[str]:
    """The source of a function, its defaults, what it closes over, and the foreign functions and constants it names."""
    if id(function) in visited:
        return
    visited.add(id(function))
    yield _source(function)
    yield repr([value for value in (function.__defaults__ or ()) if isinstance(value, _CONSTANTS)])
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell is not None]
    named = [function.__globals__.get(name) for name in function.__code__.co_names]
    for value in [*cells, *named]:
        if isinstance(value, FunctionType) and not _is_known(value):
            yield from _sources(value, visited)
        elif isinstance(value, _CONSTANTS) and value is not None:
            yield repr(value)


def _source(function: FunctionType) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # typed into a prompt: the compiled code is what there is
        code = function.__code__
        return (
            f"{code.co_code!r}{[value for value in code.co_consts if isinstance(value, _CONSTANTS)]!r}{code.co_names!r}"
        )


def _is_known(thing: Any) -> bool:
    return str(getattr(thing, "__module__", "")).split(".")[0] in _LIBRARIES


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
