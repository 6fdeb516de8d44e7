"""``featx predict``: labels of new photos."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from featx.cli.files import OutputFile, write_csv
from featx.cli.models import load_model, said_of
from featx.cli.options import Columns, Machine, example, with_console, with_machine, with_photo_column
from featx.cli.outcomes import Console, shown
from featx.cli.photos import list_photos, spelt

_MOST = 10  # names that a message shows


@click.command(short_help="Label photos with a model.", epilog=example("featx predict model.joblib new/ -o labels.csv"))
@click.argument("model", type=click.Path(exists=True, dir_okay=False))
@click.argument("photos", nargs=-1, required=True, type=click.Path(exists=True, readable=False))
@click.option("-o", "--output", type=OutputFile(".csv"), help="CSV file to write.  [default: stdout]")
@click.option(
    "--score",
    is_flag=True,
    help="Take the subfolders of PHOTOS, one folder, for the true classes, and print the accuracy; labels are then "
    "written with -o alone.",
)
@with_photo_column
@with_machine
@with_console
def predict(
    model: str,
    photos: tuple[str, ...],
    output: Path | None,
    score: bool,
    columns: Columns,
    machine: Machine,
    console: Console,
) -> None:
    """Label PHOTOS with a MODEL that featx fit wrote.

    PHOTOS are files, folders (at any depth), and tables (CSV, TSV, JSON lines, Parquet) with --image.

    Writes path, label, confidence (the label's probability) and error of each photo as CSV. With --score the photos
    that can be read are compared with the class folders that they lie in.

    Of a model of numbers the label is the number, without confidence.

    Loading a .joblib model runs whatever code it holds: never load one that comes from a stranger. A .safetensors
    model holds numbers alone.
    """
    loaded = load_model(model)
    paths = list_photos(photos, console, columns)
    truth = _true_classes(photos, paths, loaded) if score else []
    labels, confidences = _predictions(loaded, paths, machine, console)
    n_read = sum(label is not None for label in labels)
    reasons = {photo.path: photo.reason for photo in console.broken}
    rows = zip(map(shown, paths), labels, confidences, strict=True)
    found = [{"path": path, "label": label, "confidence": confidence} for path, label, confidence in rows]
    if output is not None or not (console.as_json or score):
        cells = [
            [row["path"], *(["", ""] if row["label"] is None else [row["label"], _short(row["confidence"])]), reason]
            for row, reason in zip(found, (reasons.get(path, "") for path in paths), strict=True)
        ]
        write_csv(output, ["path", "label", "confidence", "error"], cells)
    where = {} if output is None else {"output": str(output)}
    if output is not None:
        console.say(f"{n_read} of {len(paths)} photos labelled: {output}")
    scored = _scored(labels, truth) if score and n_read else {}
    if scored:
        console.say(f"Accuracy {scored['accuracy']:.3f} ({scored['n_right']} of {n_read} photos)")
    console.finish_with_photos({"model": model, **where, **scored, "predictions": found}, len(paths), n_read)


def _predictions(
    model: Any, paths: Sequence[str], machine: Machine, console: Console
) -> tuple[list[Any], list[float | None]]:
    """A label and its probability for every photo, None for those that cannot be read."""
    labels: list[Any] = [None] * len(paths)
    confidences: list[float | None] = [None] * len(paths)
    said = said_of(model, paths, machine, console)
    best = [None] * len(said.rows) if said.proba is None else said.proba.max(axis=1).tolist()
    for row, label, confidence in zip(said.rows.tolist(), said.labels.tolist(), best, strict=True):
        labels[row], confidences[row] = label, confidence
    return labels, confidences


def _true_classes(photos: Sequence[str], paths: Sequence[str], model: Any) -> list[str]:
    """The subfolder of each photo, which is a class of the model.

    Raises
    ------
    UsageError, ClickException
    """
    if not hasattr(model, "classes_"):
        raise click.UsageError("A model that was learnt with labels is expected with --score, got one of numbers.")
    folder, *more = photos
    if more or not os.path.isdir(folder):
        raise click.UsageError(
            f"One folder with one subfolder per class is expected with --score, got {' '.join(photos)}."
        )
    classes = [spelt(str(name)) for name in getattr(model, "classes_", [])]
    truth = [spelt(os.path.relpath(path, folder).split(os.sep)[0]) for path in paths]
    if others := sorted({*truth} - {*classes}):
        raise click.ClickException(
            f"Subfolders of the model's classes ({', '.join(classes[:_MOST])}) alone are expected with --score, got "
            f"{', '.join(map(shown, others[:_MOST]))} in {folder}. Rename or move what else is there."
        )
    return truth


def _scored(labels: Sequence[Any], truth: Sequence[str]) -> dict[str, Any]:
    right = [spelt(str(label)) == name for label, name in zip(labels, truth, strict=True) if label is not None]
    return {"accuracy": sum(right) / len(right), "n_right": sum(right)}


def _short(confidence: float | None) -> str:
    return "" if confidence is None else f"{confidence:.4f}"
