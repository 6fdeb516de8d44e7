"""``featx check``: what is wrong with folders of photos, before anything is learnt from them."""

from __future__ import annotations

import functools
from contextlib import closing
from pathlib import Path

import click
from tqdm.auto import tqdm

from featx.cli.files import OutputFile, write_csv
from featx.cli.findings import Findings, Photo
from featx.cli.options import example, fourth_band_option, n_jobs_option, pixel_range_option, with_console
from featx.cli.outcomes import Console, broken_of
from featx.cli.photos import closed_folders, refusal
from featx.exceptions import ImageError
from featx.images import Items, as_items
from featx.images.formats import choose
from featx.images.parts import list_parts, photos_of
from featx.images.reading import BEYOND, LITTLE, PixelRange
from featx.images.walk import left_out_of, told

# Two for each of the five folds that featx fit makes.
_FEWEST = 10

_strict = click.option("--strict", is_flag=True, help="Exit code 1 where anything is wrong.")


@click.command(
    short_help="Find what is wrong with photos.",
    epilog=example("featx check photos/ --strict"),
)
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False))
@click.option(
    "--fewest",
    type=click.IntRange(0),
    default=_FEWEST,
    show_default=True,
    help="Readable photos that a class needs, in each split.",
)
@click.option(
    "-o",
    "--output",
    type=OutputFile(".csv"),
    help="CSV file to write, with path, problem and detail of each photo with which something is wrong.",
)
@pixel_range_option
@fourth_band_option
@n_jobs_option
@functools.partial(with_console, strict=_strict)
def check(
    folders: tuple[str, ...],
    fewest: int,
    output: Path | None,
    pixel_range: PixelRange,
    fourth_band: str,
    n_jobs: int | None,
    console: Console,
) -> int:
    """Read all photos in FOLDERS in full, and say what is wrong with them; change nothing.

    A folder holds one subfolder per class, or splits (train, val, test, ...) that do, or photos alone; several folders
    are splits. Told are photos that cannot be read; exact copies, which are files of the same bytes, and those of them
    that lie under several classes or in several splits; photos of more than 8 bits that use little of the range of
    values that is read (--pixel-range), or go beyond it; files that are taken for no photos; and classes with few
    photos. Of copies both are counted: the files, and the photos that they are of. That fit and search refuse a folder
    as it stands, since its subfolders are called like splits, is told and counts as no problem.
    """
    choice = choose()
    parts = [part for folder in folders for part in list_parts(folder, choice)]
    listings = [listing for part in parts for listing in part.listings]
    left_out = left_out_of(listings)
    photos = [*photos_of(parts)]
    if not photos:
        raise click.ClickException(
            f"{' '.join(folders)} holds no pictures{f', but: {told(left_out)}' if left_out else ''}."
        )
    items = as_items([path for path, *_ in photos], pixel_range=pixel_range, fourth_band=fourth_band)
    digests = _digests(items, n_jobs, console)
    console.left_out += left_out
    console.broken += closed_folders(error for listing in listings for error in listing.closed)
    little, beyond = ([photos[row][0] for row in items.reading.seen.rows(kind)] for kind in (LITTLE, BEYOND))
    findings = Findings(
        [Photo(path, part.path, name, digest) for (path, part, name), digest in zip(photos, digests, strict=True)],
        [(part.path, name) for part in parts for name in part.classes],
        console.broken,
        left_out,
        fewest,
        little,
        beyond,
        [(folder, why) for folder in folders if (why := refusal(folder)) is not None],
        [part.path for part in parts if [*part.classes] == [""]],
    )
    for line in findings.lines():
        console.say(line)
    if output is not None:
        write_csv(output, ["path", "problem", "detail"], findings.rows())
        console.say(f"Written: {output}")
    console.finish(findings.as_dict(), len(photos))
    return int(console.strict and findings.n_problems > 0)


def _digests(items: Items, n_jobs: int | None, console: Console) -> list[bytes | None]:
    """What stands for the content of each photo, None where it cannot be read in full, which the console is told of."""
    from featx.images.unreadable import looked_at, threads_for

    def look(row: int) -> bytes:
        _, contents = items.load_with_contents(row, 0)
        return items.reading.digest_of(*contents)

    with (
        tqdm(total=len(items), unit="img", desc="reading", disable=not console.verbose) as bar,
        closing(looked_at(len(items), look, threads_for(n_jobs), bar.update)) as seen,
    ):
        found = [*seen]
    items.reading.seen.tell()
    paths = [path or "" for path in items.iter_paths()]
    console.broken += broken_of((each for each in found if isinstance(each, ImageError)), paths)
    return [None if isinstance(each, ImageError) else each for each in found]
