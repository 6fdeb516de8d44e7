"""From parameters, images and answers to a tuned network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import _check_sample_weight, check_consistent_length

from featx.estimators.base import NetworkEstimator
from featx.estimators.epochs import EpochWatch
from featx.estimators.fitted import FittedNetwork
from featx.images.sources import Items

if TYPE_CHECKING:
    from featx.training.fitting import Recipe, Source
    from featx.training.loop import History, Settings
    from featx.training.model import Model, Tensors
    from featx.training.targets import Answers, Meaning, Targets

# Training that is neither too short for fifty images nor too long for fifty thousand.
_AUTO_STEPS, _FEWEST_EPOCHS, _MOST_EPOCHS = 300, 4, 30
# Chosen by benchmarks/accuracy.md: few images are best served near the probe, more of them pay for larger steps; a head
# that starts at random needs large ones in any case. Of AdamW and Adam; SGD takes ten times as much.
_RATE, _SGD_FACTOR = 1e-3, 10.0
_RATE_PER_ROOT, _LEAST_FROM_PROBE, _MOST_FROM_PROBE = 1e-5, 1e-4, 3e-4
# What torch says where BatchNorm has nothing to take a variance of.
_OF_ONE_VALUE = "Expected more than 1 value per channel when training"


class TunedEstimator(FittedNetwork):
    """An estimator with the parameters that FineTuneClassifier and FineTuneRegressor share."""

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
        "mixup": [Interval(Real, 0, None, closed="left")],
        "ema": [Interval(Real, 0, 1, closed="neither"), None],
        "augment": [StrOptions({"flip", "crop", "color"}), callable, None],
        "augment_views": [Interval(Integral, 0, None, closed="left")],
        "batch_norm": [StrOptions({"frozen", "train"})],
        "early_stopping": ["boolean"],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
        "warm_start": ["boolean"],
        "random_state": ["random_state"],
    }

    _probe_strength: ClassVar[float]  # of the linear model that the head starts from
    _each_epoch: Callable[[int, int], None] | None = None  # told how many epochs of how many are done; may raise

    def _train(
        self, items: Items, answers: Answers, sample_weight: Any, start: Tensors | None, given: Any, once: bool = False
    ) -> None:
        import torch

        from featx.training.fitting import fit

        check_consistent_length(range(len(items)), range(len(answers)))
        weights = _check_sample_weight(sample_weight, range(len(items)), dtype=np.float64, ensure_non_negative=True)
        rows = np.flatnonzero(weights > 0)
        rows = rows[self._readable(items.take(rows.tolist()), " and are left out.")]
        if not len(rows):
            raise ValueError("At least one readable image that weighs something is expected, got none.")
        random = check_random_state(self.random_state)
        seed = int(random.randint(2**31 - 1))
        if once and start is not None:  # other views, another order than in the call before
            seed = (seed + self.n_iter_) % 2**31
        training, held_out = rows, None
        if self.early_stopping and not once:
            training, held_out = self._hold_out(rows, answers, seed)
        answers = answers.measured(training, weights)
        model = self._new_model(items, answers.meaning.n_outputs)
        recipe = self._recipe(model, len(training), seed, once)
        engine = "torch" if self.engine == "auto" and isinstance(self.random_state, Integral) else self.engine
        source = self._source(items, model, "raise", engine)  # unreadable images are left out by now

        def part(rows: np.ndarray) -> tuple[Source, Targets]:
            return source.take(rows), answers.targets(rows, weights)

        shape = model.architecture.shape
        with EpochWatch(self, answers.meaning, recipe.settings.epochs, shape, *given) as watch:
            with self._in_words(model.device), torch.inference_mode(False), torch.enable_grad():
                fitted = fit(
                    model,
                    *part(training),
                    recipe,
                    start=start,
                    validation=None if held_out is None else part(held_out),
                    after_epoch=watch.after_epoch,
                )
            self._set_fitted(answers.meaning, fitted.tensors, fitted.history, shape, goes_on=once and start is not None)
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
        self, meaning: Meaning, tensors: Tensors, history: History, shape: tuple[int, int, int], *, goes_on: bool
    ) -> None:
        before: dict[str, list[float]] = self.history_ if goes_on else {}
        columns = {name: before.get(name, []) + column for name, column in history.columns.items()}
        best_epoch = len(before.get("loss", ())) + history.best_epoch
        self._be_fitted(meaning, tensors, columns, best_epoch, shape)

    def _hold_out(self, rows: np.ndarray, answers: Answers, seed: int) -> tuple[np.ndarray, np.ndarray]:
        from featx.training.validation import hold_out

        training, held_out = hold_out(answers.groups[rows], self.validation_fraction, seed)
        return rows[training], rows[held_out]

    def _recipe(self, model: Model, n: int, seed: int, once: bool) -> Recipe:
        from featx.images.augmentation import Augmentation
        from featx.training.fitting import Recipe

        probing = self.linear_probe is not False
        strength = self._probe_strength if self.linear_probe is True else float(self.linear_probe)
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
            probe_strength=strength if probing else None,
            augmentation=None if self.augment is None else Augmentation(self.augment),
            views=self.augment_views,
            verbose=self.verbose,
        )

    def _settings(self, model: Model, n: int = 1, seed: int = 0, once: bool = False) -> Settings:
        from featx.training.loop import Settings

        return Settings(
            epochs=1 if once else self._n_epochs(n),
            batch_size=self.batch_size,
            lr_schedule="constant" if once else self.lr_schedule,
            warmup=0.0 if once else self.warmup,
            max_grad_norm=self.max_grad_norm,
            mixup=self.mixup,
            ema=self.ema,
            n_iter_no_change=self.n_iter_no_change if self.early_stopping and not once else None,
            device=model.device,
            precision=self.precision,
            seed=seed,
        )

    def _n_epochs(self, n: int) -> int:
        """Of a fit to so many images."""
        if self.epochs != "auto":
            return int(self.epochs)
        steps = -(-n // self.batch_size)
        return int(np.clip(-(-_AUTO_STEPS // steps), _FEWEST_EPOCHS, _MOST_EPOCHS))
