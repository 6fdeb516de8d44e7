"""``featx predict``: labels of new photos."""

from __future__ import annotations

from pathlib import Path

import click

from featx.cli.files import OutputFile, write_csv
from featx.cli.models import load_model, predictions
from featx.cli.options import Machine, example, with_console, with_machine
from featx.cli.outcomes import Console, shown
from featx.cli.photos import list_photos


@click.command(short_help="Label photos with a model.", epilog=example("featx predict model.joblib new/ -o labels.csv"))
@click.argument("model", type=click.Path(exists=True, dir_okay=False))
@click.argument("photos", nargs=-1, required=True, type=click.Path(exists=True, readable=False))
@click.option("-o", "--output", type=OutputFile(".csv"), help="CSV file to write.  [default: stdout]")
@with_machine
@with_console
def predict(model: str, photos: tuple[str, ...], output: Path | None, machine: Machine, console: Console) -> None:
    """Label PHOTOS, which are files and folders (at any depth), with a MODEL that featx fit wrote.

    Writes path, label, confidence (the label's probability) and error of each photo as CSV.

    Loading a .joblib model runs whatever code it holds: never load one that comes from a stranger. A .safetensors
    model holds numbers alone.
    """
    loaded = load_model(model)
    paths = list_photos(photos, console)
    labels, confidences = predictions(loaded, paths, machine, console)
    n_read = sum(label is not None for label in labels)
    reasons = {photo.path: photo.reason for photo in console.broken}
    rows = zip(map(shown, paths), labels, confidences, strict=True)
    found = [{"path": path, "label": label, "confidence": confidence} for path, label, confidence in rows]
    if output is not None or not console.as_json:
        cells = [
            [row["path"], *(["", ""] if row["label"] is None else [row["label"], _short(row["confidence"])]), reason]
            for row, reason in zip(found, (reasons.get(path, "") for path in paths), strict=True)
        ]
        write_csv(output, ["path", "label", "confidence", "error"], cells)
    where = {} if output is None else {"output": str(output)}
    if output is not None:
        console.say(f"{n_read} of {len(paths)} photos labelled: {output}")
    console.finish_with_photos({"model": model, **where, "predictions": found}, len(paths), n_read)


def _short(confidence: float | None) -> str:
    return "" if confidence is None else f"{confidence:.4f}"
