"""The loop: decoded batches through the network, out as blocks of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from featx.activations.finite import Doctor, not_finite_rows
from featx.activations.plan import FeaturePlan, Slot
from featx.activations.pooling import pool_together
from featx.activations.taps import read
from featx.backbones.layers import Architecture, Layer
from featx.backbones.networks import Network, NetworkSpec
from featx.exceptions import ImageError, LayerError, WeightsError
from featx.images.loading import iter_batches
from featx.images.preprocessing import Preprocessing
from featx.images.sources import Items
from featx.system import threads
from featx.system.devices import in_memory, kind_of, move, to_host, undisturbed
from featx.system.locks import ForkSafeLock

# Up to this many values torch sends a batch of one past oneDNN (aten/src/ATen/native/Convolution.cpp, use_mkldnn).
_LONE_IMAGE_VALUES = 20480

# On a CPU a batch is cut until no module's output is larger: a C library hands larger blocks back to the system at once
# (glibc those from 32 MiB on), and getting them anew page by page costs up to half as much as the arithmetic.
_LARGEST_BYTES, _FEWEST_AT_ONCE, _ALL = 2**25 - 2**16, 4, 2**31

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
    """Everything that decides the features of an image: network, preprocessing, layers, device and precision."""

    spec: NetworkSpec
    architecture: Architecture
    preprocessing: Preprocessing
    plan: FeaturePlan
    device: str
    precision: str

    @property
    def dtype(self) -> torch.dtype:
        """PyTorch's word for the precision."""
        return DTYPES[self.precision]

    def iter_blocks(self, items: Items, *, batch_size: int, n_jobs: int | None, on_error: str) -> Generator[Block]:
        """Yield the features of the items in order, one block per batch; the network is loaded at the first one."""
        starts = range(0, len(items), batch_size)
        batches = [range(start, min(start + batch_size, len(items))) for start in starts]
        slots = self.plan.slots
        computing = self.compute(items, batches, lambda *_: slots, asked=slots, n_jobs=n_jobs, on_error=on_error)
        with closing(computing):
            for batch, computed in zip(batches, computing, strict=True):
                rows = np.full((len(batch), *self.plan.shape), np.nan, dtype=np.float32)
                if computed.rows:
                    parts = [computed.parts[slot].numpy() for slot in self.plan.slots]
                    rows[np.subtract(computed.rows, batch.start)] = self.plan.join(parts)
                yield Block(batch.start, batch.stop, rows, list(computed.errors.values()))

    def compute(
        self,
        items: Items,
        batches: Iterable[Sequence[int]],
        choose: Callable[[Network, list[int]], Sequence[Slot]],
        *,
        asked: Sequence[Slot],
        n_jobs: int | None,
        on_error: str,
    ) -> Generator[Computed]:
        """Send batches of items through the network.

        ``choose(network, rows)`` says what to read in a batch; the network is loaded at the first that has an image.
        An item whose part in a slot of ``asked`` is not finite is an error, as ``on_error`` says.
        """
        decoding = iter_batches(items, batches, self.preprocessing.tile, n_jobs=n_threads(n_jobs), on_error=on_error)
        with closing(decoding):
            for batch in decoding:
                if batch.tiles is None:
                    yield Computed(batch.rows, {}, batch.errors)
                    continue
                parts = self._parts(self.network, batch.tiles, choose(self.network, batch.rows))
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

    def _parts(self, network: Network, tiles: torch.Tensor, slots: Sequence[Slot]) -> dict[Slot, torch.Tensor]:
        if tuple(tiles.shape[1:]) != self.architecture.shape:
            raise ValueError(
                f"Images of one shape are expected from preprocess, got {tuple(tiles.shape[1:])} after "
                f"{self.architecture.shape}. Let preprocess bring them to one size."
            )
        by_layer: dict[Layer, list[Slot]] = {}
        for slot in slots:
            by_layer.setdefault(slot.layer, []).append(slot)
        reads = list(by_layer.values())

        def reduce(position: int, output: torch.Tensor) -> list[torch.Tensor]:
            slots = reads[position]
            parts = pool_together(output, slots[0].layer, [(slot.pooling, slot.grid) for slot in slots])
            return [part.flatten(1) for part in parts]

        def read_some(some: torch.Tensor) -> list[torch.Tensor]:
            images = self.preprocessing.finish(move(some, self.device))
            # In the layout of the weights: in another, every convolution would turn its input.
            images = _in_company(images.to(self.dtype)).contiguous(memory_format=torch.channels_last)
            found = read(module, images, list(by_layer), reduce)
            for layer, parts in zip(by_layer, found, strict=True):
                check_rows(layer, parts[0], len(images))
            return [to_host(part[: len(some)]) for of_layer in found for part in of_layer]  # without the company

        TALLY.add(len(tiles))
        needs = in_memory(self.device, f"a batch of {len(tiles)} images")
        # The lock: all clones share the module, and one thread's taps would see another's images.
        with torch.inference_mode(), network.lock, undisturbed(self.device), needs:
            module = network.reading(by_layer)
            found = [read_some(some) for some in tiles.chunk(-(-len(tiles) // self._at_once))]
        parts = found[0] if len(found) == 1 else [torch.cat(part) for part in zip(*found, strict=True)]
        return dict(zip((slot for of_layer in reads for slot in of_layer), parts, strict=True))

    @cached_property
    def _at_once(self) -> int:
        """Images of a batch that pass through the network together; all where smaller pieces would leave cores idle."""
        calls = self.architecture.calls
        largest = max(math.prod(shape) // 2 for call in calls for shape in (call.shape, call.input_shape))
        fit = _LARGEST_BYTES // (largest * self.dtype.itemsize)
        in_pieces = kind_of(self.device).in_pieces
        return fit if in_pieces and fit >= max(_FEWEST_AT_ONCE, torch.get_num_threads()) else _ALL


def _in_company(images: torch.Tensor) -> torch.Tensor:
    """A lone small image twice: torch convolves it by another routine than a batch, with other rounding."""
    lone = len(images) == 1 and images.numel() <= _LONE_IMAGE_VALUES
    return torch.cat([images, images]) if lone else images


def check_rows(layer: Layer, part: torch.Tensor, n: int) -> None:
    """Raise where a layer did not put out one row per image.

    Raises
    ------
    LayerError
    """
    if len(part) != n:
        raise LayerError(
            f"Layers with one row per image are expected, got layer {layer.label!r} with {len(part)} rows for {n} "
            "images. Read another layer."
        )


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
        if unset := unset_before(layer, architecture, network):
            raise WeightsError(
                f"Weights for every module up to layer {layer.label!r} are expected, got a file that has NaN or "
                f"infinity, none or of another shape for {', '.join(sorted(unset))}. Read a stage before them, such as "
                "layers=-1, or take a file that has them."
            )


def unset_before(layer: Layer, architecture: Architecture, network: Network) -> set[str]:
    """Modules that a layer's values pass through and that have no weights."""
    before = {name for call in architecture.calls[: layer.position] for name in call.names}
    return before & network.missing
