"""What the pickle of an estimator holds, and what its copies do."""

from __future__ import annotations

import copy
import inspect
import os
import sys
from typing import Any, Self

from featx.system.threads import one_thread_after_fork


class PortablePickles:
    """Pickles that load on every platform; copies within the process keep what the estimator was given.

    A subclass has scikit-learn's ``_get_param_names``.
    """

    def _state(self) -> dict[str, Any]:
        """What a copy takes along."""
        return dict(vars(self))

    def __copy__(self) -> Self:
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self._state())
        return copied

    @one_thread_after_fork()
    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self._state(), memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[assignment]  # scikit-learn's
        names = self._get_param_names()  # type: ignore[attr-defined]
        return state | {name: portable(name, state[name]) for name in names if name in state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]  # scikit-learn's
        for name, parameter in inspect.signature(type(self).__init__).parameters.items():
            if parameter.default is not parameter.empty:  # of a version without this parameter
                vars(self).setdefault(name, parameter.default)


def portable(name: str, value: Any) -> Any:
    """A parameter as a pickle may hold it: paths as texts, in plain containers too.

    The class of a path is that of a platform, and another one cannot load it.

    Raises
    ------
    TypeError
        It is a module that torch keeps out of pickles.
    """
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value) in (list, tuple):
        return type(value)(portable(name, part) for part in value)
    if isinstance(value, dict):
        copied = copy.copy(value)
        copied.update({key: portable(name, part) for key, part in value.items()})
        return copied
    if _is_parametrized(value):
        raise TypeError(
            f"A module that torch can pickle is expected, got {name}={type(value).__name__} with parametrizations, as "
            f"weight_norm and spectral_norm make them. Pass a function that returns the module as {name}."
        )
    return value


def _is_parametrized(value: Any) -> bool:
    torch = sys.modules.get("torch")  # without it there are no modules
    if torch is None or not isinstance(value, torch.nn.Module):
        return False
    return any(torch.nn.utils.parametrize.is_parametrized(module) for module in value.modules())
