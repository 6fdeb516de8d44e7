"""Which engine takes the batches of one call through the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from featx.activations.exported.finding import NOWHERE, Finder, NoGraph, Place, why_missing
from featx.activations.exported.onnx_pass import OnnxPass
from featx.activations.exported.worth import pays
from featx.activations.plan import Slot
from featx.activations.torch_pass import TorchPass
from featx.backbones.layers import Architecture
from featx.backbones.networks import Network
from featx.exceptions import EngineError
from featx.images.preprocessing import Preprocessing, Preset
from featx.system.devices import HOST


class Pass(Protocol):
    """One way through the network."""

    def puts_out(self, slots: Sequence[Slot]) -> bool:
        """Whether it can read all of some slots."""

    def parts(self, tiles: torch.Tensor, slots: Sequence[Slot]) -> dict[Slot, torch.Tensor]:
        """What the network makes of tiles (n, ...), as preprocessing leaves them: (n, width) for each slot."""


class Computing(Protocol):
    """What a recipe says of how features are computed."""

    @property
    def engine(self) -> str:
        """``"auto"``, ``"torch"`` or ``"onnx"``."""

    @property
    def architecture(self) -> Architecture:
        """What can be read."""

    @property
    def preprocessing(self) -> Preprocessing:
        """What makes tiles, and normalises them."""

    @property
    def device(self) -> str:
        """As torch spells it."""

    @property
    def precision(self) -> str:
        """Of the network."""

    @property
    def dtype(self) -> torch.dtype:
        """PyTorch's word for the precision."""

    @property
    def network(self) -> Network:
        """Loaded when it is first asked for."""


class Passes:
    """The passes of one call: for pixels and for tensors, each chosen at the first batch of its form.

    Parameters
    ----------
    recipe : Computing
    n_images : int
        That are to be computed, as far as is known, which ``engine="auto"`` goes by.
    keep : str, default="stages"
        As of a store.
    place : Place, default=NOWHERE
        Where graphs are kept.
    check : callable () -> None
        Called when the network was loaded for an export, to raise if it is no longer the recipe's.

    Attributes
    ----------
    reason : str
        Why torch computes where ``engine="auto"`` might have taken another; empty otherwise.
    """

    def __init__(
        self,
        recipe: Computing,
        n_images: int,
        keep: str = "stages",
        place: Place = NOWHERE,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._recipe, self._n_images, self._keep, self._place = recipe, n_images, keep, place
        self._check = check
        self._chosen: dict[bool, Pass] = {}
        self.reason = ""

    def parts(self, tiles: torch.Tensor, slots: Sequence[Slot]) -> dict[Slot, torch.Tensor]:
        """What the network makes of tiles (n, ...), as preprocessing leaves them: (n, width) for each slot."""
        return self._pass(tiles, slots).parts(tiles, slots)

    def missing(self, tiles: torch.Tensor, slots: Sequence[Slot]) -> frozenset[str]:
        """Modules without weights, told by what will compute some slots of such tiles."""
        chosen = self._pass(tiles, slots)
        return chosen.graph.missing if isinstance(chosen, OnnxPass) else self._recipe.network.missing

    def engine(self, slots: Sequence[Slot]) -> str:
        """The engine that takes pixels through the network, or tensors where there is no preset."""
        tiles = torch.empty(0, dtype=torch.uint8)
        return "onnx" if isinstance(self._pass(tiles, slots), OnnxPass) else "torch"

    def _pass(self, tiles: torch.Tensor, slots: Sequence[Slot]) -> Pass:
        of_pixels = tiles.dtype == torch.uint8 and isinstance(self._recipe.preprocessing, Preset)
        known = self._chosen.get(of_pixels)
        if known is None or not known.puts_out(slots):
            known = self._chosen[of_pixels] = self._choose(of_pixels, slots)
        return known

    def _choose(self, of_pixels: bool, slots: Sequence[Slot]) -> Pass:
        recipe = self._recipe
        if recipe.engine == "torch":
            return self._in_torch(recipe.preprocessing)
        try:
            if (why_not := _why_not(recipe.device, recipe.precision)) is not None:
                raise NoGraph(why_not)
            finder = self._finder(of_pixels)
            graph = finder.find(slots)
            if graph is None and (recipe.engine == "onnx" or self._pays(slots)):
                graph = finder.make(slots)
        except NoGraph as error:
            if recipe.engine == "onnx":
                raise _engine_error(str(error)) from error
            self.reason, graph = str(error), None
        return (
            self._in_torch(recipe.preprocessing) if graph is None else OnnxPass(graph, recipe.preprocessing, of_pixels)
        )

    def _pays(self, slots: Sequence[Slot]) -> bool:
        return pays(self._recipe.architecture, slots, self._n_images, torch.get_num_threads())

    def _finder(self, of_pixels: bool) -> Finder:
        recipe = self._recipe
        preset = recipe.preprocessing if of_pixels and isinstance(recipe.preprocessing, Preset) else None
        return Finder(self._loaded, self._in_torch, recipe.architecture, preset, self._keep, self._place)

    def _loaded(self) -> Network:
        network = self._recipe.network
        self._check()  # a file of weights may have changed since the place was named after it
        return network

    def _in_torch(self, preprocessing: Preprocessing) -> TorchPass:
        recipe = self._recipe
        return TorchPass(recipe.network, recipe.architecture, preprocessing, recipe.device, recipe.dtype)


def check_engine(engine: str, device: str, precision: str) -> None:
    """Raise where an engine cannot compute on a device in a precision, whatever the network.

    Raises
    ------
    EngineError
    """
    if engine == "onnx" and (reason := _why_not(device, precision)) is not None:
        raise _engine_error(reason)


def _why_not(device: str, precision: str) -> str | None:
    """Why onnxruntime is not even asked; None where it is."""
    if device != HOST:
        return f"device={device!r} is no CPU"
    if precision != "float32":
        return f'precision={precision!r} is not "float32"'
    return why_missing("onnxruntime")


def _engine_error(reason: str) -> EngineError:
    return EngineError(
        f'A network that onnxruntime can run here is expected for engine="onnx", and {reason}. Set engine="torch", or '
        '"auto", which then takes torch.'
    )
