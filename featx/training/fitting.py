"""One fit, from images and labels to changed tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from featx.activations.extraction import Extraction
from featx.activations.plan import FeaturePlan
from featx.images.augmentation import Augmentation, AugmentedItems
from featx.images.preprocessing import Preprocessing
from featx.images.sources import Items
from featx.training.finite import check_features
from featx.training.loop import Diverged, History, Loop, Settings, outputs_of
from featx.training.model import Built, Model, Tensors
from featx.training.schedule import make_optimizer
from featx.training.targets import Targets
from featx.training.values import Held, Streamed, StreamedFront, Values, hold, hold_images

# With hidden layers, the head alone is trained for so many steps at this rate before the rest.
_HEAD_STEPS, _HEAD_RATE = 500, 1e-3
_NOT_HELD = "augment_views=0 asks for fresh views, or its output takes more disk than there is to spare"


@dataclass(frozen=True)
class Source:
    """Images, and how they become values for a model.

    Attributes
    ----------
    items : Items
    preprocessing : Preprocessing
    n_jobs : int or None
    extract : callable (Items, FeaturePlan) -> Extraction
        Through the store, where there is one.
    """

    items: Items
    preprocessing: Preprocessing
    n_jobs: int | None
    extract: Callable[[Items, FeaturePlan], Extraction]

    def held(self, model: Model, items: Items | None = None) -> Values | None:
        """Values at the model's cut, computed once; None where there is no room for them."""
        items = self.items if items is None else items
        if model.cut_plan is not None:
            return hold(self.extract(items, model.cut_plan), model.finish, len(self.items))
        return hold_images(items, self.preprocessing, self.n_jobs, len(self.items))

    def streamed(self, model: Model, items_of: Callable[[int], Items] | None = None) -> Values:
        """Values made anew for every batch, of the images as an epoch sees them."""
        items_of = items_of or (lambda epoch: self.items)
        plan = model.cut_plan
        if plan is None:
            return Streamed(items_of, self.preprocessing, self.n_jobs)
        return StreamedFront(lambda epoch: self.extract(items_of(epoch), plan), model.finish)

    def take(self, rows: np.ndarray) -> Source:
        """Some of the images."""
        return replace(self, items=self.items.take(rows.tolist()))

    def outputs(self, model: Model, function: Callable[[torch.Tensor], torch.Tensor], settings: Settings) -> np.ndarray:
        """What a function of the values gives for every image, without holding more than a block of them."""
        if model.cut_plan is None:
            return outputs_of(function, self.streamed(model), len(self.items), settings).numpy()
        parts = [
            outputs_of(function, Held(block.rows, len(block.rows), model.finish), len(block.rows), settings).numpy()
            for block in self.extract(self.items, model.cut_plan).iter_blocks()
        ]
        return np.concatenate(parts)


@dataclass(frozen=True)
class Recipe:
    """How a fit goes about it.

    Attributes
    ----------
    settings : Settings
    optimizer, learning_rate, layer_decay, weight_decay
        As in FineTuneClassifier.
    probe_strength : float or None
        How much the linear model that the head starts from is regularised, in its own words; None starts it at random.
    augmentation : Augmentation or None
    views : int
        Views of each image; 0 for a new one in every epoch.
    verbose : int
    """

    settings: Settings
    optimizer: str
    learning_rate: float
    layer_decay: float
    weight_decay: float
    probe_strength: float | None
    augmentation: Augmentation | None
    views: int
    verbose: int


@dataclass(frozen=True)
class Fitted:
    """What a fit gives."""

    tensors: Tensors
    history: History


def fit(
    model: Model,
    source: Source,
    targets: Targets,
    recipe: Recipe,
    *,
    start: Mapping[str, torch.Tensor] | None,
    validation: tuple[Source, Targets] | None,
    after_epoch: Callable[[History, Callable[[], Tensors]], bool],
) -> Fitted:
    """Train a model.

    Parameters
    ----------
    model, source, targets, recipe
    start : mapping of str to tensor or None
        Of an earlier fit, to go on from.
    validation : (Source, Targets) or None
        Images that decide which epoch is kept.
    after_epoch : callable (history, tensors) -> bool
        Told after every epoch, with a way to get at the tensors; True ends the training.
    """
    values = _values(model, source, recipe)
    reason = model.split.reason or ("" if isinstance(values, Held) else _NOT_HELD)
    if recipe.verbose and model.split.frozen is not None and reason:
        print(f"The frozen front is computed anew in every epoch: {reason}.")
    with closing(model.build(start, recipe.settings.seed)) as built:
        if recipe.verbose and built.module is not None:
            model.spec.load(model.device, torch.float32).tell_note()
        if start is None and recipe.probe_strength is not None:
            _start_head(built, source, values, targets, recipe)
        loop = _loop(built, values, targets, recipe, validation, after_epoch)
        try:
            history = loop.run()
        except Diverged:
            _check_pretrained(model, (source, *(() if validation is None else (validation[0],))), recipe, start)
            raise
        return Fitted(built.changed(), history)


