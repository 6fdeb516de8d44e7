"""How much time there is, and how much something takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

# What is foreseen is foreseen from few steps.
_MARGIN = 1.1


class OutOfTime(Exception):
    """What runs takes longer than was foreseen, and would end too late."""


@dataclass(frozen=True)
class Budget:
    """Seconds from now on.

    Attributes
    ----------
    seconds : float or None
        None for as many as it takes.
    clock : callable () -> float
    """

    seconds: float | None
    begun: float
    clock: Callable[[], float] = time.monotonic

    @classmethod
    def from_now(cls, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> Budget:
        """A budget whose time begins."""
        return cls(seconds, clock(), clock)

    @property
    def spent(self) -> float:
        """Seconds."""
        return self.clock() - self.begun

    @property
    def left(self) -> float:
        """Seconds; infinite without a limit."""
        return float("inf") if self.seconds is None else self.seconds - self.spent

    def fits(self, seconds: float) -> bool:
        """Whether so much more ends in time, and a little is left."""
        return self.seconds is None or _MARGIN * seconds <= self.left

    def why_not(self, seconds: float) -> str:
        """What to tell of something that does not fit."""
        return f"would take about {seconds:.0f} s of the {max(0.0, self.left):.0f} s left"
