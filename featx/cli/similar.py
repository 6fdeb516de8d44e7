"""``featx similar``: the photos that are most like one."""

from __future__ import annotations

import os

import click
import numpy as np

from featx.cli.models import features, load_model, read_features
from featx.cli.options import (
    Machine,
    Reading,
    example,
    extractor_for,
    layers_option,
    one_or_list,
    pooling_option,
    refuse_given,
    with_console,
    with_machine,
    with_reading,
)
from featx.cli.outcomes import Console, shown, table
from featx.cli.photos import list_photos

_MODELS = (".joblib", ".safetensors", ".pkl")


@click.command(
    short_help="Find the photos most like another one.", epilog=example("featx similar resnet18 photos/ query.jpg -n 5")
)
@click.argument("backbone_or_model")
@click.argument("photos", type=click.Path(exists=True, readable=False))
@click.argument("query", type=click.Path(exists=True, dir_okay=False, readable=False))
@click.option("-n", "--count", type=click.IntRange(1), default=10, show_default=True, help="Photos to find.")
@layers_option
@pooling_option
@with_reading
@with_machine
@with_console
def similar(
    backbone_or_model: str,
    photos: str,
    query: str,
    count: int,
    layers: list[str | int],
    pooling: str | list[str],
    reading: Reading,
    machine: Machine,
    console: Console,
) -> None:
    """Find the photos in PHOTOS that are most like QUERY, by a network or by a model that featx fit wrote.

    Prints cosine distances of features: 0 for the same, 1 for unrelated, 2 for opposite. A model says itself what it
    reads, so that the options for layers, weights and the like are for networks alone. Loading a .joblib model runs
    whatever code it holds: never load one that comes from a stranger.
    """
    found = [path for path in list_photos([photos], console) if not os.path.exists(path) or not _same(path, query)]
    paths = [*found, query]
    if backbone_or_model.lower().endswith(_MODELS):
        refuse_given(
            ["layers", "pooling", "weights", "image_size", "precision", "decode", "pixel_range", "fourth_band"],
            "goes with a network, not with a model",
        )
        rows = features(load_model(backbone_or_model), paths, machine, console)
    else:
        extractor = extractor_for(
            backbone_or_model, reading, machine, console, layers=one_or_list(layers), pooling=pooling
        )
        rows = read_features(extractor, paths, console)
    if reason := next((photo.reason for photo in console.broken if photo.path == query), None):
        raise click.ClickException(f"{shown(query)} cannot be read: {reason}")
    distances = _cosine_distances(rows[:-1], rows[-1])
    nearest = [row for row in np.argsort(distances, kind="stable").tolist() if not np.isnan(distances[row])][:count]
    results = [{"path": shown(found[row]), "distance": float(distances[row])} for row in nearest]
    console.say(table(["distance", "photo"], [[f"{result['distance']:.4f}", result["path"]] for result in results]))
    console.finish_with_photos({"query": shown(query), "results": results}, len(found), len(results))


def _same(path: str, query: str) -> bool:
    return os.path.samefile(path, query)


def _cosine_distances(rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    rows, query = rows.astype(np.float64), query.astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(query)
    return np.clip(1 - rows @ query / np.maximum(lengths, np.finfo(float).tiny), 0, 2)
