"""A network as a graph of operations, with the values that its modules take and return."""

from __future__ import annotations

import inspect
import threading
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from featx.backbones.timm_models import wants_to_be_whole
from featx.system.locks import ForkSafeLock

# While a network is traced, torch.fx has every module of the process call the tracer.
_TRACING = ForkSafeLock()

#: A call of a module: the module, and 1 for its first call in the pass, 2 for its second, ...
ModuleCall = tuple[nn.Module, int]


@dataclass(frozen=True)
class Graph:
    """What a network does with its images, in the order in which it does it.

    Attributes
    ----------
    graph : fx.Graph
    returned, given : dict of (module, call) to fx.Node or None
        The first value that each call of a module puts out, and the first that it takes.
    """

    graph: fx.Graph
    returned: dict[ModuleCall, fx.Node | None]
    given: dict[ModuleCall, fx.Node | None]

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Every operation."""
        return tuple(self.graph.nodes)


def graph_of(module: nn.Module) -> Graph:
    """Trace a network in the modes that its parts are in; its own forward is called once.

    Raises
    ------
    Exception
        Whatever a foreign forward does when it meets a proxy.
    """
    tracer = _Tracer()
    with _TRACING.held():
        graph = tracer.trace(module, concrete_args=_defaults(module))
    (output,) = (node for node in graph.nodes if node.op == "output")
    tracer.returned[module, 1] = _first_node(output.args)
    return Graph(graph, tracer.returned, tracer.given)


class _Tracer(fx.Tracer):
    """Notes what every call of a module takes and returns; operations of torchvision and timm stay whole, as torch's.

    Networks that other threads run meanwhile are let through.
    """

    def __init__(self) -> None:
        super().__init__()
        self.returned: dict[ModuleCall, fx.Node | None] = {}
        self.given: dict[ModuleCall, fx.Node | None] = {}
        self._calls: defaultdict[nn.Module, int] = defaultdict(int)
        self._thread = threading.get_ident()

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        operation = type(m).__module__.startswith("torchvision.ops") and not isinstance(m, nn.Sequential)
        return operation or wants_to_be_whole(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        out = super().call_module(m, forward, args, kwargs)
        self._calls[m] += 1
        key = m, self._calls[m]
        self.returned[key], self.given[key] = _first_node(out), _first_node((args, kwargs))
        return out


def _defaults(module: nn.Module) -> dict[str, Any]:
    """What the network takes beside images, as it is when nobody passes it: not to be traced as if it were passed."""
    _, *others = inspect.signature(module.forward).parameters.values()
    return {other.name: other.default for other in others if other.default is not other.empty}


def _first_node(value: Any) -> fx.Node | None:
    if isinstance(value, fx.Proxy):
        return value.node
    if isinstance(value, fx.Node):
        return value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return next((node for node in map(_first_node, parts) if node is not None), None)
