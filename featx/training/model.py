"""A network with a head, put together from its parts: for training, and again from what training has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from featx.activations.engine import check_weights_reach
from featx.activations.plan import FeaturePlan
from featx.backbones.layers import Architecture
from featx.backbones.networks import Network, NetworkSpec
from featx.backbones.tokens import scopes_of
from featx.system.devices import fill, move, to_host
from featx.system.randomness import private_generator
from featx.training.split import Split
from featx.training.tuned import TunedNetwork, make_head
from featx.training.values import unflatten

Tensors = dict[str, torch.Tensor]
_HEAD, _NETWORK = "head.", "network."  # in front of the names of changed tensors


@dataclass(frozen=True)
class Model:
    """Everything that decides a tuned network but its tensors.

    Attributes
    ----------
    spec : NetworkSpec
    architecture : Architecture
    plan : FeaturePlan
        Of the layer that the head reads.
    split : Split
    hidden : tuple of int
    dropout : float
    n_outputs : int
    batch_norm : {"frozen", "train"}
    device : str
    """

    spec: NetworkSpec
    architecture: Architecture
    plan: FeaturePlan
    split: Split
    hidden: tuple[int, ...]
    dropout: float
    n_outputs: int
    batch_norm: str
    device: str

    @property
    def cut_plan(self) -> FeaturePlan | None:
        """How the values at the cut are computed as features; None where the tail starts from images."""
        if self.split.head_only:
            return self.plan
        return None if self.split.cut is None else FeaturePlan.of((self.split.cut,), "flatten", 1, None)

    @cached_property
    def finish(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """From rows of `cut_plan` to what the tail takes."""
        cut = self.split.cut
        return (lambda rows: rows) if self.split.head_only or cut is None else unflatten(cut)

    def build(self, tensors: Mapping[str, torch.Tensor] | None = None, seed: int = 0) -> Built:
        """On the device, with the tensors that `Built.changed` gave, or as pretrained with a new head.

        Raises
        ------
        ValueError
            The tensors are those of another head, or of parts that stay as they were here.
        """
        with private_generator(seed):
            head = make_head(self.plan.shape[-1], self.hidden, self.n_outputs, self.dropout)
        head = move(head, self.device, torch.float32)
        module, shares = (None, False) if self.split.head_only else self._module()
        if tensors is not None:
            may_change = set() if module is None else set(self.split.names(module))
            _load(head, _within(tensors, _HEAD), set(head.state_dict()), "hidden_layer_sizes")
            _load(module, _within(tensors, _NETWORK), may_change, "freeze")
        return Built(self, module, head, shares)

    def pretrained(self) -> Network:
        """The network before training, on the device."""
        return self.spec.load(self.device, torch.float32)

    def _module(self) -> tuple[nn.Module, bool]:
        network = self.pretrained()
        check_weights_reach(self.plan, self.architecture, network)
        with network.lock:  # not with the hooks of another thread's pass
            module = copy.deepcopy(network.module)
        own = map(id, _tensors(module))
        return module, not {*map(id, _tensors(network.module))}.isdisjoint(own)


@dataclass
class Built:
    """A network in memory, until it is closed.

    Attributes
    ----------
    model : Model
    module : nn.Module or None
        Of this object alone; None where only the head trains.
    head : nn.Sequential
    shares : bool
        Whether tensors of the module are the pretrained network's after all, as of modules whose copies are themselves.
    """

    model: Model
    module: nn.Module | None
    head: nn.Sequential
    shares: bool = False
    _tails: dict[bool, nn.Module] = field(default_factory=dict)

    def network(self, training: bool) -> TunedNetwork:
        """Tail and head: what trains in training mode and with gradients, the rest in eval mode; or all of it."""
        self.head.train(training).requires_grad_(training)
        if self.module is None:
            return TunedNetwork(None, self.model.plan, self.head)
        self.model.split.set_modes(self.module, training=training, batch_norm=self.model.batch_norm)
        if training not in self._tails:  # the graph remembers the modes that functions were called in
            self._tails[training] = self.model.split.tail(self.module)
        return TunedNetwork(self._tails[training], self.model.plan, self.head)

    def parameters_with_factors(self, layer_decay: float) -> Iterator[tuple[float, nn.Parameter]]:
        """What trains, with a factor of its learning rate: 1 for the head, times ``layer_decay`` per stage below it."""
        for parameter in self.head.parameters():
            yield 1.0, parameter
        if self.module is None:
            return
        depths = self._depths()
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                yield layer_decay ** depths[name.rpartition(".")[0]], parameter

    def changed(self) -> Tensors:
        """Copies on the CPU of what training may have changed."""
        tensors = {_HEAD + name: value for name, value in self.head.state_dict().items()}
        if self.module is not None:
            state = self.module.state_dict()
            tensors |= {_NETWORK + name: state[name] for name in self.model.split.names(self.module)}
        return {name: to_host(value.detach()).clone() for name, value in tensors.items()}

    def close(self) -> None:
        """Let go of its tensors' memory: a traced network refers to itself, and Python may find that out much later."""
        self._tails.clear()
        nn.Module.to(self.head, "meta")
        if self.module is not None and not self.shares:
            nn.Module.to(self.module, "meta")

    def _depths(self) -> dict[str, int]:
        """For each module, how many stages end at or after it; modules that are not called count as the deepest."""
        architecture = self.model.architecture
        ends = [architecture.layer(name).position for name in architecture.stages]
        first: dict[str, int] = {}
        for position, call in enumerate(architecture.calls):
            for name in call.names:
                # What surrounds it has begun by then, and may have used values of its own.
                for scope in scopes_of(name):
                    first.setdefault(scope, position)
        assert self.module is not None
        return {name: sum(end > first.get(name, 0) for end in ends) for name, _ in self.module.named_modules()}


def _tensors(part: nn.Module) -> list[torch.Tensor]:
    return [*part.parameters(), *part.buffers()]


def _load(part: nn.Module | None, tensors: Tensors, may_change: set[str], parameter: str) -> None:
    """Put tensors of an earlier fit into their places, all of them or none."""
    own = {} if part is None else part.state_dict()
    strange = [name for name, value in tensors.items() if name not in may_change or own[name].shape != value.shape]
    if strange:
        raise ValueError(
            f"What the last fit has trained is expected to have its place, got another {parameter}, for which "
            f"{', '.join(strange[:3])} {'has' if len(strange) == 1 else 'have'} none. Set {parameter} back, or fit "
            "anew with warm_start=False."
        )
    for name, value in tensors.items():  # MNASNet's own way of loading refuses a part
        fill(own[name], value)


def _within(tensors: Mapping[str, torch.Tensor], prefix: str) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
