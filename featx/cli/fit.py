"""``featx fit``: from a folder of class subfolders to a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
import numpy as np
from sklearn.base import clone
from sklearn.pipeline import Pipeline, make_pipeline

from featx.activations.trying import why_unreadable
from featx.backbones.addresses import path_in
from featx.choosing.probes import learn
from featx.cli.files import OutputFile
from featx.cli.findings import Findings, Photo
from featx.cli.models import SAFE, readable, save_model
from featx.cli.options import (
    Listed,
    Machine,
    Reading,
    backbone_option,
    classes_option,
    example,
    extractor_for,
    pooling_option,
    refuse_given,
    typed_poolings,
    weights_of,
    with_console,
    with_machine,
    with_reading,
)
from featx.cli.outcomes import Console
from featx.cli.photos import list_labelled
from featx.cli.scoring import compute_once, folds_for, scores_of
from featx.estimators.classifier import FineTuneClassifier
from featx.store import FeatureStore, Session

_FOLDS, _FOLDS_TUNED = 5, 3


@click.command(
    short_help="Learn the classes of photos and write a model.", epilog=example("featx fit photos/ -o model.joblib")
)
@click.argument("photos", type=click.Path(exists=True, file_okay=False))
@click.option(
    "-o",
    "--output",
    type=OutputFile(".joblib", SAFE),
    required=True,
    help="File to write: .joblib, or with --fine-tune also .safetensors, from which no code can run.",
)
@classes_option
@backbone_option
@click.option(
    "--layers",
    type=Listed("LAYERS"),
    help="What to choose from, with commas between: penultimate, stage numbers (-1 is the last), names, or all.  "
    "[default: penultimate,-2; with --fine-tune penultimate]",
)
@pooling_option
@with_reading
@click.option(
    "--fine-tune",
    is_flag=True,
    help="Train the network too, not only a classifier on its features: minutes to hours instead of seconds, once per "
    "fold and once for the model.",
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
    help=f"Of the cross-validation.  [default: {_FOLDS}; with --fine-tune {_FOLDS_TUNED}]",
)
@with_machine
@with_console
def fit(
    photos: str,
    output: Path,
    classes: list[str] | None,
    backbone: str,
    layers: list[str | int] | None,
    pooling: str | list[str],
    reading: Reading,
    fine_tune: bool,
    freeze: list[str | int],
    epochs: int | None,
    folds: int | None,
    machine: Machine,
    console: Console,
) -> None:
    """Learn the classes of PHOTOS, a folder with one subfolder per class, and write a model.

    A pretrained network describes each photo, once; a logistic regression learns the classes from that. Layer and
    regularisation are chosen by cross-validation, whose accuracy is printed. It is that of the best of some choices,
    hence a little high; photos that were never shown tell more.
    """
    if output.suffix.lower() == SAFE and not fine_tune:
        raise click.UsageError(f"{SAFE} is expected with --fine-tune only. Name the model .joblib.")
    if not fine_tune:
        refuse_given(["freeze", "epochs"], "goes with --fine-tune only")
    paths, y = list_labelled(photos, classes, console)
    with machine.store() as store:
        if fine_tune:
            params = {
                "layers": _only(layers, "--layers"),
                "freeze": _only(freeze, "--freeze"),
                "epochs": epochs or "auto",
            }
            extra = {**params, "pooling": pooling, "weights": weights_of(reading.weights), **reading.params()}
            tuned = FineTuneClassifier(backbone, random_state=0, **(extra | machine.params(console) | {"cache": store}))
            model, result = _fine_tuned(tuned, paths, y, folds or _FOLDS_TUNED, console)
        else:
            choices = backbone, layers, pooling, reading, machine
            model, result = _on_features(choices, store, paths, y, folds or _FOLDS, console)
        save_model(model, output)
        if not console.quiet:
            _tell_copies(model, paths, y, Session(store), machine, console)
    console.say(f"{_told(result)}\nModel: {output}")
    if os.path.isfile(weights := path_in(weights_of(reading.weights))):
        console.say(f"It reads {weights}, which must stay there.")
    console.advise(f"Next: featx predict {output} FOLDER -o labels.csv")
    console.finish(result | {"model": str(output)}, len(paths))


def _on_features(
    choices: tuple[str, list[str | int] | None, str | list[str], Reading, Machine],
    store: FeatureStore,
    paths: list[str],
    y: np.ndarray,
    n_folds: int,
    console: Console,
) -> tuple[Any, dict[str, Any]]:
    backbone, layers, pooling, reading, machine = choices
    extractor = extractor_for(backbone, reading, machine, console, cache=store, pooling=pooling)
    names, good = compute_once(extractor, layers or _usual_layers(extractor), [pooling], paths, console)
    folds = folds_for(y[good], n_folds)
    kept = [paths[row] for row in good.tolist()]
    scores = scores_of(extractor, [(name, pooling) for name in names], kept, y[good], folds)
    best = max(scores, key=lambda score: score.accuracy)
    rows = extractor.set_params(layers=best.layer).transform(kept)
    learnt = learn(rows, y[good], best.C)
    model = make_pipeline(extractor.set_params(on_error="raise"), *(step for _, step in learnt.steps))
    return model, best.as_dict() | _about(y[good], folds.n_splits, len(scores))


def _usual_layers(extractor: Any) -> list[str | int]:
    several = len(extractor._architecture(extractor._spec()).stages) > 1
    readable = several and not why_unreadable(extractor, -2, [extractor.pooling])
    return ["penultimate", -2] if readable else ["penultimate"]


def _fine_tuned(
    model: FineTuneClassifier, paths: list[str], y: np.ndarray, n_folds: int, console: Console
) -> tuple[Any, dict[str, Any]]:
    good = readable(model, paths, console)
    folds = folds_for(y[good], n_folds)
    kept = np.array([paths[row] for row in good.tolist()], dtype=object)
    found = []
    for number, (learnt, held_out) in enumerate(folds.split(kept, y[good]), 1):
        _announce(f"Fold {number} of {folds.n_splits}", console)
        learner = clone(model).fit(kept[learnt], y[good][learnt])
        found.append(learner.score(kept[held_out], y[good][held_out]))
    _announce("The model, from all photos", console)
    model.fit(kept, y[good])
    scores = np.asarray(found)
    result = {"backbone": model.backbone, "layer": str(model.layers), "pooling": typed_poolings(model.pooling)}
    result |= {"freeze": model.freeze, "epochs": model.n_iter_}
    result |= {"accuracy": float(scores.mean()), "spread": float(scores.std())}
    return model, result | _about(y[good], folds.n_splits, 1)


def _tell_copies(
    model: Any, paths: list[str], y: np.ndarray, session: Session, machine: Machine, console: Console
) -> None:
    """Say in one line how many files were learnt twice, by the digests under which their features are kept."""
    from featx.images.unreadable import threads_for

    broken = {photo.path for photo in console.broken}
    labelled = {path: str(label) for path, label in zip(paths, y, strict=True) if path not in broken}
    first = model[0] if isinstance(model, Pipeline) else model
    digests = session.digests(first._items([*labelled], reset=False), threads_for(machine.n_jobs))
    known = zip(labelled.items(), digests, strict=True)
    photos = [Photo(path, "", label, its) for (path, label), its in known if isinstance(its, bytes)]
    if line := Findings(photos, [], [], [], 0).copies_line():
        console.note(f"{line} (featx check -o FILE lists them).")


def _announce(what: str, console: Console) -> None:
    if console.verbose:  # whose bar comes next
        console.note(what)


def _about(y: np.ndarray, n_folds: int, n_layers: int) -> dict[str, Any]:
    return {"classes": np.unique(y).tolist(), "n_used": len(y), "folds": n_folds, "layers_tried": n_layers}


def _told(result: dict[str, Any]) -> str:
    how = f"C={result['C']:g}" if "C" in result else f"freeze={result['freeze']}, {result['epochs']} epochs"
    return (
        f"{result['n_used']} photos of {len(result['classes'])} classes: {', '.join(result['classes'][:10])}"
        f"{', ...' if len(result['classes']) > 10 else ''}\n"
        f"{result['backbone']}, layer {result['layer']}, {result['pooling']} pooling, {how}\n"
        f"Accuracy {result['accuracy']:.3f} +- {result['spread']:.3f} ({result['folds']}-fold cross-validation)"
    )


def _only(values: list[str | int] | None, option: str) -> str | int:
    first, *more = values or ["penultimate"]
    if more:
        raise click.UsageError(f"One value of {option} is expected with --fine-tune, got {len(more) + 1}.")
    return first
