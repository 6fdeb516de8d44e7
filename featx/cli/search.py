"""``featx search``: which network, layer and pooling suit some photos."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from featx.activations.engine import TALLY
from featx.backbones.catalogue import resolve_backbone
from featx.cli.files import OutputFile
from featx.cli.found import Effort, Found, as_typed
from featx.cli.options import (
    KEPT_POOLINGS,
    Columns,
    Listed,
    Machine,
    Reading,
    classes_option,
    example,
    extractor_for,
    with_console,
    with_label_columns,
    with_machine,
    with_reading,
)
from featx.cli.outcomes import Console, table
from featx.cli.scoring import Score, compute_once, folds_for, poolings_of, scores_of
from featx.cli.sources import Labelled, source_of
from featx.estimators.extractor import PretrainedFeatureExtractor


@click.command(
    short_help="Rank networks, layers and poolings on photos.",
    epilog=example("featx search photos/ --backbones resnet18,mobilenet_v3_small --layers all"),
)
@click.argument("photos", type=click.Path(exists=True))
@classes_option
@click.option(
    "--backbones", type=Listed("NAMES"), default="resnet18", show_default=True, help="Networks, with commas between."
)
@click.option(
    "--layers",
    type=Listed("LAYERS"),
    default="all",
    show_default=True,
    help="Layers, with commas between: penultimate, stage numbers (-1 is the last), names, or all for every stage and "
    "the penultimate layer.",
)
@click.option(
    "--poolings",
    type=Listed("POOLINGS", (*KEPT_POOLINGS, "cls", "auto")),
    default="avg",
    show_default=True,
    help="Poolings, with commas between: avg, max, gem, cls, or auto, what each network is usually read with.",
)
@with_reading
@with_label_columns
@click.option(
    "--weights-of",
    multiple=True,
    metavar="BACKBONE=NAME|FILE",
    help="Weights of one of the networks, in place of --weights. Several times for several.",
)
@click.option("--folds", type=click.IntRange(2), default=5, show_default=True, help="Of the cross-validation.")
@click.option(
    "--report",
    type=OutputFile(".html", ".htm"),
    help="Write one HTML file with ranking, layer curves, confusions, mistakes and nearest photos.",
)
@with_machine
@with_console
def search(
    photos: str,
    classes: list[str] | None,
    backbones: list[str],
    layers: list[str | int],
    poolings: list[str],
    reading: Reading,
    columns: Columns,
    weights_of: tuple[str, ...],
    folds: int,
    report: Path | None,
    machine: Machine,
    console: Console,
) -> None:
    """Try networks, layers and poolings on PHOTOS, and rank them.

    PHOTOS is a folder with one subfolder per class, or a table (CSV, TSV, JSON lines, Parquet) with --image and
    --label.

    Each photo passes once through each network, however many layers and poolings are tried. Every choice gets a
    logistic regression, whose regularisation the same cross-validation chooses.
    """
    if report is not None:
        from featx.cli.report import check_can_report

        check_can_report("featx search --report")
    own = _weights_by_backbone(weights_of, backbones)
    readings = {name: replace(reading, weights=own.get(name, reading.weights)) for name in map(str, backbones)}
    for name in readings:
        resolve_backbone(name)  # a misspelt one is told before the others were computed
    source = source_of(photos, classes, columns)
    labelled = source.labelled(console)
    with machine.store() as store:
        extractors = {
            name: extractor_for(name, its, machine, console, cache=store, pooling=poolings[0])
            for name, its in readings.items()
        }
        used, scores, efforts = _search(labelled, extractors, layers, poolings, folds, console)
        ranked = sorted(scores, key=lambda score: -score.accuracy)
        best = ranked[0]
        fit = ["fit", *source.words, "-o", "model.joblib", "--backbone", best.backbone, "--layers", best.layer]
        fit += ["--pooling", best.pooling, *readings[best.backbone].words(), *([] if machine.cache else ["--no-cache"])]
        found = Found(
            source=source,
            command=click.get_current_context().obj or ["search"],
            next_command=fit,
            cached=machine.kept is not None,
            photos=used,
            broken=tuple(console.broken),
            folds=folds_for(used.y, folds),
            ranked=ranked,
            extractors=extractors,
            efforts=efforts,
        )
        _show(found, console)
        _report(found, report, console)
    console.finish(_as_json(found, report), len(labelled.paths))


def _report(found: Found, path: Path | None, console: Console) -> None:
    """Write the report; where that fails, the results are told all the same."""
    if path is None:
        return
    from featx.cli.report import write_report

    try:
        write_report(found, path)
    except Exception:
        console.finish(_as_json(found, None))
        raise
    console.say(f"Report: {path}")


def _search(
    photos: Labelled,
    extractors: dict[str, PretrainedFeatureExtractor],
    layers: list[str | int],
    poolings: list[str],
    n_folds: int,
    console: Console,
) -> tuple[Labelled, list[Score], list[Effort]]:
    """Photos that could be read, scores of all choices, and what each network took."""
    scores, efforts = list[Score](), list[Effort]()
    for name, extractor in extractors.items():
        before, started = TALLY.n_images, time.perf_counter()
        names, good = compute_once(extractor, layers, poolings, photos.paths, console)
        passed, photos = time.perf_counter(), photos.take(good)
        choices = _choices(extractor, names, poolings)
        scores += scores_of(extractor, choices, photos.paths, photos.y, folds_for(photos.y, n_folds))
        efforts.append(Effort(name, TALLY.n_images - before, passed - started, time.perf_counter() - passed))
    return photos, scores, efforts


def _choices(
    extractor: PretrainedFeatureExtractor, names: list[str], poolings: list[str]
) -> list[tuple[str, str | list[str]]]:
    """Layers with every pooling, each once: vectors have nothing to pool, and "auto" may be among the others."""
    found = [(name, how) for name in names for how in poolings_of(extractor, name, poolings)]
    return [choice for i, choice in enumerate(found) if choice not in found[:i]]


def _show(found: Found, console: Console) -> None:
    rows = [
        [place, s.network, s.layer, s.pooling, f"{s.C:g}", f"{s.accuracy:.3f}", f"+- {s.spread:.3f}"]
        for place, s in enumerate(found.ranked, 1)
    ]
    console.say(f"{len(found.photos.y)} photos of {len(found.classes)} classes; accuracy by cross-validation\n")
    console.say(table(["", "backbone", "layer", "pooling", "C", "accuracy", "folds"], rows))
    console.advise(f"\nNext: {as_typed(found.next_command)}")


def _as_json(found: Found, report: Path | None) -> dict[str, Any]:
    return {
        "classes": found.classes,
        "leaderboard": [score.as_dict() for score in found.ranked],
        "efforts": [effort.as_dict() for effort in found.efforts],
        "report": None if report is None else str(report),
    }


def _weights_by_backbone(given: tuple[str, ...], backbones: Sequence[str | int]) -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    for name, equals, weights in pairs:
        if name not in backbones or not equals or not weights:
            raise click.UsageError(
                f"--weights-of BACKBONE=WEIGHTS with one of {', '.join(map(str, backbones))} is expected, got "
                f"{name + equals + weights!r}."
            )
    return {name: weights for name, _, weights in pairs}
