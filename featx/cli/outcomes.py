"""How a command ends: what it prints, in which form, and with which exit code."""

from __future__ import annotations

import ast
import json
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import click

from featx.exceptions import FeatxError, ImageError, NotFinite
from featx.images.walk import LeftOut, told
from featx.store import KEPT, resolve_store
from featx.system.shell import typed

_INTERRUPTED = 130
# Errors whose message says all; of others the kind helps too.
_PLAIN = (FeatxError, ValueError, OSError)
_PARAMETER = re.compile(
    r"\b(backbone|weights|layers|pooling|image_size|precision|decode|freeze|epochs|device|engine|batch_size|n_jobs|scoring|pixel_range"
    r"|fourth_band)=(?=\S)"
)
# A file and a key of its content, and a range of values, as the library writes them.
_FILE_AND_KEY = re.compile(r"\bweights=(\(('[^']*'|\"[^\"]*\"), ('[^']*'|\"[^\"]*\")\))")
_RANGE = re.compile(r"(?<=--pixel-range )\(([^\s,()]+), ([^\s,()]+)\)")


@dataclass(frozen=True)
class Broken:
    """A photo that cannot be read, of which the network makes no finite numbers, or of which no label is known.

    Attributes
    ----------
    path, reason : str
    was_read : bool
        Whether the photo is as good as any.
    is_unlabelled : bool
        Whether nobody says what is on it.
    """

    path: str
    reason: str
    was_read: bool = False
    is_unlabelled: bool = False

    @classmethod
    def unlabelled(cls, path: str, column: str) -> Broken:
        """A photo beside which a table has no label."""
        return cls(path, f"no label in the column {column!r}", was_read=True, is_unlabelled=True)


@dataclass
class Console:
    """Where a command writes: results to stdout, as words or as one JSON object; everything else to stderr.

    Attributes
    ----------
    quiet, as_json, strict : bool
        As the options of these names.
    broken : list of Broken
        The photos that could not be read so far.
    left_out : list of LeftOut
        The files in folders that are taken for none.
    n_lost_rows : int
        Rows of tables that name no photo.
    """

    quiet: bool = False
    as_json: bool = False
    strict: bool = False
    broken: list[Broken] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    n_lost_rows: int = 0
    _n_listed: int = 0

    @property
    def verbose(self) -> int:
        """What estimators take as ``verbose``: a progress bar where somebody is there to see it."""
        return int(not self.quiet and sys.stderr.isatty())

    def say(self, text: str) -> None:
        """Print a result, unless all results come as JSON."""
        if not self.as_json:
            click.echo(text)

    def advise(self, text: str) -> None:
        """Print beside the results what to type next."""
        if not self.quiet:
            self.say(text)

    def note(self, text: str) -> None:
        """Print to stderr what is good to know."""
        if not self.quiet:
            click.echo(text, err=True)

    def tell(self, text: str) -> None:
        """Print to stderr what has to be known."""
        click.echo(text, err=True)

    def leave_out(self, found: Iterable[Broken]) -> None:
        """Remember broken photos for the end; with ``--strict`` this is the end.

        Raises
        ------
        ClickException
        """
        for photo in found:
            if self.strict:
                what = "has" if photo.was_read else "cannot be read:"
                raise click.ClickException(_with_options(f"{shown(photo.path)} {what} {photo.reason}"))
            self.broken.append(photo)

    def tell_left_out(self, left_out: Sequence[LeftOut]) -> None:
        """Say in one line which files of folders are taken for no photos; with ``--strict`` some end the command.

        Raises
        ------
        ClickException
        """
        lost = [each for each in left_out if each.is_lost]
        if self.strict and lost:
            raise click.ClickException(
                f"Photos alone are expected with --strict, got {told(lost)}. Move these away, or install what reads "
                "them."
            )
        self.left_out += left_out
        if left_out:
            self.note(f"Left out: {told(left_out)}.")

    def lose_rows(self, n: int, what: str) -> None:
        """Say that rows of a table cannot be used; with ``--strict`` some end the command.

        Raises
        ------
        ClickException
        """
        if n and self.strict:
            raise click.ClickException(f"Rows with a photo alone are expected with --strict, got {what}.")
        if n:
            self.tell(f"Left out: {what}.")
        self.n_lost_rows += n

    def list_broken(self) -> None:
        """Print to stderr, each once, the photos that could not be read, and why others are not used."""
        broken, self._n_listed = self.broken[self._n_listed :], len(self.broken)
        unread = [photo for photo in broken if not photo.was_read]
        if unread:
            click.echo(f"{len(unread)} photo{'s' * (len(unread) > 1)} could not be read:", err=True)
        for photo in unread:
            click.echo(f"  {shown(photo.path)}: {_with_options(photo.reason)}", err=True)
        unused: dict[str, list[str]] = {}
        for photo in broken:
            if photo.was_read:
                unused.setdefault(photo.reason, []).append(shown(photo.path))
        for reason, paths in unused.items():
            others = f" and {len(paths) - 1} more are" if len(paths) > 1 else " is"
            click.echo(f"{paths[0]}{others} not used: {_with_options(reason)}", err=True)

    def finish(self, result: dict[str, Any], n_photos: int | None = None) -> None:
        """List the broken photos, and print the result as JSON where that is asked for."""
        self.list_broken()
        if self.as_json:
            broken = [{"path": shown(photo.path), "reason": photo.reason} for photo in self.broken]
            left_out = [each._asdict() for each in self.left_out]
            n_unlabelled = sum(photo.is_unlabelled for photo in self.broken)
            counts = {"n_photos": (n_photos or 0) + n_unlabelled, "n_lost_rows": self.n_lost_rows}
            photos = {} if n_photos is None else {**counts, "broken": broken, "left_out": left_out}
            click.echo(json.dumps(result | photos, allow_nan=False))

    def finish_with_photos(self, result: dict[str, Any], n_photos: int, n_read: int) -> None:
        """As `finish`; without one photo that could be read, this is no success.

        Raises
        ------
        ClickException
        """
        self.finish(result, n_photos)
        if n_photos and not n_read:
            raise self.none_left(n_photos)

    def none_left(self, n_photos: int) -> click.ClickException:
        """What to raise where not one photo can be used."""
        reasons = [photo.reason for photo in self.broken if photo.was_read and not photo.is_unlabelled]
        if not reasons:
            return click.ClickException(f"None of {n_photos} photos could be read.")
        return click.ClickException(_with_options(f"None of {n_photos} photos can be used: {reasons[0]}"))


