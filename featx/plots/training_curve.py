"""TrainingCurveDisplay: how the loss fell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.utils.validation import check_is_fitted

from featx.plots.display import Display, check_matplotlib, draw_legend
from featx.plots.pictures import network_estimators

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D


class TrainingCurveDisplay(Display):
    """Loss against epoch, with the epoch that was kept.

    Parameters
    ----------
    loss : sequence of float
        Mean loss over each epoch, as trained.
    validation_loss : sequence of float or None, default=None
        Loss on the held-out images after each epoch.
    best_epoch : int or None, default=None
        The one that was kept, counted from 0.

    Attributes
    ----------
    lines_ : list of Line2D
        Of the training loss, and of the validation loss where there is one.
    best_ : Line2D or None
        The vertical line at the epoch that was kept.
    ax_, figure_ : matplotlib Axes and Figure

    Examples
    --------
    >>> from featx.plots import TrainingCurveDisplay
    >>> display = TrainingCurveDisplay([0.9, 0.5, 0.3], validation_loss=[0.8, 0.6, 0.7], best_epoch=1).plot()
    >>> [line.get_label() for line in display.lines_]
    ['training', 'validation']
    """

    lines_: list[Line2D]
    best_: Line2D | None

    def __init__(
        self, loss: Sequence[float], *, validation_loss: Sequence[float] | None = None, best_epoch: int | None = None
    ) -> None:
        self.loss = loss
        self.validation_loss = validation_loss
        self.best_epoch = best_epoch

    @classmethod
    def from_estimator(cls, estimator: Any, *, ax: Axes | None = None) -> TrainingCurveDisplay:
        """Draw the history of a fitted network.

        Parameters
        ----------
        estimator : FineTuneClassifier or FineTuneRegressor, or a fitted pipeline or search that holds one
        ax : matplotlib Axes or None, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        display : TrainingCurveDisplay
        """
        from featx.estimators.fitted import FittedNetwork

        caller = f"{cls.__name__}.from_estimator"
        check_matplotlib(caller, ax)
        found = list(network_estimators(estimator, FittedNetwork).values())
        if len(found) != 1:
            raise TypeError(
                "A FineTuneClassifier or FineTuneRegressor, or a pipeline or search with one, is expected by "
                f"{caller}, got {estimator!r}."
            )
        check_is_fitted(found[0])
        history = found[0].history_
        display = cls(history["loss"], validation_loss=history.get("validation_loss"), best_epoch=found[0].best_epoch_)
        return display.plot(ax)

    def plot(self, ax: Axes | None = None) -> TrainingCurveDisplay:
        """Draw the curves.

        Parameters
        ----------
        ax : matplotlib Axes or None, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        self
        """
        ax = self._begin(ax)
        from matplotlib.ticker import MaxNLocator

        curves = {"training": self.loss, "validation": self.validation_loss}
        self.lines_ = [
            ax.plot(np.arange(len(losses)), losses, marker=".", label=label)[0]
            for label, losses in curves.items()
            if losses is not None
        ]
        self.best_ = None
        if self.best_epoch is not None:
            label = f"kept: epoch {self.best_epoch}"
            self.best_ = ax.axvline(self.best_epoch, color="0.4", linestyle="--", linewidth=1, label=label)
        handles = [*self.lines_, *([] if self.best_ is None else [self.best_])]
        draw_legend(ax, handles, [handle.get_label() for handle in handles])
        ax.set(xlabel="epoch, counted from 0", ylabel="loss")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        return self
