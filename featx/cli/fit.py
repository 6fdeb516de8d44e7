"""``featx fit``: from labelled photos to a model."""

from __future__ import annotations

import functools
import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click
import numpy as np
from sklearn.metrics import get_scorer_names

from featx.backbones.addresses import path_in
from featx.cli.files import OutputFile
from featx.cli.findings import Findings, Photo
from featx.cli.found import as_typed
from featx.cli.kinds import KINDS
from featx.cli.measures import OfClasses
from featx.cli.models import SAFE, networks_of, save_model
from featx.cli.options import (
    Columns,
    Listed,
    Machine,
    Reading,
    backbone_option,
    classes_option,
    example,
    pooling_option,
    refuse_given,
    weights_of,
    with_console,
    with_label_columns,
    with_machine,
    with_reading,
)
from featx.cli.outcomes import Console
from featx.cli.sources import TASKS, Labelled, Source, source_of
from featx.cli.ways import FOLDS, FOLDS_TUNED, Learnt, OnFeatures, Searched, Settings, Tuned, TunedOrNot, Way
from featx.store import Session
from featx.system.interrupts import Interrupts

_MINUTES = 13
_LATE = "The search is over: the model is being learnt and written. Ctrl-C once more writes none."

_groups_column = click.option(
    "--groups",
    metavar="COLUMN",
    help="Of a table: the column that says which photos belong together, such as those of one patient; no group is "
    "learnt from and judged by at once.",
)


@click.command(
    short_help="Learn what is on photos and write a model.",
    epilog=example("featx fit labels.csv --image file --label breed -o m.joblib", "featx fit photos/ -o model.joblib"),
)
@click.argument("photos", type=click.Path(exists=True))
@click.option(
    "-o",
    "--output",
    type=OutputFile(".joblib", SAFE),
    required=True,
    help="File to write: .joblib, or with --fine-tune also .safetensors, from which no code can run.",
)
@classes_option
@functools.partial(with_label_columns, groups=_groups_column)
@click.option(
    "--task",
    type=click.Choice(TASKS),
    default=TASKS[0],
    show_default=True,
    help="Of a table: whether its labels are names of classes or numbers to predict.",
)
@backbone_option
@click.option("--quick", is_flag=True, help="Learn from features alone, in seconds: as with --layers penultimate,-2.")
@click.option(
    "--time-budget",
    type=click.FloatRange(0),
    metavar="SECONDS",
    help="For the search and the model, beyond the first pass of the photos through the network; what would not be "
    f"ready in time is not begun.  [default: {60 * _MINUTES}]",
)
@click.option(
    "--scoring",
    metavar="NAME",
    help="What the search compares by: a name of scikit-learn's, such as balanced_accuracy.  [default: accuracy]",
)
@click.option(
    "--layers",
    type=Listed("LAYERS"),
    help="Learn from features of one of these, with commas between: penultimate, stage numbers (-1 is the last), "
    "names, or all; with --fine-tune from this one.  [default: what the search finds]",
)
@pooling_option
@with_reading
@click.option(
    "--fine-tune",
    is_flag=True,
    help="Train the network in one way, and nothing else: minutes to hours, once per fold and once for the model.",
)
@click.option(
    "--freeze",
    type=Listed("STAGES"),
    default="-1",
    show_default=True,
    help="With --fine-tune, what stays as it was: a number of stages from the input, -n for all but the last n, all, "
    "or a module's name. Fewer take longer.",
)
@click.option("--epochs", type=click.IntRange(1), help="With --fine-tune.  [default: by the number of photos]")
@click.option(
    "--folds",
    type=click.IntRange(2),
    help=f"Of the cross-validation.  [default: {FOLDS}; with --fine-tune {FOLDS_TUNED}]",
)
@click.option(
    "--report",
    type=OutputFile(".html", ".htm"),
    help="Write one HTML file with what was tried, confusions and mistakes, and where on them the model looked.",
)
@with_machine
@with_console
def fit(
    photos: str,
    output: Path,
    classes: list[str] | None,
    columns: Columns,
    task: str,
    backbone: str,
    quick: bool,
    time_budget: float | None,
    scoring: str | None,
    layers: list[str | int] | None,
    pooling: str | list[str],
    reading: Reading,
    fine_tune: bool,
    freeze: list[str | int],
    epochs: int | None,
    folds: int | None,
    report: Path | None,
    machine: Machine,
    console: Console,
) -> None:
    """Learn the classes of PHOTOS and write a model.

    PHOTOS is a folder with one subfolder per class, or a table (CSV, TSV, JSON lines, Parquet) with --image and
    --label; with --task regression its labels are numbers.

    A pretrained network describes each photo, once. Then several ways to learn from that are tried, cheap ones first:
    linear models on features of one layer (probe, lda) or of several (layers), the last stages of the network trained
    (last-stage, last-two, and last-two-flip with mirrored photos), and the mean of the two best. A line tells of each.
    A dearer one is taken only where it is better beyond doubt; the model learns from all photos in that way.

    Ctrl-C ends the search, and the best way so far is taken; a second one ends the command.

    With --quick, --layers or --fine-tune there is no search. The accuracy that is printed is that of the best of some
    choices by cross-validation, hence a little high; photos that were never shown tell more: featx score.
    """
    settings = Settings(KINDS[task], backbone, pooling, reading, machine, folds)
    way = _way(settings, fine_tune, quick, layers, freeze, epochs, scoring, time_budget)
    if output.suffix.lower() == SAFE and not fine_tune:
        raise click.UsageError(
            f"{output} holds one trained network and nothing else, and what is learnt in another way does not fit in. "
            "Type --fine-tune (without --quick), or name the model .joblib."
        )
    if report is not None:
        if task != TASKS[0]:
            raise click.UsageError("Classes are expected with --report, got --task regression.")
        from featx.cli.report import check_can_report

        check_can_report("featx fit --report")
    source = source_of(photos, classes, columns, task)
    labelled = source.labelled(console)
    with machine.store() as store, Interrupts(lambda: console.tell(_LATE)) as interrupts:
        learnt = way.learn(labelled, store, console, interrupts)
        save_model(learnt.model, output)
        interrupts.leave()  # the file is there
        result = learnt.result | settings.kind.about(learnt.photos.y) | {"n_used": len(learnt.photos.y)}
        result |= {"model": str(output)}
        console.say(f"{_told(learnt, settings)}\nModel: {output}")
        if os.path.isfile(weights := path_in(weights_of(reading.weights))):
            console.say(f"It reads {weights}, which must stay there.")
        if not console.quiet:
            _tell_copies(networks_of(learnt.model)[0], learnt.photos, Session(store), machine, console)
        try:
            if report is not None:
                _report(learnt, source, report, console)
                console.say(f"Report: {report}")
        except Exception:  # the model is there all the same
            console.finish(result | {"report": None}, len(labelled.paths))
            raise
        if any(not row["n_folds"] for row in result.get("leaderboard", ())) and not result["interrupted"]:
            console.advise("A larger --time-budget lets more be tried.")
        console.advise(f"Next: featx predict {output} FOLDER -o labels.csv, or featx score {output} OTHERS with labels")
        console.finish(result | {"report": None if report is None else str(report)}, len(labelled.paths))