def _loop(
    built: Built,
    values: Values,
    targets: Targets,
    recipe: Recipe,
    validation: tuple[Source, Targets] | None,
    after_epoch: Callable[[History, Callable[[], Tensors]], bool],
) -> Loop:
    held_out = None
    if validation is not None:
        held_out = (validation[0].held(built.model) or validation[0].streamed(built.model), validation[1])
    built.network(True)  # before the parameters are asked which of them train
    optimizer = make_optimizer(
        recipe.optimizer,
        built.parameters_with_factors(recipe.layer_decay),
        recipe.learning_rate,
        recipe.weight_decay,
    )
    return Loop(
        built.network,
        values,
        targets,
        optimizer,
        recipe.settings,
        validation=held_out,
        after_epoch=lambda history: after_epoch(history, built.changed),
    )


def _check_pretrained(
    model: Model, sources: Iterable[Source], recipe: Recipe, start: Mapping[str, torch.Tensor] | None
) -> None:
    """Raise where it is the features that training began with which are not finite.

    Raises
    ------
    NotFinite
    """
    with closing(model.build(start, recipe.settings.seed)) as anew:
        for images in sources:
            rows = images.outputs(model, anew.network(False).features, recipe.settings)
            check_features(rows, images.items, images.preprocessing, model, recipe.settings.precision)


def _values(model: Model, source: Source, recipe: Recipe) -> Values:
    """What the tail trains on: held where it is the same in several epochs and there is room for it."""
    augmentation = recipe.augmentation
    if augmentation is None:
        return source.held(model) or source.streamed(model)

    def seen(views: range) -> Items:
        return AugmentedItems(source.items, augmentation, views, recipe.settings.seed)

    def in_epoch(epoch: int) -> Items:
        view = epoch % recipe.views if recipe.views else epoch
        return seen(range(view, view + 1))

    held = source.held(model, seen(range(min(recipe.views, recipe.settings.epochs)))) if recipe.views else None
    return held or source.streamed(model, in_epoch)


def _start_head(built: Built, source: Source, values: Values, targets: Targets, recipe: Recipe) -> None:
    """Train the head alone on the pretrained features (LP-FT)."""
    rows = _features(built, source, values, recipe)
    check_features(rows, source.items, source.preprocessing, built.model, recipe.settings.precision)
    *hidden, out = (layer for layer in built.head if isinstance(layer, nn.Linear))
    if not hidden:
        assert recipe.probe_strength is not None
        return targets.loss.probe(rows, targets.values, targets.weights, recipe.probe_strength, out)
    alone = Built(built.model, None, built.head)
    settings = recipe.settings
    n_batches = -(-len(rows) // settings.batch_size)
    alone.network(True)
    optimizer = make_optimizer("adamw", alone.parameters_with_factors(1.0), _HEAD_RATE, recipe.weight_decay)
    settings = replace(settings, epochs=max(1, _HEAD_STEPS // n_batches), n_iter_no_change=None, mixup=0.0, ema=None)
    Loop(alone.network, Held(rows, len(rows), lambda values: values), targets, optimizer, settings).run()


def _features(built: Built, source: Source, values: Values, recipe: Recipe) -> np.ndarray:
    """Pretrained features of the images as they are, without augmentation."""
    model = built.model
    if isinstance(values, Held) and recipe.augmentation is None and model.split.head_only:
        return values.rows
    if model.split.cut is not None and recipe.augmentation is None:
        return outputs_of(built.network(False).features, values, len(source.items), recipe.settings).numpy()
    plain = hold(source.extract(source.items, model.plan), lambda rows: rows, len(source.items))  # from the store
    if plain is not None:
        return plain.rows
    return source.outputs(model, built.network(False).features, recipe.settings)
