"""``featx extract``: features of photos in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import click
import numpy as np

from featx.cli.files import OutputFile
from featx.cli.options import (
    Columns,
    Machine,
    Reading,
    backbone_option,
    example,
    extractor_for,
    layers_option,
    one_or_list,
    pooling_option,
    refuse_given,
    with_console,
    with_machine,
    with_photo_column,
    with_reading,
)
from featx.cli.outcomes import Broken, Console, broken_of, shown
from featx.cli.photos import list_photos
from featx.estimators.extractor import PretrainedFeatureExtractor
from featx.exceptions import NotFinite
from featx.system.paths import nearby
from featx.system.writing import replacing

_FILES = (".parquet", ".npy")
# Rows written together, so that a file does not depend on the sizes of the blocks that come.
_ROW_GROUP = 1024


@click.command(
    short_help="Write features of photos to a file, or in shards to a folder.",
    epilog=example("featx extract photos/ -o features.parquet --layers -1 --pooling gem"),
)
@click.argument("photos", nargs=-1, required=True, type=click.Path(exists=True, readable=False))
@click.option(
    "-o",
    "--output",
    type=OutputFile(*_FILES, ""),
    required=True,
    help="File to write: .parquet with the columns path, one per feature, and error; or .npy, with paths, column names "
    "and errors in a .npy.json beside it. A name without an ending is a folder for shards, for very many photos.",
)
@click.option("--scheduler", metavar="ADDRESS", help="With a folder: compute on the workers of a Dask scheduler.")
@click.option("--local-workers", type=click.IntRange(1), help="With a folder: compute in so many processes.")
@click.option(
    "--shard-size", type=click.IntRange(1), default=4096, show_default=True, help="With a folder: photos in a file."
)
@backbone_option
@layers_option
@pooling_option
@with_reading
@with_photo_column
@with_machine
@with_console
def extract(
    photos: tuple[str, ...],
    output: Path,
    scheduler: str | None,
    local_workers: int | None,
    shard_size: int,
    backbone: str,
    layers: list[str | int],
    pooling: str | list[str],
    reading: Reading,
    columns: Columns,
    machine: Machine,
    console: Console,
) -> None:
    """Write the features of PHOTOS to a file or, in shards, to a folder.

    PHOTOS are files, folders (at any depth), and tables (CSV, TSV, JSON lines, Parquet) with --image.

    Whatever ends a run, the next one computes what is missing alone, unless --no-cache says to keep nothing. The file
    appears when it is complete. A photo that cannot be read has a row without numbers.
    """
    if output.suffix:
        refuse_given(["shard_size"], "goes with a folder for shards only")
    if output.suffix and (scheduler or local_workers):
        raise click.UsageError(f"A folder for shards is expected with workers, got {str(output)!r}.")
    paths = list_photos(photos, console, columns)
    extractor = extractor_for(backbone, reading, machine, console, layers=one_or_list(layers), pooling=pooling)
    names = extractor.get_feature_names_out().tolist()
    if not output.suffix:
        n_broken = _extract_shards(extractor, paths, output, shard_size, _client(scheduler, local_workers), console)
    else:
        n_broken = _extract_file(extractor, paths, output, names, console)
    console.say(f"{len(paths)} photos, {len(names)} features each: {output}")
    result = {"output": str(output), "n_features": len(names)}
    console.finish_with_photos(result, len(paths), len(paths) - n_broken)


def _extract_file(
    extractor: PretrainedFeatureExtractor, paths: list[str], output: Path, names: list[str], console: Console
) -> int:
    """Write one file; the number of photos that cannot be read."""
    n_broken = 0
    extraction = extractor._extraction_of_images(paths)
    extraction = extraction.with_engine(extraction.engine_of_all_runs())
    kind = _Parquet if output.suffix.lower() == ".parquet" else _Npy
    with (
        replacing(output) as part,
        kind.writing(part, output, [*map(shown, paths)], names) as file,
        closing(extraction.iter_blocks()) as blocks,
    ):
        for block in blocks:
            broken = broken_of(block.errors, paths)
            console.leave_out(broken)
            n_broken += len(broken)
            reasons = {error.row: photo.reason for error, photo in zip(block.errors, broken, strict=True)}
            file.add(block.rows, [reasons.get(row) for row in range(block.start, block.stop)])
    return n_broken


def _extract_shards(
    extractor: PretrainedFeatureExtractor,
    paths: list[str],
    output: Path,
    shard_size: int,
    connecting: AbstractContextManager[Any],
    console: Console,
) -> int:
    """Write the shards that are missing; the number of photos in all of them that cannot be read."""
    try:
        import pyarrow.dataset
    except ImportError as error:
        raise click.ClickException('Shards need pyarrow. Run pip install "featx[cli]".') from error
    from featx.distributed import extract as extract_shards

    with connecting as client:
        extract_shards(extractor, paths, output, client=client, shard_size=shard_size)
    there = pyarrow.dataset.dataset(sorted(output.glob("part-*.parquet")), format="parquet")
    broken = there.to_table(columns=["path", "error"], filter=pyarrow.dataset.field("error").is_valid())
    console.leave_out(
        Broken(nearby(row["path"]), row["error"], row["error"].startswith(NotFinite.PHRASE))
        for row in broken.to_pylist()
    )
    return len(broken)


def _client(scheduler: str | None, local_workers: int | None) -> AbstractContextManager[Any]:
    """A Dask client that is closed in the end; None where this process computes."""
    if scheduler is None and local_workers is None:
        return nullcontext()
    if scheduler is not None and local_workers is not None:
        raise click.UsageError("Either --scheduler or --local-workers is expected, got both.")
    try:
        import dask
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise click.ClickException('Workers need Dask. Run pip install "featx[dask]".') from error
    if scheduler is not None:
        return Client(scheduler)
    threads = max(1, (os.cpu_count() or 1) // (local_workers or 1))
    environment = {"distributed.nanny.pre-spawn-environ.OMP_NUM_THREADS": threads}
    return _local(dask, Client, LocalCluster, environment, local_workers)


@contextmanager
def _local(dask: Any, client: Any, cluster: Any, environment: dict[str, Any], n_workers: int | None) -> Iterator[Any]:
    with (
        dask.config.set(environment),
        cluster(n_workers=n_workers, threads_per_worker=1, dashboard_address=":0") as started,
        client(started) as connected,
    ):
        yield connected


class _File(Protocol):
    """A table that grows by rows."""

    def add(self, rows: np.ndarray, reasons: list[str | None]) -> None:
        """Features of the next photos, of shape (n, n_features), and why some have none."""


class _Parquet:
    """A Parquet file that is written group by group."""

    def __init__(self, writer: Any, schema: Any, paths: list[str]) -> None:
        self._writer, self._schema, self._paths = writer, schema, paths
        self._rows: list[np.ndarray] = []
        self._reasons: list[str | None] = []
        self._start = 0

    @classmethod
    @contextmanager
    def writing(cls, part: Path, output: Path, paths: list[str], names: list[str]) -> Iterator[_File]:
        """Open the file; complete when the context is left without an error."""
        try:
            import pyarrow
            from pyarrow.parquet import ParquetWriter
        except ImportError as error:
            raise click.ClickException(
                f'{output} needs pyarrow. Run pip install "featx[cli]", or write a .npy file.'
            ) from error
        columns = [("path", pyarrow.string()), *((name, pyarrow.float32()) for name in names)]
        schema = pyarrow.schema([*columns, ("error", pyarrow.string())])
        with ParquetWriter(part, schema) as writer:
            file = cls(writer, schema, paths)
            yield file
            file._write(everything=True)

    def add(self, rows: np.ndarray, reasons: list[str | None]) -> None:
        self._rows.append(rows)
        self._reasons += reasons
        self._write(everything=False)

    def _write(self, *, everything: bool) -> None:
        import pyarrow

        while len(self._reasons) >= _ROW_GROUP or (everything and self._reasons):
            rows, reasons = np.concatenate(self._rows), self._reasons
            now, self._rows, self._reasons = rows[:_ROW_GROUP], [rows[_ROW_GROUP:]], reasons[_ROW_GROUP:]
            paths = self._paths[self._start : self._start + len(now)]
            self._start += len(now)
            missing = np.array([reason is not None for reason in reasons[:_ROW_GROUP]])
            columns = [pyarrow.array(np.ascontiguousarray(column), mask=missing) for column in now.T]
            arrays = [pyarrow.array(paths), *columns, pyarrow.array(reasons[:_ROW_GROUP], pyarrow.string())]
            self._writer.write_table(pyarrow.Table.from_arrays(arrays, schema=self._schema))


class _Npy:
    """An array of shape (n_photos, n_features), float32, with what it means in a JSON file beside it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._reasons: list[str | None] = []

    @classmethod
    @contextmanager
    def writing(cls, part: Path, output: Path, paths: list[str], names: list[str]) -> Iterator[_File]:
        """Open the file; complete when the context is left without an error."""
        head = {"descr": "<f4", "fortran_order": False, "shape": (len(paths), len(names))}
        # Not mapped: some systems rename no file of which a process still has a map.
        with open(part, "wb") as stream:
            np.lib.format.write_array_header_1_0(stream, head)
            file = cls(stream)
            yield file
        about = {"paths": paths, "columns": names, "errors": file._reasons}
        output.unlink(missing_ok=True)  # an earlier array must never stand beside this one's paths
        with replacing(output.with_name(f"{output.name}.json")) as beside:
            beside.write_text(json.dumps(about), encoding="utf-8")

    def add(self, rows: np.ndarray, reasons: list[str | None]) -> None:
        self._stream.write(np.ascontiguousarray(rows, "<f4").tobytes())
        self._reasons += reasons
