"""``featx extract``: features of photos in a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

import click
import numpy as np

from featx.cli.files import OutputFile, replacing
from featx.cli.options import (
    Machine,
    Reading,
    backbone_option,
    example,
    extractor_for,
    layers_option,
    one_or_list,
    pooling_option,
    with_console,
    with_machine,
    with_reading,
)
from featx.cli.outcomes import Console, broken_of, shown
from featx.cli.photos import list_photos

# Rows written together, so that a file does not depend on the sizes of the blocks that come.
_ROW_GROUP = 1024


@click.command(epilog=example("featx extract photos/ -o features.parquet --layers -1 --pooling gem"))
@click.argument("photos", nargs=-1, required=True, type=click.Path(exists=True, readable=False))
@click.option(
    "-o",
    "--output",
    type=OutputFile(".parquet", ".npy"),
    required=True,
    help="File to write: .parquet with the columns path, one per feature, and error; or .npy, with paths, column names "
    "and errors in a .npy.json beside it.",
)
@backbone_option
@layers_option
@pooling_option
@with_reading
@with_machine
@with_console
def extract(
    photos: tuple[str, ...],
    output: Path,
    backbone: str,
    layers: list[str | int],
    pooling: str,
    reading: Reading,
    machine: Machine,
    console: Console,
) -> None:
    """Write the features of PHOTOS, which are files and folders (at any depth), to a file.

    Whatever ends a run, the next one computes what is missing alone, unless --no-cache says to keep nothing. The file
    appears when it is complete. A photo that cannot be read has a row without numbers.
    """
    paths = list_photos(photos, console)
    extractor = extractor_for(backbone, reading, machine, console, layers=one_or_list(layers), pooling=pooling)
    names = extractor.get_feature_names_out().tolist()
    kind = _Parquet if output.suffix.lower() == ".parquet" else _Npy
    with (
        replacing(output) as part,
        kind.writing(part, output, [*map(shown, paths)], names) as file,
        closing(extractor._extraction_of_images(paths).iter_blocks()) as blocks,
    ):
        for block in blocks:
            broken = broken_of(block.errors, paths)
            console.leave_out(broken)
            reasons = {error.row: photo.reason for error, photo in zip(block.errors, broken, strict=True)}
            file.add(block.rows, [reasons.get(row) for row in range(block.start, block.stop)])
    console.say(f"{len(paths)} photos, {len(names)} features each: {output}")
    console.finish({"output": str(output), "n_features": len(names)}, len(paths))


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

    def __init__(self, array: np.memmap) -> None:
        self._array, self._start = array, 0
        self._reasons: list[str | None] = []

    @classmethod
    @contextmanager
    def writing(cls, part: Path, output: Path, paths: list[str], names: list[str]) -> Iterator[_File]:
        """Open the file; complete when the context is left without an error."""
        shape = len(paths), len(names)
        array = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=shape)
        file = cls(array)
        yield file
        array.flush()
        about = {"paths": paths, "columns": names, "errors": file._reasons}
        output.unlink(missing_ok=True)  # an earlier array must never stand beside this one's paths
        with replacing(output.with_name(f"{output.name}.json")) as beside:
            beside.write_text(json.dumps(about), encoding="utf-8")

    def add(self, rows: np.ndarray, reasons: list[str | None]) -> None:
        self._array[self._start : self._start + len(rows)] = rows
        self._start += len(rows)
        self._reasons += reasons
