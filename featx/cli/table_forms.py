"""Forms of tables: CSV, TSV, JSON lines and Parquet."""

from __future__ import annotations

import codecs
import csv
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any, TextIO

import click

from featx.cli.options import Columns
from featx.cli.outcomes import one_line, shown

_TEXT, _LINES, _PARQUET = (".csv", ".tsv"), (".jsonl", ".ndjson"), (".parquet", ".pq")
_SEPARATORS = ",;\t|"
_MARKS = ((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_USUAL, _OTHERWISE = "utf-8-sig", "cp1252"


@dataclass(frozen=True)
class Form(ABC):
    """A table in some form.

    Attributes
    ----------
    path : str
    """

    path: str

    @abstractmethod
    def names(self) -> list[str]:
        """Of its columns."""

    @abstractmethod
    def rows(self, names: Sequence[str]) -> Iterator[list[Any]]:
        """Values of some columns: texts, or whatever the form can hold; None for nothing."""

    @abstractmethod
    def code(self) -> str:
        """Python that reads it with pandas."""

    @property
    def remark(self) -> str:
        """What is good to know of how it is read; empty for nothing."""
        return ""

    def check(self, columns: Columns, needed: Iterable[str]) -> None:
        """Raise where columns that are needed are not named, or those named are not there.

        Raises
        ------
        UsageError
        """
        there = self.names()
        told = ", ".join(map(repr, there[:20])) + (", ..." if len(there) > 20 else "")
        for option in needed:
            if getattr(columns, option) is None:
                raise click.UsageError(
                    f"--{option} COLUMN is expected with a table. {shown(self.path)} has the columns {told}."
                )
        for option in ("image", "label", "groups"):
            name = getattr(columns, option)
            if name is not None and name not in there:
                near = get_close_matches(name, there, n=1)
                meant = f" Did you mean {near[0]!r}?" if near else ""
                raise click.UsageError(
                    f"--{option} with a column of {shown(self.path)} is expected, got {name!r}. It has the columns "
                    f"{told}.{meant}"
                )
            if name is not None and there.count(name) > 1:
                raise click.UsageError(
                    f"One column {name!r} is expected in {shown(self.path)}, got {there.count(name)}."
                )


@dataclass(frozen=True)
class _Text(Form):
    """Lines of cells, whatever separates them; the first line has the names."""

    def names(self) -> list[str]:
        """Of the first line, without spaces around them."""
        return self._head[1]

    def rows(self, names: Sequence[str]) -> Iterator[list[str | None]]:
        """Cells as they stand there; one that is not there is nothing.

        Raises
        ------
        ClickException
            A line has more cells than there are columns.
        """
        separator, head = self._head
        places = [head.index(name) for name in names]
        with self._open() as file:
            reader = csv.reader(file, delimiter=separator, strict=True)
            _first(reader)
            line = reader.line_num
            try:
                for cells in reader:
                    if len(cells) > len(head) and any(cell.strip() for cell in cells[len(head) :]):
                        raise click.ClickException(
                            f"{len(head)} cells are expected in each line of {shown(self.path)}, got {len(cells)} in "
                            f"line {reader.line_num}. Put cells that hold {separator!r} into double quotes."
                        )
                    line = reader.line_num
                    if any(cell.strip() for cell in cells):
                        yield [cells[place] if place < len(cells) else None for place in places]
            except csv.Error as error:
                raise click.ClickException(
                    f"Cells with both quotes, or with none, are expected in {shown(self.path)}, got something else "
                    f"from line {line + 1} on: {error}. Write a quote inside of quotes twice."
                ) from error

    def code(self) -> str:
        """With what pandas would not guess."""
        separator, encoding = self._head[0], self._encoding
        given = {"dtype": "str", "keep_default_na": "False", "na_values": "['']"}
        if separator != ",":
            given["sep"] = repr(separator)
        if encoding != _USUAL:
            given["encoding"] = repr(encoding)
        return f"pd.read_csv({self.path!r}, {', '.join(f'{name}={value}' for name, value in given.items())})"

    @property
    def remark(self) -> str:
        """Where its letters are a guess."""
        unknown = self._encoding == _OTHERWISE
        return f"{shown(self.path)} is not UTF-8 and is read as Windows-1252." if unknown else ""

    @cached_property
    def _head(self) -> tuple[str, list[str]]:
        """What separates cells, and the names."""
        usual = "\t" if self.path.lower().endswith(".tsv") else ","
        heads = []
        with self._open() as file:
            for separator in (usual, *_SEPARATORS.replace(usual, "")):  # of equally good ones the first
                file.seek(0)
                if cells := _first(csv.reader(file, delimiter=separator)):
                    heads.append((separator, [name.strip() for name in cells]))
        if not heads:
            raise click.ClickException(
                f"A table with the names of its columns in the first line is expected, got {shown(self.path)}, which "
                "is empty."
            )
        return max(heads, key=lambda found: len(found[1]))

    @contextmanager
    def _open(self) -> Iterator[TextIO]:
        try:
            with open(self.path, encoding=self._encoding, newline="") as file:
                yield file
        except (csv.Error, UnicodeError) as error:
            raise click.ClickException(
                f"A table of text is expected, got {shown(self.path)}, which cannot be read as one: {one_line(error)}"
            ) from error

    @cached_property
    def _encoding(self) -> str:
        """UTF-8, or what files of spreadsheets have instead."""
        with open(self.path, "rb") as file:
            start = file.read(2)
            if marked := next((name for mark, name in _MARKS if start == mark), None):
                return marked
            file.seek(0)
            decoder = codecs.getincrementaldecoder("utf-8")()
            try:
                while block := file.read(1 << 20):
                    decoder.decode(block)
                decoder.decode(b"", final=True)
            except UnicodeDecodeError:
                return _OTHERWISE
        return _USUAL


def _first(reader: Iterator[list[str]]) -> list[str] | None:
    """The first line that has something in it."""
    return next((cells for cells in reader if any(cell.strip() for cell in cells)), None)


@dataclass(frozen=True)
class _Lines(Form):
    """A JSON object in each line."""

    def names(self) -> list[str]:
        """Of all objects, in the order in which they come."""
        names = dict[str, None]()
        for found in self._objects():
            names.update(dict.fromkeys(found))
        if not names:
            raise click.ClickException(
                f"A JSON object in each line is expected, got {shown(self.path)}, which holds none."
            )
        return [*names]

    def rows(self, names: Sequence[str]) -> Iterator[list[Any]]:
        """Values; null, and what is not there, is nothing."""
        return ([found.get(name) for name in names] for found in self._objects())

    def code(self) -> str:
        """By pandas."""
        return f"pd.read_json({self.path!r}, lines=True, dtype=False, convert_dates=False)"

    def _objects(self) -> Iterator[dict[str, Any]]:
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    found = json.loads(line.decode(_USUAL))
                except ValueError as error:  # of letters or of JSON
                    raise self._wrong(number, one_line(error)) from error
                if not isinstance(found, dict):
                    raise self._wrong(number, f"{line.strip().decode()[:40]!r}")
                yield found

    def _wrong(self, number: int, what: str) -> click.ClickException:
        return click.ClickException(
            f"A JSON object in each line is expected, got {shown(self.path)} with line {number}: {what}"
        )


@dataclass(frozen=True)
class _Parquet(Form):
    """A Parquet file."""

    def names(self) -> list[str]:
        """Of its schema."""
        return [*self._file().schema_arrow.names]

    def rows(self, names: Sequence[str]) -> Iterator[list[Any]]:
        """Values, batch by batch."""
        for batch in self._file().iter_batches(columns=[*dict.fromkeys(names)]):
            columns = [batch.column(name).to_pylist() for name in names]
            yield from map(list, zip(*columns, strict=True))

    def code(self) -> str:
        """By pandas."""
        return f"pd.read_parquet({self.path!r})"

    def _file(self) -> Any:
        try:
            import pyarrow
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise click.ClickException(
                f'{shown(self.path)} needs pyarrow. Run pip install "featx[cli]", or write a CSV file.'
            ) from error
        try:
            return ParquetFile(self.path)
        except (pyarrow.ArrowException, OSError) as error:
            raise click.ClickException(
                f"A Parquet file is expected, got {shown(self.path)}, which cannot be read as one: {one_line(error)}"
            ) from error


#: Endings of tables, in any case.
FORMS: dict[str, type[Form]] = {
    **dict.fromkeys(_TEXT, _Text),
    **dict.fromkeys(_LINES, _Lines),
    **dict.fromkeys(_PARQUET, _Parquet),
}


def is_table(path: str) -> bool:
    """Whether a path is named like a table; folders may be called anything."""
    return os.path.splitext(path)[1].lower() in FORMS and not os.path.isdir(path)


def opened(path: str) -> Form:
    """A table in the form that its name says."""
    return FORMS[os.path.splitext(path)[1].lower()](path)
