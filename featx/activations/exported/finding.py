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
from featx.exceptions import OutOfMemory
from featx.images.preprocessing import CustomPreprocessing, Preprocessing, Preset
from featx.system.compat import exports_graphs
from featx.system.locks import ForkSafeLock
from featx.system.machine import processor
from featx.system.packages import installed, is_installed

# To be raised whenever the same name would stand for another graph.
_SCHEMA = 1
_MAKERS = ("onnx", "onnxscript", "onnxruntime")
_MOST_HELD = 4
# Large, and asked for by training alone: what reads them reads nothing else, but where a store keeps the rest.
_ALONE = ("flatten", "map")
_REFUSED = b"no graph: "


class NoGraph(Exception):
    """A network cannot be run by onnxruntime; the message says why."""


class NotNow(NoGraph):
    """As `NoGraph`, for a reason that may be gone at the next try."""


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
        columns = {slot.column.name for slot in slots}
        labels = [self._label(self._fingerprint())]
        if self._place.description:
            labels.append(self._label(self._place.description))
        try:
            graph = self._exported(self._outputs(slots, self._network().missing))
        except NotNow:
            raise
        except NoGraph as error:
            self._write(slots, _REFUSED + str(error).encode())
            for label in labels:
                _HELD.refuse(label, columns, str(error))
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
            kind = NotNow if isinstance(error.__cause__, MemoryError | OSError) else NoGraph
            raise kind(str(error)) from error
        tiles = torch.from_numpy(samples)
        in_torch = self._in_torch(CustomPreprocessing(None) if self._preset is None else self._preset)
        try:
            rows = in_torch.parts(tiles if self._preset is None else tiles.permute(0, 3, 1, 2), outputs)
        except OutOfMemory as error:
            raise NotNow(str(error)) from error
        names = tuple(slot.column.name for slot in outputs)
        of_columns = {slot.column.name: part.numpy() for slot, part in rows.items()}
        return _agreeing(Graph(model, names, network.missing, samples, of_columns))

    def _outputs(self, slots: Sequence[Slot], missing: frozenset[str] = frozenset()) -> list[Slot]:
        """What is asked for, and where that is pooled what else one pass keeps."""
        alone = self._place is NOWHERE and all(slot.pooling in _ALONE for slot in slots)
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
        except NotNow:
            raise
        except NoGraph as error:
            self._place.write_file(self._mark(slots), str(error).encode())
            _HELD.refuse(label, {slot.column.name for slot in slots}, str(error))
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
            network = self._network()
            with network.lock:  # not with the hooks of another thread's pass
                return network.fingerprint
        except NoFingerprint as error:
            raise NoGraph(str(error)) from error


class _Held:
    """Graphs in this process's memory, and why there is none for some columns, by label; those last used, a few."""

    def __init__(self) -> None:
        self._found: OrderedDict[str, list[Graph]] = OrderedDict()
        self._refused: dict[tuple[str, frozenset[str]], str] = {}
        self._lock = ForkSafeLock()

    def __len__(self) -> int:
        return len(self._found) + len(self._refused)

    def get(self, label: str, columns: set[str]) -> Graph | None:
        with self._lock.held():
            if (reason := self._refused.get((label, frozenset(columns)))) is not None:
                raise NoGraph(reason)
            found = self._found.get(label, [])
            if found:
                self._found.move_to_end(label)
            return next((graph for graph in found if columns <= {*graph.outputs}), None)

    def add(self, label: str, graph: Graph) -> None:
        with self._lock.held():
            self._found[label] = [graph, *self._found.get(label, ())][:_MOST_HELD]
            self._found.move_to_end(label)
            while len(self._found) > _MOST_HELD:
                self._found.popitem(last=False)

    def refuse(self, label: str, columns: set[str], reason: str) -> None:
        with self._lock.held():
            self._refused[label, frozenset(columns)] = reason


_HELD = _Held()
_MAKING = ForkSafeLock()


def _agreeing(graph: Graph) -> Graph:
    """The graph, if this machine computes with it what torch did.

    Raises
    ------
    NoGraph
    """
    try:
        found = run(graph, graph.samples, graph.outputs, 1)
    except OutOfMemory as error:
        raise NotNow(str(error)) from error
    except Exception as error:  # each release has its own for what it does not know
        raise NoGraph(f"onnxruntime cannot run it here ({type(error).__name__}: {error})") from error
    distance, column = graph.farthest(found)
    if distance > TOLERANCE:
        raise NoGraph(f"onnxruntime's rows differ from torch's by {distance:.1g} of their norm in {column!r}")
    return graph


def why_missing(*names: str) -> str | None:
    """That one of some packages is not installed, and what brings it; None where all are."""
    missing = [name for name in names if not is_installed(name)]
    return f"{missing[0]} is not installed, which pip install featx[onnx] brings" if missing else None


def why_no_export(network: Network) -> str | None:
    """Why a network cannot be exported here; None where it may be tried."""
    if (reason := why_missing(*_MAKERS)) is not None:
        return reason
    if not exports_graphs():
        return "this release of torch is too old to export networks; torch 2.9 is the first that does"
    with network.lock:  # not with the hooks of another thread's pass
        is_ours = is_foldable(network.module)
    if not is_ours:
        return "the network has code from outside of torch, torchvision and timm, or hooks"
    return None
