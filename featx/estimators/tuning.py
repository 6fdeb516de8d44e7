"""From parameters, images and labels to a tuned network, and from that to scores."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import _check_sample_weight, check_consistent_length, check_is_fitted

from featx.backbones.addresses import plain_address
from featx.estimators.base import NetworkEstimator
from featx.estimators.epochs import EpochWatch
from featx.images.sources import Items
from featx.system.locks import ForkSafeLock
from featx.system.pickling import portable

if TYPE_CHECKING:
    from featx.activations.extraction import Extraction
    from featx.activations.plan import FeaturePlan
    from featx.training.fitting import Recipe, Source
    from featx.training.loop import History, Settings
    from featx.training.model import Model, Tensors
    from featx.training.targets import Labels, Targets
    from featx.training.tuned import TunedNetwork

# Training that is neither too short for fifty images nor too long for fifty thousand.
_AUTO_STEPS, _FEWEST_EPOCHS, _MOST_EPOCHS = 300, 4, 30
# Chosen by benchmarks/accuracy.md: few images are best served near the probe, more of them pay for larger steps; a head
# that starts at random needs large ones in any case. Of AdamW and Adam; SGD takes ten times as much.
_RATE, _SGD_FACTOR = 1e-3, 10.0
_RATE_PER_ROOT, _LEAST_FROM_PROBE, _MOST_FROM_PROBE = 1e-5, 1e-4, 3e-4
_PROBE_C = 0.01
# Parameters that decide what a fitted network is.
_DECIDING = (
    *("backbone", "weights", "layers", "pooling", "grid", "normalize", "preprocess", "image_size", "image_shape"),
    *("pixel_range", "fourth_band", "decode", "freeze", "hidden_layer_sizes", "random_state"),
)
# Not for strangers: where this machine keeps things, and what opens its doors.
_OF_THIS_MACHINE = ("cache", "device", "engine", "n_jobs", "storage_options", "verbose")
# What torch says where BatchNorm has nothing to take a variance of.
_OF_ONE_VALUE = "Expected more than 1 value per channel when training"
_BUILDING = ForkSafeLock()


class TunedEstimator(NetworkEstimator):
    """An estimator with the parameters of FineTuneClassifier."""

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **NetworkEstimator._parameter_constraints,
        "layers": [str, Integral],
        "freeze": [Integral, str],
        "hidden_layer_sizes": ["array-like", Interval(Integral, 1, None, closed="left")],
        "dropout": [Interval(Real, 0, 1, closed="left")],
        "linear_probe": ["boolean", Interval(Real, 0, None, closed="neither")],
        "epochs": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "optimizer": [StrOptions({"adamw", "adam", "sgd"})],
        "learning_rate": [Interval(Real, 0, None, closed="neither"), StrOptions({"auto"})],
        "layer_decay": [Interval(Real, 0, 1, closed="right")],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "lr_schedule": [StrOptions({"cosine", "linear", "constant"})],
        "warmup": [Interval(Real, 0, 1, closed="left")],
        "max_grad_norm": [Interval(Real, 0, None, closed="neither"), None],
        "label_smoothing": [Interval(Real, 0, 1, closed="left")],
        "mixup": [Interval(Real, 0, None, closed="left")],
        "ema": [Interval(Real, 0, 1, closed="neither"), None],
        "augment": [StrOptions({"flip", "crop", "color"}), callable, None],
        "augment_views": [Interval(Integral, 0, None, closed="left")],
        "batch_norm": [StrOptions({"frozen", "train"})],
        "class_weight": [dict, list, StrOptions({"balanced"}), None],
        "early_stopping": ["boolean"],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
        "warm_start": ["boolean"],
        "random_state": ["random_state"],
    }

    _way_out = (
        'Remove it (featx.find_unreadable lists all such rows), or set on_error="nan": fit leaves it out, '
        "predict_proba gives NaN."
    )

    def _train(
        self, items: Items, labels: Labels, sample_weight: Any, start: Tensors | None, given: Any, once: bool = False
    ) -> None:
        import torch

        from featx.training.fitting import fit

        check_consistent_length(range(len(items)), labels.codes)
        weights = _check_sample_weight(sample_weight, range(len(items)), dtype=np.float64, ensure_non_negative=True)
        rows = np.flatnonzero(weights > 0)
        rows = rows[self._readable(items.take(rows.tolist()), " and are left out.")]
        if not len(rows):
            raise ValueError("At least one readable image that weighs something is expected, got none.")
        random = check_random_state(self.random_state)
        seed = int(random.randint(2**31 - 1))
        if once and start is not None:  # other views, another order than in the call before
            seed = (seed + self.n_iter_) % 2**31
        model = self._new_model(items, len(labels.classes))
        training, held_out = rows, None
        if self.early_stopping and not once:
            training, held_out = self._hold_out(rows, labels, seed)
        recipe = self._recipe(model, len(training), seed, once)
        engine = "torch" if self.engine == "auto" and isinstance(self.random_state, Integral) else self.engine
        source = self._source(items, model, "raise", engine)  # unreadable images are left out by now

        def part(rows: np.ndarray) -> tuple[Source, Targets]:
            return source.take(rows), labels.targets(rows, self.class_weight, weights)

        shape = model.architecture.shape
        with EpochWatch(self, labels, recipe.settings.epochs, shape, *given) as watch:
            with self._in_words(model.device), torch.inference_mode(False), torch.enable_grad():
                fitted = fit(
                    model,
                    *part(training),
                    recipe,
                    start=start,
                    validation=None if held_out is None else part(held_out),
                    after_epoch=watch.after_epoch,
                )
            self._set_fitted(labels, fitted.tensors, fitted.history, shape, goes_on=once and start is not None)
        items.reading.seen.tell()

    @contextmanager
    def _in_words(self, device: str) -> Iterator[None]:
        """What torch says of too little memory or too small batches, in words that help; memory is given back."""
        from featx.system.devices import give_back, in_memory

        advice = (
            f'Lower batch_size, or freeze more than freeze={self.freeze!r}; precision="bfloat16" halves most of it.'
        )
        try:
            with in_memory(device, f"batch_size={self.batch_size}", advice):
                yield
        except ValueError as error:
            if _OF_ONE_VALUE not in str(error):
                raise
            raise ValueError(
                "At least two values per channel in every batch are expected with batch_norm="
                f"{self.batch_norm!r}, got one image whose maps are 1 x 1, with batch_size={self.batch_size}. Set "
                'batch_norm="frozen", or train on two images or more with batch_size=2 or more.'
            ) from error
        finally:
            give_back(device)

    def _set_fitted(
        self, labels: Labels, tensors: Tensors, history: History, shape: tuple[int, int, int], *, goes_on: bool
    ) -> None:
        before: dict[str, list[float]] = self.history_ if goes_on else {}
        columns = {name: before.get(name, []) + column for name, column in history.columns.items()}
        best_epoch = len(before.get("loss", ())) + history.best_epoch
        self._be_fitted(labels.classes, labels.codes.ndim == 2, tensors, columns, best_epoch, shape)

    def _be_fitted(
        self,
        classes: np.ndarray,
        multilabel: bool,
        tensors: Tensors,
        history: dict[str, list[float]],
        best_epoch: int,
        shape: tuple[int, int, int] | None,
    ) -> None:
        """All that fitting with the present parameters leaves behind, `n_features_in_` and names apart."""
        self.classes_, self._multilabel, self._shape = classes, multilabel, shape
        self.tensors_, self.history_, self.best_epoch_ = tensors, history, best_epoch
        self.n_iter_ = len(history["loss"])
        self._made_with = {name: getattr(self, name) for name in _DECIDING}
        self._runtime: dict[str, Any] = {}  # what predicts, once it was asked to

    def _hold_out(self, rows: np.ndarray, labels: Labels, seed: int) -> tuple[np.ndarray, np.ndarray]:
        from featx.training.validation import hold_out

        training, held_out = hold_out(labels.codes[rows], self.validation_fraction, seed)
        return rows[training], rows[held_out]

    def _recipe(self, model: Model, n: int, seed: int, once: bool) -> Recipe:
        from featx.images.augmentation import Augmentation
        from featx.training.fitting import Recipe

        probing = self.linear_probe is not False
        rate = self.learning_rate
        if rate == "auto":
            near_probe = probing and not model.split.head_only
            rate = np.clip(_RATE_PER_ROOT * n**0.5, _LEAST_FROM_PROBE, _MOST_FROM_PROBE) if near_probe else _RATE
            rate *= _SGD_FACTOR if self.optimizer == "sgd" else 1.0
        if self.preprocess is None and self.augment in ("crop", "color"):
            raise ValueError(
                "Views that keep shape and scale are expected for the ready tensors of preprocess=None, got "
                f'augment={self.augment!r}. Use "flip" or a callable.'
            )
        return Recipe(
            settings=self._settings(model, n, seed, once),
            optimizer=self.optimizer,
            learning_rate=float(rate),
            layer_decay=self.layer_decay,
            weight_decay=self.weight_decay,
            probe_c=(_PROBE_C if self.linear_probe is True else float(self.linear_probe)) if probing else None,
            augmentation=None if self.augment is None else Augmentation(self.augment),
            views=self.augment_views,
            verbose=self.verbose,
        )

    def _settings(self, model: Model, n: int = 1, seed: int = 0, once: bool = False) -> Settings:
        from featx.training.loop import Settings

        steps = -(-n // self.batch_size)
        auto = int(np.clip(-(-_AUTO_STEPS // steps), _FEWEST_EPOCHS, _MOST_EPOCHS))
        epochs = auto if self.epochs == "auto" else int(self.epochs)
        return Settings(
            epochs=1 if once else epochs,
            batch_size=self.batch_size,
            lr_schedule="constant" if once else self.lr_schedule,
            warmup=0.0 if once else self.warmup,
            max_grad_norm=self.max_grad_norm,
            label_smoothing=self.label_smoothing,
            mixup=self.mixup,
            ema=self.ema,
            n_iter_no_change=self.n_iter_no_change if self.early_stopping and not once else None,
            device=model.device,
            precision=self.precision,
            seed=seed,
        )

    def _as_fitted(self) -> TunedEstimator:
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
        found = source.outputs(model, network.scores if scores else network.features, self._settings(model))
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

    def _readable(self, items: Items, consequence: str) -> np.ndarray:
        """Rows of the images that can be read; all of them where others are to raise."""
        if self.on_error == "raise":
            return np.arange(len(items))
        from featx.activations.engine import n_threads
        from featx.images.unreadable import readable_rows

        return np.asarray(readable_rows(items, n_threads(self.n_jobs), consequence), dtype=int)

    def _model(self, items: Items | None) -> Model:
        """What the last fit has trained; the same object while the shape of the images is."""
        with _BUILDING.held():
            runtime = self._runtime
            known: Model | None = runtime.get("model")
            if known is None or not self._still_fits(known, items):
                runtime.clear()
                known = runtime["model"] = self._new_model(items, len(self.classes_))
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
        """Write the fitted classifier as safetensors with JSON inside, in which nothing can run.

        Parameters
        ----------
        path : str or path
            File to write, usually ``.safetensors``. It holds the parameters (without ``cache``, ``device``, ``engine``,
            ``n_jobs``, ``storage_options`` and ``verbose``), the classes and what training changed; a frozen front is
            loaded again from ``weights``.

        Raises
        ------
        TypeError
            A parameter is a module or a callable, or labels are neither numbers nor texts.
        """
        from featx.training.sharing import labels_to_json, save_fitted

        check_is_fitted(self)
        given = self.get_params(deep=False) | self._made_with
        params = {name: value for name, value in given.items() if name not in _OF_THIS_MACHINE}
        params["weights"] = plain_address(given["weights"])
        about = {
            "params": params,
            "classes": labels_to_json(self.classes_),
            "multilabel": self._multilabel,
            "history": self.history_,
            "best_epoch": self.best_epoch_,
            "shape": getattr(self, "_shape", None),  # of a fit with an earlier version there is none
            "n_features": getattr(self, "n_features_in_", None),
            "feature_names": [*getattr(self, "feature_names_in_", ())],
        }
        save_fitted(path, self.tensors_, about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """A fitted classifier from a file that :meth:`save` wrote.

        Parameters
        ----------
        path : str or path

        Returns
        -------
        classifier : an estimator of this class

        Raises
        ------
        WeightsError
            The file is something else.
        """
        from featx.training.sharing import labels_from_json, load_fitted

        tensors, about = load_fitted(path)
        loaded = cls(**about["params"])
        classes = labels_from_json(about["classes"])
        shape = None if about.get("shape") is None else tuple(about["shape"])
        loaded._be_fitted(classes, about["multilabel"], tensors, about["history"], about["best_epoch"], shape)
        if about["n_features"] is not None:
            loaded.n_features_in_ = about["n_features"]
        if names := about.get("feature_names"):  # files of earlier versions have none
            loaded.feature_names_in_ = np.asarray(names, dtype=object)
        return loaded

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
