"""From a network in torch to a graph: normalisation in front, taps that pool, nothing behind the deepest."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from featx.activations.exported.graph import INPUT
from featx.activations.plan import Slot
from featx.activations.pooling import pool_in_one_piece
from featx.activations.taps import read
from featx.backbones.networks import Network
from featx.images.preprocessing import Preset
from featx.system.locks import ForkSafeLock

_N_SAMPLES = 8
# While torch exports, it turns oneDNN off for the process, and puts back what it found: two at once would leave it off.
_EXPORTING = ForkSafeLock()


class CannotExport(Exception):
    """torch cannot export a network; the message says why."""


def export(network: Network, slots: Sequence[Slot], samples: np.ndarray, preset: Preset | None) -> bytes:
    """What reads some slots, in ONNX; its outputs are called as the slots' columns.

    Parameters
    ----------
    network : Network
        On the CPU, in float32. Stays as it is.
    slots : sequence of Slot
    samples : ndarray of shape (n, ...)
        Two or more of what it is to take.
    preset : Preset or None
        Whose normalisation goes into the graph, which then takes pixels; without one it takes normalised tensors.

    Raises
    ------
    CannotExport
    """
    try:
        reader = _reader(network, slots, preset)
        with _EXPORTING.held(), torch.inference_mode(False), torch.no_grad(), _quietly():
            return _as_onnx(reader, torch.from_numpy(samples[:2]), [slot.column.name for slot in slots])
    except Exception as error:  # whatever torch's exporter makes of a foreign forward
        raise CannotExport(f"torch cannot export the network ({_first_line(error)})") from error


def _as_onnx(reader: nn.Module, example: torch.Tensor, names: list[str]) -> bytes:
    """For any number of tiles; the example must hold two, since one would be taken for a constant."""
    program = torch.onnx.export(
        reader,
        (example,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("n")},),
        input_names=[INPUT],
        output_names=names,
        external_data=False,
        verbose=False,
    )
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content


class _Reader(nn.Module):
    """Tiles in, parts of all slots out."""

    def __init__(self, module: nn.Module, slots: Sequence[Slot]) -> None:
        super().__init__()
        self.module, self._slots = module, slots

    def forward(self, tiles: torch.Tensor) -> list[torch.Tensor]:
        def reduce(position: int, output: torch.Tensor) -> torch.Tensor:
            slot = self._slots[position]
            return pool_in_one_piece(output, slot.layer, slot.pooling, slot.grid).flatten(1)

        layers = [slot.layer for slot in self._slots]
        return read(self.module, self.normalised(tiles), layers, reduce, stop=False)

    def normalised(self, tiles: torch.Tensor) -> torch.Tensor:
        return tiles


class _PixelReader(_Reader):
    """As `_Reader`, of pixels (n, height, width, 3) in 0..255."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, module: nn.Module, slots: Sequence[Slot], preset: Preset) -> None:
        super().__init__(module, slots)
        mean, std = (torch.tensor(value, dtype=torch.float64).view(-1, 1, 1) for value in (preset.mean, preset.std))
        self.register_buffer("scale", (1 / (255 * std)).float())
        self.register_buffer("shift", (-mean / std).float())

    def normalised(self, tiles: torch.Tensor) -> torch.Tensor:
        return tiles.permute(0, 3, 1, 2).float() * self.scale + self.shift  # (n, 3, height, width)


def _reader(network: Network, slots: Sequence[Slot], preset: Preset | None) -> _Reader:
    with network.lock:
        module = network.reading({slot.layer for slot in slots})
        # A structure of its own, for hooks and modes, on the tensors that are there.
        memo: dict[int, object] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
        own = copy.deepcopy(module, memo)
    return (_Reader(own, slots) if preset is None else _PixelReader(own, slots, preset)).eval()


def samples_of(shape: tuple[int, int, int], preset: Preset | None) -> np.ndarray:
    """Noise of several coarsenesses, as photos have them; the same every time.

    Parameters
    ----------
    shape : (int, int, int)
        Channels, height and width of the tiles.
    preset : Preset or None
        As of `export`.
    """
    channels, height, width = shape
    random = np.random.default_rng(0)
    samples = []
    for i in range(_N_SAMPLES):
        cells = 2 ** (i % 4)
        coarse = random.integers(0, 256, (-(-height // cells), -(-width // cells), channels), dtype=np.uint8)
        samples.append(np.kron(coarse, np.ones((cells, cells, 1), np.uint8))[:height, :width])
    pixels = np.stack(samples)
    if preset is not None:
        return pixels
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2).astype(np.float32) / 64 - 2)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what torch logs and warns of on the way: what counts is what comes out."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for module in ("torch", "onnx", "copyreg"):  # what other threads warn of meanwhile is told
            warnings.filterwarnings("ignore", module=module)
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
