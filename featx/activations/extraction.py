"""One call for features: from the store or the network, with a progress bar and one count of what could not be read."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from featx.activations.engine import Block, Recipe
from featx.activations.finite import warn_not_finite
from featx.activations.kept import KeptRecipe
from featx.activations.keys import NoKey, changed, describe_recipe
from featx.activations.plan import Slot, slots_of
from featx.exceptions import EngineError, ImageError, NotFinite
from featx.images.augmentation import mirrored
from featx.images.sources import Items
from featx.images.unreadable import warn_unreadable
from featx.store import FeatureStore, Session, warn_once
from featx.system.machine import processor
from featx.system.packages import installed
from featx.system.threads import one_thread_after_fork, step_by_step

_Tick = Callable[[int], object]
_ROWS_OF_NAN = (
    "; their rows are NaN, which most estimators refuse: remove what featx.find_unreadable lists, or fill such rows "
    "in, as SimpleImputer does."
)


@dataclass(frozen=True)
class Extraction:
    """Items, the recipe for their features, and how to go about it.

    Parameters
    ----------
    items : Items
    recipe : Recipe
    store : FeatureStore or None
    max_pixels, batch_size, n_jobs, on_error, verbose
        As in PretrainedFeatureExtractor.
    warns : bool, default=True
        Whether one warning counts the unreadable images, of which the blocks tell in any case, and another those whose
        values use little of their range or lie beyond it.
    views : {"flip"} or None, default=None
        As in PretrainedFeatureExtractor.
    """

    items: Items
    recipe: Recipe
    store: FeatureStore | None
    max_pixels: int
    batch_size: int
    n_jobs: int | None
    on_error: str
    verbose: int
    warns: bool = True
    views: str | None = None

    def without_store(self, reason: str) -> Extraction:
        """The same, computed anew; a warning says why where there was a store."""
        if self.store is not None:
            warn_once(self.store, f"Features are not kept in {self.store}: {reason}.")
        return replace(self, store=None)

    def with_engine(self, engine: str) -> Extraction:
        """The same, computed by another engine."""
        return replace(self, recipe=replace(self.recipe, engine=engine))

    @one_thread_after_fork()
    def engine_for(self, n_images: int) -> str:
        """The engine that computes so many images, ``"torch"`` or ``"onnx"``.

        Raises
        ------
        EngineError
            The recipe names one that cannot be had.
        """
        if self.recipe.engine == "torch":
            return self.recipe.engine
        kept = self._kept(lambda _: None, self.recipe.plan.slots)
        passes = self.recipe.passes(n_images) if kept is None else kept.passes_for(n_images)
        return passes.engine(self.recipe.plan.slots)

    def engine_of_all_runs(self) -> str:
        """As `engine_for` all items; where there is a store, what an earlier run has decided for any of the recipe."""
        if self.recipe.engine != "auto" or self.store is None:
            return self.engine_for(len(self.items))
        session = Session(self.store)
        description = self.description(session)
        if description is None:
            return self.engine_for(len(self.items))
        recipe = self.recipe
        columns = [slot.column.name for slot in recipe.plan.slots]
        machine = f"{recipe.device}; {processor()}; {installed('onnxruntime')}"
        decided = session.answer(
            f"engine of {description}; {columns}; {machine}", lambda: self.engine_for(len(self.items))
        )
        try:
            return self.with_engine(decided).engine_for(len(self.items))
        except EngineError:  # what it was decided by is gone
            return "torch"

    @step_by_step
    def iter_blocks(self, most_rows: int = 4096) -> Generator[Block]:
        """Yield the features in order, in blocks of at most ``most_rows`` (and of a batch where there is no store)."""
        with self._counting() as (tick, errors), closing(self._blocks(tick, most_rows)) as blocks:
            for block in blocks:
                errors += block.errors
                yield block

    def _blocks(self, tick: _Tick, most_rows: int) -> Generator[Block]:
        if self.views is not None:
            yield from self._averaged(tick, most_rows)
            return
        kept = self._kept(tick, self.recipe.plan.slots)
        blocks = (
            self.recipe.iter_blocks(self.items, **self._how)
            if kept is None
            else kept.iter_blocks(self.items, most_rows)
        )
        with closing(blocks):
            for block in blocks:
                if kept is None:
                    tick(len(block.rows))
                yield block

    def _averaged(self, tick: _Tick, most_rows: int) -> Generator[Block]:
        """Features of items averaged with those of their mirror images."""
        plain, others = self._views()
        with closing(plain._blocks(tick, most_rows)) as blocks, closing(others._blocks(_not_told, most_rows)) as more:
            for block, other in zip(blocks, more, strict=True):
                errors = block.errors + _further(other.errors, block.errors)
                yield replace(block, rows=(block.rows + other.rows) / 2, errors=errors)

    def _views(self) -> list[Extraction]:
        """The extraction itself; or one for the items, and one for their mirror images."""
        if self.views is None:
            return [self]
        plain = replace(self, views=None)
        return [plain, replace(plain, items=mirrored(self.items))]

    def iter_rows(self) -> Iterator[np.ndarray]:
        """Yield the features in order, in arrays of at most ``batch_size`` rows."""
        with closing(self.iter_blocks(most_rows=16 * self.batch_size)) as blocks:
            for block in blocks:
                for start in range(0, len(block.rows), self.batch_size):
                    yield block.rows[start : start + self.batch_size]

    @one_thread_after_fork()
    def warm(self, layers: Iterable[Any] | None) -> list[ImageError]:
        """Compute what the store does not know yet of the plan's and some more layers; errors of unreadable images.

        Raises
        ------
        ValueError
            There is no store.
        """
        if self.store is None:
            raise ValueError("A cache to fill is expected, got cache=None. Set cache=True or to a folder.")
        architecture = self.recipe.architecture
        more = slots_of(architecture.resolve(layers), architecture) if layers is not None else ()
        with self._counting() as (tick, errors):
            for view, told in zip(self._views(), (tick, _not_told), strict=False):
                kept = view._kept(told, [*self.recipe.plan.slots, *more], memory=False)  # what counts is the disk
                if kept is not None:
                    errors += _further(kept.warm(view.items), errors)
        return errors

    @property
    def _how(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "n_jobs": self.n_jobs, "on_error": self.on_error}

    def _kept(self, tick: _Tick, slots: Sequence[Slot], memory: bool = True) -> KeptRecipe | None:
        """The recipe behind the store; None without one, or where nothing tells what the features depend on."""
        if self.store is None:
            return None
        session = Session(self.store, memory)
        description = self.description(session)
        if description is None:
            return None
        session.open_recipe(description)

        def check() -> None:
            # Asked again when the network is loaded: a file of weights may have changed since.
            if self._description(session) != description:
                raise changed(self.recipe.spec.weights.given)

        return KeptRecipe(self.recipe, session, slots, tick=tick, check=check, **self._how)

    def description(self, session: Session) -> str | None:
        """The recipe in words; None, after a warning, where nothing tells what the features depend on."""
        try:
            return self._description(session)
        except NoKey as reason:
            assert self.store is not None
            warn_once(self.store, f"Features are not kept in {self.store}: {reason}.")
            return None

    def _description(self, session: Session) -> str:
        return describe_recipe(
            self.recipe, self.max_pixels, self.items.short_side, session.digest_of_file, session.answer
        )

    @contextmanager
    def _counting(self) -> Iterator[tuple[_Tick, list[ImageError]]]:
        """The progress bar, and at the end warnings that count images without features, and badly ranged ones."""
        errors: list[ImageError] = []
        label = self.recipe.spec.backbone.label
        with tqdm(total=len(self.items), unit="img", desc=label, disable=not self.verbose) as bar:
            yield bar.update, errors
            if self.verbose and "network" in vars(self.recipe):
                self.recipe.network.tell_note()
            if self.verbose:
                self.recipe.tell_reasons()
        if not self.warns:
            return
        self.items.reading.seen.tell()
        unread = [error for error in errors if not isinstance(error, NotFinite)]
        warn_unreadable(unread, len(self.items), _ROWS_OF_NAN)
        warn_not_finite([error for error in errors if isinstance(error, NotFinite)], len(self.items))


def _not_told(n: int) -> None:
    """For a second view of the same images, which are counted once."""


def _further(errors: Iterable[ImageError], known: Iterable[ImageError]) -> list[ImageError]:
    """Errors of images that have none yet."""
    rows = {error.row for error in known}
    return [error for error in errors if error.row not in rows]
