"""extract: features of many items in shards, which a later run goes on with."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from numbers import Integral
from typing import TYPE_CHECKING, Any, NoReturn

from sklearn.base import clone
from tqdm.auto import tqdm

from featx._version import __version__
from featx.activations.keys import NoKey
from featx.distributed.folder import Folder
from featx.distributed.listing import list_items
from featx.distributed.shards import Manifest, Shard, check_no_others, engine_there, is_shard
from featx.distributed.work import Done, Shape, compute_shard, recipe_of, shape_of_images
from featx.estimators.extractor import PretrainedFeatureExtractor
from featx.exceptions import FeatxError
from featx.images.reading import Seen
from featx.images.remote import is_url
from featx.images.walk import LeftOut, left_out_of

if TYPE_CHECKING:
    from distributed import Client

# Shards handed out at a time, for each thread of the workers: the scheduler then holds few, however many there are.
_AHEAD = 2
# What a scheduler lost is handed out again, so often in a row without a shard done.
_MOST_LOSSES = 5


class ShardError(FeatxError, RuntimeError):
    """A shard could not be computed; those that are done stay, and the next run goes on with the others."""


@dataclass(frozen=True)
class Extracted:
    """What a run of :func:`extract` did.

    Attributes
    ----------
    output : str
    n_items, n_shards : int
        All there are.
    n_computed : int
        Shards that this run computed; the others were there.
    n_errors : int
        Unreadable items among those that this run computed.
    left_out : tuple of LeftOut
        Files in a folder that are taken for no pictures, as of :func:`featx.load_image_folder`.
    """

    output: str
    n_items: int
    n_shards: int
    n_computed: int
    n_errors: int
    left_out: tuple[LeftOut, ...] = ()


def extract(
    extractor: PretrainedFeatureExtractor,
    items: Any,
    output: str | os.PathLike[str],
    *,
    client: Client | None = None,
    shard_size: int = 4096,
    storage_options: Mapping[str, Any] | None = None,
) -> Extracted:
    """Write the features of many files as Parquet, shard by shard.

    Each shard is computed as a whole and appears as a whole: whatever ends a run, the next one with the same
    arguments computes the missing shards alone, and the output is the same. An item that cannot be read has a row
    without features, and the column ``error`` says why.

    Parameters
    ----------
    extractor : PretrainedFeatureExtractor
        Its ``on_error`` and ``storage_options`` are not looked at; ``engine="auto"`` is decided once, by the number of
        items (on workers it is torch), and written down for later runs. A backbone by name travels to the workers as a
        few kilobytes, a module with its weights. ``cache`` is a store of each worker's own machine.
    items : str, path, or list, array, Series or one-column frame of them
        Files to read: paths, URLs (``s3://``, ``gs://``, ``https://``, ...), a pattern such as ``"photos/**/*.jpg"`` or
        ``"s3://bucket/*.jpg"``, or a folder of pictures. Workers read them, so all must see them under these names.
    output : str or path
        A folder, local or a URL, that this call owns: ``manifest.json`` and ``part-NUMBER-DIGEST.parquet`` with the
        columns ``path`` (absolute, or a URL), ``digest`` (of the file's bytes, hexadecimal), ``features`` (float32
        lists of one length) and ``error``. Rows are in the order of the items.
    client : distributed.Client or None, default=None
        Whose workers compute; None computes in this process.
    shard_size : int, default=4096
        Items in a shard: what is lost at most when a worker dies.
    storage_options : mapping or None, default=None
        Lets items and output be URLs, opened through fsspec with these options. Failed requests are repeated for up to
        a minute. What is broken is an error of its row; where a server did not answer at all, the run ends with an
        error, and the next one goes on.

    Returns
    -------
    Extracted

    Raises
    ------
    ValueError
        The output holds shards of another recipe or of other items, or an argument is wrong.
    ShardError
        Workers died or failed over a shard again and again. Nothing that was done is lost.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> from featx import PretrainedFeatureExtractor
    >>> from featx.distributed import extract
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for shade in range(5):
    ...         Image.new("RGB", (32, 32), (50 * shade, 0, 0)).save(Path(folder, f"{shade}.png"))
    ...     done = extract(PretrainedFeatureExtractor("featx_micro"), folder, Path(folder, "out"), shard_size=2)
    >>> done.n_items, done.n_shards, done.n_errors
    (5, 3, 0)
    """
    if not isinstance(shard_size, Integral) or shard_size < 1:
        raise ValueError(f"A number of items from 1 up is expected, got shard_size={shard_size!r}.")
    folder = Folder(_everywhere(os.fspath(output)), storage_options)
    listing = list_items(items, storage_options)
    paths = [*map(_everywhere, listing.pictures)]
    options = None if storage_options is None else dict(storage_options)
    worker = clone(extractor).set_params(on_error="nan", storage_options=options, verbose=0)
    shape = shape_of_images(worker, paths)
    manifest = _manifest(worker, paths, int(shard_size), shape, _engine(worker, folder, client))
    worker.set_params(engine=manifest.engine)
    shards = list(manifest.shards(paths))
    there = manifest.settle(folder, shards)
    missing = [shard for shard in shards if shard.name not in there]
    tasks = _Tasks(worker, paths, folder, manifest.recipe, shape)
    computing = tasks.here(missing) if client is None else tasks.on(client, missing)
    n_errors, seen = 0, Seen()
    with (
        tqdm(total=len(paths), unit="img", disable=not extractor.verbose) as bar,
        closing(computing),
    ):
        bar.update(len(paths) - sum(shard.stop - shard.start for shard in missing))
        for done in computing:
            n_errors += done.n_errors
            seen.add(done.seen)
            bar.update(done.n_items)
    seen.tell()
    names = set(filter(is_shard, folder.sizes()))
    check_no_others(names, shards, folder)
    if lost := {shard.name for shard in shards} - names:
        raise ShardError(f"All shards are expected in {folder.url!r}, and {min(lost)} is gone. Run it again.")
    return Extracted(folder.url, len(paths), len(shards), len(missing), n_errors, (*left_out_of([listing]),))


def _everywhere(path: str) -> str:
    """A path that means the same to processes that stand in other folders."""
    return path if is_url(path) else os.path.abspath(path)


def _manifest(
    extractor: PretrainedFeatureExtractor,
    paths: Sequence[str],
    shard_size: int,
    shape: Shape | None,
    engine: str,
) -> Manifest:
    if extractor.pooling == "map":
        raise ValueError('One row per image is expected, got pooling="map". Use any other pooling.')
    try:
        extraction = extractor._extraction(extractor._items([*paths[:1]], reset=False), shape)
        recipe = recipe_of(extraction)
    except NoKey as error:
        raise ValueError(f"Features that a later run can go on with are expected: {error}.") from error
    if engine == "auto":  # once for all shards, so that a later run computes the same to the last bit
        engine = extraction.engine_for(len(paths))
    return Manifest.of(recipe, extraction.recipe.plan.names().tolist(), shard_size, paths, engine)


def _engine(extractor: PretrainedFeatureExtractor, folder: Folder, client: Client | None) -> str:
    """The one that was named, or that the output was begun with; of workers, whose devices are not known, torch."""
    if extractor.engine != "auto":
        return str(extractor.engine)
    return engine_there(folder) or ("auto" if client is None else "torch")


def _check_workers(client: Client) -> None:
    """Raise where featx is missing or another on a worker, which would not even understand what it is asked."""
    found = client.run(version, "featx", on_error="return")
    for worker, there in found.items():
        if there != __version__:
            told = f"{type(there).__name__}: {there}" if isinstance(there, BaseException) else there
            raise ShardError(
                f"featx {__version__} is expected on every worker, got {told} on {worker}. Install it there."
            )


@contextmanager
def _connected(scheduler: str) -> Iterator[None]:
    """What is asked of a scheduler and its workers; here an OSError means that they do not answer."""
    try:
        yield
    except OSError as error:
        raise ShardError(
            f"A scheduler that answers is expected, and the one at {scheduler} is gone, or its workers are. Start them "
            "and run this again: only missing shards are computed."
        ) from error


def _fail(error: BaseException | None, shard: Shard) -> NoReturn:
    """Raise what a worker raised; in words that help where workers died."""
    from distributed import KilledWorker

    if isinstance(error, KilledWorker):
        raise ShardError(
            f"Workers that live are expected, and all that began {shard.name} were lost: killed, or out of memory. "
            "Lower shard_size or batch_size, or give workers more memory, and run this again: only missing shards are "
            "computed."
        ) from error
    raise error or ShardError(f"{shard.name} failed without a word.")


@dataclass(frozen=True)
class _Tasks:
    """What there is to do for shards."""

    extractor: PretrainedFeatureExtractor
    paths: Sequence[str]
    folder: Folder
    recipe: str
    shape: Shape | None

    def here(self, shards: Sequence[Shard]) -> Iterator[Done]:
        """Compute shards in this process."""
        for shard in shards:
            yield compute_shard(*self._of(shard))

    def on(self, client: Client, shards: Sequence[Shard]) -> Iterator[Done]:
        """Compute shards on a client's workers, and yield what became of them as they are done."""
        from distributed import as_completed

        _check_workers(client)
        address = client.scheduler_info()["address"]
        waiting, out, losses = deque(shards), dict[str, Shard](), 0
        ahead = as_completed(loop=client.loop, with_results=False, raise_errors=False)

        def hand_out() -> None:
            with _connected(address):
                while waiting and len(out) < _AHEAD * max(1, sum(client.ncores().values())):
                    future = client.submit(compute_shard, *self._of(waiting[0]), pure=False)
                    out[str(future.key)] = waiting.popleft()
                    ahead.add(future)

        try:
            hand_out()
            for future in ahead:
                shard = out.pop(str(future.key))
                if future.status == "error":
                    _fail(future.exception(), shard)
                if future.status == "finished":
                    losses = 0
                    with _connected(address):
                        done = future.result()
                    yield done
                else:  # the scheduler forgot it
                    losses += 1
                    waiting.appendleft(shard)
                if losses > _MOST_LOSSES:
                    raise ShardError(
                        f"A scheduler that keeps its work is expected, and it lost shard {shard.name} {losses} times. "
                        "Look at its log and run this again: only missing shards are computed."
                    )
                hand_out()
        finally:
            with suppress(OSError):
                client.cancel([*ahead.futures])

    def _of(self, shard: Shard) -> tuple[PretrainedFeatureExtractor, Sequence[str], str, Folder, str, Shape | None]:
        return self.extractor, self.paths[shard.start : shard.stop], shard.name, self.folder, self.recipe, self.shape
