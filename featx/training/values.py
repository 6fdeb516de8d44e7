"""What the tail trains on: values at the cut, held where they are computed once, or made anew for every batch."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from featx.activations.engine import n_threads
from featx.activations.extraction import Extraction
from featx.backbones.layers import Layer
from featx.images.loading import iter_batches
from featx.images.preprocessing import Preprocessing
from featx.images.sources import Items

# Values that are read again in every epoch: up to here in memory, up to a share of the free disk in a file.
_MOST_IN_MEMORY, _MOST_OF_DISK = 2**28, 0.5


class Values(Protocol):
    """Batches of what a tail takes."""

    def iter_batches(self, batches: Sequence[np.ndarray], epoch: int) -> Generator[torch.Tensor]:
        """Yield the values of some rows each, of shape (n_rows, ...), as the tail may overwrite them."""


@dataclass(frozen=True)
class Held:
    """Values computed once.

    Attributes
    ----------
    rows : ndarray of shape (n_views * n, ...)
        All images in the first view, then all in the second.
    n : int
        Images.
    finish : callable (tensor) -> tensor
        What is left to do to a batch.
    """

    rows: np.ndarray
    n: int
    finish: Callable[[torch.Tensor], torch.Tensor]

    def iter_batches(self, batches: Sequence[np.ndarray], epoch: int) -> Generator[torch.Tensor]:
        """Yield copies, in epoch e those of view e modulo the number of views."""
        view = epoch % max(1, len(self.rows) // max(1, self.n))
        for batch in batches:
            yield self.finish(torch.from_numpy(self.rows.take(view * self.n + batch, axis=0)))


@dataclass(frozen=True)
class Streamed:
    """Images decoded anew for every batch, in threads ahead of the training.

    Attributes
    ----------
    items_of : callable (int) -> Items
        The images as an epoch sees them.
    """

    items_of: Callable[[int], Items]
    preprocessing: Preprocessing
    n_jobs: int | None

    def iter_batches(self, batches: Sequence[np.ndarray], epoch: int) -> Generator[torch.Tensor]:
        """Yield preprocessed images."""
        decoding = iter_batches(
            self.items_of(epoch),
            [batch.tolist() for batch in batches],
            self.preprocessing.tile,
            n_jobs=n_threads(self.n_jobs),
            on_error="raise",
        )
        with closing(decoding):
            for batch in decoding:
                assert batch.tiles is not None
                yield self.preprocessing.finish(batch.tiles)


@dataclass(frozen=True)
class StreamedFront:
    """Values at the cut computed anew for every batch.

    Attributes
    ----------
    extraction_of : callable (int) -> Extraction
        The images as an epoch sees them, and the front.
    finish : callable (tensor) -> tensor
        From rows to what the tail takes.
    """

    extraction_of: Callable[[int], Extraction]
    finish: Callable[[torch.Tensor], torch.Tensor]

    def iter_batches(self, batches: Sequence[np.ndarray], epoch: int) -> Generator[torch.Tensor]:
        """Yield values of the batches."""
        extraction = self.extraction_of(epoch)
        plan = extraction.recipe.plan
        computing = extraction.recipe.compute(
            extraction.items,
            [batch.tolist() for batch in batches],
            lambda *_: plan.slots,
            extraction.recipe.passes(len(extraction.items)),
            asked=plan.slots,
            n_jobs=extraction.n_jobs,
            on_error="raise",
        )
        with closing(computing):
            for computed in computing:
                yield self.finish(torch.from_numpy(plan.join([computed.parts[slot].numpy() for slot in plan.slots])))


def hold(extraction: Extraction, finish: Callable[[torch.Tensor], torch.Tensor], n: int) -> Held | None:
    """Features of an extraction, computed once; None where they would take too much disk."""
    rows = _room_for((len(extraction.items), *extraction.recipe.plan.shape), np.dtype(np.float32))
    if rows is None:
        return None
    with closing(extraction.iter_blocks()) as blocks:
        for block in blocks:
            rows[block.start : block.stop] = block.rows
    return Held(rows, n, finish)


def hold_images(items: Items, preprocessing: Preprocessing, n_jobs: int | None, n: int) -> Held | None:
    """Preprocessed images, decoded once; None where they would take too much disk."""
    starts = range(0, len(items), 32)
    batches = [range(start, min(start + 32, len(items))) for start in starts]
    decoding = iter_batches(items, batches, preprocessing.tile, n_jobs=n_threads(n_jobs), on_error="raise")
    rows: np.ndarray | None = None
    with closing(decoding):
        for batch in decoding:
            assert batch.tiles is not None
            tiles = batch.tiles.numpy()
            if rows is None:
                rows = _room_for((len(items), *tiles.shape[1:]), tiles.dtype)
            if rows is None:
                return None
            if rows.dtype != tiles.dtype:  # some images came as floats
                return None
            rows[batch.rows] = tiles
    return None if rows is None else Held(rows, n, preprocessing.finish)


def unflatten(layer: Layer) -> Callable[[torch.Tensor], torch.Tensor]:
    """From flat rows, as `pool_together` makes them, to what the layer puts out."""

    def restore(rows: torch.Tensor) -> torch.Tensor:
        shape = layer.shape[1:]
        if layer.layout != "NHWC":
            values = rows.unflatten(1, shape)
            return values.contiguous(memory_format=torch.channels_last) if values.ndim == 4 else values
        height, width, channels = shape
        return rows.unflatten(1, (channels, height, width)).permute(0, 2, 3, 1).contiguous()

    return restore


def _room_for(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray | None:
    """An array in memory, or in a file that is gone when nobody holds it any more; None where it is too large."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size <= _MOST_IN_MEMORY:
        return np.empty(shape, dtype)
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError:  # no disk that can be written to
        return None
    if size > _MOST_OF_DISK * shutil.disk_usage(folder).free:
        return None
    with tempfile.TemporaryFile(prefix="featx-", dir=folder) as file:
        return np.memmap(file, dtype, mode="w+", shape=shape)
