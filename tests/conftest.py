"""Shared fixtures: the real photos and weights, the embedded network on digits, and a watch over global state."""

from __future__ import annotations

import os
import random
import signal
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from releases import warnings_to_ignore
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.modules import module as torch_module

from featx import FeatureStore, load_image_folder
from featx.activations.exported import finding

DATA = Path(os.environ.get("FEATX_DATA", Path(__file__).parents[2] / "shared"))
# What tests marked gpu run on; with "cpu" they try themselves where there is no GPU.
GPU = os.environ.get("FEATX_TEST_DEVICE", "cuda")
SQUEEZENET = DATA / "weights" / "squeezenet1_1-imagenet-features.safetensors"


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a script's "&" leaves it to nobody, children included
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for warning in warnings_to_ignore():
        config.addinivalue_line("filterwarnings", warning)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}  # keywords hold the folders' names too
        if "realdata" in marks and not DATA.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"real data not found at {DATA}; set FEATX_DATA to its folder"))
        if "gpu" in marks and GPU.startswith("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _own_draws(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test draws the same alone, in any order and in any process; FEATX_TEST_SEED gives all tests other draws."""
    seed = int(os.environ.get("FEATX_TEST_SEED", "0")) + zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  the legacy generator is the global one
    torch.manual_seed(seed)
    if hasattr(request.module, "RNG"):
        monkeypatch.setattr(request.module, "RNG", np.random.default_rng(seed))


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests(request: pytest.FixtureRequest) -> Iterator[None]:
    """What engine="auto" takes must not depend on the tests before; those of the engines share what they export."""
    # With a patch of its own: the test's must be undone before the watch below looks.
    with pytest.MonkeyPatch.context() as own:
        if getattr(request.module, "__name__", "") != "test_engines":
            own.setattr(finding, "_HELD", finding._Held())
        yield


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """Every test leaves the thread count, the default device and the threads as it found them."""
    before = torch.get_num_threads(), torch.get_default_device(), torch.get_default_dtype()
    yield
    assert (torch.get_num_threads(), torch.get_default_device(), torch.get_default_dtype()) == before
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("featx")]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FeatureStore:
    """The user's feature store, in a folder of the test's own, which is also the current one."""
    monkeypatch.setenv("FEATX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return FeatureStore(tmp_path / "cache")


@pytest.fixture(scope="session")
def ants_bees(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("ants-bees")
    with zipfile.ZipFile(DATA / "data" / "ants-bees.zip") as archive:
        archive.extractall(folder)
    return load_image_folder(folder)


@pytest.fixture(scope="session")
def digits() -> tuple[np.ndarray, np.ndarray]:
    return load_digits(return_X_y=True)


@contextmanager
def counting_images(kind: str) -> Iterator[list[int]]:
    """Sizes of the batches that reach a network of some class, traces without values left out."""
    batches: list[int] = []

    def notice(module: nn.Module, args: tuple) -> None:
        if type(module).__name__ == kind and args[0].device.type != "meta":
            batches.append(len(args[0]))

    handle = torch_module.register_module_forward_pre_hook(notice)
    try:
        yield batches
    finally:
        handle.remove()


def relative_difference(first: np.ndarray, second: np.ndarray) -> float:
    """Largest distance of corresponding rows, in units of the row's norm."""
    first, second = np.asarray(first), np.asarray(second)
    first, second = first.reshape(len(first), -1), second.reshape(len(second), -1)
    return float((np.linalg.norm(first - second, axis=1) / np.linalg.norm(second, axis=1)).max())
