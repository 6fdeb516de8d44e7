"""Where a graph is: in this process, in a store, or in the network that it is made of."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import xxhash

from featx.activations.exported.exporting import CannotExport, export, samples_of
from featx.activations.exported.graph import TOLERANCE, Graph
from featx.activations.exported.sessions import run
from featx.activations.plan import Slot, kept_slots
from featx.activations.torch_pass import TorchPass
from featx.backbones.fingerprint import NoFingerprint
from featx.backbones.folding import is_foldable
from featx.backbones.layers import Architecture
from featx.backbones.networks import Network
from featx.images.preprocessing import CustomPreprocessing, Preprocessing, Preset
from featx.system.compat import exports_graphs
from featx.system.locks import ForkSafeLock
from featx.system.machine import processor
from featx.system.packages import installed, is_installed

# To be raised whenever the same name would stand for another graph.
_SCHEMA = 1
_MAKERS = ("onnx", "onnxscript", "onnxruntime")
_MOST_HELD = 4
# Large, and asked for by training alone: what reads them reads nothing else.
_ALONE = ("flatten", "map")
_REFUSED = b"no graph: "


class NoGraph(Exception):
    """A network cannot be run by onnxruntime; the message says why."""


class Place(Protocol):
    """Where graphs are kept beyond the process."""

    @property
    def description(self) -> str:
        """The recipe in words, by which its graphs are found; empty where nothing is kept."""

    def read_file(self, name: str) -> bytes | None:
        """What was written under a name."""

    def write_file(self, name: str, content: bytes) -> None:
        """Keep something, where there is room."""


class _Nowhere:
    """No place but the process's memory."""

    description = ""

    def read_file(self, name: str) -> None:
        """Nothing."""

    def write_file(self, name: str, content: bytes) -> None:
        """Do nothing."""


NOWHERE = _Nowhere()


class Finder:
    """Finds or makes the graph of one recipe for one form of tiles.

    Parameters
    ----------
    network : callable () -> Network
        Loads what graphs are made of.
    in_torch : callable (Preprocessing) -> TorchPass
        What they are compared with.
    architecture : Architecture
    preset : Preset or None
        Whose normalisation is in them; None where they take normalised tensors.
    keep : str
        As of a store: what they put out beside what is asked for.
    place : Place
    """

    def __init__(
        self,
        network: Callable[[], Network],
        in_torch: Callable[[Preprocessing], TorchPass],
        architecture: Architecture,
        preset: Preset | None,
        keep: str,
        place: Place,
    ) -> None:
        self._network, self._in_torch, self._architecture = network, in_torch, architecture
        self._preset, self._keep, self._place = preset, keep, place

    def find(self, slots: Sequence[Slot]) -> Graph | None:
        """One that puts out some slots and need not be exported; None where there is none.

        Raises
        ------
        NoGraph
            There was an attempt before, and it failed.
        """
        columns = {slot.column.name for slot in slots}
        label = self._label(self._place.description) if self._place.description else None
        found = None if label is None else (_HELD.get(label, columns) or self._read(label, slots))
        if found is None and len(_HELD):
            found = _HELD.get(self._label(self._fingerprint()), columns)
        return found

    def make(self, slots: Sequence[Slot]) -> Graph:
        """Export one, compare it with torch, and keep it.

        Raises
        ------
        NoGraph
        """
        with _MAKING.held():
            return self.find(slots) or self._made(slots)  # another thread may have made it meanwhile

    def _made(self, slots: Sequence[Slot]) -> Graph:
        labels = [self._label(self._fingerprint())]
        if self._place.description:
            labels.append(self._label(self._place.description))
        try:
            graph = self._exported(self._outputs(slots, self._network().missing))
        except NoGraph as error:
            self._write(slots, _REFUSED + str(error).encode())
            for label in labels:
                _HELD.refuse(label, str(error))
            raise
        for label in labels:
            _HELD.add(label, graph)
        self._write(slots, graph.to_bytes())
        self._place.write_file(self._mark(slots), b"")
        return graph

    def _exported(self, outputs: Sequence[Slot]) -> Graph:
        network = self._network()
        if (reason := why_no_export(network)) is not None:
            raise NoGraph(reason)
        samples = samples_of(self._architecture.shape, self._preset)
        try:
            model = export(network, outputs, samples, self._preset)
        except CannotExport as error:
            raise NoGraph(str(error)) from error
        tiles = torch.from_numpy(samples)
        in_torch = self._in_torch(CustomPreprocessing(None) if self._preset is None else self._preset)
        rows = in_torch.parts(tiles if self._preset is None else tiles.permute(0, 3, 1, 2), outputs)
        names = tuple(slot.column.name for slot in outputs)
        of_columns = {slot.column.name: part.numpy() for slot, part in rows.items()}
        return _agreeing(Graph(model, names, network.missing, samples, of_columns))

    def _outputs(self, slots: Sequence[Slot], missing: frozenset[str] = frozenset()) -> list[Slot]:
        """What is asked for, and where that is pooled what else one pass keeps."""
        alone = all(slot.pooling in _ALONE for slot in slots)
        kept = () if alone else kept_slots(self._keep, self._architecture, missing)
        return list({slot.column.name: slot for slot in (*slots, *kept)}.values())

    def _read(self, label: str, slots: Sequence[Slot]) -> Graph | None:
        """From the place, compared with torch unless it was compared on such a machine before."""
        content = self._place.read_file(self._name(slots))
        if content is not None and content.startswith(_REFUSED):
            raise NoGraph(content.removeprefix(_REFUSED).decode())
        graph = None if content is None else Graph.from_bytes(content)
        if graph is None or not {slot.column.name for slot in slots} <= {*graph.outputs}:
            return None
        mark = self._place.read_file(self._mark(slots))
        try:
            if mark is None:
                _agreeing(graph)
                self._place.write_file(self._mark(slots), b"")
            elif mark:
                raise NoGraph(mark.decode())
        except NoGraph as error:
            self._place.write_file(self._mark(slots), str(error).encode())
            _HELD.refuse(label, str(error))
            raise
        _HELD.add(label, graph)
        return graph

    def _write(self, slots: Sequence[Slot], content: bytes) -> None:
        if self._place.description:
            self._place.write_file(self._name(slots), content)

    def _label(self, recipe: str) -> str:
        """What two graphs of one recipe differ by, beside what they put out."""
        return f"{recipe}; tiles: {self._architecture.shape}, {self._preset!r}"

    def _name(self, slots: Sequence[Slot]) -> str:
        columns = sorted(slot.column.name for slot in self._outputs(slots))
        made_by = [f"{name} {installed(name)}" for name in _MAKERS]
        words = [self._label(self._place.description), *columns, *made_by, str(_SCHEMA)]
        return xxhash.xxh3_128_hexdigest("\0".join(words).encode())

    def _mark(self, slots: Sequence[Slot]) -> str:
        """The name of what tells that a machine like this one has compared the graph."""
        machine = xxhash.xxh3_64_hexdigest(f"{processor()} {installed('onnxruntime')}".encode())
        return f"{self._name(slots)}-{machine}"

    def _fingerprint(self) -> str:
        try:
            return self._network().fingerprint
        except NoFingerprint as error:
            raise NoGraph(str(error)) from error


