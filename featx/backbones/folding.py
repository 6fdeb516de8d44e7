"""Convolutions that take over the BatchNorm behind them: the same values, read and written once less."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn.utils import fuse_conv_bn_eval

from featx.backbones.graph import Graph, graph_of
from featx.backbones.tracing import copy_to_meta


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


@torch.inference_mode(False)
def fold(module: nn.Module) -> Folded:
    """Fold what a trace shows can be folded; a network that cannot be traced stays as it is.

    Parameters
    ----------
    module : nn.Module
        In eval mode. Stays as it is.
    """
    structure = copy_to_meta(module)
    try:
        graph = graph_of(structure)
    except Exception:  # whatever a foreign forward does when it meets a proxy
        return Folded(module, frozenset())
    pairs = _pairs(structure, graph)
    if not pairs:
        return Folded(module, frozenset())
    tensors = [*module.parameters(), *module.buffers()]
    twin = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
    for node in pairs:
        (norm,) = (str(user.target) for user in node.users)
        twin.set_submodule(str(node.target), _fused(twin, str(node.target), norm), strict=True)
        twin.set_submodule(norm, nn.Identity(), strict=True)
    return Folded(twin, _hidden(structure, graph, pairs))


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
        hooked = child._forward_hooks or child._forward_pre_hooks
        alone = len(names[child]) == 1 and calls.count(name) == 1 and name not in read
        return type(child) is kind and alone and not hooked and not child.training

    def is_pair(node: fx.Node) -> bool:
        if not is_plain(node, nn.Conv2d) or len(node.users) != 1:
            return False
        (user,) = node.users
        if not is_plain(user, nn.BatchNorm2d) or user.args != (node,):
            return False
        return structure.get_submodule(str(user.target)).running_var is not None

    return {node for node in graph.nodes if is_pair(node)}


def _fused(module: nn.Module, convolution: str, norm: str) -> nn.Module:
    """In float32, then in the precision of the network."""
    first, second = (copy.deepcopy(module.get_submodule(name)) for name in (convolution, norm))
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
