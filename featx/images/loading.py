"""Decoding in threads, ahead of whoever takes the batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
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
    """Some items of X, decoded.

    Attributes
    ----------
    rows : list of int
        Positions in the items, of those that could be read.
    tiles : tensor of shape (n_rows, channels, height, width) or None
        None where no item of the batch could be read.
    errors : dict of int to ImageError
        By position in the items, for those that could not be read.
    """

    rows: list[int]
    tiles: torch.Tensor | None
    errors: dict[int, ImageError]


def iter_batches(
    items: Items,
    batches: Iterable[Sequence[int]],
    tile: Callable[[torch.Tensor, bool], torch.Tensor],
    *,
    n_jobs: int,
    on_error: str,
) -> Generator[Batch]:
    """Yield batches of items in the order asked for, while threads decode about two batches ahead.

    The threads are gone when the iterator ends, whether it was exhausted, closed, or left by an exception.

    Parameters
    ----------
    items : Items
        What to decode.
    batches : iterable of sequences of int
        Positions in the items. It is asked for the next batch no earlier than its decoding can begin.
    tile : callable (image, stretch) -> tensor
        Preprocessing of one image; runs in the threads.
    n_jobs : int
        Number of threads.
    on_error : {"raise", "nan"}
        Whether the first unreadable item raises its error, or is left out and recorded.
    """
    with ThreadPoolExecutor(n_jobs, thread_name_prefix="featx-decode") as pool:

        def load(rows: Sequence[int]) -> list[Tile]:
            return [load_tile(items, row, tile) for row in rows]

        def submit(rows: Sequence[int]) -> list[Future[list[Tile]]]:
            return [pool.submit(load, rows[start : start + _TASK_SIZE]) for start in range(0, len(rows), _TASK_SIZE)]

        ahead: deque[tuple[Sequence[int], list[Future[list[Tile]]]]] = deque()
        source = iter(batches)
        try:
            while True:
                # Two batches, or more where they are too small to keep the threads busy.
                while len(ahead) < 2 or sum(len(rows) for rows, _ in ahead) < n_jobs * _TASK_SIZE:
                    rows = next(source, None)
                    if rows is None:
                        break
                    ahead.append((rows, submit(rows)))
                if not ahead:
                    return
                rows, futures = ahead[0]
                tiles = [tile for future in futures for tile in future.result()]
                ahead.popleft()
                ahead.extend((rows, submit(rows)) for rows in islice(source, 1))
                yield _batch(rows, tiles, on_error)
        finally:
            for _, futures in ahead:
                for future in futures:
                    future.cancel()


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
        error.add_note(f"While preprocessing X[{items.original_row(row)}] ({items[row].source or 'no file'}).")
        raise


def shape_of_first(items: Items, tile: Callable[[torch.Tensor, bool], torch.Tensor]) -> tuple[int, int, int] | None:
    """Shape (channels, height, width) of the first image after preprocessing; None where none can be read."""
    for row in range(len(items)):
        first = load_tile(items, row, tile)
        if not isinstance(first, ImageError):
            channels, height, width = first.shape
            return channels, height, width
    return None


def _batch(rows: Sequence[int], tiles: list[Tile], on_error: str) -> Batch:
    errors = {row: tile for row, tile in zip(rows, tiles, strict=True) if isinstance(tile, ImageError)}
    if errors and on_error == "raise":
        raise next(iter(errors.values()))
    images = [tile for tile in tiles if isinstance(tile, torch.Tensor)]
    return Batch([row for row in rows if row not in errors], collate(images) if images else None, errors)
