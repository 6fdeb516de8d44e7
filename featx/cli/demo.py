"""``featx demo``: the commands at work on pictures that come along."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import numpy as np
from PIL import Image

from featx.cli.fit import fit
from featx.cli.found import as_typed
from featx.cli.options import example
from featx.cli.predict import predict
from featx.cli.search import search
from featx.cli.similar import similar

_PER_CLASS, _SIDE = 12, 32
_LIGHT = ["--no-cache", "--quiet"]
_NETWORK = ["--image-size", "16", "--folds", "3", *_LIGHT]


@click.command(
    short_help="Show the commands at work, offline, in half a minute.", epilog=example("featx demo --folder digits")
)
@click.option(
    "--folder",
    type=click.Path(file_okay=False),
    help="Where to put the pictures and the model, and leave them.  [default: a folder that is deleted in the end]",
)
def demo(folder: str | None) -> None:
    """Show the commands at work, offline, in half a minute: handwritten digits and the small network featx_micro."""
    if folder is not None:
        _show(Path(folder))
        return
    with tempfile.TemporaryDirectory(prefix="featx-demo-") as own:
        _show(Path(own))


def _show(folder: Path) -> None:
    _write_digits(folder / "photos", start=0)
    _write_digits(folder / "new", start=_PER_CLASS, per_class=1)
    known, new, model, seven = (str(folder / name) for name in ("photos", "new", "model.joblib", "new/7/0.png"))
    click.echo(f"{_PER_CLASS} pictures of each digit in {known}, one subfolder per digit; others in {new}.")
    _run(search, known, "--backbones", "featx_micro", "--layers", "all", "--poolings", "avg,max", *_NETWORK)
    _run(fit, known, "-o", model, "--backbone", "featx_micro", "--layers", "all", *_NETWORK)
    _run(predict, model, new, *_LIGHT)
    _run(similar, model, known, seven, "-n", "3", *_LIGHT)
    click.echo("\nNext: the same with photos of your own, and --backbone resnet18. featx COMMAND --help says more.")


def _run(command: click.Command, *words: str) -> None:
    click.echo(f"\n$ {as_typed([command.name or '', *words])}")
    command.main([*words], f"featx {command.name}", standalone_mode=False)


def _write_digits(folder: Path, start: int, per_class: int = _PER_CLASS) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    for digit in digits.target_names:
        (folder / str(digit)).mkdir(parents=True, exist_ok=True)
        rows = np.flatnonzero(digits.target == digit)[start : start + per_class]
        for i, row in enumerate(rows.tolist()):
            grey = Image.fromarray((digits.images[row] * 255 / 16).astype(np.uint8))
            grey.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR).save(folder / str(digit) / f"{i}.png")
