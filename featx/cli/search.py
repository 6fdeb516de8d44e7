"""``featx search``: which network, layer and pooling suit some photos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import click
import numpy as np

from featx.backbones.catalogue import resolve_backbone
from featx.cli.options import (
    KEPT_POOLINGS,
    Listed,
    Machine,
    Reading,
    example,
    extractor_for,
    with_console,
    with_machine,
    with_reading,
)
from featx.cli.outcomes import Console, table
from featx.cli.photos import list_labelled
from featx.cli.scoring import Score, candidates, compute_once, folds_for, is_vector, scores_of
from featx.extractor import PretrainedFeatureExtractor


@click.command(epilog=example("featx search photos/ --backbones resnet18,mobilenet_v3_small --layers all"))
@click.argument("photos", type=click.Path(exists=True, file_okay=False))
@click.option(
    "--backbones", type=Listed("NAMES"), default="resnet18", show_default=True, help="Networks, with commas between."
)
@click.option(
    "--layers",
    type=Listed("LAYERS"),
    default="all",
    show_default=True,
    help="Layers, with commas between: penultimate, stage numbers (-1 is the last), names, or all for every stage.",
)
@click.option(
    "--poolings",
    type=Listed("POOLINGS", KEPT_POOLINGS),
    default="avg",
    show_default=True,
    help="Poolings, with commas between: avg, max, gem.",
)
@with_reading
@click.option(
    "--weights-of",
    multiple=True,
    metavar="BACKBONE=NAME|FILE",
    help="Weights of one of the networks, in place of --weights. Several times for several.",
)
@click.option("--folds", type=click.IntRange(2), default=5, show_default=True, help="Of the cross-validation.")
@with_machine
@with_console
def search(
    photos: str,
    backbones: list[str],
    layers: list[str | int],
    poolings: list[str],
    reading: Reading,
    weights_of: tuple[str, ...],
    folds: int,
    machine: Machine,
    console: Console,
) -> None:
    """Try networks, layers and poolings on PHOTOS, a folder with one subfolder per class, and rank them.

    Each photo passes once through each network, however many layers and poolings are tried. Every choice gets a
    logistic regression, whose regularisation the same cross-validation chooses.
    """
    own = _weights_by_backbone(weights_of, backbones)
    readings = {name: replace(reading, weights=own.get(name, reading.weights)) for name in map(str, backbones)}
    for name in readings:
        resolve_backbone(name)  # a misspelt one is told before the others were computed
    paths, y = list_labelled(photos, console)
    n_photos, scores = len(paths), list[Score]()
    with machine.store() as store:
        for name, its in readings.items():
            extractor = extractor_for(name, its, machine, console, cache=store, pooling=poolings[0])
            names = candidates(extractor, layers)
            good = compute_once(extractor.set_params(layers=names[0]), names, paths, console)
            paths, y = [paths[row] for row in good.tolist()], y[good]
            scores += scores_of(extractor, _choices(extractor, names, poolings), paths, y, folds_for(y, folds))
    ranked = sorted(scores, key=lambda score: -score.accuracy)
    _show(ranked, y, console)
    console.finish({"classes": np.unique(y).tolist(), "leaderboard": [score.as_dict() for score in ranked]}, n_photos)


def _choices(extractor: PretrainedFeatureExtractor, names: list[str], poolings: list[str]) -> list[tuple[str, str]]:
    """Layers with every pooling; vectors, which have nothing to pool, once."""
    return [(name, how) for name in names for how in (poolings[:1] if is_vector(extractor, name) else poolings)]


def _show(ranked: Sequence[Score], y: np.ndarray, console: Console) -> None:
    rows = [
        [place, s.backbone, s.layer, s.pooling, f"{s.C:g}", f"{s.accuracy:.3f}", f"+- {s.spread:.3f}"]
        for place, s in enumerate(ranked, 1)
    ]
    best = ranked[0]
    console.say(f"{len(y)} photos of {len(np.unique(y))} classes; accuracy by cross-validation\n")
    console.say(table(["", "backbone", "layer", "pooling", "C", "accuracy", "folds"], rows))
    console.say(
        f"\nNext: featx fit PHOTOS -o model.joblib --backbone {best.backbone} --layers {best.layer} "
        f"--pooling {best.pooling}"
    )


def _weights_by_backbone(given: tuple[str, ...], backbones: Sequence[str | int]) -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    for name, equals, weights in pairs:
        if name not in backbones or not equals or not weights:
            raise click.UsageError(
                f"--weights-of BACKBONE=WEIGHTS with one of {', '.join(map(str, backbones))} is expected, got "
                f"{name + equals + weights!r}."
            )
    return {name: weights for name, _, weights in pairs}