def broken_of(errors: Iterable[ImageError], paths: Sequence[str]) -> list[Broken]:
    """The library's errors of unreadable images as broken photos."""
    return [
        Broken(paths[error.row], _reason(error), isinstance(error, NotFinite))
        for error in errors
        if error.row is not None
    ]


def _reason(error: ImageError) -> str:
    reason = error.reason or str(error)
    return reason if error.advice is None else f"{reason}. {_with_options(error.advice)}"


def shown(path: str) -> str:
    """A path as text that every file can hold: bytes of names that are no text become escapes."""
    return path.encode("utf-8", "backslashreplace").decode()


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows in columns, numbers to the right."""
    cells = [[" ".join(str(cell).splitlines()) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [all(_is_number(row[i]) for row in cells[1:]) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        padded = [cell.rjust(n) if r else cell.ljust(n) for cell, n, r in zip(row, widths, right, strict=True)]
        return "  ".join(padded).rstrip()

    return "\n".join(map(line, cells))


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] in "-.+"


class Program(click.Group):
    """The top of the command line: every end becomes an exit code and at most one line."""

    def main(  # type: ignore[override]  # whatever standalone_mode says, there is one way to end
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        """Run a command and leave the process."""
        given = list(sys.argv[1:] if args is None else args)
        run = super().main
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message=rf".* images (could not be read|have {NotFinite.PHRASE})"
            )  # listed at the end instead
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            code = _exit_code(
                lambda: run([*given], prog_name, **(extra | {"standalone_mode": False, "obj": given})),
                "--traceback" in given,
                next((self.commands[word] for word in given if word in self.commands), None),
            )
        sys.exit(code)


def _exit_code(run: Callable[[], Any], with_traceback: bool, command: click.Command | None) -> int:
    try:
        code = run()
    except click.ClickException as error:
        if with_traceback and error.__cause__ is not None:
            traceback.print_exception(error)
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        interrupted = isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt)
        click.echo(_interrupted() if interrupted else "Nothing was done.", err=True)
        return _INTERRUPTED if interrupted else 1
    except Exception as error:
        if with_traceback:
            traceback.print_exc()
        kind = "" if isinstance(error, _PLAIN) else f"{type(error).__name__}: "
        click.echo(f"Error: {kind}{_with_options(one_line(error), command)}", err=True)
        return 1
    return code if isinstance(code, int) else 0


def _interrupted() -> str:
    store = resolve_store(True)
    n = 0 if store is None else KEPT[store.path]
    return (
        f"Interrupted. {n} new rows of features are kept; the same command goes on from there." if n else "Interrupted."
    )


def _with_options(message: str, command: click.Command | None = None) -> str:
    """The library's words for parameters as a command's options and arguments, which can be typed."""
    message = _FILE_AND_KEY.sub(lambda found: f"--weights {typed(['#'.join(ast.literal_eval(found[1]))])}", message)
    message = _PARAMETER.sub(lambda found: f"{_place_of(found[1], command)} ", message)
    return _RANGE.sub(r"\1,\2", message)


def _place_of(name: str, command: click.Command | None) -> str:
    """Option or argument of a command that a parameter of the library comes from: --backbones, BACKBONE."""
    own = [each for each in (command.params if command else ()) if (each.name or "").startswith(name)]
    if not own:
        return f"--{name.replace('_', '-')}"
    nearest = min(own, key=lambda each: len(each.name or ""))
    return max(nearest.opts, key=len) if isinstance(nearest, click.Option) else nearest.human_readable_name


def one_line(error: BaseException) -> str:
    """An error's message, whatever it looks like."""
    return shown(" ".join(str(error).split())) or type(error).__name__


def _show_warning(message: Warning | str, *_: Any) -> None:
    click.echo(f"Warning: {_with_options(' '.join(str(message).split()))}", err=True)
