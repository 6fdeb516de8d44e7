"""One shard: from items to a Parquet file, in whatever process."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from featx.activations.engine import n_threads
from featx.activations.keys import describe_recipe
from featx.distributed.folder import Folder
from featx.exceptions import FeatxError, ImageError
from featx.images.items import PathItem
from featx.images.loading import load_tile
from featx.images.reading import DEEP, FOUR_BANDS, HEIF, Content, Seen
from featx.images.remote import Unreachable, is_url
from featx.images.sources import Items
from featx.images.view import WatchedItems
from featx.store.index import digest_or_error, state_of

if TYPE_CHECKING:
    from featx.activations.extraction import Extraction
    from featx.estimators.extractor import PretrainedFeatureExtractor

Shape: TypeAlias = tuple[int, int, int]  # channels, height, width

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
    seen : Seen
        What was decoded for it.
    """

    name: str
    n_items: int
    n_errors: int
    seen: Seen


def shape_of_images(extractor: PretrainedFeatureExtractor, items: Sequence[str]) -> Shape | None:
    """Shape that a user's own preprocessing gives to images, as the first shows that can be read; None without one.

    Raises
    ------
    ServerError
        One cannot be read for a reason that is not its own.
    """
    if not callable(extractor.preprocess):
        return None
    tile = extractor._preprocessing(extractor._spec()).tile
    for item in items:
        seen = load_tile(extractor._items([item], reset=False), 0, tile)
        if not isinstance(seen, ImageError):
            channels, height, width = seen.shape
            return channels, height, width
        _check_reached([seen])
    return None


def recipe_of(extraction: Extraction) -> str:
    """Everything that can change a feature, in words; the same on machines that compute the same.

    Raises
    ------
    featx.activations.keys.NoKey
        Nothing tells.
    """
    plan = extraction.recipe.plan
    read = ", ".join(f"{slot.layer.label} {slot.pooling} {slot.grid}" for slot in plan.slots)
    seen = describe_recipe(
        extraction.recipe,
        extraction.max_pixels,
        extraction.items.short_side,
        lambda path: PathItem(path, 0).digest_of_bytes(),
    )
    reading = extraction.items.reading.words(DEEP | FOUR_BANDS | HEIF)  # what items are is not known
    return "; ".join(
        [
            f"layers: {read}; normalize: {plan.normalize}; {seen}",
            *([f"reading: {reading}"] if reading else []),
            *([f"views: {extraction.views}"] if extraction.views else []),
        ]
    )


def compute_shard(
    extractor: PretrainedFeatureExtractor,
    items: Sequence[str],
    name: str,
    folder: Folder,
    recipe: str,
    shape: Shape | None,
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
    shape : (int, int, int) or None
        As of :func:`shape_of_images`.

    Raises
    ------
    OtherMachine
        They would be made by something else here.
    """
    extraction = extractor._extraction(extractor._items([*items], reset=False), shape)
    here = recipe_of(extraction)
    if here != recipe:
        raise OtherMachine(
            "The same weights and versions are expected on every machine, got others on a worker. Install the same "
            f"packages and files there.\n  client: {recipe}\n  worker: {here}"
        )
    rows, digests, errors = _features(extractor, extraction)
    folder.write(name, _as_parquet(items, rows, digests, errors))
    return Done(name, len(items), len(errors), extraction.items.reading.seen)


def _features(
    extractor: PretrainedFeatureExtractor, extraction: Extraction
) -> tuple[np.ndarray, list[str | None], dict[int, str]]:
    """Rows, digests of the files' bytes, and why some items have no row."""
    paths = [path or "" for path in extraction.items.iter_paths()]
    states = [state_of(path) for path in paths] if extraction.store is not None else []
    digests: dict[int, str] = {}
    moved: set[int] = set()  # files that changed between two looks at them, as several views take

    def note(row: int, content: Content) -> None:
        if digests.setdefault(row, digest := content.digest.hex()) != digest:
            moved.add(row)

    items = WatchedItems(extraction.items, 0, note)
    far = extraction.n_jobs is None and any(map(is_url, paths))
    extraction = replace(extraction, items=items, n_jobs=_CONNECTIONS if far else extraction.n_jobs, warns=False)
    rows = np.empty((len(paths), *extraction.recipe.plan.shape), dtype=np.float32)
    errors: dict[int, str] = {}
    with closing(extraction.iter_blocks()) as blocks:
        for block in blocks:
            rows[block.start : block.stop] = block.rows
            _check_reached(block.errors)
            errors |= {error.row: error.reason or str(error) for error in block.errors if error.row is not None}
    # A store knew the others by the states of their files. What is written are features and digest of the same bytes.
    rest = [row for row in range(len(paths)) if row not in digests and row not in errors]
    failed = _look_at(items, rest, n_threads(extraction.n_jobs))
    _check_reached(failed.values())
    changed = [row for row in rest if row in failed or state_of(paths[row]) != states[row]]
    if changed := sorted({*changed, *moved} - {*errors}):
        anew = extractor._items([paths[row] for row in changed], reset=False)
        rows[changed], new, more = _features(extractor, replace(extraction, items=anew, store=None))
        digests |= {row: digest for row, digest in zip(changed, new, strict=True) if digest is not None}
        errors |= {changed[row]: reason for row, reason in more.items()}
    return rows, [None if row in errors else digests[row] for row in range(len(paths))], errors


def _look_at(items: Items, rows: Sequence[int], n_threads: int) -> dict[int, ImageError]:
    """Read some items for those who watch them; the errors of those that cannot be read."""
    with ThreadPoolExecutor(n_threads) as pool:
        found = zip(rows, pool.map(lambda row: digest_or_error(items, row, 0), rows), strict=True)
        return {row: error for row, error in found if isinstance(error, ImageError)}


def _check_reached(errors: Iterable[ImageError]) -> None:
    """Raise where a server did not answer: that says nothing of the item, which a later run may read.

    Raises
    ------
    ServerError
    """
    for error in errors:
        if isinstance(error.__cause__, Unreachable):
            raise ServerError(
                f"Disks and servers that answer are expected, and {error.source!r} could not be read for a reason that "
                f"is not its own: {error.reason}. Run this again later: only missing shards are computed. If it stays "
                "so, leave the item out."
            )


def _as_parquet(items: Sequence[str], rows: np.ndarray, digests: list[str | None], errors: dict[int, str]) -> bytes:
    """A Parquet file with the columns path, digest, features (lists of one length) and error."""
    import pyarrow as pa
    from pyarrow.parquet import write_table

    missing = np.isin(np.arange(len(items)), list(errors))
    # Lists of a fixed size would say more, and Arrow before release 25 cannot read those that have rows without.
    ends = np.cumsum(np.where(missing, 0, rows.shape[1]))
    offsets = pa.array(np.concatenate([[0], ends]), pa.int32(), mask=np.append(missing, False))
    features = pa.ListArray.from_arrays(offsets, pa.array((rows[~missing] if errors else rows).ravel()))
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
