"""What releases of the libraries below lack: the one place that goes a second way for some of them.

Each name is the newest release's own where there is one, asked for by what is there and never by version number. What a
release lacks altogether is done without, as the estimators' docstrings say. What torch has for some devices alone lies
in ``devices.py``.
"""

from __future__ import annotations

import inspect
import sys
from collections import UserDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

F = TypeVar("F", bound=Callable[..., Any])

try:  # scikit-learn 1.9
    from sklearn.callback import CallbackSupportMixin, with_callbacks
except ImportError:

    class _NobodyToTell:
        """A callback context without callbacks."""

        def subcontext(self, **_: Any) -> _NobodyToTell:
            return self

        def call_on_fit_task_begin(self, **_: Any) -> None:
            pass

        def call_on_fit_task_end(self, **_: Any) -> bool:
            return False

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """In place of scikit-learn's: fits tell nobody of their epochs, and there is no ``set_callbacks``."""

        def _init_callback_context(self, **_: Any) -> _NobodyToTell:
            return _NobodyToTell()

    def with_callbacks(function: F) -> F:
        """In place of scikit-learn's: the function itself."""
        return function


try:  # scikit-learn 1.7
    from sklearn.utils._repr_html.params import ParamsDict
except ImportError:
    ParamsDict = UserDict  # nobody asks for tables of parameters


def root_figure(ax: Any) -> Figure | None:
    """The figure that matplotlib's axes lie in, that of a subfigure's axes included."""
    try:
        return ax.get_figure(root=True)
    except TypeError:  # matplotlib < 3.10
        return ax.get_figure().figure


def set_blas_threads(library: Any, n_threads: int) -> None:
    """Set how many threads a BLAS library, as threadpoolctl knows it, computes with; any thread may set it again."""
    library.set_num_threads(n_threads)
    # From threadpoolctl 3.8 on what others set is left out in silence, until the thread that set it first lets go.
    let_go = getattr(library, "clear_controlling_thread", None)
    if let_go is not None:
        let_go()


def timm_keeps_whole(kind: type) -> bool:
    """Whether timm, where it is loaded, says of a class of modules that their inside cannot be traced."""
    for place in ("timm.layers", "timm.models._features_fx"):  # where newer releases have it, and older ones
        asked = getattr(sys.modules.get(place), "is_notrace_module", None)
        if asked is not None:
            return bool(asked(kind))
    return False


def exports_graphs() -> bool:
    """Whether torch exports networks to ONNX by way of ``torch.export``, as it does of itself from 2.9 on."""
    from torch.onnx import export

    usual = inspect.signature(export).parameters.get("dynamo")
    return usual is not None and usual.default is True


__all__ = [
    "CallbackSupportMixin",
    "ParamsDict",
    "exports_graphs",
    "root_figure",
    "set_blas_threads",
    "timm_keeps_whole",
    "with_callbacks",
]
