"""ActivationMapDisplay: where in a photo a layer responds."""

from __future__ import annotations

from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.utils._param_validation import Interval, StrOptions, validate_params

from featx.exceptions import LayerError
from featx.plots.display import PLAIN, Display, check_matplotlib
from featx.plots.pictures import extractor_of, input_of, only
from featx.system.threads import one_thread_after_fork

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage


class ActivationMapDisplay(Display):
    """What a layer puts out, laid over the part of the photo that the network saw.

    Parameters
    ----------
    activation : ndarray of shape (map_height, map_width)
        Each cell lies over its share of the picture.
    picture : ndarray of shape (height, width, 3), uint8
        The network's own input before it was normalised: upright, resized, and cropped to the centre where the
        preprocessing does that.
    title : str, default=""

    Attributes
    ----------
    image_ : AxesImage
        The picture.
    overlay_ : AxesImage
        The activation.
    ax_, figure_ : matplotlib Axes and Figure

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from featx import PretrainedFeatureExtractor
    >>> from featx.plots import ActivationMapDisplay
    >>> extractor = PretrainedFeatureExtractor("featx_micro")
    >>> display = ActivationMapDisplay.from_estimator(extractor, load_digits().images[0] / 16, layer=1)
    >>> display.activation.shape, display.picture.shape
    ((16, 16), (32, 32, 3))
    """

    image_: AxesImage
    overlay_: AxesImage

    def __init__(self, activation: np.ndarray, picture: np.ndarray, *, title: str = "") -> None:
        self.activation = activation
        self.picture = picture
        self.title = title

    @classmethod
    @one_thread_after_fork()
    @validate_params(  # type: ignore[untyped-decorator]
        {
            "layer": [str, Integral],
            "channel": [Interval(Integral, 0, None, closed="left"), StrOptions({"mean", "norm"})],
        },
        prefer_skip_nested_validation=False,
    )
    def from_estimator(
        cls,
        extractor: Any,
        image: Any,
        layer: str | int = -1,
        channel: int | str = "mean",
        *,
        ax: Axes | None = None,
    ) -> ActivationMapDisplay:
        """Send an image through the network, and draw what one layer makes of it.

        Parameters
        ----------
        extractor : PretrainedFeatureExtractor or fitted FineTuneClassifier
            Or a pipeline or search that holds one. Its ``layers``, ``pooling``, ``grid`` and ``normalize`` do not
            matter here.
        image : path, bytes, PIL image, array or tensor
            One image, in a form that X may hold.
        layer : str or int, default=-1
            A stage index or a module's name; the layer must have places (a map or tokens).
        channel : int, "mean" or "norm", default="mean"
            One channel, the mean of all, or the length of the vector at each place.
        ax : matplotlib Axes or None, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        display : ActivationMapDisplay
        """
        caller = f"{cls.__name__}.from_estimator"
        check_matplotlib(caller, ax)
        reader = extractor_of(extractor, caller)
        reader.set_params(layers=layer, pooling="map", normalize=None, on_error="raise", views=None)
        reader.set_output(transform="default")  # maps fit into no frame
        X = only(image, reader)
        places = reader._architecture(reader._spec(), reader._items(X, reset=False)).resolve(layer)
        if len(places) != 1:
            raise LayerError(f"One layer is expected by {caller}, got layer={layer!r}. Name one of its stages.")
        values = reader.transform(X)[0]  # (height, width, channels)
        title = f"{places[0].label}, {channel if isinstance(channel, str) else f'channel {channel}'}"
        return cls(_of_channel(values, channel), input_of(reader, X)[0], title=title).plot(ax)

    def plot(self, ax: Axes | None = None, *, alpha: float = 0.8, cmap: Any = "inferno") -> ActivationMapDisplay:
        """Draw the picture, and the activation over it.

        Parameters
        ----------
        ax : matplotlib Axes or None, default=None
            Where to draw; None makes a figure.
        alpha : float, default=0.8
            How much of the picture the strongest response hides, from 0 to 1; the weakest hides nothing.
        cmap : str or Colormap, default="inferno"
            Colours of the activation, from its least to its largest value.

        Returns
        -------
        self
        """
        ax = self._begin(ax, (4.5, 4.8))
        height, width = self.picture.shape[:2]
        extent = (-0.5, width - 0.5, height - 0.5, -0.5)
        self.image_ = ax.imshow(self.picture, extent=extent)
        low, high = self.activation.min(), self.activation.max()
        strength = (self.activation - low) / (high - low) if high > low else np.zeros_like(self.activation)
        self.overlay_ = ax.imshow(
            self.activation, extent=extent, alpha=alpha * strength, cmap=cmap, interpolation="bilinear"
        )
        ax.set_title(self.title, fontsize="medium", **PLAIN)
        ax.set_axis_off()
        return self


def _of_channel(values: np.ndarray, channel: int | str) -> np.ndarray:
    if channel == "mean":
        return values.mean(axis=2)
    if channel == "norm":
        return np.linalg.norm(values, axis=2)
    if int(channel) >= values.shape[2]:
        raise ValueError(f"A channel from 0 to {values.shape[2] - 1} is expected, got channel={channel}.")
    return values[:, :, int(channel)]
