"""Options that commands share, and what they make: a console, and settings for estimators."""

from __future__ import annotations

import csv
import functools
import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from featx.backbones.addresses import Address, split_address
from featx.cli.outcomes import Console
from featx.estimators.extractor import PretrainedFeatureExtractor
from featx.exceptions import StoreWarning
from featx.store import FeatureStore, passing_store, resolve_store, why_unusable

F = TypeVar("F", bound=Callable[..., Any])

#: Poolings of which one pass over the photos keeps all.
KEPT_POOLINGS = ("avg", "max", "gem")


def listed(values: Iterable[str]) -> str:
    """Values as `Listed` takes them."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(values)
    return line.getvalue()


class Listed(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4
    """Values with commas between them, as a list; those that hold commas are in double quotes, as in CSV files.

    Parameters
    ----------
    name : str
        For help.
    known : tuple of str, default=()
        The only values there are; empty for any.
    numbers : bool, default=True
        Whether whole numbers among any become int.
    """

    def __init__(self, name: str, known: tuple[str, ...] = (), *, numbers: bool = True) -> None:
        self.name, self.known, self.numbers = name, known, numbers and not known

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str | int]:
        """Split, and check."""
        if isinstance(value, list):
            return value
        (fields,) = csv.reader(io.StringIO(str(value), newline=""), skipinitialspace=True) if value else [[]]
        parts = [part.strip() for part in fields if part.strip()]
        for part in parts:
            if self.known and part not in self.known:
                self.fail(f"{part!r} is not one of {', '.join(self.known)}.", param, ctx)
        if not parts:
            self.fail("At least one value is expected.", param, ctx)
        return list(dict.fromkeys(map(_number_or_name, parts) if self.numbers else parts))


class Limits(click.ParamType):  # type: ignore[type-arg]
    """Two numbers with a comma between, the lower first; or the word "auto"."""

    name = "LOW,HIGH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read them."""
        if value == "auto" or isinstance(value, tuple):
            return value
        try:
            low, high = (float(part) for part in str(value).strip("()").split(","))
        except ValueError:
            low, high = 0.0, 0.0
        if not low < high < float("inf"):
            self.fail(f"Two numbers, the lower first, are expected, such as 0,4095; got {value!r}.", param, ctx)
        return low, high


def _number_or_name(part: str) -> str | int:
    return int(part) if part.removeprefix("-").isascii() and part.removeprefix("-").isdigit() else part


@dataclass(frozen=True)
class Machine:
    """How to go about it: nothing here changes a result, but for the last digits of features.

    Attributes
    ----------
    cache : bool
    device : str or None
    engine : str
    batch_size : int
    n_jobs : int or None
    """

    cache: bool
    device: str | None
    engine: str
    batch_size: int
    n_jobs: int | None

    def params(self, console: Console) -> dict[str, Any]:
        """For an estimator."""
        return {
            "cache": None if self.kept is None else True,
            "device": self.device,
            "engine": self.engine,
            "batch_size": self.batch_size,
            "n_jobs": self.n_jobs,
            "verbose": console.verbose,
        }

    @cached_property
    def kept(self) -> FeatureStore | None:
        """The user's feature store; None where it is not to be used or cannot be, which a warning tells once."""
        if not self.cache:
            return None
        store = resolve_store(True)
        assert store is not None
        if reason := why_unusable(store):
            warnings.warn(
                f"Features are not kept for later commands: {reason}. Set FEATX_CACHE to a folder on a local disk, or "
                "type --no-cache.",
                StoreWarning,
                stacklevel=2,
            )
            return None
        return store

    @contextmanager
    def store(self) -> Iterator[FeatureStore]:
        """The user's feature store, or one that lasts as long as the command: a photo passes a network once anyhow."""
        if self.kept is not None:
            yield self.kept
            return
        with passing_store() as store:
            yield store


