"""What a fitted network does: outputs, features, files, and copies of itself."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from dataclasses import replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from sklearn.base import TransformerMixin
from sklearn.utils.validation import _check_feature_names_in, check_is_fitted

from featx.backbones.addresses import plain_address
from featx.estimators.base import NetworkEstimator
from featx.images.sources import Items
from featx.system.locks import ForkSafeLock
from featx.system.pickling import portable

if TYPE_CHECKING:
    from featx.activations.extraction import Extraction
    from featx.activations.plan import FeaturePlan
    from featx.estimators.extractor import PretrainedFeatureExtractor
    from featx.training.fitting import Source
    from featx.training.loop import Settings
    from featx.training.model import Model, Tensors
    from featx.training.targets import Meaning
    from featx.training.tuned import TunedNetwork

# Parameters that decide what a fitted network is.
_DECIDING = (
    *("backbone", "weights", "layers", "pooling", "grid", "normalize", "preprocess", "image_size", "image_shape"),
    *("pixel_range", "fourth_band", "decode", "freeze", "hidden_layer_sizes", "random_state"),
)
# Not for strangers: where this machine keeps things, and what opens its doors.
_OF_THIS_MACHINE = ("cache", "device", "engine", "n_jobs", "storage_options", "verbose")
_AT_ONCE = 4096  # images whose features are held where several views are averaged
_BUILDING = ForkSafeLock()


class FittedNetwork(TransformerMixin, NetworkEstimator):  # type: ignore[misc]
    """An estimator whose last fit has left changed tensors behind."""

    _saved_as: ClassVar[str]  # the estimator that a file is of

    def _meaning(self) -> Meaning:
        """What the outputs of the last fit stand for."""
        raise NotImplementedError

    def _set_meaning(self, meaning: Any) -> None:
        raise NotImplementedError

    @staticmethod
    def _meaning_of(stored: dict[str, Any]) -> Meaning:
        """What ``Meaning.to_json`` has made."""
        raise NotImplementedError

    def _settings(self, model: Model) -> Settings:
        raise NotImplementedError

    def _be_fitted(
        self,
        meaning: Meaning,
        tensors: Tensors,
        history: dict[str, list[float]],
        best_epoch: int,
        shape: tuple[int, int, int] | None,
    ) -> None:
        """All that fitting with the present parameters leaves behind, `n_features_in_` and names apart."""
        self._set_meaning(meaning)
        self._shape = shape
        self.tensors_, self.history_, self.best_epoch_ = tensors, history, best_epoch
        self.n_iter_ = len(history["loss"])
        self._made_with = {name: getattr(self, name) for name in _DECIDING}
        self._runtime: dict[str, Any] = {}  # what predicts, once it was asked to

    def _as_fitted(self) -> Self:
        """With the parameters of the last fit, where they decide what was fitted: changed ones are for the next."""
        check_is_fitted(self)
        fitted = copy.copy(self)
        fitted.__dict__.update(self._made_with, _runtime=self._runtime)  # a copy begins without what it has built
        return fitted

    def _outputs(self, X: Any, *, scores: bool) -> np.ndarray:
        from featx.training.finite import check_outputs

        self._validate_params()
        items = self._items(X, reset=False)
        readable = self._readable(items, "; their rows are NaN.")
        if not len(readable):
            raise ValueError("At least one readable image is expected, got none.")
        model = self._model(items)
        network = self._network(model)
        source = self._source(items.take(readable.tolist()), model, self.on_error, self.engine)
        found = self._found(source, model, network, scores)
        check_outputs(
            found,
            source.items,
            source.preprocessing,
            model,
            self.tensors_,
            precision=self.precision,
            on_error=self.on_error,
        )
        items.reading.seen.tell()
        out = np.full((len(items), *found.shape[1:]), np.nan, dtype=np.float32)
        out[readable] = found
        return out

    def _found(self, source: Source, model: Model, network: TunedNetwork, scores: bool) -> np.ndarray:
        """Scores, or what the head reads, of all images; of several views the head reads the average."""
        settings = self._settings(model)
        if self.views is None:
            return source.outputs(model, network.scores if scores else network.features, settings)
        from featx.images.augmentation import mirrored

        parts = []
        for start in range(0, len(source.items), _AT_ONCE):
            plain = source.items[start : start + _AT_ONCE]
            views = [replace(source, items=items) for items in (plain, mirrored(plain))]
            rows = np.mean([view.outputs(model, network.features, settings) for view in views], axis=0)
            parts.append(network.scores_of(rows) if scores else rows)
        return np.concatenate(parts)

    def _shared_params(self, names: Iterable[str]) -> dict[str, Any]:
        """Parameters of an extractor that has the tuned network."""
        from featx.backbones.weights import preset_name
        from featx.system.devices import HOST, move

        model = self._model(None)
        mine = self.get_params(deep=False)
        shared = {name: mine[name] for name in names if name in mine}
        shared["random_state"] = model.spec.seed
        module = model.build(self.tensors_).module
        if module is not None:
            shared |= {"backbone": move(module, HOST), "weights": "DEFAULT", "pooling": model.plan.pooling}
            if self.preprocess == "weights":
                shared["preprocess"] = preset_name(model.spec.backbone, model.spec.weights)
            if self.layers != "penultimate":
                shared["layers"] = model.plan.layers[0].label
        return shared

    def _model(self, items: Items | None) -> Model:
        """What the last fit has trained; the same object while the shape of the images is."""
        with _BUILDING.held():
            runtime = self._runtime
            known: Model | None = runtime.get("model")
            if known is None or not self._still_fits(known, items):
                runtime.clear()
                known = runtime["model"] = self._new_model(items, self._meaning().n_outputs)
            return known

    def _still_fits(self, model: Model, items: Items | None) -> bool:
        if model.device != self._device():
            return False
        return items is None or model.architecture.shape == self._architecture(model.spec, items).shape

    def _new_model(self, items: Items | None, n_outputs: int) -> Model:
        """The network with its head, as the parameters say."""
        from featx.activations.plan import FeaturePlan
        from featx.training.model import Model
        from featx.training.split import split_of

        if self.pooling == "map":
            raise ValueError('One row per image is expected, got pooling="map". Use any other pooling.')
        hidden = [self.hidden_layer_sizes] if isinstance(self.hidden_layer_sizes, Integral) else self.hidden_layer_sizes
        if not all(isinstance(width, Integral) and int(width) >= 1 for width in hidden):
            raise ValueError(f"Widths of 1 or more are expected, got hidden_layer_sizes={self.hidden_layer_sizes!r}.")
        spec = self._spec()
        # Without images, those that the last fit has seen: what preprocess makes may be all that the network takes.
        architecture = self._architecture(spec, items, getattr(self, "_shape", None) if items is None else None)
        attach, *more = architecture.resolve(self.layers)
        if more:
            raise ValueError(f"One layer for the head is expected, got layers={self.layers!r}. Name one of its stages.")
        return Model(
            spec,
            architecture,
            FeaturePlan.of((attach,), self.pooling, self.grid, self.normalize, architecture.usual_poolings),
            split_of(spec, architecture, attach, self.freeze),
            hidden=tuple(map(int, hidden)),
            dropout=float(self.dropout),
            n_outputs=n_outputs,
            batch_norm=self.batch_norm,
            device=self._device(),
        )

    def _device(self) -> str:
        from featx.system.devices import resolve_device

        return resolve_device(self.device)

    def _network(self, model: Model) -> TunedNetwork:
        with _BUILDING.held():
            runtime = self._runtime
            known: tuple[Model, Tensors, TunedNetwork] | None = runtime.get("network")
            # Another thread's images may have another shape, and a user may put other tensors in place of these.
            if known is None or known[0] is not model or known[1] is not self.tensors_:
                network = model.build(self.tensors_).network(False)
                known = runtime["network"] = model, self.tensors_, network
            return known[2]

    def _source(self, items: Items, model: Model, on_error: str, engine: str) -> Source:
        from featx.training.fitting import Source

        def extract(items: Items, plan: FeaturePlan) -> Extraction:
            extraction = self._extraction_of(items, model.spec, model.architecture, plan)
            # Of rows that are not finite the estimator tells itself.
            extraction = replace(extraction.with_engine(engine), on_error=on_error, warns=False)
            if items.is_keyed:
                return extraction
            return extraction.without_store(
                "augment is a callable without an attribute cache_key, a text that says "
                "what it does and is changed with it"
            )

        return Source(items, self._preprocessing(model.spec), self.n_jobs, extract)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what was fitted as safetensors with JSON inside, in which nothing can run.

        Parameters
        ----------
        path : str or path
            File to write, usually ``.safetensors``. It holds the parameters (without ``cache``, ``device``, ``engine``,
            ``n_jobs``, ``storage_options`` and ``verbose``), what outputs stand for and what training changed; a frozen
            front is loaded again from ``weights``.

        Raises
        ------
        TypeError
            A parameter is a module or a callable, or labels are neither numbers nor texts.
        """
        from featx.training.sharing import save_fitted

        check_is_fitted(self)
        given = self.get_params(deep=False) | self._made_with
        params = {name: value for name, value in given.items() if name not in _OF_THIS_MACHINE}
        params["weights"] = plain_address(given["weights"])
        about = {
            "estimator": self._saved_as,
            "params": params,
            **self._meaning().to_json(),
            "history": self.history_,
            "best_epoch": self.best_epoch_,
            "shape": getattr(self, "_shape", None),  # of a fit with an earlier version there is none
            "n_features": getattr(self, "n_features_in_", None),
            "feature_names": [*getattr(self, "feature_names_in_", ())],
        }
        save_fitted(path, self.tensors_, about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """A fitted estimator from a file that :meth:`save` wrote.

        Parameters
        ----------
        path : str or path

        Returns
        -------
        fitted : an estimator of this class

        Raises
        ------
        WeightsError
            The file is something else.
        """
        from featx.training.sharing import load_fitted

        tensors, about = load_fitted(path, cls._saved_as)
        loaded = cls(**about["params"])
        shape = None if about.get("shape") is None else tuple(about["shape"])
        loaded._be_fitted(cls._meaning_of(about), tensors, about["history"], about["best_epoch"], shape)
        if about["n_features"] is not None:
            loaded.n_features_in_ = about["n_features"]
        if names := about.get("feature_names"):  # files of earlier versions have none
            loaded.feature_names_in_ = np.asarray(names, dtype=object)
        return loaded

    def transform(self, X: Any) -> np.ndarray:
        """Features that the head reads, from the tuned network.

        Parameters
        ----------
        X : array-like of n images
            As in :meth:`fit`.

        Returns
        -------
        features : ndarray of shape (n, n_features), float32
        """
        return self._as_fitted()._outputs(X, scores=False)

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Names of the columns of :meth:`transform`, as in :class:`PretrainedFeatureExtractor`."""
        fitted = self._as_fitted()
        if hasattr(self, "n_features_in_"):
            _check_feature_names_in(self, input_features)
        return fitted._model(None).plan.names()

    def to_extractor(self) -> PretrainedFeatureExtractor:
        """A transformer that gives the features of the tuned network.

        Returns
        -------
        extractor : PretrainedFeatureExtractor
            With the tuned network as its ``backbone``, and otherwise the same parameters.
        """
        from featx.estimators.extractor import PretrainedFeatureExtractor

        return PretrainedFeatureExtractor(**self._as_fitted()._shared_params(PretrainedFeatureExtractor().get_params()))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    def _state(self) -> dict[str, Any]:
        state = super()._state()
        return state | {"_runtime": {}} if "_runtime" in state else state

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        if "tensors_" not in state:
            return state
        from featx.training.sharing import as_arrays

        made_with = {name: portable(name, value) for name, value in state["_made_with"].items()}
        return state | {"_runtime": {}, "_made_with": made_with, "tensors_": as_arrays(state["tensors_"])}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if hasattr(self, "tensors_"):
            from featx.training.sharing import as_tensors

            self.tensors_ = as_tensors(self.tensors_)
