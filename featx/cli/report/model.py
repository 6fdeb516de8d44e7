"""What a report of one model says: how good it is, where it is wrong, and where on those photos it looked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from featx.cli.judged import Judged
from featx.cli.measures import OfClasses
from featx.cli.models import networks_of
from featx.cli.outcomes import Broken
from featx.cli.report.contents import MOST_MISTAKES, Mistake, Picture, name_of, picture_of
from featx.estimators.recipes import Mean
from featx.estimators.transfer import TransferClassifier
from featx.exceptions import LayerError
from featx.plots.pictures import thumbnail

_NO_MAPS = (
    "Where the model looked can be shown of a trained network, and of a linear model on the averages of one layer."
)
_INCHES, _DPI = (3.6, 1.9), 80  # of the maps of one photo


@dataclass(frozen=True)
class ModelReport:
    """What there is to tell of a model.

    Attributes
    ----------
    title : str
    lead : str
        Where the figures come from.
    model : classifier of images
        Fitted.
    judged : Judged
        What it, or others like it, said of photos that they did not learn from.
    measures : OfClasses
    folder : str
        From which on photos are named.
    command : str
    broken : sequence of Broken
    leaderboard : sequence of dict
        What was tried, where there was a search.
    best, chosen : str
        Which of them is taken, and why.
    """

    title: str
    lead: str
    model: Any
    judged: Judged
    measures: OfClasses
    folder: str
    command: str
    broken: Sequence[Broken]
    leaderboard: Sequence[dict[str, Any]] = ()
    best: str = ""
    chosen: str = ""


def mistakes_of(report: ModelReport) -> tuple[list[Mistake], str]:
    """The worst mistakes with their maps; and why there are none, in words."""
    judged, reason = report.judged, ""
    rows = judged.worst(MOST_MISTAKES)
    items = networks_of(report.model)[0]._items([*judged.photos.paths], reset=False, in_full=True)
    found = []
    for row in rows:
        path, true, taken = judged.photos.paths[row], str(judged.photos.y[row]), str(judged.predicted[row])
        name = name_of(path, report.folder)
        of_photo: Picture | None = None
        if not reason:
            try:
                of_photo = picture_of(_maps(report.model, path, [taken, true]), name)
            except (LayerError, TypeError):
                reason = _NO_MAPS
        picture = picture_of(thumbnail(items, row), name)
        found.append(Mistake(picture, true, taken, float(judged.confidence[row]), of_photo))
    return found, reason


def _maps(model: Any, path: str, labels: list[str]) -> np.ndarray:
    """What speaks for some classes on a photo, as a picture (height, width, 3), uint8.

    Raises
    ------
    LayerError, TypeError
        There is nothing in the model that maps can be made of.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, dpi=_DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    _draw_maps(_parts(model), path, labels, figure.subplots())
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _draw_maps(parts: Sequence[Any], path: str, labels: list[str], ax: Any) -> None:
    """Of the first part that has some."""
    from featx.plots import ClassMapDisplay

    for place, part in enumerate(parts):
        known = {str(label): label for label in part.classes_.tolist()}
        try:
            ClassMapDisplay.from_estimator(part, path, [known[label] for label in labels], ax=ax)
            return
        except (LayerError, TypeError):
            if place == len(parts) - 1:
                raise


def _parts(model: Any) -> list[Any]:
    """What decides by itself in a model; of a mean the dearer part first."""
    if isinstance(model, TransferClassifier):
        return _parts(model.estimator_)
    return [part for each in model.estimators[::-1] for part in _parts(each)] if isinstance(model, Mean) else [model]


def basename(folder: str) -> str:
    """The name of a folder, wherever it is."""
    return os.path.basename(os.path.realpath(folder)) or folder
