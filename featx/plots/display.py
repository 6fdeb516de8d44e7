"""What all displays share: an Axes to draw on, text that is shown as it is, and galleries of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from featx.system.compat import root_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.text import Text

# Properties of a text that holds a user's words: a dollar is a dollar, whatever matplotlib is set to.
PLAIN: dict[str, Any] = {"parse_math": False, "usetex": False}
# Characters of a label that fit under a picture.
_MOST_CHARACTERS = 26
# A cell of a gallery: a picture within a unit square, with a margin, and lines of text below.
_PICTURE, _LINE = 0.94, 0.12
# Inches of a cell.
_CELL = 1.9


def check_matplotlib(caller: str, ax: object = None) -> None:
    """Raise where there is no matplotlib, or ``ax`` is not one of its Axes; before anything is computed.

    Raises
    ------
    ImportError
        Says what to install.
    TypeError
    """
    try:
        from matplotlib.axes import Axes
    except ImportError as error:
        raise ImportError(
            f'{caller} requires matplotlib. You can install matplotlib with `pip install "featx[plots]"`'
        ) from error
    if ax is not None and not isinstance(ax, Axes):
        raise TypeError(
            f"A matplotlib Axes or None is expected by {caller}, got ax={ax!r}. Pass the second result of "
            "plt.subplots(), or one entry of it."
        )


class Display:
    """A picture that is drawn by ``plot``.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Where it was drawn.
    figure_ : matplotlib Figure
        What holds the Axes.
    """

    ax_: Axes
    figure_: Figure

    def _begin(self, ax: Axes | None, size: tuple[float, float] | None = None) -> Axes:
        """The Axes to draw on: the one given, or that of a new figure of some size in inches."""
        check_matplotlib(f"{type(self).__name__}.plot", ax)
        import matplotlib.pyplot as plt

        if ax is None:
            ax = plt.subplots(figsize=size, layout="constrained")[1]
        figure = root_figure(ax)
        assert figure is not None
        self.ax_, self.figure_ = ax, figure
        return ax

    def _begin_gallery(self, ax: Axes | None, n: int, n_columns: int, n_lines: int) -> Axes:
        columns = balanced(n, n_columns)
        height = -(-n // columns) * (1 + n_lines * _LINE)
        return self._begin(ax, (max(4.0, columns * _CELL), max(1.5, height * _CELL + 0.3)))


def draw_gallery(
    ax: Axes, pictures: Sequence[np.ndarray], captions: Sequence[str], *, n_columns: int, n_lines: int
) -> tuple[list[AxesImage], list[Text]]:
    """Draw pictures in rows, each with a caption below, on one Axes.

    Parameters
    ----------
    ax : Axes
    pictures : sequence of ndarray of shape (height, width, 3), uint8
    captions : sequence of str
    n_columns : int
        Pictures in a row, at most.
    n_lines : int
        Lines of text that a caption has, at most.

    Returns
    -------
    images : list of AxesImage
    texts : list of Text
    """
    columns, pitch = balanced(len(pictures), n_columns), 1 + n_lines * _LINE
    images, texts = [], []
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        row, column = divmod(i, columns)
        x, bottom = column + 0.5, row * pitch + _PICTURE  # wide pictures stand on their captions too
        height, width = (_PICTURE / max(picture.shape[:2]) * side for side in picture.shape[:2])
        images.append(ax.imshow(picture, extent=(x - width / 2, x + width / 2, bottom, bottom - height)))
        texts.append(ax.text(x, bottom + 0.04, caption, ha="center", va="top", fontsize="small", **PLAIN))
    ax.set(xlim=(0, columns), ylim=(-(-len(pictures) // columns) * pitch or 1, 0), aspect="equal")
    ax.set_axis_off()
    return images, texts


def balanced(n: int, n_columns: int) -> int:
    """Columns of a gallery, at most so many, such that its last row is about as long as the others."""
    n_rows = -(-n // n_columns) or 1
    return -(-n // n_rows) or 1


def draw_legend(ax: Axes, handles: Sequence[Any], labels: Sequence[object], title: str | None = None) -> None:
    """Draw a legend whose labels are a user's words."""
    legend = ax.legend(handles, ["-"] * len(labels), title=title)  # which leaves out, or warns of, some of the words
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.update({**PLAIN, "text": shortened(label)})


def shortened(label: object) -> str:
    """A label in one line that leaves room for others."""
    words = " ".join(str(label).split())
    return words if len(words) <= _MOST_CHARACTERS else f"{words[: _MOST_CHARACTERS - 1]}…"
