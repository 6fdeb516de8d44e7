"""The loop: decoded batches through the network, out as blocks of rows."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from featx.activations.plan import FeaturePlan
from featx.activations.taps import read
from featx.backbones.layers import Architecture
from featx.backbones.networks import Network, NetworkSpec
from featx.exceptions import ImageError, WeightsError
from featx.images.loading import Batch, iter_batches
from featx.images.preprocessing import Preprocessing
from featx.images.sources import Items

# Up to this many values torch sends a batch of one past oneDNN (aten/src/ATen/native/Convolution.cpp, use_mkldnn).
_LONE_IMAGE_VALUES = 20480

# Where CUDA may round float32 to TF32, for speed.
_TF32_BACKENDS = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Block:
    """Feature rows of consecutive items.

    Attributes
    ----------
    start, stop : int
        Positions in the items.
    rows : ndarray of shape (stop - start, ...), float32
        NaN where an item could not be read.
    errors : list of ImageError
    """

    start: int
    stop: int
    rows: np.ndarray
    errors: list[ImageError]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the features of an image: network, preprocessing, layers, device and precision."""

    spec: NetworkSpec
    architecture: Architecture
    preprocessing: Preprocessing
    plan: FeaturePlan
    device: str
    precision: str

    def iter_blocks(self, items: Items, *, batch_size: int, n_jobs: int | None, on_error: str) -> Generator[Block]:
        """Yield the features of the items in order, one block per batch; the network is loaded at the first one."""
        network: Network | None = None
        decoding = iter_batches(
            items,
            self.preprocessing.tile,
            batch_size=batch_size,
            n_jobs=n_threads(n_jobs),
            on_error=on_error,
        )
        with closing(decoding) as batches:
            for batch in batches:
                if network is None and batch.tiles is not None:
                    network = self._load()
                yield self._block(network, batch)

    def _load(self) -> Network:
        network = self.spec.load(self.device, _DTYPES[self.precision])
        check_weights_reach(self.plan, self.architecture, network)
        return network

    def _block(self, network: Network | None, batch: Batch) -> Block:
        rows = np.full((batch.stop - batch.start, *self.plan.shape), np.nan, dtype=np.float32)
        if network is not None and batch.tiles is not None:
            if tuple(batch.tiles.shape[1:]) != self.architecture.shape:
                raise ValueError(
                    f"Images of one shape are expected from preprocess, got {tuple(batch.tiles.shape[1:])} after "
                    f"{self.architecture.shape}. Let preprocess bring them to one size."
                )
            rows[batch.readable] = self._features(network, batch.tiles)
        return Block(batch.start, batch.stop, rows, batch.errors)

    def _features(self, network: Network, tiles: torch.Tensor) -> np.ndarray:
        with torch.inference_mode(), network.lock, _undisturbed(self.device):
            images = self.preprocessing.finish(tiles.to(self.device))
            images = images.to(_DTYPES[self.precision]).contiguous(memory_format=torch.channels_last)
            parts = read(network.module, _in_company(images), self.plan.layers, self.plan.reduce)
            return self.plan.join(parts)[: len(images)].cpu().numpy()


def _in_company(images: torch.Tensor) -> torch.Tensor:
    """A lone small image twice: torch convolves it by another routine than a batch, with other rounding."""
    lone = len(images) == 1 and images.numel() <= _LONE_IMAGE_VALUES
    return images.expand(2, -1, -1, -1) if lone else images


def n_threads(n_jobs: int | None) -> int:
    """Decoding threads: as many as torch uses for None, otherwise joblib's reading of ``n_jobs``."""
    if n_jobs is None:
        return torch.get_num_threads()
    from joblib import cpu_count

    return n_jobs if n_jobs > 0 else max(1, cpu_count() + 1 + n_jobs)


def resolve_device(device: str | None) -> str:
    """The device asked for, or the best there is.

    Raises
    ------
    ValueError
        torch does not know the device or cannot reach it.
    """
    if device is None:
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"A device that torch can use here is expected, got device={device!r}: {str(error).splitlines()[0]} "
            "Use device=None to take the best there is."
        ) from error
    return device


def check_weights_reach(plan: FeaturePlan, architecture: Architecture, network: Network) -> None:
    """Raise where a layer lies behind modules that the weights file had no tensors for.

    Raises
    ------
    WeightsError
    """
    for layer in plan.layers:
        before = {name for call in architecture.calls[: layer.position] for name in call.names}
        if unset := sorted(before & network.missing):
            raise WeightsError(
                f"Weights for every module up to layer {layer.label!r} are expected, got a file without those of "
                f"{', '.join(unset)}. Read a stage before them, such as layers=-1, or take the whole file."
            )


@contextmanager
def _undisturbed(device: str) -> Iterator[None]:
    """Full float32 whatever the caller's autocast or TF32 settings are: a feature must not depend on them."""
    kind = torch.device(device).type
    backends = _TF32_BACKENDS if kind == "cuda" else ()
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(kind, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
