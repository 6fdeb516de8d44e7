"""``featx cache``: the user's feature store."""

from __future__ import annotations

import click

from featx.cli.options import example, with_plain_console
from featx.cli.outcomes import Console, table
from featx.store import FeatureStore, resolve_store
from featx.store.places import parse_size

_folder = click.option(
    "--folder",
    type=click.Path(file_okay=False),
    help="Of the store.  [default: $FEATX_CACHE, or featx in the user's cache folder]",
)
_UNITS = ("B", "kB", "MB", "GB", "TB")


@click.group(short_help="See and tidy what earlier commands kept.", epilog=example("featx cache info"))
def cache() -> None:
    """See and tidy what earlier commands kept, so that a photo passes through a network once."""


@cache.command(epilog=example("featx cache info"))
@_folder
@with_plain_console
def info(folder: str | None, console: Console) -> None:
    """Show what is kept, and for which networks."""
    store = _store(folder)
    found = store.info()
    console.say(f"Feature store at {store.path}: {_told(found['file_bytes'])} on disk of at most {store.max_size}")
    console.say(f"{found['images']} images with features, {found['computed']} passes through a network so far")
    if found["graphs"]:
        console.say(f"{found['graphs']} files of exported networks")
    filled = [row for row in found["by_recipe"] if row["images"]]
    rows = [[row["images"], _told(row["live_bytes"]), _network(row["recipe"])] for row in filled]
    if rows:
        console.say("\n" + table(["images", "size", "network"], rows))
    console.finish({"path": store.path, **found})


@cache.command(epilog=example("featx cache prune --max-size 2GB"))
@click.option(
    "--max-size", type=str, callback=lambda *given: _size(*given), help="Such as 500MB or 2GiB.  [default: 20GB]"
)
@_folder
@with_plain_console
def prune(max_size: str | None, folder: str | None, console: Console) -> None:
    """Free disk space, least recently used features first, until the store fits into a size."""
    freed = _store(folder).prune(max_size)
    console.say(f"Freed {_told(freed)}.")
    console.finish({"freed_bytes": freed})


@cache.command(epilog=example("featx cache clear --yes"))
@click.option("--yes", is_flag=True, help="Do not ask.")
@_folder
@with_plain_console
def clear(yes: bool, folder: str | None, console: Console) -> None:
    """Delete all features; nothing else in the folder."""
    store = _store(folder)
    size = store.info()["file_bytes"]
    if not yes:
        click.confirm(f"Delete all features ({_told(size)}) in {store.path}?", abort=True, err=True)
    store.clear()
    console.say(f"Deleted {_told(size)}.")
    console.finish({"path": store.path, "deleted_bytes": size})


@cache.command(epilog=example("featx cache verify"))
@_folder
@with_plain_console
def verify(folder: str | None, console: Console) -> None:
    """Read every record, and delete those that are not as they were written."""
    counts = _store(folder).verify()
    deleted = f"{counts['wrong']} wrong ones deleted, and what {counts['damaged']} damaged files held"
    console.say(f"{counts['records']} records read, {deleted if counts['wrong'] or counts['damaged'] else 'all fine'}.")
    console.finish(counts)


def _store(folder: str | None) -> FeatureStore:
    store = resolve_store(True if folder is None else folder)
    assert store is not None
    return store


def _size(context: click.Context, param: click.Parameter, value: str | None) -> str | None:
    try:
        if value is not None:
            parse_size(value, "--max-size")
    except ValueError as error:
        raise click.BadParameter(str(error), context, param) from error
    return value


def _told(n_bytes: float) -> str:
    unit = 0
    while n_bytes >= 1000 and unit < len(_UNITS) - 1:
        n_bytes, unit = n_bytes / 1000, unit + 1
    return f"{n_bytes:.0f} {_UNITS[unit]}" if unit == 0 else f"{n_bytes:.1f} {_UNITS[unit]}"


def _network(recipe: str) -> str:
    """The network of a recipe's description, and the size of the photos that it sees."""
    parts = dict(part.partition(": ")[::2] for part in recipe.split("; "))
    name = parts.get("network", recipe).split(" ")[0]
    return " ".join([name, *(parts[key] for key in ("input", "precision") if key in parts)])
