"""From what a user passes as ``backbone`` to a description that can build the network."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from featx.backbones.table import FAMILIES, Family, family_of
from featx.exceptions import BackboneError

if TYPE_CHECKING:
    from torch import nn

EMBEDDED = "featx_micro"


def list_backbones() -> list[str]:
    """Names that ``backbone`` takes, sorted: torchvision's classification networks and ``"featx_micro"``.

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
    family : Family or None
        The table's row; None for modules and callables.
    source : str, callable or nn.Module
        What the user passed.
    key : hashable or None
        Equal for backbones that build the same architecture; None for a module, which may change between calls.
    """

    label: str
    family: Family | None
    source: Any = field(compare=False, repr=False)
    key: Hashable

    @property
    def named(self) -> bool:
        """Whether the network comes from the catalogue."""
        return self.family is not None

    def build(self, size: int) -> nn.Module:
        """Construct the network: random where the backbone is named, otherwise as it comes.

        ``size`` is the image side in pixels, for networks that are built for one.
        """
        from torch import nn

        if self.family is not None:
            sized = {self.family.size_option: size} if self.family.size_option else {}
            return _named_builder(self.label)(**self.family.build_options, **sized)
        if isinstance(self.source, nn.Module):
            return copy.deepcopy(self.source)
        module = self.source()
        if not isinstance(module, nn.Module):
            raise BackboneError(
                f"A callable backbone is expected to return a torch.nn.Module, got {type(module).__name__} "
                f"from {self.label}. Pass the module itself, or a function without arguments that returns one."
            )
        return module


def resolve_backbone(backbone: object) -> Backbone:
    """Description of the network that ``backbone`` names, holds or returns.

    Raises
    ------
    BackboneError
        The name is unknown; the message names the nearest ones.
    """
    if isinstance(backbone, str):
        return Backbone(backbone, family_of(backbone), backbone, backbone)
    from torch import nn

    if isinstance(backbone, nn.Module):
        return Backbone(type(backbone).__name__, None, backbone, None)
    if not callable(backbone):
        raise BackboneError(
            "backbone is expected to be a name, a torch.nn.Module or a callable that returns one, "
            f"got backbone={backbone!r}. See featx.list_backbones()."
        )
    return Backbone(getattr(backbone, "__qualname__", repr(backbone)), None, backbone, _callable_key(backbone))


def _named_builder(name: str) -> Callable[..., nn.Module]:
    if name == EMBEDDED:
        from featx.backbones.micro import FeatxMicro

        return FeatxMicro
    import torchvision

    return functools.partial(torchvision.models.get_model, name, weights=None)


def _callable_key(function: Any) -> Hashable:
    """Equal for copies of one partial, which ``sklearn.clone`` makes; otherwise the callable itself."""
    if not isinstance(function, functools.partial):
        return function if isinstance(function, Hashable) else None
    try:
        key = ("partial", _callable_key(function.func), function.args, tuple(sorted(function.keywords.items())))
        hash(key)
    except TypeError:
        return None
    return key
