"""From what a user passes as ``backbone`` to a description that can build the network."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from featx.backbones.table import FAMILIES, Family
from featx.exceptions import BackboneError

if TYPE_CHECKING:
    from torch import nn

    from featx.backbones.entry import Entry


def list_backbones() -> list[str]:
    """Names that ``backbone`` takes, sorted: torchvision's classification networks and ``"featx_micro"``.

    Where timm is installed, ``backbone`` also takes ``"timm/NAME"`` for each NAME of ``timm.list_models()``.

    Returns
    -------
    names : list of str

    Examples
    --------
    >>> from featx import list_backbones
    >>> "resnet50" in list_backbones(), "featx_micro" in list_backbones()
    (True, True)
    """
    return sorted(model for family in FAMILIES for model in family.channels)


@dataclass(frozen=True)
class Backbone:
    """A network that can be built: by name, by callable, or by copying a module.

    Attributes
    ----------
    label : str
        For messages.
    source : str, callable or nn.Module
        What the user passed.
    key : hashable or None
        Equal for backbones that build the same architecture; None for a module, which may change between calls.
    entry : Entry or None
        What the catalogue knows of it; None for modules and callables.
    """

    label: str
    source: Any = field(compare=False, repr=False)
    key: Hashable
    entry: Entry | None = field(default=None, compare=False, repr=False)

    @property
    def named(self) -> bool:
        """Whether the network comes from the catalogue."""
        return self.entry is not None

    @property
    def family(self) -> Family | None:
        """The table's row, where there is one."""
        return None if self.entry is None else self.entry.family

    def build(self, weights: str = "", side: int | None = None) -> nn.Module:
        """Construct the network: random where the backbone is named, otherwise as it comes.

        ``weights`` names the published weights that are to fit; empty for those of a file or a seed. ``side`` is that
        of a named network's images where they are to be of another size.
        """
        from torch import nn

        from featx.backbones.tracing import private_copy

        if self.entry is not None:
            return self.entry.build(weights, side)
        module = self.source if isinstance(self.source, nn.Module) else self.source()
        if not isinstance(module, nn.Module):
            raise BackboneError(
                f"A callable backbone is expected to return a torch.nn.Module, got {type(module).__name__} "
                f"from {self.label}. Pass the module itself, or a function without arguments that returns one."
            )
        return private_copy(module, self.label)


def resolve_backbone(backbone: object) -> Backbone:
    """Description of the network that ``backbone`` names, holds or returns.

    Raises
    ------
    BackboneError
        The name is unknown; the message names the nearest ones.
    """
    if isinstance(backbone, str):
        from featx.backbones.entries import entry_of

        return Backbone(backbone, backbone, backbone, entry_of(backbone))
    from torch import nn

    if isinstance(backbone, nn.Module):
        module = _unwrapped(backbone)
        return Backbone(type(module).__name__, module, None)
    if not callable(backbone):
        raise BackboneError(
            "backbone is expected to be a name, a torch.nn.Module or a callable that returns one, "
            f"got backbone={backbone!r}. See featx.list_backbones()."
        )
    return Backbone(getattr(backbone, "__qualname__", repr(backbone)), backbone, _callable_key(backbone))


def _unwrapped(module: nn.Module) -> nn.Module:
    """The network inside torch's own wrappers, which replicate or compile it and cannot be read from outside."""
    from torch.nn.parallel import DataParallel, DistributedDataParallel

    if isinstance(module, (DataParallel, DistributedDataParallel)):
        return _unwrapped(module.module)
    compiled = getattr(module, "_orig_mod", None)
    return module if compiled is None else _unwrapped(compiled)


def _callable_key(function: Any) -> Hashable:
    """Equal for copies of one partial, which ``sklearn.clone`` makes; otherwise the callable itself."""
    if not isinstance(function, functools.partial):
        return function if isinstance(function, Hashable) else None
    try:
        values = [*enumerate(function.args), *sorted(function.keywords.items())]
        key = ("partial", _callable_key(function.func), tuple((name, type(value), value) for name, value in values))
        hash(key)
    except TypeError:
        return None
    return key
