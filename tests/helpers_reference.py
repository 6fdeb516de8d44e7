"""The plain reference: what a layer's output is when nothing is shared, fused, stopped early or written in place."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def plain_copy(model: nn.Module) -> nn.Module:
    """Copy of `model` in eval mode in which no module writes in place; `model` itself is left as it is."""
    plain = copy.deepcopy(model).eval()
    for module in plain.modules():
        if "inplace" in vars(module):
            vars(module)["inplace"] = False
    return plain


def reference_outputs(model: nn.Module, x: torch.Tensor, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Output of each named module for the batch `x`, every one from a full pass of its own.

    ``"NAME#2"`` is the module's second call in the pass, ``"NAME"`` its first. Of a tuple the first element is taken.
    """
    plain = plain_copy(model)
    return {name: _output(plain, x, name) for name in names}


def reference_penultimate(model: nn.Module, x: torch.Tensor, output_name: str) -> torch.Tensor:
    """Input of the module `output_name` for the batch `x`, from a full pass."""
    plain, seen = plain_copy(model), []

    def keep(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args[0].clone())

    plain.get_submodule(output_name).register_forward_pre_hook(keep)
    with torch.inference_mode():
        plain(x)
    return seen[0]


def _output(plain: nn.Module, x: torch.Tensor, name: str) -> torch.Tensor:
    path, _, call = name.partition("#")
    seen: list[torch.Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        # The clone is what protects the value from an in-place addition that `forward` makes afterwards.
        seen.append((output[0] if isinstance(output, tuple) else output).clone())

    handle = plain.get_submodule(path).register_forward_hook(keep)
    with torch.inference_mode():
        plain(x)
    handle.remove()
    return seen[int(call or 1) - 1]
