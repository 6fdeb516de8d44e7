"""``featx score``: how good a model is, on photos that it has never seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np

from featx.cli.files import OutputFile
from featx.cli.found import as_typed
from featx.cli.judged import Judged
from featx.cli.measures import OfClasses, measures_of
from featx.cli.models import load_model, said_of
from featx.cli.options import (
    Columns,
    Machine,
    classes_option,
    example,
    with_console,
    with_label_columns,
    with_machine,
)
from featx.cli.outcomes import Console, shown
from featx.cli.photos import spelt
from featx.cli.sources import TASKS, Labelled, source_of

_MOST_NAMES = 10
_LEAD = "What the model says of photos, beside what they are."


@click.command(
    short_help="Say how good a model is on photos that it has not seen.",
    epilog=example("featx score model.joblib new/ --report score.html"),
)
@click.argument("model", type=click.Path(exists=True, dir_okay=False))
@click.argument("photos", type=click.Path(exists=True))
@classes_option
@with_label_columns
@click.option(
    "--report",
    type=OutputFile(".html", ".htm"),
    help="Write one HTML file with all figures, confusions and mistakes, and where on them the model looked.",
)
@with_machine
@with_console
def score(
    model: str,
    photos: str,
    classes: list[str] | None,
    columns: Columns,
    report: Path | None,
    machine: Machine,
    console: Console,
) -> None:
    """Compare what a MODEL that featx fit wrote says of PHOTOS with what they are.

    PHOTOS is a folder with one subfolder per class, or a table (CSV, TSV, JSON lines, Parquet) with --image and
    --label. Where the model has never seen them, nor any like them, such as the same thing photographed twice, the
    figures are those to publish.

    Printed are the accuracy with its 95 % interval (Wilson's), its mean over the classes (balanced), recall, precision
    and F1 of each class, the most frequent confusions, whether the probabilities can be trusted (calibration), and the
    worst mistakes. Of a model of numbers they are R squared, the mean absolute error, the root of the mean squared one,
    and the worst mistakes.

    Loading a .joblib model runs whatever code it holds: never load one that comes from a stranger.
    """
    loaded = load_model(model)
    has_classes = hasattr(loaded, "classes_")
    if report is not None:
        if not has_classes:
            raise click.UsageError("A model of classes is expected with --report, got one of numbers.")
        from featx.cli.report import check_can_report

        check_can_report("featx score --report")
    source = source_of(photos, classes, columns, TASKS[0] if has_classes else TASKS[1])
    labelled = source.labelled(console)
    if has_classes:
        labelled = _of_known_classes(labelled, loaded, photos)
    elif labelled.y.dtype.kind != "f":
        raise click.UsageError(f"A table with numbers is expected with a model of numbers, got the folder {photos}.")
    said = said_of(loaded, labelled.paths, machine, console)
    if not len(said.rows):
        raise console.none_left(len(labelled.paths))
    names = np.array([spelt(str(name)) for name in loaded.classes_]) if has_classes else np.array([])
    if len({*names.tolist()}) < len(names):
        raise click.ClickException(
            f"Classes with different names are expected, got {model}, some of whose names differ in the spelling of "
            "their letters alone. Rename the classes and learn them again."
        )
    predicted = np.array([spelt(str(label)) for label in said.labels]) if has_classes else said.labels
    judged = Judged(labelled.take(said.rows), names, predicted, said.proba)
    found = measures_of(judged)
    for line in found.lines(lambda row: shown(judged.photos.paths[row])):
        console.say(line)
    where: dict[str, Any] = {"report": None if report is None else str(report)}
    if report is not None and isinstance(found, OfClasses):
        _report(loaded, model, source.folder, judged, found, report, console)
        console.say(f"Report: {report}")
    mistakes = [{"path": shown(judged.photos.paths[row]), **about} for row, about in found.worst]
    console.finish({"model": model, **found.as_dict(), "worst": mistakes} | where, len(labelled.paths))


def _report(
    loaded: Any, model: str, folder: str, judged: Judged, found: OfClasses, path: Path, console: Console
) -> None:
    from featx.cli.report import ModelReport, write_model_report

    command = as_typed(click.get_current_context().obj or ["score"])
    title = f"How good is {Path(model).name}?"
    write_model_report(ModelReport(title, _LEAD, loaded, judged, found, folder, command, tuple(console.broken)), path)


def _of_known_classes(photos: Labelled, model: Any, source: str) -> Labelled:
    """The same in the model's own spelling of its classes.

    Raises
    ------
    ClickException
        There are others.
    """
    known = {spelt(str(name)) for name in model.classes_}
    y = np.array([spelt(label) for label in photos.y.tolist()])
    if others := sorted({*y.tolist()} - known):
        raise click.ClickException(
            f"Classes of the model ({', '.join(sorted(known)[:_MOST_NAMES])}) alone are expected, got "
            f"{', '.join(map(shown, others[:_MOST_NAMES]))} in {source}. Leave these photos out, or name their class "
            "as the model does."
        )
    return Labelled(photos.paths, y, photos.groups)
