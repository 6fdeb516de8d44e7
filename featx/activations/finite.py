"""Features that are not finite numbers: found where they are made, and told with what makes them so."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from featx.activations.plan import Slot
from featx.backbones.layers import Architecture, Layer
from featx.backbones.networks import Network, NetworkSpec
from featx.backbones.weights import Weights
from featx.exceptions import NotFinite
from featx.images.sources import Items
from featx.system.callers import frames_to_caller

_MOST_NAMES = 3


def not_finite_rows(part: torch.Tensor) -> torch.Tensor | None:
    """A mask (n,) of the rows that hold NaN or infinity; None where all of them are finite."""
    if part.sum().isfinite():  # one pass without a copy; where finite numbers overflow in the sum, each is looked at
        return None
    mask = ~part.isfinite().flatten(1).all(1)
    return mask if mask.any() else None


@dataclass(frozen=True)
class Doctor:
    """Knows why a network puts out what is not finite.

    Parameters
    ----------
    spec : NetworkSpec
    architecture : Architecture
    precision : str
    """

    spec: NetworkSpec
    architecture: Architecture
    precision: str
    _wrong_weights: dict[Layer, list[str]] = field(default_factory=dict)

    def error(self, items: Items, row: int, tile: torch.Tensor | None, slot: Slot, network: Network) -> NotFinite:
        """For one item, of which the network saw a tile (None: one without fault) and made no finite part in a slot."""
        reason, remedy = self._why(tile, slot, network)
        where = f"in layer {slot.layer.label!r}: {reason}"
        return NotFinite.of(items.original_row(row), items[row].source, where, remedy)

    def _why(self, tile: torch.Tensor | None, slot: Slot, network: Network) -> tuple[str, str]:
        """What makes it so, and what to do."""
        if tile is not None and not tile.isfinite().all():
            return "preprocess has made NaN or infinity of the image", "Let it return finite numbers."
        if slot.layer not in self._wrong_weights:
            self._wrong_weights[slot.layer] = self._weights_before(slot.layer, network)
        if wrong := self._wrong_weights[slot.layer]:
            more = f" and {len(wrong) - _MOST_NAMES} more" if len(wrong) > _MOST_NAMES else ""
            held = ", ".join(wrong[:_MOST_NAMES]) + more
            return f"{_name_of(self.spec.weights)} hold NaN or infinity in {held}", "Take other weights."
        if self.precision == "float16":
            return 'precision="float16" ends at 65504', 'Set precision="bfloat16" or precision="float32".'
        if slot.pooling == "gem":
            powers = 'pooling="gem" takes third powers, which are too large here'
            return powers, 'Use pooling="avg" or an earlier layer.'
        return "the network's values grow beyond all numbers", "Read an earlier layer, or take other weights."

    def _weights_before(self, layer: Layer, network: Network) -> list[str]:
        """Names of tensors that are not finite and that a layer's values can depend on."""
        # Half precision makes infinity of large weights, and never NaN of any.
        is_wrong = torch.isnan if self.precision == "float16" else lambda tensor: ~torch.isfinite(tensor)
        calls = self.architecture.calls
        before = {name for call in calls[: layer.position] for name in call.names}
        behind = {name for call in calls[layer.position :] for name in call.names} - before
        behind = {name for name in behind if name and not any(inner.startswith(f"{name}.") for inner in before)}
        state = {name: value for name, value in network.module.state_dict().items() if isinstance(value, torch.Tensor)}
        return [
            name for name, value in state.items() if name.rpartition(".")[0] not in behind and is_wrong(value).any()
        ]


def warn_not_finite(errors: Sequence[NotFinite], n_images: int) -> None:
    """One warning that counts images without finite features and names the first, where there are any.

    Parameters
    ----------
    errors : sequence of NotFinite
    n_images : int
        Of which they are.
    """
    if errors:
        count = f"{len(errors)} of {n_images} images have {NotFinite.PHRASE}; their rows are NaN."
        warnings.warn(f"{count} The first: {errors[0]}", UserWarning, stacklevel=frames_to_caller())


def _name_of(weights: Weights) -> str:
    """What a message calls some weights."""
    return f"weights={weights.given!r}" if weights.name else "the backbone's weights"