@dataclass(frozen=True)
class Columns:
    """Where a table of photos says what.

    Attributes
    ----------
    image, label, groups : str or None
        Names of columns.
    root : str or None
        The folder that its paths are relative to; None for the table's own.
    """

    image: str | None = None
    label: str | None = None
    groups: str | None = None
    root: str | None = None

    def base(self, table: str) -> str:
        """The folder that a table's paths are relative to."""
        return os.path.dirname(table) if self.root is None else self.root

    def words(self) -> list[str]:
        """What to type for them."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return [word for name, value in given.items() if value is not None for word in (f"--{name}", value)]


@dataclass(frozen=True)
class Reading:
    """What decides the features: the network, and how photos are brought to it.

    Attributes
    ----------
    weights : str or None
    image_size : int or None
    precision, decode, fourth_band : str
    pixel_range : "auto" or (float, float)
    """

    weights: str | None
    image_size: int | None
    precision: str
    decode: str
    pixel_range: str | tuple[float, float] = "auto"
    fourth_band: str = "alpha"

    def params(self) -> dict[str, Any]:
        """For an estimator."""
        names = ("image_size", "precision", "decode", "pixel_range", "fourth_band")
        return {name: getattr(self, name) for name in names}

    def words(self) -> list[str]:
        """What to type for the same, without what is usual."""
        usual = Reading(None, None, "float32", "exact")
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        given = {name: value for name, value in options.items() if value != getattr(usual, name)}
        return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", _typed(value))]


def _typed(value: Any) -> str:
    return ",".join(repr(number).removesuffix(".0") for number in value) if isinstance(value, tuple) else str(value)


def extractor_for(
    backbone: str, reading: Reading, machine: Machine, console: Console, **params: Any
) -> PretrainedFeatureExtractor:
    """An extractor that gives rows of NaN for unreadable photos."""
    given = {"weights": weights_of(reading.weights), **reading.params(), **machine.params(console)}
    return PretrainedFeatureExtractor(backbone, on_error="nan", **(given | params))


def weights_of(spec: str | None) -> Address:
    """What ``--weights`` means: a file by its full path, so that a model finds it from anywhere, or a name, or none.

    ``FILE#KEY`` means a key of the file's content, unless there is a file of that whole name.
    """
    if spec is None:
        return "DEFAULT"
    if spec.lower() == "none":
        return None
    address = split_address(spec)
    if isinstance(address, tuple):
        return os.path.abspath(address[0]), address[1]
    return os.path.abspath(spec) if os.path.isfile(spec) else spec


def typed_weights(address: Address) -> str | None:
    """What to type for weights, where there are any."""
    return address if address is None or isinstance(address, str) else "#".join(address)


def one_or_list(values: Sequence[str | int]) -> Any:
    """Layers or poolings as estimators take them: a single one as it is."""
    return values[0] if len(values) == 1 else [*values]


def typed_poolings(pooling: str | Sequence[str]) -> str:
    """Poolings as they are typed."""
    return pooling if isinstance(pooling, str) else ",".join(pooling)


def refuse_given(names: Iterable[str], why: str) -> None:
    """Raise where the user has typed one of some options, which would have no effect.

    Raises
    ------
    UsageError
    """
    context = click.get_current_context()
    for option in context.command.params:
        typed = option.name is not None and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
        if option.name in names and typed:
            raise click.UsageError(f"{option.opts[0]} {why}.")


def example(*lines: str) -> str:
    """The end of a command's help."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


