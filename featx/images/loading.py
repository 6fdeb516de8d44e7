"""Decoding in threads, ahead of whoever takes the batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import torch

from featx.exceptions import ImageError
from featx.images.preprocessing import collate
from featx.images.sources import Items

# Images per task handed to a thread: enough to hide the cost of handing over, few enough to share out a batch.
_TASK_SIZE = 4

Tile = torch.Tensor | ImageError


@dataclass(frozen=True)
class Batch:
    """Consecutive items of X, decoded.

    Attributes
    ----------
    start, stop : int
        Positions in the items.
    tiles : tensor of shape (n_readable, channels, height, width) or None
        None where no item of the batch could be read.
    readable : list of int
        Positions, counted from ``start``, of the items in ``tiles``.
    errors : list of ImageError
        One for each item that could not be read.
    """

    start: int
    stop: int
    tiles: torch.Tensor | None
    readable: list[int]
    errors: list[ImageError]


def iter_batches(
    items: Items,
    tile: Callable[[torch.Tensor, bool], torch.Tensor],
    *,
    batch_size: int,
    n_jobs: int,
    on_error: str,
) -> Generator[Batch]:
    """Yield the items in order, in batches, while threads decode about two batches ahead.

    The threads are gone when the iterator ends, whether it was exhausted, closed, or left by an exception.

    Parameters
    ----------
    items : Items
        What to decode.
    tile : callable (image, stretch) -> tensor
        Preprocessing of one image; runs in the threads.
    batch_size, n_jobs : int
        Items per batch; number of threads.
    on_error : {"raise", "nan"}
        Whether the first unreadable item raises its error, or is left out and recorded.
    """
    with ThreadPoolExecutor(n_jobs, thread_name_prefix="featx-decode") as pool:
        futures: deque[Future[list[Tile]]] = deque()
        try:
            yield from _batches(_iter_tiles(pool, futures, items, tile, ahead=2 * batch_size), batch_size, on_error)
        finally:
            for future in futures:
                future.cancel()


def _iter_tiles(
    pool: ThreadPoolExecutor,
    futures: deque[Future[list[Tile]]],
    items: Items,
    tile: Callable[[torch.Tensor, bool], torch.Tensor],
    ahead: int,
) -> Iterator[Tile]:
    def load(start: int) -> list[Tile]:
        return [load_tile(items, row, tile) for row in range(start, min(start + _TASK_SIZE, len(items)))]

    starts = iter(range(0, len(items), _TASK_SIZE))
    futures.extend(pool.submit(load, start) for start in islice(starts, -(-ahead // _TASK_SIZE)))
    while futures:
        done = futures.popleft().result()
        futures.extend(pool.submit(load, start) for start in islice(starts, 1))
        yield from done


def load_tile(items: Items, row: int, tile: Callable[[torch.Tensor, bool], torch.Tensor]) -> Tile:
    """One item after preprocessing, or the error that says why it cannot be read.

    An exception of the user's own preprocessing comes through, with a note that names the row.
    """
    try:
        image = items.load(row)
    except ImageError as error:
        return error
    try:
        return tile(image, items[row].stretch)
    except Exception as error:
        error.add_note(f"While preprocessing X[{row}] ({items[row].source or 'no file'}).")
        raise


def _batches(tiles: Iterator[Tile], batch_size: int, on_error: str) -> Iterator[Batch]:
    start, pending = 0, []
    for tile in tiles:
        if isinstance(tile, ImageError) and on_error == "raise":
            raise tile
        pending.append(tile)
        if len(pending) == batch_size:
            yield _batch(start, pending)
            start, pending = start + batch_size, []
    if pending:
        yield _batch(start, pending)


def _batch(start: int, tiles: list[Tile]) -> Batch:
    readable = [position for position, tile in enumerate(tiles) if isinstance(tile, torch.Tensor)]
    images = [tile for tile in tiles if isinstance(tile, torch.Tensor)]
    errors = [tile for tile in tiles if isinstance(tile, ImageError)]
    return Batch(start, start + len(tiles), collate(images) if images else None, readable, errors)
