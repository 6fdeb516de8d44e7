"""What a notebook shows of an estimator beside what scikit-learn shows: the network's stages, folded."""

from __future__ import annotations

import copy
import html
from typing import TYPE_CHECKING

from featx.system.compat import ParamsDict

if TYPE_CHECKING:
    from featx.backbones.layers import Architecture

# The classes are those of scikit-learn's style sheet, which stands in the same page.
_TABLE = """
        <div class="estimator-table">
            <details>
                <summary>Stages of {model} at {height} x {width} pixels</summary>
                <table class="parameters-table">
                    <tbody>
                        <tr><th>layers=</th><th>Name</th><th>Channels</th><th>Reduction</th><th>Cells</th></tr>
                        {rows}
                    </tbody>
                </table>
            </details>
        </div>
"""
_ROW = (
    '<tr class="default"><td>{index}</td><td>{name}</td><td>{channels}</td><td>1/{reduction}</td>'
    "<td>{height} x {width}</td></tr>"
)


class _ParamsAndStages(ParamsDict):  # type: ignore[misc]
    """scikit-learn's table of parameters, with a second one below."""

    stages = ""

    def _html_repr(self) -> str:
        return super()._html_repr() + self.stages


def with_stages(params: ParamsDict, architecture: Architecture) -> ParamsDict:
    """Parameters as scikit-learn shows them, and the stages of a network.

    Parameters
    ----------
    params : ParamsDict
        From BaseEstimator's ``_get_params_html``.
    architecture : Architecture

    Returns
    -------
    ParamsDict
        The same mapping; only what it looks like differs.
    """
    shown = copy.copy(params)  # whose constructor differs between releases
    shown.__class__ = _ParamsAndStages
    shown.stages = _stages_html(architecture)
    return shown


def _stages_html(architecture: Architecture) -> str:
    _, height, width = architecture.shape
    rows = []
    for index, layer in enumerate(map(architecture.layer, architecture.stages)):
        cells = layer.spatial
        name, reduction = html.escape(layer.name), round(height / cells[0])
        rows.append(
            _ROW.format(
                index=index,
                name=name,
                channels=layer.channels,
                reduction=reduction,
                height=cells[0],
                width=cells[1],
            )
        )
    return _TABLE.format(model=html.escape(architecture.model), height=height, width=width, rows="\n".join(rows))
