"""Tables of photos and what is known of them: CSV, TSV, JSON lines and Parquet."""

from __future__ import annotations

import codecs
import csv
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from math import isfinite
from typing import Any, Protocol, TextIO

import click

from featx.cli.options import Columns
from featx.cli.outcomes import Broken, Console, one_line, shown
from featx.images.remote import is_url

_TEXT, _LINES, _PARQUET = (".csv", ".tsv"), (".jsonl", ".ndjson"), (".parquet", ".pq")
_SEPARATORS = ",;\t|"  # of equally good ones the first
_MARKS = ((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_USUAL, _OTHERWISE = "utf-8-sig", "cp1252"
_MOST = 5  # rows or files that a message shows


class File(Protocol):
    """A table in some form."""

    @property
    def path(self) -> str:
        """As it was typed."""

    def names(self) -> list[str]:
        """Of its columns."""

    def rows(self, names: Sequence[str]) -> Iterator[list[Any]]:
        """Values of some columns: texts, or whatever the form can hold; None for nothing."""

    def code(self) -> str:
        """Python that reads it with pandas."""

    @property
    def remark(self) -> str:
        """What is good to know of how it is read; empty for nothing."""

    def check(self, columns: Columns, needed: Iterable[str]) -> None:
        """Raise where columns that are needed are not named, or those named are not there."""


class _Columns:
    """What all forms share: the check of names."""

    path: str

    @property
    def remark(self) -> str:
        """Nothing."""
        return ""

    def names(self) -> list[str]:
        """Of the columns."""
        raise NotImplementedError

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


@dataclass(frozen=True)
class _Text(_Columns):
    """Lines of cells, whatever separates them; the first line has the names."""

    path: str

    def names(self) -> list[str]:
        """Of the first line, without spaces around them."""
        return self._head[1]

    def rows(self, names: Sequence[str]) -> Iterator[list[str | None]]:
        """Cells; one that is empty, or is not there, is nothing.

        Raises
        ------
        ClickException
            A line has more cells than there are columns.
        """
        separator, head = self._head
        places = [head.index(name) for name in names]
        with self._open() as file:
            reader = csv.reader(file, delimiter=separator)
            next(reader)
            for cells in reader:
                if len(cells) > len(head) and any(cell.strip() for cell in cells[len(head) :]):
                    raise click.ClickException(
                        f"{len(head)} cells are expected in each line of {shown(self.path)}, got {len(cells)} in line "
                        f"{reader.line_num}. Put cells that hold {separator!r} into double quotes."
                    )
                if any(cell.strip() for cell in cells):
                    yield [cells[place].strip() or None if place < len(cells) else None for place in places]

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
        with self._open() as file:
            try:
                heads = []
                for separator in _SEPARATORS:
                    file.seek(0)
                    heads.append((separator, [name.strip() for name in next(csv.reader(file, delimiter=separator))]))
            except StopIteration:
                raise click.ClickException(
                    f"A table with the names of its columns in the first line is expected, got {shown(self.path)}, "
                    "which is empty."
                ) from None
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


@dataclass(frozen=True)
class _Lines(_Columns):
    """A JSON object in each line."""

    path: str

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
        with open(self.path, encoding=_USUAL) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    found = json.loads(line)
                except ValueError as error:
                    raise self._wrong(number, one_line(error)) from error
                if not isinstance(found, dict):
                    raise self._wrong(number, f"{line.strip()[:40]!r}")
                yield found

    def _wrong(self, number: int, what: str) -> click.ClickException:
        return click.ClickException(
            f"A JSON object in each line is expected, got {shown(self.path)} with line {number}: {what}"
        )


@dataclass(frozen=True)
class _Parquet(_Columns):
    """A Parquet file."""

    path: str

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


_FORMS: dict[str, type[_Text | _Lines | _Parquet]] = {
    **dict.fromkeys(_TEXT, _Text),
    **dict.fromkeys(_LINES, _Lines),
    **dict.fromkeys(_PARQUET, _Parquet),
}


def is_table(path: str) -> bool:
    """Whether a path is named like a table; folders may be called anything."""
    return os.path.splitext(path)[1].lower() in _FORMS and not os.path.isdir(path)


def opened(path: str) -> File:
    """A table in the form that its name says."""
    return _FORMS[os.path.splitext(path)[1].lower()](path)


@dataclass(frozen=True)
class Row:
    """A photo and what stands beside it.

    Attributes
    ----------
    path : str
    label : str or float
    group : str or None
    """

    path: str
    label: str | float
    group: str | None


def listed_photos(path: str, columns: Columns, console: Console) -> list[str]:
    """The photos of a table, each once.

    Raises
    ------
    UsageError, ClickException
    """
    file = opened(path)
    file.check(columns, ["image"])
    found = [row[0] for row in _rows(file, columns, ("image",), console)]
    _check_any_there(found, path, columns)
    return found


def joined(path: str, columns: Columns, numbers: bool, console: Console) -> list[Row]:
    """Photos with their labels, each once.

    Parameters
    ----------
    path : str
    columns : Columns
        Are there.
    numbers : bool
        Whether labels are numbers.
    console : Console
        Is told of what is left out: rows without a photo or a label, and those that say once more what another does.

    Raises
    ------
    ClickException
        No photo is there, one has two labels, or a number is none.
    """
    options = ("image", "label", *(["groups"] * (columns.groups is not None)))
    file = opened(path)
    known = dict[str, list[Any]]()
    unlabelled, repeated = list[str](), 0
    several = dict[str, tuple[str, list[Any]]]()
    for photo, *values in _rows(file, columns, options, console):
        if values[0] is None:
            unlabelled.append(photo)
            continue
        first = known.setdefault(os.path.abspath(photo), [photo, *values])
        if first[0] is photo:
            continue
        repeated += 1
        for what, one, other in zip(options[1:], first[1:], values, strict=True):
            if one != other:
                several.setdefault(what, (photo, [one, other]))
    unlabelled = [photo for photo in dict.fromkeys(unlabelled) if os.path.abspath(photo) not in known]
    _check_any_there([*(row[0] for row in known.values()), *unlabelled], path, columns)
    if without := [row[0] for row in known.values() if columns.groups is not None and row[2] is None]:
        raise click.ClickException(
            f"A group for each photo is expected in the column {columns.groups!r} of {shown(path)}, got none for "
            f"{', '.join(map(shown, without[:_MOST]))}{_more(without)}. Write the photo's own name where it is alone."
        )
    for what, (photo, two) in several.items():
        raise click.ClickException(
            f"One {'label' if what == 'label' else 'group'} for each photo is expected, got {shown(photo)} with "
            f"{' and '.join(map(repr, two))} in {shown(path)}. Leave one of its rows."
        )
    if not known:
        raise click.ClickException(f"Photos with labels are expected, got {shown(path)} without any.")
    console.leave_out(Broken(photo, f"no label in the column {columns.label!r}", was_read=True) for photo in unlabelled)
    if repeated:
        console.note(f"{_counted(repeated)} of {shown(path)} say once more what others do.")
    rows = [Row(photo, label, *(rest or [None])) for photo, label, *rest in known.values()]
    return _with_numbers(rows, path, columns) if numbers else rows


def _rows(file: File, columns: Columns, options: Sequence[str], console: Console) -> list[list[Any]]:
    """Path and other values of all rows that name a photo; with the path alone each photo once."""
    found, empty, n_rows = list[list[Any]](), 0, 0
    base = columns.base(file.path)
    for cells in file.rows([getattr(columns, option) for option in options]):
        n_rows += 1
        name, *values = map(_text, cells)
        if name is None:
            empty += 1
        else:
            found.append([_path(name, base), *values])
    if not n_rows:
        raise click.ClickException(f"Rows of photos are expected, got {shown(file.path)} without any.")
    if not found:
        raise click.ClickException(
            f"Photos are expected in the column {columns.image!r} of {shown(file.path)}, which is empty in all rows."
        )
    if file.remark:
        console.note(file.remark)
    if empty:
        console.note(f"{_counted(empty)} of {shown(file.path)} name no photo in {columns.image!r} and are left out.")
    return found


def _text(value: Any) -> str | None:
    """A cell as text; None for nothing, which floats write as NaN."""
    return None if value is None or value != value or value == "" else str(value)


def _path(name: str, base: str) -> str:
    """Of a photo that a table names; those that Windows wrote have other separators."""
    if is_url(name) or os.path.isabs(name):
        return name
    path = os.path.join(base, name)
    if "\\" in name and os.sep == "/" and not os.path.exists(path):
        return os.path.join(base, name.replace("\\", "/"))
    return path


def _check_any_there(paths: Sequence[str], table: str, columns: Columns) -> None:
    """Raise where not one photo is there; single ones are told with those that cannot be read."""
    if any(is_url(path) or os.path.exists(path) for path in paths):
        return
    raise click.ClickException(
        f"Photos are expected at the paths in the column {columns.image!r} of {shown(table)}, got none of "
        f"{len(paths)}, such as {shown(os.path.abspath(paths[0]))}. Paths are relative to the table's folder, or to "
        "the one that --root says."
    )


def _with_numbers(rows: Sequence[Row], table: str, columns: Columns) -> list[Row]:
    found, wrong = list[Row](), list[str]()
    for row in rows:
        number = _number(row.label)
        if number is None:
            wrong.append(f"{row.label!r} of {shown(row.path)}")
        else:
            found.append(Row(row.path, number, row.group))
    if wrong:
        raise click.ClickException(
            f"Numbers are expected in the column {columns.label!r} of {shown(table)}, got "
            f"{', '.join(wrong[:_MOST])}{_more(wrong)}. Write decimals with a point; names are learnt as classes."
        )
    return found


def _number(label: str | float) -> float | None:
    try:
        number = float(label)
    except ValueError:
        return None
    return number if isfinite(number) else None


def _counted(n: int) -> str:
    return f"{n} row{'s' * (n != 1)}"


def _more(found: Sequence[str]) -> str:
    """What follows the first of them in a message."""
    return f" and {len(found) - _MOST} more" if len(found) > _MOST else ""
