"""The network in two at the freeze point: a front that never changes, and a tail that trains."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn

from featx.activations.taps import read
from featx.backbones.graph import graph_of
from featx.backbones.layers import Architecture, Layer
from featx.backbones.networks import NetworkSpec
from featx.exceptions import LayerError
from featx.system.locks import ForkSafeLock

_NORMS_WITH_STATISTICS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
# Stages that train by default, chosen by benchmarks/accuracy.md: as good as all of them, in six tenths of the time.
_AUTO = 2

# Functions of the module operator that change their first argument, as `+=` does.
_WRITING = frozenset(
    {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "setitem"}
)


@dataclass(frozen=True)
class Split:
    """Where a network is cut, and what trains behind the cut.

    Attributes
    ----------
    frozen : Layer or None
        Everything up to here stays as it was; None where everything trains.
    attach : Layer
        What the head reads.
    cut : Layer or None
        What the tail starts from: `frozen`, or the nearest layer before it that alone reaches `attach`. None where the
        tail is the whole network, because nothing is frozen or because it cannot be traced.
    trainable : frozenset of str
        Modules whose own parameters and statistics may change.
    reason : str
        Why a frozen network has no cut; empty where it has one.
    """

    frozen: Layer | None
    attach: Layer
    cut: Layer | None
    trainable: frozenset[str]
    reason: str = ""

    @property
    def head_only(self) -> bool:
        """Whether training needs nothing but the rows that the head reads."""
        return self.frozen is not None and self.frozen.position >= self.attach.position

    def names(self, module: nn.Module) -> list[str]:
        """Names in the state dict of what may change, shallow to deep."""
        own = [prefix + name for prefix, part in self._parts(module) for name in _own_tensors(part)]
        return [name for name in module.state_dict() if name in set(own)]

    def set_modes(self, module: nn.Module, *, training: bool, batch_norm: str) -> None:
        """Put what trains into training mode and everything else into eval mode, without gradients."""
        module.eval().requires_grad_(False)
        for _, part in self._parts(module):
            for parameter in part.parameters(recurse=False):
                parameter.requires_grad_(training)
            fixed = batch_norm == "frozen" and isinstance(part, _NORMS_WITH_STATISTICS)
            part.training = training and not fixed

    def tail(self, module: nn.Module) -> nn.Module:
        """From the values at the cut to those that the head reads, in the modes that the module's parts are in."""
        if self.cut is not None:
            return _Traced(module).tail(self.cut, self.attach)
        return self._without_idle_branches(module) or _Whole(module, self.attach)

    def _without_idle_branches(self, module: nn.Module) -> nn.Module | None:
        """The whole network but for what runs beside the layer and is not read, where there is such a thing.

        Auxiliary classifiers run in training mode alone, and may fail on images that all the rest takes.
        """
        if not module.training:
            return None
        try:
            traced = _Traced(module)
            runs_idly = any(node.op == "call_module" for node in traced.idle_before(self.attach))
            return traced.tail(None, self.attach) if runs_idly else None
        except Exception:  # whatever a foreign forward does when it meets a proxy: it is run as it is
            return None

    def _parts(self, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for name, part in module.named_modules():
            if name in self.trainable:
                yield (f"{name}." if name else ""), part


def split_at(module: nn.Module, architecture: Architecture, attach: Layer, freeze: object) -> Split:
    """Resolve a user's ``freeze`` for a head at ``attach``.

    Parameters
    ----------
    module : nn.Module
        With the network's structure; its values are not looked at.
    architecture : Architecture
    attach : Layer
    freeze : int, "all" or str
        As in FineTuneClassifier.

    Raises
    ------
    LayerError
        The network has no such stage or module.
    """
    frozen = _resolve_freeze(architecture, attach, freeze)
    head_only = Split(attach, attach, attach, frozenset())
    if frozen is not None and frozen.position >= attach.position:
        return head_only
    try:
        traced = _Traced(module)
        traced.idle_before(attach)
        trainable = traced.modules_between(frozen, attach)
    except Exception as error:  # whatever a foreign forward does when it meets a proxy
        return Split(frozen, attach, None, _called_between(architecture, frozen, attach), reason=str(error))
    if frozen is not None and not any(_own_tensors(module.get_submodule(name)) for name in trainable):
        return head_only  # nothing behind the freeze point has anything to learn
    cut = None if frozen is None else traced.cut_before(frozen, attach, architecture)
    reason = "" if frozen is None or cut else "several values cross every place before the freeze point"
    return Split(frozen, attach, cut, trainable, reason)


def split_of(spec: NetworkSpec, architecture: Architecture, attach: Layer, freeze: object) -> Split:
    """As `split_at`, for a network that need not be loaded."""
    # A foreign forward may count its calls: not on the user's own module.
    structure = architecture.module if spec.backbone.named else copy.deepcopy(architecture.module)
    return split_at(structure, architecture, attach, freeze)


def _resolve_freeze(architecture: Architecture, attach: Layer, freeze: object) -> Layer | None:
    if freeze == "all":
        return attach
    if isinstance(freeze, bool):
        raise LayerError(f'A number of stages, "auto", "all" or a module\'s name is expected, got freeze={freeze}.')
    if isinstance(freeze, str) and freeze != "auto":
        return _named(architecture, freeze)
    stages = [name for name in architecture.stages if architecture.layer(name).position <= attach.position]
    count = -min(_AUTO, len(stages)) if freeze == "auto" else int(freeze)  # type: ignore[call-overload]
    if not -len(stages) <= count <= len(stages):
        raise LayerError(
            f"A number of stages from {-len(stages)} to {len(stages)} is expected for {architecture.model}, got "
            f"freeze={freeze}. Its stages up to the head are {stages}."
        )
    count = count if count >= 0 else len(stages) + count
    return architecture.layer(stages[count - 1]) if count else None


def _named(architecture: Architecture, freeze: str) -> Layer:
    try:
        return architecture.resolve(freeze)[0]
    except LayerError as error:
        number = freeze.strip().removeprefix("-").isdecimal()
        hint = f" Pass {freeze.strip()} as a number." if number else ""
        raise LayerError(
            f'A number of stages, "auto", "all" or a module\'s name is expected, got freeze={freeze!r}.{hint} '
            f"{architecture.model} has the stages {list(architecture.stages)}; featx.list_layers names all modules."
        ) from error


class _Traced:
    """A network as a graph, with the values that its modules return and take."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._graph = module, graph_of(module)

    def node_of(self, layer: Layer) -> fx.Node:
        """Where a layer's values come from.

        Raises
        ------
        LookupError
            It lies inside what the graph treats as one operation.
        """
        child = self._module.get_submodule(layer.name)
        node = (self._graph.given if layer.side == "input" else self._graph.returned).get((child, layer.call))
        if node is None:
            raise LookupError(f"{layer.label} lies inside of an operation that cannot be traced")
        return node

    def tail(self, cut: Layer | None, attach: Layer) -> fx.GraphModule:
        """The part of the graph between two layers; all that leads to ``attach`` for None."""
        begin, end = self._images if cut is None else self.node_of(cut), self.node_of(attach)
        inside = self._before(end, stop=begin)
        graph = fx.Graph()
        copies = {begin: graph.placeholder("values")}
        for node in self._graph.nodes:
            if node in inside and node is not begin:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(copies[end])
        return fx.GraphModule(self._module, graph)

    def idle_before(self, attach: Layer) -> list[fx.Node]:
        """Operations before a layer whose results do not lead to it.

        Raises
        ------
        LookupError
            One of them writes over something that does.
        """
        end = self.node_of(attach)
        leading, order = self._before(end), list(self._graph.nodes)
        idle = [node for node in order[: order.index(end)] if node not in leading]
        for node in idle:
            if self._writes(node) and leading.intersection(self._shared_with(node, leading)):
                raise LookupError(f"{node.target} writes over what it takes, and nobody takes what it returns")
        return idle

    def _shared_with(self, node: fx.Node, leading: set[fx.Node]) -> set[fx.Node]:
        """Values whose memory an operation may take: its inputs, and what these may be views of."""
        found, waiting = set[fx.Node](), list(node.all_input_nodes)
        while waiting:
            value = waiting.pop()
            if value not in found:
                found.add(value)
                if value not in leading and not self._is_new(value):
                    waiting += value.all_input_nodes
        return found

    def _is_new(self, node: fx.Node) -> bool:
        """Whether a value has memory of its own: a module with parameters computes it."""
        if node.op != "call_module" or self._writes(node):
            return False
        return any(True for _ in self._module.get_submodule(str(node.target)).parameters())

    def _writes(self, node: fx.Node) -> bool:
        """Whether an operation may change what it takes."""
        if node.op == "call_module":
            return bool(getattr(self._module.get_submodule(str(node.target)), "inplace", False))
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
        by_name = name.endswith("_") and not name.startswith("__")
        return by_name or name in _WRITING or bool(node.kwargs.get("inplace")) or node.kwargs.get("out") is not None

    @property
    def _images(self) -> fx.Node:
        return next(node for node in self._graph.nodes if node.op == "placeholder")

    def cut_before(self, frozen: Layer, attach: Layer, architecture: Architecture) -> Layer | None:
        """The last layer up to ``frozen`` through which all that reaches ``attach`` passes."""
        end, order = self.node_of(attach), {node: i for i, node in enumerate(self._graph.nodes)}
        last = order[self.node_of(frozen)]
        nodes = {node: key for key, node in self._graph.returned.items() if node is not None and order[node] <= last}
        names = {child: name for name, child in self._module.named_modules()}
        for node in sorted(nodes, key=order.__getitem__, reverse=True):
            child, call = nodes[node]
            if not any(found.op == "placeholder" for found in self._before(end, stop=node)):
                try:
                    return architecture.layer(names[child], call)
                except (LayerError, KeyError):  # puts out no row per image
                    continue
        return None

    def modules_between(self, frozen: Layer | None, attach: Layer) -> frozenset[str]:
        """Modules with values of their own that take part between two layers and not before."""
        end = self.node_of(attach)
        before = set() if frozen is None else self._before(self.node_of(frozen))
        after = self._before(end) - before
        return self._owners(after) - self._owners(before)

    def _owners(self, nodes: set[fx.Node]) -> frozenset[str]:
        targets = {str(node.target) for node in nodes if node.op == "call_module"}
        inner = {
            f"{target}.{name}" if name else target
            for target in targets
            for name, _ in self._module.get_submodule(target).named_modules()
        }
        read = {str(node.target).rpartition(".")[0] for node in nodes if node.op == "get_attr"}
        # A container's own flag decides what functions in its forward do (dropout, say), so it trains with its parts.
        around = {name.rpartition(".")[0] for name in inner | read}
        return frozenset(inner | read | around)

    def _before(self, node: fx.Node, stop: fx.Node | None = None) -> set[fx.Node]:
        """A node and all that it is made from, not looking past ``stop``."""
        found, waiting = set(), [node]
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                if node is not stop:
                    waiting += node.all_input_nodes
        return found


class _Whole(nn.Module):
    """The network itself, from images to what the head reads."""

    def __init__(self, module: nn.Module, attach: Layer) -> None:
        super().__init__()
        self.module, self._attach, self._lock = module, attach, ForkSafeLock()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Of shape (n, ...), as the layer puts it out."""
        with self._lock.held():  # its hooks would also see what another thread runs
            return self._read(images)

    def _read(self, images: torch.Tensor) -> torch.Tensor:
        (values,) = read(self.module, images, [self._attach], lambda _, output: output)
        return values


def _called_between(architecture: Architecture, frozen: Layer | None, attach: Layer) -> frozenset[str]:
    first = 0 if frozen is None else frozen.position
    before = {name for call in architecture.calls[:first] for name in call.names}
    after = {name for call in architecture.calls[first : attach.position] for name in call.names}
    if frozen is None:
        after.add("")
    else:  # a module that began before the freeze point may have used its own values there
        around = {name for name in after if any(inner.startswith(f"{name}.") or not name for inner in before)}
        after -= around
    return frozenset(after - before)


def _own_tensors(part: nn.Module) -> list[str]:
    names = [name for name, _ in part.named_parameters(recurse=False)]
    return names + [name for name, _ in part.named_buffers(recurse=False)]
