"""The engine behind a store: look up what is known, share out the rest, keep what is computed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from featx.activations.engine import Block, Computed, Recipe, n_threads
from featx.activations.passes import Passes
from featx.activations.plan import Slot, kept_slots
from featx.exceptions import ImageError, NotFinite
from featx.images.reading import Content
from featx.images.sources import Items
from featx.images.view import WatchedItems
from featx.store import MOST_ROWS, Column, Session, rows_in_memory


class KeptRecipe:
    """A recipe whose rows are looked up in a store before they are computed.

    Parameters
    ----------
    recipe : Recipe
    session : Session
        With the recipe chosen.
    slots : sequence of Slot
        What is asked for: those of the recipe's plan, or more to keep.
    batch_size, n_jobs, on_error
        As in PretrainedFeatureExtractor.
    tick : callable (int) -> object
        Told how many items of X became known, as they do.
    check : callable () -> None
        Called when the network was loaded, to raise if it is no longer the recipe's.
    """

    def __init__(
        self,
        recipe: Recipe,
        session: Session,
        slots: Sequence[Slot],
        *,
        batch_size: int,
        n_jobs: int | None,
        on_error: str,
        tick: Callable[[int], object],
        check: Callable[[], None],
    ) -> None:
        self.recipe, self.session, self.slots, self.tick = recipe, session, tuple(slots), tick
        self.batch_size, self.n_jobs, self.on_error = batch_size, n_jobs, on_error
        self._check = check
        self._columns = [slot.column for slot in slots]
        self._kept: tuple[Slot, ...] | None = None
        self._passes: Passes | None = None
        self._n_items = 0

    def passes_for(self, n_images: int) -> Passes:
        """What takes so many images through the network, with graphs in the store."""
        return self.recipe.passes(n_images, self.session.keep, self.session, self._check)

    def iter_blocks(self, items: Items, most_rows: int = MOST_ROWS) -> Generator[Block]:
        """Yield the features of the items in order, in blocks of at most ``most_rows``."""
        for start, lookup in self._lookups(items, most_rows):
            rows = np.full((len(lookup.places), *self.recipe.plan.shape), np.nan, dtype=np.float32)
            known = np.setdiff1d(np.arange(len(rows)), list(lookup.errors))
            if len(known):
                places = lookup.places[known]
                rows[known] = self.recipe.plan.join([part[places] for part in lookup.parts])
            yield Block(start, start + len(rows), rows, [lookup.errors[row] for row in sorted(lookup.errors)])

    def warm(self, items: Items) -> list[ImageError]:
        """Make sure that the rows are known, without returning them; the errors of unreadable images."""
        lookups = self._lookups(items, MOST_ROWS)
        return [error for _, lookup in lookups for _, error in sorted(lookup.errors.items())]

    def _lookups(self, items: Items, most_rows: int) -> Iterator[tuple[int, _Lookup]]:
        self._n_items = len(items)
        step = min(most_rows, max(self.batch_size, rows_in_memory(self._columns)))
        for start in range(0, len(items), step):
            part = items[start : start + step]
            lookup = _Lookup.of(part, self.session.digests(part, n_threads(self.n_jobs)), self._columns)
            if lookup.errors and self.on_error == "raise":
                raise lookup.errors[min(lookup.errors)]
            with self.session:  # claims are held for no longer than this, never while the caller has its turn
                self._fill(lookup)
            yield start, lookup

    def _fill(self, lookup: _Lookup) -> None:
        missing = self._still_missing(lookup, list(range(len(lookup.digests))))
        if missing and self._passes is None:
            # As many of all items, if as many are missing of those that were not looked up yet.
            self._passes = self.passes_for(round(len(missing) / len(lookup.places) * self._n_items))
        self.tick(len(lookup.places) - len(missing))
        while missing:
            done = self._compute(lookup, missing)
            # What others were computing may have arrived; what they gave up is ours to take in the next round.
            others = [place for place in missing if place not in done]
            missing = self._still_missing(lookup, others)
            self.tick(len(others) - len(missing))
            if missing and not done:
                self.session.wait()

    def _still_missing(self, lookup: _Lookup, places: list[int]) -> list[int]:
        """Copy what the store knows into the look-up; the places that it does not know."""
        if not places:
            return []
        rows = np.asarray(places)
        known = self.session.fill([lookup.digests[place] for place in places], self._columns, lookup.parts, rows)
        return rows[~known].tolist()

    def _compute(self, lookup: _Lookup, missing: list[int]) -> set[int]:
        """Compute the missing images that nobody else is computing; the places that are done, unreadable ones too."""
        assert self._passes is not None
        done: set[int] = set()

        def is_there(digests: list[bytes]) -> list[bool]:
            # Copies on the way what has come since the look-up, so that nobody has to look again.
            places = [lookup.place_of[digest] for digest in digests]
            missing = set(self._still_missing(lookup, places))
            return [place not in missing for place in places]

        def batches() -> Iterator[list[int]]:
            # Claimed no sooner than its decoding can begin: until then other processes may take it.
            for window in windows(missing, self.batch_size):
                taken = self.session.take([lookup.digests[place] for place in window], is_there)
                if taken:
                    yield [lookup.rows[lookup.place_of[digest]] for digest in taken]

        def choose(rows: list[int], missing: frozenset[str]) -> Sequence[Slot]:
            return self._to_compute(missing, lookup.digests_of(rows))

        changed: set[int] = set()

        def note(row: int, content: Content) -> None:
            """What is kept under a digest must come from the bytes that it was made of."""
            if lookup.items.reading.digest_of(content) != lookup.digests_of([row])[0]:
                changed.add(row)  # in a thread that decodes, before its batch is computed

        items = WatchedItems(lookup.items, self.session.seed, note)
        computing = self.recipe.compute(
            items, batches(), choose, self._passes, asked=self.slots, n_jobs=self.n_jobs, on_error=self.on_error
        )
        with closing(computing):
            for computed in computing:
                self._keep(lookup, computed, changed)  # batch by batch: what is killed later has kept this
                done.update(lookup.places[[*computed.rows, *computed.errors]].tolist())
                self.tick(len(computed.rows) + len(computed.errors))
        return done

    def _to_compute(self, missing: frozenset[str], digests: list[bytes]) -> Sequence[Slot]:
        """What to read in a batch: what is asked for, and what one pass should keep unless all of it is there."""
        if self._kept is None:
            self._check()  # now that it is loaded, which took time
            self._kept = kept_slots(self.session.keep, self.recipe.architecture, missing)
        kept = {slot.column: slot for slot in self._kept}
        asked = {slot.column: slot for slot in self.slots}
        # The pass is due anyhow, and gives a whole record at little more. Only where all of it is on the disk, and
        # nothing of it is asked for, the rest is read alone.
        if kept.keys() & asked.keys() or not self.session.has(digests, list(kept)):
            return list((asked | {column: slot for column, slot in kept.items() if column not in asked}).values())
        return self.slots

    def _keep(self, lookup: _Lookup, computed: Computed, changed: set[int]) -> None:
        """Into the look-up and the store: what one pass keeps in one record, what was asked for beside it singly."""
        if computed.rows:
            rows = {slot.column: part.numpy() for slot, part in computed.parts.items()}
            places = lookup.places[computed.rows]
            for part, column in zip(lookup.parts, self._columns, strict=True):
                part[places] = rows[column]
            same = np.array([row not in changed for row in computed.rows])
            for mask, columns in _of_finite_columns(computed):
                self._put(lookup, computed.rows, rows, np.flatnonzero(mask & same), columns)
        if unkept := [*computed.errors, *changed.intersection(computed.rows)]:
            self.session.release(lookup.digests_of(unkept))
            for row, error in computed.errors.items():
                lookup.fail(row, error)
            for row in changed.intersection(computed.rows):
                lookup.split_off(row)

    def _put(
        self, lookup: _Lookup, of: list[int], rows: dict[Column, np.ndarray], some: np.ndarray, columns: set[Column]
    ) -> None:
        """Some columns of some of the rows that were computed into the store."""
        if not len(some):
            return
        kept = tuple(slot.column for slot in self._kept or ())
        together = tuple(column for column in kept if column in columns) if rows.keys() >= set(kept) else ()
        singly = [(column,) for column in self._columns if column not in together]
        whole = len(some) == len(of)
        parts = {column: part if whole else part[some] for column, part in rows.items() if column in columns}
        digests = lookup.digests_of([of[place] for place in some.tolist()])
        self.session.put(digests, parts, [*([together] if together else []), *singly])


def _of_finite_columns(computed: Computed) -> Iterator[tuple[np.ndarray, set[Column]]]:
    """Masks of rows with the columns that are finite in all of them; every row once."""
    columns = [slot.column for slot in computed.parts]
    if not computed.not_finite:
        yield np.ones(len(computed.rows), dtype=bool), set(columns)
        return
    finite = np.ones((len(computed.rows), len(columns)), dtype=bool)
    for slot, mask in computed.not_finite.items():
        finite[:, columns.index(slot.column)] = ~mask.numpy()
    for pattern in np.unique(finite, axis=0):
        found = {column for column, is_finite in zip(columns, pattern.tolist(), strict=True) if is_finite}
        yield (finite == pattern).all(axis=1), found


@dataclass
class _Lookup:
    """The state of looking some rows of X up: one place per different image.

    Attributes
    ----------
    items : Items
        The rows.
    place_of : dict of bytes to int
        Place of every different image, by digest.
    rows : list of int
        For each place, the first row that the image stands in.
    places : ndarray of shape (n_rows,)
        For each row, the place of its image; -1 where it has no digest.
    parts : list of ndarray of shape (n_places, width)
        One per column.
    errors : dict of int to ImageError
        By row.
    """

    items: Items
    place_of: dict[bytes, int]
    rows: list[int]
    places: np.ndarray
    parts: list[np.ndarray]
    errors: dict[int, ImageError]

    def __post_init__(self) -> None:
        self.digests = list(self.place_of)

    @classmethod
    def of(cls, items: Items, digests: Sequence[bytes | ImageError], columns: Sequence[Column]) -> _Lookup:
        place_of: dict[bytes, int] = {}
        rows: list[int] = []
        places: list[int] = []
        for row, digest in enumerate(digests):
            place = place_of.setdefault(digest, len(rows)) if isinstance(digest, bytes) else -1
            if place == len(rows):
                rows.append(row)
            places.append(place)
        parts = [np.empty((len(rows), column.width), dtype=np.float32) for column in columns]
        errors = {row: digest for row, digest in enumerate(digests) if isinstance(digest, ImageError)}
        return cls(items, place_of, rows, np.array(places, dtype=np.intp), parts, errors)

    def digests_of(self, rows: Sequence[int]) -> list[bytes]:
        return [self.digests[self.places[row]] for row in rows]

    def split_off(self, row: int) -> None:
        """A place of its own for the row that was computed, of which others are no twins any more; theirs stays."""
        place = int(self.places[row])
        twins = [twin for twin in np.flatnonzero(self.places == place).tolist() if twin != row]
        if twins:
            self.places[row], self.rows[place] = len(self.rows), twins[0]
            self.rows.append(row)
            self.parts[:] = [np.concatenate([part, part[place : place + 1]]) for part in self.parts]

    def fail(self, row: int, error: ImageError) -> None:
        """Record that an image cannot be read, for all rows that it stands in."""
        for twin in np.flatnonzero(self.places == self.places[row]).tolist():
            self.errors[twin] = error if twin == row else self._error_at(twin, error)

    def _error_at(self, row: int, otherwise: ImageError) -> ImageError:
        if isinstance(otherwise, NotFinite):
            return otherwise.elsewhere(self.items.original_row(row), self.items[row].source)
        try:
            self.items.load(row)
        except ImageError as error:
            return error
        return otherwise


def windows(places: Sequence[int], size: int) -> Iterator[list[int]]:
    """At most ``size`` places at a time, cut at multiples of ``size`` wherever the parts do not fit together.

    A run that goes on where another was killed then makes the batches that the other would have made, and so the same
    values to the last bit, also where unreadable images are missing from the batches before.
    """
    window: list[int] = []
    for _, group in groupby(places, key=lambda place: place // size):
        more = list(group)
        if len(window) + len(more) > size:
            yield window
            window = []
        window += more
    if window:
        yield window
