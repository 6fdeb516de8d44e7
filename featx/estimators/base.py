"""What all estimators share: images in, a network, and where features are kept."""

from __future__ import annotations

import os
from numbers import Integral
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils import check_array
from sklearn.utils._param_validation import Interval, Options, StrOptions
from sklearn.utils.validation import validate_data

from featx.exceptions import REMOVE_IT
from featx.images.sources import Items, as_items
from featx.store import FeatureStore, resolve_store
from featx.system.compat import CallbackSupportMixin
from featx.system.pickling import PortablePickles
from featx.system.threads import ForkSafeMethods, one_thread_after_fork

if TYPE_CHECKING:
    from featx.activations.extraction import Extraction
    from featx.activations.plan import FeaturePlan
    from featx.backbones.layers import Architecture
    from featx.backbones.networks import NetworkSpec
    from featx.images.preprocessing import Preprocessing


class NetworkEstimator(ForkSafeMethods, PortablePickles, CallbackSupportMixin, BaseEstimator):  # type: ignore[misc]
    """An estimator on images and a pretrained network."""

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "backbone": [str, callable],
        "weights": [str, os.PathLike, tuple, list, None],
        "layers": [str, Integral, list, tuple, np.ndarray],
        "pooling": [StrOptions({"auto", "avg", "max", "gem", "cls", "flatten", "map"}), list, tuple],
        "grid": [Interval(Integral, 1, None, closed="left")],
        "normalize": [StrOptions({"l2", "signed-sqrt"}), None],
        "image_shape": [tuple, list, None],
        "pixel_range": [StrOptions({"auto"}), tuple, list],
        "fourth_band": [StrOptions({"alpha", "ignore"})],
        "preprocess": [str, callable, None],
        "image_size": [Interval(Integral, 1, None, closed="left"), None],
        "decode": [StrOptions({"exact", "fast"})],
        "max_pixels": [Interval(Integral, 1, None, closed="left")],
        "on_error": [StrOptions({"raise", "nan"})],
        "storage_options": [dict, None],
        "views": [StrOptions({"flip"}), None],
        "device": [str, None],
        "precision": [StrOptions({"float32", "bfloat16", "float16"})],
        "engine": [StrOptions({"auto", "torch", "onnx"})],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "n_jobs": [Interval(Integral, 1, None, closed="left"), Interval(Integral, None, -1, closed="right"), None],
        "cache": [None, Options(bool, {True}), str, os.PathLike, FeatureStore],
        "verbose": ["verbose"],
    }

    # What to do about an unreadable image under on_error="raise".
    _way_out: ClassVar[str] = (
        'Remove it (featx.find_unreadable lists all such rows), or set on_error="nan" for a row of NaN, which most '
        "estimators refuse."
    )
    _param_names: ClassVar[list[str]]

    @classmethod
    def _get_param_names(cls) -> list[str]:
        if "_param_names" not in cls.__dict__:  # a grid search asks for them thousands of times
            cls._param_names = super()._get_param_names()
        return [*cls._param_names]

    def _items(self, X: Any, *, reset: bool, in_full: bool = False) -> Items:
        if self.image_shape is not None:
            X = self._checked_rows(X, reset)
        elif reset:
            self._forget_columns()
        return as_items(
            X,
            image_shape=self.image_shape,
            pixel_range=self.pixel_range,
            fourth_band=self.fourth_band,
            full_depth=callable(self.preprocess),
            max_pixels=self.max_pixels,
            raw=self.preprocess is None,
            short_side=None if in_full or self.decode == "exact" else self._short_side(),
            storage_options=self.storage_options,
            remedy=self._way_out if self.on_error == "raise" else REMOVE_IT,
        )

    def _checked_rows(self, X: Any, reset: bool) -> np.ndarray:
        """A 2-D X as an array; its columns are compared with those of the last fit, where there was one."""
        how = {"dtype": "numeric", "ensure_all_finite": self.on_error == "raise"}
        if reset or hasattr(self, "n_features_in_"):
            return validate_data(self, X, reset=reset, **how)
        return check_array(X, estimator=self, input_name="X", **how)

    def _readable(self, items: Items, consequence: str) -> np.ndarray:
        """Rows of the images that can be read; all of them where others are to raise."""
        if self.on_error == "raise":
            return np.arange(len(items))
        from featx.activations.engine import n_threads
        from featx.images.unreadable import readable_rows

        return np.asarray(readable_rows(items, n_threads(self.n_jobs), consequence), dtype=int)

    @one_thread_after_fork()  # scikit-learn copies modules
    def __sklearn_clone__(self) -> Any:
        return super().__sklearn_clone__()

    def _forget_columns(self) -> None:
        """What an earlier fit on rows learned."""
        for name in ("n_features_in_", "feature_names_in_"):
            self.__dict__.pop(name, None)

    def _short_side(self) -> int | None:
        """Pixels of an image's shorter side that the preprocessing needs; None where that is not known."""
        from featx.images.preprocessing import Preset

        preprocessing = self._preprocessing(self._spec())
        return preprocessing.resize if isinstance(preprocessing, Preset) else None

    def _spec(self) -> NetworkSpec:
        from featx.backbones.networks import network_spec

        seed = self.random_state if isinstance(self.random_state, Integral) else 0
        return network_spec(self.backbone, self.weights, int(seed), self.image_size)

    def _preprocessing(self, spec: NetworkSpec) -> Preprocessing:
        from featx.backbones.weights import preset_named
        from featx.images.preprocessing import CustomPreprocessing

        if not isinstance(self.preprocess, str):
            return CustomPreprocessing(self.preprocess)
        preset = spec.preset if self.preprocess == "weights" else preset_named(self.preprocess)
        return preset.scaled(self.image_size)

    @one_thread_after_fork()
    def _architecture(
        self, spec: NetworkSpec, items: Items | None = None, shape: tuple[int, int, int] | None = None
    ) -> Architecture:
        """What can be read from images of the shape that preprocessing makes; a user's own as given, or seen on X."""
        from featx.images.loading import shape_of_first
        from featx.images.preprocessing import Preset

        preprocessing = self._preprocessing(spec)
        if isinstance(preprocessing, Preset):
            return spec.architecture((3, preprocessing.crop, preprocessing.crop))
        if shape is not None:
            return spec.architecture(shape)
        if items is not None:
            return spec.architecture(shape_of_first(items, preprocessing.tile))
        return spec.architecture(None if self.image_size is None else spec.square(self.image_size))

    def _extraction_of(
        self, items: Items, spec: NetworkSpec, architecture: Architecture, plan: FeaturePlan, views: str | None = None
    ) -> Extraction:
        from featx.activations.engine import Recipe
        from featx.activations.extraction import Extraction
        from featx.system.devices import resolve_device

        device = resolve_device(self.device)
        recipe = Recipe(spec, architecture, self._preprocessing(spec), plan, device, self.precision, self.engine)
        return Extraction(
            items,
            recipe,
            store=resolve_store(self.cache),
            max_pixels=self.max_pixels,
            batch_size=self.batch_size,
            n_jobs=self.n_jobs,
            on_error=self.on_error,
            verbose=self.verbose,
            views=views,
        )

    def _get_params_html(self, *args: Any, **given: Any) -> Any:
        """The table of parameters that notebooks show, with the network's stages below where they cost nothing."""
        params = super()._get_params_html(*args, **given)
        try:
            from featx.estimators.notebook import with_stages

            spec = self._spec()
            # A callable would have to be called, and a foreign module may have to be run on real images.
            return with_stages(params, self._architecture(spec)) if spec.backbone.named else params
        except Exception:  # wrong parameters are for fit to tell
            return params

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = self.image_shape is not None
        tags.input_tags.three_d_array = self.image_shape is None
        tags.input_tags.string = self.image_shape is None
        tags.input_tags.allow_nan = self.on_error == "nan"
        return tags
