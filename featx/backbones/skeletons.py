"""How networks are built without drawing or holding what their parameters begin with."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class ParametersMadeWith(TorchFunctionMode):
    """While it is entered, new parameters get an argument that their module leaves open.

    ``dtype=torch.float32`` makes a seed stand for one network whatever the default dtype is; ``device="meta"`` makes
    parameters take neither memory nor initialisation, while the numbers that builders compute with stay real.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self._arguments = arguments

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs |= {name: value for name, value in self._arguments.items() if kwargs.get(name) is None}
        return func(*args, **kwargs)
