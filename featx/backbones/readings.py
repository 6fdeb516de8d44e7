"""Which of a file's tensors are a network's: under what keys they stand, and what of an old head is of use."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from featx.backbones.checkpoints import same

Tensors = Mapping[str, torch.Tensor]

#: Ending of names that old files lack, and that nothing reads in eval mode.
OPTIONAL = "num_batches_tracked"
_DIGITS = "0123456789"


@dataclass(frozen=True)
class Demand:
    """What a network takes.

    Attributes
    ----------
    tensors : mapping of str to tensor
        Its own, by name; only their shapes count.
    head : tuple of str
        Modules that a file may lack, or have of another size.
    """

    tensors: Tensors
    head: tuple[str, ...]

    @cached_property
    def trunk(self) -> frozenset[str]:
        """Names of the tensors that a file must have."""
        return frozenset(name for name in self.tensors if not self.is_of_head(name) and not name.endswith(OPTIONAL))

    def is_of_head(self, name: str) -> bool:
        """Whether a tensor belongs to the head."""
        return name.startswith(tuple(f"{child}." for child in self.head))

    def fits(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether the network has a place for a tensor."""
        return name in self.tensors and self.tensors[name].shape == tensor.shape


@dataclass(frozen=True)
class Reading:
    """The tensors under one place of a file, by the names that they have from there on.

    Attributes
    ----------
    place : str
        Keys in front of them, with dots between; empty where there are none.
    demand : Demand
    given : mapping of str to tensor
    """

    place: str
    demand: Demand
    given: Tensors

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What goes into the network: the trunk's, and of the head those that fit."""
        left_out = self.misfits_of_head
        return {
            name: tensor
            for name, tensor in self.given.items()
            if self.demand.fits(name, tensor) and not _is_below(name, left_out)
        }

    @cached_property
    def missing(self) -> frozenset[str]:
        """Modules of the network that the file has no tensors for, or none that fit."""
        names = (name for name in self.demand.tensors if name not in self.tensors and not name.endswith(OPTIONAL))
        return frozenset(name.rpartition(".")[0] for name in names)

    @cached_property
    def misfits_of_head(self) -> frozenset[str]:
        """Modules of the head that are left out, since the file has another head, or numbers that are none.

        A head with other layers than the network's is left out whole: where only some of its names agree, nothing
        says that what lies between them does.
        """
        foreign = {child for child in self.demand.head if self._has_other_layers(child)}
        wrong = (
            name
            for name, tensor in self.given.items()
            if self.demand.is_of_head(name) and not self.demand.fits(name, tensor)
        )
        return frozenset({*foreign, *(name.rpartition(".")[0] for name in wrong)}) | self.not_finite_of_head

    @cached_property
    def not_finite_of_head(self) -> frozenset[str]:
        """Modules of the head for which the file has NaN or infinity."""
        fitting = ((name, tensor) for name, tensor in self.given.items() if self.demand.fits(name, tensor))
        wrong = (name for name, tensor in fitting if self.demand.is_of_head(name) and not _is_finite(tensor))
        return frozenset(name.rpartition(".")[0] for name in wrong)

    @cached_property
    def problems(self) -> dict[str, list[str]]:
        """Why the tensors do not fit the trunk: names by kind of problem; empty lists where they do."""
        own = {name: value for name, value in self.given.items() if not self.demand.is_of_head(name)}
        missing = [name for name in self.demand.tensors if name in self.demand.trunk and name not in own]
        misshapen = [
            f"{name} {tuple(value.shape)} in place of {tuple(self.demand.tensors[name].shape)}"
            for name, value in own.items()
            if name in self.demand.tensors and not self.demand.fits(name, value)
        ]
        old = frozenset() if missing or misshapen else self.old_heads
        unexpected = [name for name in own if name not in self.demand.tensors and _top(name) not in old]
        return {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}

    @cached_property
    def old_heads(self) -> frozenset[str]:
        """Modules beside the network's that a head is called by elsewhere ("last_linear", "projector").

        They hold matrices. What is called as the trunk's parts are ("layer5" beside "layer4") is more of a trunk, and
        a lone vector or token may change what the trunk does.
        """
        stems = {_top(name).rstrip(_DIGITS) for name in self.demand.trunk}
        matrices = {
            _top(name)
            for name, tensor in self.given.items()
            if "." in name and tensor.ndim > 1 and name not in self.demand.tensors and not self.demand.is_of_head(name)
        }
        return frozenset(top for top in matrices if top.rstrip(_DIGITS) not in stems)

    @property
    def fits(self) -> bool:
        """Whether it is all of the trunk and nothing else than heads and trunk."""
        return not any(self.problems.values())

    def agrees_with(self, other: Reading) -> bool:
        """Whether both have the same tensors, to the bit, where they have the same names."""
        shared = self.tensors.keys() & other.tensors.keys()
        return all(same(self.tensors[name], other.tensors[name]) for name in shared)

    def _has_other_layers(self, child: str) -> bool:
        names = [name for name in self.given if name.startswith(f"{child}.") and not name.endswith(OPTIONAL)]
        return any(name not in self.demand.tensors for name in names)


