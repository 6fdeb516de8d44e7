"""Digests of files, of the very bytes that their features are those of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from featx.exceptions import ImageError, UnreadableImage
from featx.images.items import PathItem
from featx.images.sources import Items
from featx.images.view import ItemsView
from featx.store.index import digest_or_error

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class DigestingItems(ItemsView):
    """Paths that note the digests of all bytes that are read of them, so that none are read for the digest alone.

    Parameters
    ----------
    items : Items
        Of paths.
    digests : dict of int to str or None, default=None
        Where to note them, in hexadecimal digits, by position in X; None for a new one.
    """

    def __init__(self, items: Items, digests: dict[int, str] | None = None) -> None:
        super().__init__(items)
        self.digests: dict[int, str] = {} if digests is None else digests

    def __getitem__(self, index: Any) -> Any:
        return DigestingItems(self._items[index], self.digests) if isinstance(index, slice) else self._items[index]

    def load(self, row: int) -> torch.Tensor:
        """Pixels of one item."""
        return self._noting(row, lambda item: item.load_with_digests(0))

    def load_if(self, row: int, digest: bytes, seed: int) -> tuple[torch.Tensor, bool]:
        """Pixels of one item, and whether they are those that ``digest`` was made of."""

        def read(item: PathItem) -> tuple[tuple[torch.Tensor, bool], tuple[bytes]]:
            pixels, (seeded, plain) = item.load_with_digests(seed, 0)
            return (pixels, seeded == digest), (plain,)

        return self._noting(row, read)

    def digest(self, row: int, seed: int = 0) -> bytes:
        """Digest of one item."""

        def read(item: PathItem) -> tuple[bytes, tuple[bytes]]:
            seeded, plain = item.digests(seed, 0)
            return seeded, (plain,)

        return self._noting(row, read)

    def digest_all(self, rows: Sequence[int], n_threads: int) -> dict[int, ImageError]:
        """Note the digests of some items; the errors of those that cannot be read."""
        with ThreadPoolExecutor(n_threads) as pool:
            found = zip(rows, pool.map(lambda row: digest_or_error(self, row, 0), rows), strict=True)
            return {row: error for row, error in found if isinstance(error, ImageError)}

    def _noting(self, row: int, read: Callable[[PathItem], tuple[T, tuple[bytes, ...]]]) -> T:
        item = self._items[row]
        assert isinstance(item, PathItem)
        try:
            value, (plain,) = read(item)
        except UnreadableImage as error:
            self._items._fail(row, item, error)
        self.digests[self.original_row(row)] = plain.hex()
        return value