class _Held:
    """Graphs in this process's memory, and why there is none, by label; those last used, at most a few."""

    def __init__(self) -> None:
        self._found: OrderedDict[str, list[Graph] | str] = OrderedDict()
        self._lock = ForkSafeLock()

    def __len__(self) -> int:
        return len(self._found)

    def get(self, label: str, columns: set[str]) -> Graph | None:
        with self._lock.held():
            found = self._found.get(label)
            if found is None:
                return None
            self._found.move_to_end(label)
        if isinstance(found, str):
            raise NoGraph(found)
        return next((graph for graph in found if columns <= {*graph.outputs}), None)

    def add(self, label: str, graph: Graph) -> None:
        with self._lock.held():
            there = self._found.get(label)
            self._put(label, [graph, *(there if isinstance(there, list) else ())][:_MOST_HELD])

    def refuse(self, label: str, reason: str) -> None:
        with self._lock.held():
            self._put(label, reason)

    def _put(self, label: str, what: list[Graph] | str) -> None:
        self._found[label] = what
        self._found.move_to_end(label)
        while len(self._found) > _MOST_HELD:
            self._found.popitem(last=False)


_HELD = _Held()
_MAKING = ForkSafeLock()


def _agreeing(graph: Graph) -> Graph:
    """The graph, if this machine computes with it what torch did.

    Raises
    ------
    NoGraph
    """
    found = run(graph, graph.samples, graph.outputs, torch.get_num_threads())
    distance, column = graph.farthest(found)
    if distance > TOLERANCE:
        raise NoGraph(f"onnxruntime's rows differ from torch's by {distance:.1g} of their norm in {column!r}")
    return graph


def why_no_export(network: Network) -> str | None:
    """Why a network cannot be exported here; None where it may be tried."""
    missing = [name for name in _MAKERS if not is_installed(name)]
    if missing:
        return f"{missing[0]} is not installed, which pip install featx[onnx] brings"
    if not exports_graphs():
        return "this release of torch is too old to export networks; torch 2.9 is the first that does"
    if not is_foldable(network.module):
        return "the network has code from outside of torch, torchvision and timm, or hooks"
    return None