def readings_of(found: Tensors, demand: Demand, key: str | None = None) -> list[Reading]:
    """Every reading of a file that may be meant, of which the caller takes the one that fits.

    A place counts where all names of the trunk stand under it; where there is none, the one with most of them.

    Parameters
    ----------
    found : mapping of str to tensor
        The file's tensors, by keys with dots between.
    demand : Demand
    key : str or None, default=None
        Where to look: at that place, or else at any below it; None for everywhere.

    Returns
    -------
    readings : list of Reading
        At least one, unless there is nothing under ``key``.
    """
    if key:
        found = {name: tensor for name, tensor in found.items() if _is_below(name, [key])}
    places = _places(found, demand)
    complete = [place for place, n in places.items() if n == len(demand.trunk)]
    if not complete:
        nearest = max(places, key=lambda place: places[place], default=key or "")
        return [Reading(nearest, demand, dict(_under(nearest, found)))] if found else []
    readings: list[Reading] = []
    for place in sorted(complete, key=len, reverse=True):  # what lies below, such as an average, is another network
        inner = [reading.place for reading in readings if reading.fits]
        readings.append(Reading(place, demand, dict(_under(place, found, inner))))
    return [reading for reading in readings if reading.place == key] or readings[::-1]


def rearranged(
    found: Tensors, demand: Demand, key: str | None, rename: Callable[[Tensors], Tensors | None]
) -> list[Reading]:
    """Readings of tensors that a network's authors named otherwise; those that fit.

    Parameters
    ----------
    found, demand, key
        As of `readings_of`.
    rename : callable (mapping of str to tensor) -> mapping of str to tensor or None
        To today's names.
    """
    within = [name for name in found if not key or _is_below(name, [key])]
    places = Counter(name[:end] for name in within for end in (0, *(dot.start() for dot in re.finditer(r"\.", name))))
    readings = []
    for place in (place for place, n in places.items() if 2 * n >= len(demand.trunk)):
        renamed = rename(dict(_under(place, found)))
        readings += [] if renamed is None else [Reading(place, demand, renamed)]
    return [reading for reading in readings if reading.fits]


def fullest_of_agreeing(fitting: Sequence[Reading]) -> Reading | None:
    """The reading with most of the head, if all agree where they say the same."""
    first = max(fitting, key=lambda reading: len(reading.tensors))
    return first if all(first.agrees_with(other) for other in fitting) else None


def _places(found: Tensors, demand: Demand) -> dict[str, int]:
    """How many names of the trunk stand under each place of a file."""
    counts: Counter[str] = Counter()
    for name in found:
        parts = name.split(".")
        counts.update(".".join(parts[:i]) for i in range(len(parts)) if ".".join(parts[i:]) in demand.trunk)
    return dict(counts)


def _under(place: str, found: Tensors, without: Sequence[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors below a place by the rest of their names, without those below some other places."""
    start = f"{place}." if place else ""
    for name, tensor in found.items():
        if name.startswith(start) and not _is_below(name, without):
            yield name.removeprefix(start), tensor


def _top(name: str) -> str:
    return name.partition(".")[0]


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.float().isfinite().all())


def _is_below(name: str, places: Sequence[str] | frozenset[str]) -> bool:
    return any(not place or name == place or name.startswith(f"{place}.") for place in places)
