"""Random draws that leave torch's global generator where it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from featx.system.devices import HOST, generators_of
from featx.system.locks import ForkSafeLock

_LOCK = ForkSafeLock()  # entered again by a builder that runs under it and itself draws


@contextmanager
def private_generator(seed: int) -> Iterator[None]:
    """PyTorch's CPU generator at a seed of its own, and afterwards where it was; one thread at a time."""
    with Draws(seed).drawn_from():
        yield


class Draws:
    """A course of random numbers that goes on from one use to the next, in place of torch's global generators.

    Parameters
    ----------
    seed : int
    device : str, default="cpu"
        Where draws are made beside the CPU.
    """

    def __init__(self, seed: int, device: str = HOST) -> None:
        self._seed, self._device = seed, torch.device(device)
        self._states: list[torch.Tensor] | None = None

    @contextmanager
    def drawn_from(self) -> Iterator[None]:
        """While it is entered, what draws from the global generators draws from here; one thread at a time."""
        generators = generators_of(self._device)
        with _LOCK.held():
            before = [generator.get_state() for generator in generators]
            try:
                if self._states is None:
                    for generator in generators:
                        generator.manual_seed(self._seed)
                else:
                    _set(generators, self._states)
                yield
                self._states = [generator.get_state() for generator in generators]
            finally:
                _set(generators, before)


def _set(generators: list[torch.Generator], states: list[torch.Tensor]) -> None:
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
