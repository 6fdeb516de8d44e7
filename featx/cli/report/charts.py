"""Charts as SVG that follows the reader's light or dark mode."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from featx.cli.scoring import Score
from featx.plots import LayerScoreDisplay

# Matplotlib writes colours into the file; this one stands for the text's own.
_INK = "#0a0b0c"
_INK_SETTINGS = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
_STYLE = "<style>svg{color:#1c2330}@media(prefers-color-scheme:dark){svg{color:#e4e8ee}}</style>"
_INCHES = (4.8, 3.2)


def layer_curve(scores: Sequence[Score], names: Sequence[str], limits: tuple[float, float]) -> str:
    """Accuracy against layer, one line for each pooling.

    Parameters
    ----------
    scores : sequence of Score
        All of one network.
    names : sequence of str
        Its layers, from input to output.
    limits : (float, float)
        Of the axis of accuracy.

    Returns
    -------
    str
        A whole SVG file.
    """
    from matplotlib import rc_context, rcParamsDefault
    from matplotlib.figure import Figure

    poolings = list(dict.fromkeys(score.pooling for score in sorted(scores, key=lambda score: score.pooling)))
    values = np.full((len(poolings), len(names), len(scores[0].fold_accuracies)), np.nan)
    for score in scores:
        values[poolings.index(score.pooling), names.index(score.layer)] = score.fold_accuracies
    look: Any = dict.fromkeys(_INK_SETTINGS, _INK) | {"svg.fonttype": "none", "font.family": "sans-serif"}
    usual: Any = {name: value for name, value in rcParamsDefault.items() if not name.startswith("backend")}
    with rc_context(usual | look | {"legend.frameon": False}):  # whatever the user's own settings are
        figure = Figure(figsize=_INCHES, layout="constrained")
        ax = figure.subplots()
        LayerScoreDisplay(names, poolings, values, score_name="accuracy").plot(ax)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.25, color=_INK)
        ax.set_ylim(*limits)
        return _as_svg(figure)


def _as_svg(figure: Any) -> str:
    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    _, start, rest = file.getvalue().partition("<svg")
    head, end, body = rest.partition(">")
    return start + head + end + _STYLE + re.sub(_INK, "currentColor", body)
