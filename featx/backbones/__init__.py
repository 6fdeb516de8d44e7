"""From a name or a module to a network, and to the places where it can be read."""

from featx.backbones.catalogue import list_backbones
from featx.backbones.listing import list_layers

__all__ = ["list_backbones", "list_layers"]
