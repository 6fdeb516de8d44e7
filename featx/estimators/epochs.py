"""Epochs of a fit, as scikit-learn's callbacks and a progress bar are told of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sklearn.base import clone
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from featx.training.loop import History
    from featx.training.model import Tensors
    from featx.training.targets import Meaning


class EpochWatch:
    """Tells scikit-learn's callbacks of every epoch, and shows them in a progress bar."""

    def __init__(
        self, estimator: Any, meaning: Meaning, epochs: int, shape: tuple[int, int, int], X: Any, y: Any
    ) -> None:
        self._estimator, self._meaning, self._shape, self._given = estimator, meaning, shape, {"X": X, "y": y}
        self._context = estimator._init_callback_context(max_subtasks=epochs)
        self._bar = tqdm(total=epochs, unit="epoch", desc="epochs", disable=not estimator.verbose)

    def __enter__(self) -> EpochWatch:
        self._context.call_on_fit_task_begin(estimator=self._estimator, **self._given)
        self._begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.close()
        if kind is None:
            self._context.call_on_fit_task_end(estimator=self._estimator, **self._given, reconstruction_attributes=dict)

    def after_epoch(self, history: History, tensors: Callable[[], Tensors]) -> bool:
        """Tell of an epoch that ended; whether the fit is to stop."""

        def fitted() -> dict[str, Any]:
            done = clone(self._estimator)
            done._set_fitted(self._meaning, tensors(), history, self._shape, goes_on=False)
            return {name: value for name, value in vars(done).items() if name not in done.get_params(deep=False)}

        self._bar.set_postfix(loss=history.columns["loss"][-1])
        self._bar.update()
        if self._estimator._each_epoch is not None:
            self._estimator._each_epoch(history.n_epochs, self._bar.total)
        stop = self._epoch.call_on_fit_task_end(
            estimator=self._estimator, **self._given, reconstruction_attributes=fitted
        )
        if not stop and history.n_epochs < self._bar.total:
            self._begin()
        return bool(stop)

    def _begin(self) -> None:
        self._epoch = self._context.subcontext(task_name="epoch")
        self._epoch.call_on_fit_task_begin(estimator=self._estimator, **self._given)