def _way(
    settings: Settings,
    fine_tune: bool,
    quick: bool,
    layers: list[str | int] | None,
    freeze: list[str | int],
    epochs: int | None,
    scoring: str | None,
    time_budget: float | None,
) -> Way:
    """The way to learn that the options mean.

    Raises
    ------
    UsageError
        Some of them do not go together.
    """
    if fine_tune and quick:
        raise click.UsageError("Either --quick or --fine-tune is expected, got both.")
    if not fine_tune:
        refuse_given(["freeze", "epochs"], "goes with --fine-tune only")
    if fine_tune:
        refuse_given(["scoring", "time_budget"], "goes with the search, and not with --fine-tune")
        params = {"layers": _only(layers, "--layers"), "freeze": _only(freeze, "--freeze"), "epochs": epochs or "auto"}
        return Tuned(settings, params)
    if quick or layers is not None:
        refuse_given(["scoring", "time_budget"], "goes with the search, and not with --quick or --layers")
        return OnFeatures(settings, layers)
    budget = 60.0 * _MINUTES if time_budget is None else time_budget
    if settings.kind is KINDS["regression"]:
        refuse_given(["scoring"], "goes with classes, and not with --task regression")
        return TunedOrNot(OnFeatures(settings, None), Tuned(settings, {}), budget)
    if scoring is not None and scoring not in get_scorer_names():
        near = get_close_matches(scoring, get_scorer_names(), n=1)
        raise click.UsageError(
            f"--scoring with a name of scikit-learn's is expected, got {scoring!r}."
            + (f" Did you mean {near[0]}?" if near else "")
        )
    return Searched(settings, scoring, budget)


def _report(learnt: Learnt, source: Source, path: Path, console: Console) -> None:
    from featx.cli.report import ModelReport, basename, write_model_report

    result = learnt.result
    report = ModelReport(
        f"What was learnt of {basename(source.path)}",
        f"By {result['backbone']}, {learnt.how}. Each photo is predicted by a model that did not learn from it; the "
        "choice was made by these photos, too, so that others tell more (featx score).",
        learnt.model,
        learnt.judged,
        OfClasses.of(learnt.judged),
        source.folder,
        as_typed(click.get_current_context().obj or ["fit"]),
        tuple(console.broken),
        result.get("leaderboard", ()),
        result.get("recipe", ""),
        learnt.how,
    )
    write_model_report(report, path)


def _tell_copies(network: Any, photos: Labelled, session: Session, machine: Machine, console: Console) -> None:
    """Say in one line how many files were learnt twice, by the digests under which their features are kept."""
    from featx.images.unreadable import threads_for

    labelled = {path: str(label) for path, label in zip(photos.paths, photos.y, strict=True)}
    digests = session.digests(network._items([*labelled], reset=False), threads_for(machine.n_jobs))
    known = zip(labelled.items(), digests, strict=True)
    found = [Photo(path, "", label, its) for (path, label), its in known if isinstance(its, bytes)]
    if line := Findings(found, [], [], [], 0).copies_line():
        console.note(f"{line} (featx check -o FILE lists them).")


def _told(learnt: Learnt, settings: Settings) -> str:
    result = learnt.result
    score, n, of = result["scoring"], result["folds"], result["of_folds"]
    folds = f"{n}-fold cross-validation" if n == of else f"{n} of {of} folds of a cross-validation"
    groups = "" if learnt.photos.groups is None else f" in {len(np.unique(learnt.photos.groups))} groups"
    return (
        f"{len(learnt.photos.y)} photos{groups} {settings.kind.told(learnt.photos.y)}\n"
        f"{settings.backbone}, {learnt.how}\n"
        f"{score[0].upper() + score[1:]} {result[score]:.3f} +- {result['spread']:.3f} ({folds})"
        f"{settings.kind.remark(result[score])}"
    )


def _only(values: list[str | int] | None, option: str) -> str | int:
    first, *more = values or ["penultimate"]
    if more:
        raise click.UsageError(f"One value of {option} is expected with --fine-tune, got {len(more) + 1}.")
    return first
