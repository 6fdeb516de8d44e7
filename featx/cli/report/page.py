"""The report as one HTML file: everything inside, nothing fetched, nothing that runs."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from featx._version import __version__
from featx.cli.found import Found, as_typed
from featx.cli.outcomes import Broken, shown
from featx.cli.report.charts import layer_curve
from featx.cli.report.contents import about_photos, code_of, contents_of
from featx.cli.report.model import ModelReport, basename, mistakes_of
from featx.plots.display import check_matplotlib
from featx.system.writing import replacing

# Rows shown at once; the others are folded.
_MOST_ROWS = 12
# A larger confusion matrix is told as a list of the most frequent confusions.
_MOST_CLASSES, _MOST_PAIRS = 25, 30
_PACKAGES = ("scikit-learn", "torch", "torchvision")


def check_can_report(command: str) -> None:
    """Raise where what draws a report is missing, before anything is computed.

    Raises
    ------
    ImportError
        Says what to install.
    """
    check_matplotlib(command)


def write_report(found: Found, path: Path) -> None:
    """Write what a search found.

    Parameters
    ----------
    found : Found
    path : Path
        A file, which appears whole or not at all.
    """
    page = shown(_template("search.html").render(**_words(found)))  # names of classes, too, may be no text
    with replacing(path) as part:
        part.write_text(page, encoding="utf-8")


def write_model_report(report: ModelReport, path: Path) -> None:
    """Write what there is to tell of one model, in the same way."""
    shown_mistakes, no_maps = mistakes_of(report)
    measures, classes = report.measures, [each.label for each in report.measures.classes]
    words = {
        "title": report.title,
        "lead": report.lead,
        "measures": measures,
        "leaderboard": report.leaderboard,
        "best": report.best,
        "chosen": report.chosen,
        "classes": classes,
        "matrix": _matrix(classes, measures.confusion),
        "confused": measures.confused(_MOST_PAIRS),
        "shown": shown_mistakes,
        "no_maps": no_maps,
        "n_wrong": measures.n_photos - measures.n_right,
        **_lost(report.broken),
        "command": report.command,
        **_date(),
    }
    page = shown(_template("model.html").render(**words))
    with replacing(path) as part:
        part.write_text(page, encoding="utf-8")


def _matrix(classes: Sequence[str], confusion: np.ndarray) -> list[tuple[str, list[tuple[int, float]]]] | None:
    """Numbers and shares of each row; None where there are too many to be seen."""
    rows = zip(classes, confusion, strict=True)
    found = [(label, [(int(n), n / max(1, row.sum())) for n in row]) for label, row in rows]
    return found if len(classes) <= _MOST_CLASSES else None


def _lost(photos: Sequence[Broken]) -> dict[str, Any]:
    """Photos that could not be read, and those that are not used for another reason."""
    return {
        "broken": [(photo.path, photo.reason) for photo in photos if not photo.was_read],
        "unused": [(photo.path, photo.reason) for photo in photos if photo.was_read],
    }


def _date() -> dict[str, Any]:
    versions = [("featx", __version__), *((name, version(name)) for name in _PACKAGES)]
    return {"versions": versions, "date": time.strftime("%Y-%m-%d")}


def _template(name: str) -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("featx.cli.report"),
        autoescape=True,  # names of files and folders are a stranger's words
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _words(found: Found) -> dict[str, Any]:
    contents, classes = contents_of(found), found.classes
    return {
        "folder": basename(found.source.path),
        "best": found.best,
        "ranked": list(enumerate(found.ranked, 1)),
        "n_shown": _MOST_ROWS,
        "n_folds": found.folds.n_splits,
        "photos": about_photos(found),
        "n_photos": len(found.photos.paths),
        **_lost(found.broken),
        "curves": [(name, curve) for name in found.extractors if (curve := _curve(found, name))],
        "classes": classes,
        "matrix": _matrix(classes, contents.confusion),
        "confused": contents.confused(classes, _MOST_PAIRS),
        "contents": contents,
        "efforts": found.efforts,
        "command": as_typed(found.command),
        "next_command": as_typed(found.next_command),
        "code": code_of(found),
        **_date(),
    }


def _limits(found: Found) -> tuple[float, float]:
    """What the accuracy axes of all charts show, so that networks can be compared."""
    low = min(score.accuracy - score.spread for score in found.ranked)
    high = max(score.accuracy + score.spread for score in found.ranked)
    margin = 0.05 * max(high - low, 0.02)
    return low - margin, high + margin


def _curve(found: Found, backbone: str) -> str | None:
    """Address of a chart inside the page; None where there is one layer only."""
    scores = [score for score in found.ranked if score.backbone == backbone]
    extractor = found.extractors[backbone]
    architecture = extractor._architecture(extractor._spec())
    names: Sequence[str] = sorted(
        {score.layer for score in scores}, key=lambda name: architecture.resolve(name)[0].position
    )
    if len(names) < 2:
        return None
    svg = layer_curve(scores, names, _limits(found)).encode()
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