def _options(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


_traceback = click.option(
    "--traceback", is_flag=True, expose_value=False, help="Show where in the code an error comes from."
)
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, for scripts.")
_quiet = click.option(
    "--quiet",
    "-q",
    is_flag=True,
    help="No progress bars, notes and advice: results alone, and what was lost for them, such as unreadable photos.",
)
_strict = click.option(
    "--strict",
    is_flag=True,
    help="Stop with exit code 1 at the first photo that cannot be read, and where folders hold other files too (but "
    "hidden ones and those of the system).",
)
n_jobs_option = click.option("--n-jobs", type=int, help="Threads that decode photos.  [default: as many as torch uses]")
_machine = (
    click.option(
        "--cache/--no-cache",
        default=True,
        show_default=True,
        help="Keep features for later commands, in $FEATX_CACHE or the user's cache folder.",
    ),
    click.option("--device", metavar="NAME", help="cpu, cuda, mps, cuda:1, ...  [default: the best there is]"),
    click.option(
        "--engine",
        type=click.Choice(["auto", "torch", "onnx"]),
        default="auto",
        show_default=True,
        help="What computes the network on a CPU: torch, onnxruntime, or onnxruntime where that is faster.",
    ),
    click.option(
        "--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Photos computed together."
    ),
    n_jobs_option,
)
pixel_range_option = click.option(
    "--pixel-range",
    type=Limits(),
    default="auto",
    show_default=True,
    help="Values that are black and white in files of more than 8 bits, such as 0,4095 for a camera of 12 bits.",
)
fourth_band_option = click.option(
    "--fourth-band",
    type=click.Choice(["alpha", "ignore"]),
    default="alpha",
    show_default=True,
    help="Whether a fourth band beside three colours is transparency, or something else, to be left out.",
)
_photo_column = (
    click.option("--image", metavar="COLUMN", help="Of a table: the column with the photos' paths."),
    click.option(
        "--root",
        type=click.Path(exists=True, file_okay=False),
        help="Of a table: the folder that its paths are relative to.  [default: the table's own]",
    ),
)
_label_column = click.option("--label", metavar="COLUMN", help="Of a table: the column with what is to be learnt.")
_reading = (
    click.option(
        "--weights",
        metavar="NAME|FILE[#KEY]",
        help="Name of published weights, a file of tensors (#KEY: those under that key of a checkpoint), or none for a "
        "random network.  [default: the network's usual ones]",
    ),
    click.option(
        "--image-size",
        type=click.IntRange(1),
        help="Side in pixels that the network sees.  [default: as it was trained]",
    ),
    click.option(
        "--precision",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        default="float32",
        show_default=True,
        help="Of the network's arithmetic.",
    ),
    click.option(
        "--decode",
        type=click.Choice(["exact", "fast"]),
        default="exact",
        show_default=True,
        help="fast reads large JPEGs at a smaller scale.",
    ),
    pixel_range_option,
    fourth_band_option,
)

backbone_option = click.option(
    "--backbone",
    default="resnet18",
    show_default=True,
    metavar="NAME",
    help="A network of torchvision, timm/NAME, or featx_micro, which is small, comes with featx and suits small "
    "pictures only.",
)
pooling_option = click.option(
    "--pooling",
    type=Listed("POOLING", (*KEPT_POOLINGS, "cls", "flatten", "auto")),
    default="avg",
    show_default=True,
    callback=lambda _context, _option, value: one_or_list(value),
    help="How a layer's places become one row: avg, max, gem or cls, side by side with commas between; flatten; or "
    "auto, what the network is usually read with.",
)
classes_option = click.option(
    "--classes",
    type=Listed("NAMES", numbers=False),
    help="The class folders, with commas between, and names that hold commas in double quotes; another folder is an "
    "error. Needed where they are called like the splits of a data set (train, test, ...).  [default: every subfolder "
    "with photos]",
)
layers_option = click.option(
    "--layers",
    type=Listed("LAYERS"),
    default="penultimate",
    show_default=True,
    help="What to read: penultimate, stage numbers (-1 is the last), names, or all; several with commas between, side "
    "by side.",
)


def with_console(function: F, strict: Callable[[F], F] = _strict) -> F:
    """Pass ``console``, made of ``--json``, ``--quiet`` and ``--strict``, which may mean something of its own."""

    @functools.wraps(function)
    def command(*args: Any, console: Console, **given: Any) -> Any:
        try:
            return function(*args, console=console, **given)
        except Exception:
            console.list_broken()  # too many of them may be why
            raise

    return _options(strict, _json, _quiet, _traceback)(_gathering(Console, "console", command))  # type: ignore


def with_plain_console(function: F) -> F:
    """Pass ``console``, where no photos are read."""
    return _options(_json, _traceback)(_gathering(Console, "console", function))


def with_machine(function: F) -> F:
    """Pass ``machine``, made of the options that change no result."""
    return _options(*_machine)(_gathering(Machine, "machine", function))


def with_reading(function: F) -> F:
    """Pass ``reading``, made of the options that change the features."""
    return _options(*_reading)(_gathering(Reading, "reading", function))


def with_photo_column(function: F) -> F:
    """Pass ``columns``, made of the options that say where a table has its photos."""
    return _options(*_photo_column)(_gathering(Columns, "columns", function))


def with_label_columns(function: F, groups: Callable[[F], F] | None = None) -> F:
    """The same where photos have labels too, and ``groups`` perhaps."""
    image, root = _photo_column
    more = () if groups is None else (groups,)
    return _options(image, _label_column, root, *more)(_gathering(Columns, "columns", function))


def _gathering(kind: type, name: str, function: F) -> F:
    """The function, called with some of its options in one object."""
    names = {field.name for field in fields(kind)}

    @functools.wraps(function)
    def command(*args: Any, **given: Any) -> Any:
        mine = {option: given.pop(option) for option in names & given.keys()}
        return function(*args, **given, **{name: kind(**mine)})

    return command  # type: ignore[return-value]
