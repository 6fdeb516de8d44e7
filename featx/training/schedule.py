"""How fast each part learns, and when."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from featx.system.devices import have_fused

_OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
_MOMENTUM = 0.9


@dataclass(frozen=True)
class Schedule:
    """Learning rate as a share of its peak.

    Parameters
    ----------
    shape : {"cosine", "linear", "constant"}
        How it falls after the warm-up: to zero at the last step, or not at all.
    warmup : float
        Share of the steps over which it rises, in 0..1.
    n_steps : int
    """

    shape: str
    warmup: float
    n_steps: int

    def share(self, step: int) -> float:
        """For one step, counted from 0."""
        rising = self.warmup * self.n_steps
        if step < rising:
            return (step + 1) / (rising + 1)
        left = (self.n_steps - step) / max(1.0, self.n_steps - rising)
        return {"cosine": (1 - math.cos(math.pi * left)) / 2, "linear": left, "constant": 1.0}[self.shape]


def make_optimizer(
    name: str, parameters: Iterable[tuple[float, nn.Parameter]], learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """An optimiser whose groups say in ``peak`` how fast they learn at most.

    Parameters
    ----------
    name : {"adamw", "adam", "sgd"}
    parameters : iterable of (float, Parameter)
        With the factor of their learning rate. Biases and norms are not decayed.
    learning_rate, weight_decay : float
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for factor, parameter in parameters:
        decay = weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((learning_rate * factor, decay), []).append(parameter)
    options = {"momentum": _MOMENTUM} if name == "sgd" else {}
    trained = [parameter for of_group in groups.values() for parameter in of_group]
    return _OPTIMIZERS[name](
        [
            {"params": of_group, "peak": peak, "weight_decay": decay, **options}
            for (peak, decay), of_group in groups.items()
        ],
        lr=learning_rate,
        # One kernel for all tensors: small heads spend more time on calls than on arithmetic. Not for SGD, whose
        # momentum would start from whatever lay in memory where float16 overflows in the first step.
        fused=(name != "sgd" and have_fused(trained)) or None,
    )
