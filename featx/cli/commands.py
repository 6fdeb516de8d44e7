"""All commands under one name."""

from __future__ import annotations

import click

from featx.cli.cache import cache
from featx.cli.check import check
from featx.cli.demo import demo
from featx.cli.extract import extract
from featx.cli.fit import fit
from featx.cli.layers import layers
from featx.cli.options import example
from featx.cli.outcomes import Program
from featx.cli.predict import predict
from featx.cli.score import score
from featx.cli.search import search
from featx.cli.similar import similar
from featx.cli.versions import versions


def _tell_versions(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        click.echo(versions())
        context.exit()


@click.group(
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=example("featx demo"),
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_tell_versions,
    help="Show the releases of featx and of what it stands on, and exit.",
)
def featx() -> None:
    """Transfer learning with your own photos: pretrained networks, without a line of code.

    Photos lie in folders, for learning in one subfolder per class, or are named by a table. Exit codes: 0 fine, 1 an
    error, told in one line, 2 wrong usage, 130 interrupted.
    """


for _command in (check, layers, fit, predict, score, search, extract, similar, cache, demo):
    featx.add_command(_command)
