"""The loop: decoded batches through the network, out as blocks of rows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from tqdm.auto import tqdm

from featx.activations.exported.finding import NOWHERE, Place
from featx.activations.finite import Doctor, not_finite_rows
from featx.activations.passes import Passes
from featx.activations.plan import FeaturePlan, Slot, unset_before
from featx.backbones.layers import Architecture
from featx.backbones.networks import Network, NetworkSpec
from featx.exceptions import ImageError, WeightsError
from featx.images.loading import iter_batches
from featx.images.preprocessing import Preprocessing
from featx.images.sources import Items
from featx.system import threads
from featx.system.locks import ForkSafeLock

_TOLD: set[str] = set()  # by this process, of reasons

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Block:
    """Feature rows of consecutive items.

    Attributes
    ----------
    start, stop : int
        Positions in the items.
    rows : ndarray of shape (stop - start, ...), float32
        NaN where an item could not be read or its features are not finite.
    errors : list of ImageError
    """

    start: int
    stop: int
    rows: np.ndarray
    errors: list[ImageError]


@dataclass(frozen=True)
class Computed:
    """What one batch gave.

    Attributes
    ----------
    rows : list of int
        Positions in the items, of those that have what was asked for.
    parts : dict of Slot to tensor of shape (n_rows, width)
        On the CPU.
    errors : dict of int to ImageError
        By position in the items, of the others.
    not_finite : dict of Slot to tensor of shape (n_rows,), bool
        Where parts that nobody asked for hold NaN or infinity; slots without are not there.
    """

    rows: list[int]
    parts: dict[Slot, torch.Tensor]
    errors: dict[int, ImageError]
    not_finite: dict[Slot, torch.Tensor] = field(default_factory=dict)

    def without(self, wrong: torch.Tensor, errors: dict[int, ImageError]) -> Computed:
        """What is left of it without some rows, of which a mask tells, and which have errors instead."""
        return Computed(
            [row for row, gone in zip(self.rows, wrong.tolist(), strict=True) if not gone],
            {slot: part[~wrong] for slot, part in self.parts.items()},
            self.errors | errors,
            {slot: left for slot, mask in self.not_finite.items() if (left := mask[~wrong]).any()},
        )


class Tally:
    """How many images went through networks in this process, since it began."""

    def __init__(self) -> None:
        self.n_images = 0
        self._lock = ForkSafeLock()

    def add(self, n: int) -> None:
        """Count some more."""
        with self._lock.held():
            self.n_images += n


TALLY = Tally()


@dataclass(frozen=True)
class Recipe:
    """All that decides the features of an image, network, preprocessing and layers, and what computes them."""

    spec: NetworkSpec
    architecture: Architecture
    preprocessing: Preprocessing
    plan: FeaturePlan
    device: str
    precision: str
    engine: str

    @property
    def dtype(self) -> torch.dtype:
        """PyTorch's word for the precision."""
        return DTYPES[self.precision]

    def iter_blocks(self, items: Items, *, batch_size: int, n_jobs: int | None, on_error: str) -> Generator[Block]:
        """Yield the features of the items in order, one block per batch; the network is loaded at the first one."""
        starts = range(0, len(items), batch_size)
        batches = [range(start, min(start + batch_size, len(items))) for start in starts]
        slots = self.plan.slots
        passes = self.passes(len(items))
        computing = self.compute(
            items, batches, lambda *_: slots, passes, asked=slots, n_jobs=n_jobs, on_error=on_error
        )
        with closing(computing):
            for batch, computed in zip(batches, computing, strict=True):
                rows = np.full((len(batch), *self.plan.shape), np.nan, dtype=np.float32)
                if computed.rows:
                    parts = [computed.parts[slot].numpy() for slot in self.plan.slots]
                    rows[np.subtract(computed.rows, batch.start)] = self.plan.join(parts)
                yield Block(batch.start, batch.stop, rows, list(computed.errors.values()))

    def passes(
        self,
        n_images: int,
        keep: str = "stages",
        place: Place = NOWHERE,
        check: Callable[[], None] = lambda: None,
    ) -> Passes:
        """What takes about so many images through the network; the rest as of `Passes`."""
        passes = Passes(self, n_images, keep, place, check)
        self._passes.append(passes)
        return passes

    def tell_reasons(self) -> None:
        """Say to stderr why torch computed where another engine might have; once per process."""
        for reason in {passes.reason for passes in self._passes} - {"", *_TOLD}:
            _TOLD.add(reason)
            tqdm.write(f"torch computes: {reason}.", file=sys.stderr)

    def compute(
        self,
        items: Items,
        batches: Iterable[Sequence[int]],
        choose: Callable[[list[int], frozenset[str]], Sequence[Slot]],
        passes: Passes,
        *,
        asked: Sequence[Slot],
        n_jobs: int | None,
        on_error: str,
    ) -> Generator[Computed]:
        """Send batches of items through the network.

        ``choose(rows, missing)`` says what to read in a batch of a network whose modules of those names have no
        weights; the network is loaded at the first batch that has an image. An item whose part in a slot of ``asked``
        is not finite is an error, as ``on_error`` says.
        """
        decoding = iter_batches(items, batches, self.preprocessing.tile, n_jobs=n_threads(n_jobs), on_error=on_error)
        with closing(decoding):
            for batch in decoding:
                if batch.tiles is None:
                    yield Computed(batch.rows, {}, batch.errors)
                    continue
                self._check_shape(batch.tiles)
                slots = choose(batch.rows, passes.missing(batch.tiles, asked))
                parts = self._parts(batch.tiles, slots, passes)
                wrong = {slot: mask for slot, part in parts.items() if (mask := not_finite_rows(part)) is not None}
                computed = Computed(batch.rows, parts, batch.errors, wrong)
                yield self._checked(computed, items, batch.tiles, asked, on_error) if wrong else computed

    def _checked(
        self, computed: Computed, items: Items, tiles: torch.Tensor, asked: Sequence[Slot], on_error: str
    ) -> Computed:
        """Without the rows of which something that was asked for is not finite.

        Raises
        ------
        NotFinite
            There is one, and ``on_error="raise"``.
        """
        columns = {slot.column for slot in asked}
        failing = {slot: mask for slot, mask in computed.not_finite.items() if slot.column in columns}
        if not failing:
            return computed
        wrong = torch.stack([*failing.values()]).any(0)
        errors: dict[int, ImageError] = {}
        for place in wrong.nonzero().flatten().tolist():
            row = computed.rows[place]
            # The earliest place: what is wrong there makes the later ones wrong too.
            slot = min((slot for slot, mask in failing.items() if mask[place]), key=lambda slot: slot.layer.position)
            errors[row] = self._doctor.error(items, row, tiles[place], slot, self.network)
            if on_error == "raise":
                raise errors[row]
        return computed.without(wrong, errors)

    @cached_property
    def _doctor(self) -> Doctor:
        return Doctor(self.spec, self.architecture, self.precision)

    @cached_property
    def network(self) -> Network:
        """The network, loaded when it is first asked for: what a key was made from is what computes."""
        network = self.spec.load(self.device, self.dtype)
        check_weights_reach(self.plan, self.architecture, network)
        return network

    def _parts(self, tiles: torch.Tensor, slots: Sequence[Slot], passes: Passes) -> dict[Slot, torch.Tensor]:
        TALLY.add(len(tiles))
        return passes.parts(tiles, slots)

    def _check_shape(self, tiles: torch.Tensor) -> None:
        if tuple(tiles.shape[1:]) != self.architecture.shape:
            raise ValueError(
                f"Images of one shape are expected from preprocess, got {tuple(tiles.shape[1:])} after "
                f"{self.architecture.shape}. Let preprocess bring them to one size."
            )

    @cached_property
    def _passes(self) -> list[Passes]:
        return []


def n_threads(n_jobs: int | None) -> int:
    """Decoding threads: as many as torch uses for None, otherwise joblib's reading of ``n_jobs``."""
    return threads.n_threads(n_jobs, torch.get_num_threads())


def check_weights_reach(plan: FeaturePlan, architecture: Architecture, network: Network) -> None:
    """Raise where a layer lies behind modules that the weights file had no tensors for.

    Raises
    ------
    WeightsError
    """
    for layer in plan.layers:
        if unset := unset_before(layer, architecture, network.missing):
            raise WeightsError(
                f"Weights for every module up to layer {layer.label!r} are expected, got a file that has NaN or "
                f"infinity, none or of another shape for {', '.join(sorted(unset))}. Read a stage before them, such as "
                "layers=-1, or take a file that has them."
            )
