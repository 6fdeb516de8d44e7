"""Convolutions that take over the BatchNorm behind them: the same values, read and written once less."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn.utils import fuse_conv_bn_eval

from featx.backbones.graph import Graph, graph_of
from featx.backbones.tracing import copy_to_meta

_LIBRARIES = frozenset({"torch", "torchvision", "timm", "featx"})


@dataclass(frozen=True)
class Folded:
    """A network in eval mode whose convolutions have taken over the BatchNorm behind them.

    Attributes
    ----------
    module : nn.Module
        With the names of the original, and its tensors but for those of the convolutions.
    hidden : frozenset of (str, int, str)
        Name, call and side ("output", "input") of the values between the two, which are not to be had any more.
    """

    module: nn.Module
    hidden: frozenset[tuple[str, int, str]]


class _Passed(nn.BatchNorm2d):
    """A norm whose work is done already; everything else about it is as it was."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The input itself."""
        return input


def is_foldable(module: nn.Module) -> bool:
    """Whether a network does what a trace of it shows, which code from outside the libraries may not."""
    return all(
        type(child).__module__.partition(".")[0] in _LIBRARIES
        and "forward" not in vars(child)
        and not (child._forward_hooks or child._forward_pre_hooks)
        for child in module.modules()
    )


@torch.inference_mode(False)
def fold(module: nn.Module) -> Folded:
    """Fold what a trace shows can be folded; a network that cannot be traced stays as it is.

    Parameters
    ----------
    module : nn.Module
        In eval mode. Stays as it is.
    """
    try:
        structure = copy_to_meta(module)
        graph = graph_of(structure)
    except Exception:  # a network that needs values, or whatever a forward does when it meets a proxy
        return Folded(module, frozenset())
    pairs = _pairs(structure, graph)
    if not pairs:
        return Folded(module, frozenset())
    # The memo makes deepcopy share tensors, and take what is new wherever the old one is referred to.
    memo: dict[int, object] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    for node in pairs:
        (user,) = node.users
        convolution, norm = (module.get_submodule(str(found.target)) for found in (node, user))
        memo[id(convolution)] = _fused(convolution, norm)
        memo[id(norm)] = passed = copy.copy(norm)
        passed.__class__ = _Passed
    return Folded(copy.deepcopy(module, memo), _hidden(structure, graph, pairs))


def _pairs(structure: nn.Module, graph: Graph) -> set[fx.Node]:
    """Calls of a convolution whose only reader is a BatchNorm, both known by one name and called once."""
    names: dict[nn.Module, list[str]] = {}
    for name, child in structure.named_modules(remove_duplicate=False):
        names.setdefault(child, []).append(name)
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}

    def is_plain(node: fx.Node, kind: type[nn.Module]) -> bool:
        if node.op != "call_module":
            return False
        name = str(node.target)
        child = structure.get_submodule(name)
        alone = len(names[child]) == 1 and calls.count(name) == 1 and name not in read
        return type(child) is kind and alone and not child.training

    def is_pair(node: fx.Node) -> bool:
        if not is_plain(node, nn.Conv2d) or len(node.users) != 1:
            return False
        (user,) = node.users
        if not is_plain(user, nn.BatchNorm2d) or user.args != (node,):
            return False
        return structure.get_submodule(str(user.target)).running_var is not None

    return {node for node in graph.nodes if is_pair(node)}


def _fused(convolution: nn.Module, norm: nn.Module) -> nn.Module:
    """In float32, then in the precision of the network."""
    first, second = copy.deepcopy(convolution), copy.deepcopy(norm)
    assert isinstance(first, nn.Conv2d)
    assert isinstance(second, nn.BatchNorm2d)
    dtype = first.weight.dtype
    return fuse_conv_bn_eval(first.float(), second.float()).to(dtype).requires_grad_(False)


def _hidden(structure: nn.Module, graph: Graph, pairs: set[fx.Node]) -> frozenset[tuple[str, int, str]]:
    sides = {"output": graph.returned, "input": graph.given}
    between = {
        (child, call, side) for side, values in sides.items() for (child, call), node in values.items() if node in pairs
    }
    return frozenset(
        (name, call, side)
        for name, module in structure.named_modules(remove_duplicate=False)
        for child, call, side in between
        if child is module
    )
