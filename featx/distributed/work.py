"""One shard: from items to a Parquet file, in whatever process."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from featx.activations.engine import n_threads
from featx.activations.keys import describe_recipe
from featx.distributed.folder import Folder
from featx.exceptions import FeatxError, ImageError, UnreadableImage
from featx.images.items import PathItem
from featx.images.remote import Unreachable, is_url
from featx.images.sources import Items
from featx.images.view import ItemsView

if TYPE_CHECKING:
    import torch

    from featx.activations.extraction import Extraction
    from featx.extractor import PretrainedFeatureExtractor

# Threads for items that lie elsewhere, where the extractor's n_jobs is None: most of the time they wait.
_CONNECTIONS = 16


class ServerError(FeatxError, OSError):
    """Items could not be read for a reason that may be gone later; their shard is not written."""


class OtherMachine(FeatxError, RuntimeError):
    """A worker would compute other features than the client."""


@dataclass(frozen=True)
class Done:
    """What became of a shard.

    Attributes
    ----------
    name : str
    n_items, n_errors : int
    """

    name: str
    n_items: int
    n_errors: int


def recipe_of(extraction: Extraction) -> str:
    """Everything that can change a feature, in words; the same on machines that compute the same.

    Raises
    ------
    featx.activations.keys.NoKey
        Nothing tells.
    """
    plan = extraction.recipe.plan
    read = ", ".join(layer.label for layer in plan.layers)
    seen = describe_recipe(
        extraction.recipe, extraction.max_pixels, extraction.items.short_side, lambda path: PathItem(path, 0).digest()
    )
    return f"layers: {read}; pooling: {plan.pooling}, grid {plan.grid}; normalize: {plan.normalize}; {seen}"


def compute_shard(
    extractor: PretrainedFeatureExtractor, items: Sequence[str], name: str, folder: Folder, recipe: str, sample: str
) -> Done:
    """Compute the features of some items and write them.

    Parameters
    ----------
    extractor : PretrainedFeatureExtractor
        With ``on_error="nan"``.
    items : sequence of str
    name : str
        Of the file.
    folder : Folder
    recipe : str
        What the features must be made by.
    sample : str
        An item that shows the shape that a user's own preprocessing gives to images.

    Raises
    ------
    OtherMachine
        They would be made by something else here.
    """
    extraction = extractor._extraction_of_images([sample])
    here = recipe_of(extraction)
    if here != recipe:
        raise OtherMachine(
            "The same weights and versions are expected on every machine, got others on a worker. Install the same "
            f"packages and files there.\n  client: {recipe}\n  worker: {here}"
        )
    rows, digests, errors = _features(extraction, extractor._items([*items], reset=False))
    folder.write(name, _as_parquet(items, rows, digests, errors))
    return Done(name, len(items), len(errors))


def _features(extraction: Extraction, items: Items) -> tuple[np.ndarray, list[str | None], dict[int, str]]:
    """Rows, digests of the files' bytes, and why some items have no row."""
    watched = _Digesting(items)
    far = extraction.n_jobs is None and any(is_url(path or "") for path in items.iter_paths())
    extraction = replace(extraction, items=watched, n_jobs=_CONNECTIONS if far else extraction.n_jobs, warns=False)
    rows = np.empty((len(items), *extraction.recipe.plan.shape), dtype=np.float32)
    errors: dict[int, str] = {}
    with closing(extraction.iter_blocks()) as blocks:
        for block in blocks:
            rows[block.start : block.stop] = block.rows
            _check_reached(block.errors)
            errors |= {error.row: error.reason or str(error) for error in block.errors if error.row is not None}
    watched.digest_the_rest(errors, n_threads(extraction.n_jobs))
    return rows, [watched.digests.get(row) for row in range(len(items))], errors


def _check_reached(errors: Sequence[ImageError]) -> None:
    """Raise where a server did not answer: that says nothing of the item, which a later run may read.

    Raises
    ------
    ServerError
    """
    for error in errors:
        if isinstance(error.__cause__, Unreachable):
            raise ServerError(
                f"Disks and servers that answer are expected, and {error.source!r} could not be read for a reason that "
                f"is not its own: {error.reason}. Run this again later: only missing shards are computed."
            )


class _Digesting(ItemsView):
    """Paths that note the digests of the bytes that their pixels were made of, so that nothing is read twice."""

    def __init__(self, items: Items) -> None:
        super().__init__(items)
        self.digests: dict[int, str] = {}

    def load(self, row: int) -> torch.Tensor:
        item = self._items[row]
        assert isinstance(item, PathItem)
        try:
            pixels, digest = item.load_with_digest(0)
        except UnreadableImage as error:
            self._items._fail(row, item, error)
        self.digests[self._items.original_row(row)] = digest.hex()
        return pixels

    def digest_the_rest(self, errors: dict[int, str], n_threads: int) -> None:
        """Digest the items whose features a store knew; one that has gone since stays without."""

        def digest(row: int) -> str | None:
            try:
                return self._items.digest(row).hex()
            except ImageError:
                return None

        rest = [row for row in range(len(self)) if row not in self.digests and row not in errors]
        with ThreadPoolExecutor(n_threads) as pool:
            found = zip(rest, pool.map(digest, rest), strict=True)
            self.digests |= {row: digest for row, digest in found if digest is not None}


def _as_parquet(items: Sequence[str], rows: np.ndarray, digests: list[str | None], errors: dict[int, str]) -> bytes:
    """A Parquet file with the columns path, digest, features (lists of one length) and error."""
    import pyarrow as pa
    from pyarrow.parquet import write_table

    missing = np.isin(np.arange(len(items)), list(errors))
    features = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1], mask=pa.array(missing))
    columns = {
        "path": pa.array([_shown(item) for item in items], pa.string()),
        "digest": pa.array(digests, pa.string()),
        "features": features,
        "error": pa.array([errors.get(row) for row in range(len(items))], pa.string()),
    }
    file = io.BytesIO()
    # Features are noise to a compressor.
    write_table(pa.table(columns), file, compression="zstd", use_dictionary=["error"], column_encoding=None)
    return file.getvalue()


def _shown(path: str) -> str:
    return path.encode("utf-8", "backslashreplace").decode()
