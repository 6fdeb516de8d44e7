"""``featx layers``: what can be read from a network."""

from __future__ import annotations

import click

from featx.backbones.listing import KINDS, architecture_of, names_of
from featx.cli.options import example, with_plain_console
from featx.cli.outcomes import Console, table


@click.command(short_help="List a network's layers.", epilog=example("featx layers resnet50 --kind blocks"))
@click.argument("backbone")
@click.option(
    "--kind",
    type=click.Choice(KINDS),
    default="stages",
    show_default=True,
    help="The last block at each reduction (four blocks by depth in vision transformers), every block of the trunk, or "
    "everything that runs.",
)
@click.option(
    "--image-size", type=click.IntRange(1), help="Side in pixels that the network sees.  [default: as it was trained]"
)
@with_plain_console
def layers(backbone: str, kind: str, image_size: int | None, console: Console) -> None:
    """List the layers of BACKBONE that --layers takes, with channels and places. Fetches no weights."""
    architecture = architecture_of(backbone, image_size)
    names = names_of(architecture, kind)
    found = [architecture.resolve(name)[0] for name in names]
    sizes = ["-" if layer.layout == "vector" else "x".join(map(str, layer.spatial)) for layer in found]
    rows = [[i, layer.label, layer.channels, size] for i, (layer, size) in enumerate(zip(found, sizes, strict=True))]
    if kind != "stages":  # a number means a stage
        rows = [row[1:] for row in rows]
    head = ["stage", "layer", "channels", "places"] if kind == "stages" else ["layer", "channels", "places"]
    console.say(table(head, rows))
    entries = [
        {"name": layer.label, "channels": layer.channels, "places": [*layer.spatial], "layout": layer.layout}
        for layer in found
    ]
    console.finish({"backbone": backbone, "kind": kind, "layers": entries})
