"""Frames instead of arrays, where ``set_output`` or ``set_config`` asks for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Output:
    """What ``transform`` is to give.

    Attributes
    ----------
    kind : str
        ``"default"`` for arrays, otherwise scikit-learn's word for a kind of frame.
    setting : str
        What to type for it, for messages.
    """

    kind: str
    setting: str

    @classmethod
    def of(cls, estimator: Any) -> Output:
        """Of an estimator: its own, or what holds for all."""
        from sklearn.utils._set_output import _get_output_config

        kind = _get_output_config("transform", estimator)["dense"]
        own = "transform" in getattr(estimator, "_sklearn_output_config", {})
        return cls(kind, f"set_output(transform={kind!r})" if own else f"set_config(transform_output={kind!r})")

    @property
    def in_frames(self) -> bool:
        """Whether columns need names."""
        return self.kind != "default"


def check_has_columns(estimator: Any) -> None:
    """Raise where frames are asked for and an image's features are no row.

    Raises
    ------
    ValueError
    """
    output = Output.of(estimator)
    if output.in_frames and estimator.pooling == "map":
        raise ValueError(
            f'One row of features per image is expected for {output.setting}, got pooling="map". Call '
            'set_output(transform="default") for arrays, or use any other pooling.'
        )
