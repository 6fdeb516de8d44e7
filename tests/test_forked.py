"""Processes that were forked after torch was used: right rows, one thread, no hang."""

from __future__ import annotations

import copy
import http.client
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from children import PATIENCE_S, in_child
from conftest import relative_difference
from releases import exports_graphs
from sklearn.base import clone
from torch import nn

from featx import FineTuneClassifier, PretrainedFeatureExtractor, find_unreadable, list_layers
from featx.plots import ActivationMapDisplay
from featx.system import threads

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork"),
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),
]
ENGINES = ["torch", pytest.param("onnx", marks=exports_graphs)]
X = np.random.default_rng(0).integers(0, 256, (8, 96, 96, 3), dtype=np.uint8)
Y = np.arange(8) % 2


@pytest.fixture(autouse=True)
def _torch_has_used_threads() -> Iterator[None]:
    """As in a process that has worked: threads wait for more of it."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    torch.exp(torch.zeros(100_000))
    yield
    torch.set_num_threads(before)


def extractor(**params: Any) -> PretrainedFeatureExtractor:
    return PretrainedFeatureExtractor("featx_micro", **{"image_size": 64, **params})


@pytest.fixture(scope="module")
def classifier() -> FineTuneClassifier:
    return new_classifier().fit(X, Y)


def new_classifier() -> FineTuneClassifier:
    return FineTuneClassifier("featx_micro", image_size=64, epochs=1, random_state=0)


class Counting(nn.Module):
    """Notes how many threads torch has where it computes."""

    seen: list[int] = []  # noqa: RUF012  # also where the module is copied

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(torch.get_num_threads())
        return self.convolution(images).mean((2, 3))


CALLS: dict[str, Callable[[FineTuneClassifier], Any]] = {
    "transform": lambda _: extractor().transform(X),
    "iter_transform": lambda _: np.concatenate([*extractor(batch_size=5).iter_transform(X)]),
    "random network": lambda _: PretrainedFeatureExtractor("squeezenet1_1", weights=None, image_size=64).transform(X),
    "fit": lambda _: new_classifier().fit(X, Y).predict_proba(X),
    "partial_fit": lambda _: new_classifier().partial_fit(X, Y, classes=[0, 1]).predict_proba(X),
    "predict_proba": lambda fitted: fitted.predict_proba(X),
    "predict": lambda fitted: fitted.predict(X),
    "to_extractor": lambda fitted: fitted.to_extractor().transform(X),
    "names": lambda fitted: fitted.get_feature_names_out(),
    "list_layers": lambda _: list_layers(lambda: Counting()),
    "plot": lambda _: ActivationMapDisplay.from_estimator(extractor(), X[0]).activation,
}


COPIES: dict[str, Callable[[Any], Any]] = {"copy.deepcopy": copy.deepcopy, "clone": clone}


@pytest.mark.parametrize("name", COPIES)
def test_estimators_with_modules_are_copied_in_a_forked_child(name: str) -> None:
    wide = nn.Sequential(nn.Conv2d(3, 64, 3, 2), nn.Conv2d(64, 128, 3, 2))  # torch copies these with several threads
    given = PretrainedFeatureExtractor(wide, layers="1", image_size=32)
    expected = given.transform(X)
    assert relative_difference(in_child(lambda: COPIES[name](given).transform(X)), expected) < 1e-5


@pytest.mark.parametrize("name", CALLS)
def test_forked_child_gives_what_its_parent_gives(name: str, classifier: FineTuneClassifier) -> None:
    expected = CALLS[name](classifier)
    found = in_child(lambda: CALLS[name](classifier))
    if np.asarray(expected).dtype.kind == "f":
        # Training adds up what rounds otherwise with another number of threads.
        assert relative_difference(found, expected) < (1e-3 if "fit" in name else 1e-5)
    else:
        np.testing.assert_array_equal(found, expected)


def test_forked_child_computes_on_one_thread_and_leaves_the_count_as_it_was() -> None:
    def call() -> tuple[list[int], list[int]]:
        Counting.seen.clear()
        reading = PretrainedFeatureExtractor(Counting(), layers="convolution", image_size=32)
        left = [torch.get_num_threads() for _ in reading.iter_transform(X)]
        reading.fit_transform(X)
        return Counting.seen, [*left, torch.get_num_threads()]

    inside, outside = in_child(call)
    assert inside
    assert set(inside) == {1}
    assert set(outside) == {3}


def test_each_thread_of_a_forked_child_keeps_its_own_count() -> None:
    def call() -> dict[int, int]:
        inside, found = threading.Barrier(3, timeout=PATIENCE_S), dict[int, int]()

        def work(count: int) -> None:
            torch.get_num_threads()  # a thread takes what was last set anywhere when it is first asked
            torch.set_num_threads(count)
            with threads.one_thread_after_fork():
                inside.wait()  # all are inside at once
            found[count] = torch.get_num_threads()

        several = [threading.Thread(target=work, args=(count,)) for count in (2, 3, 4)]
        for thread in several:
            thread.start()
        for thread in several:
            thread.join()
        return found

    assert in_child(call) == {2: 2, 3: 3, 4: 4}


def test_parent_goes_on_with_all_its_threads() -> None:
    in_child(lambda: extractor().transform(X))
    Counting.seen.clear()
    PretrainedFeatureExtractor(Counting(), layers="convolution", image_size=32).transform(X)
    assert set(Counting.seen) == {3}


def test_child_of_a_child_and_its_threads_give_the_same(classifier: FineTuneClassifier) -> None:
    expected = extractor().transform(X)

    def in_threads() -> list[np.ndarray]:
        found: list[np.ndarray] = []
        several = [threading.Thread(target=lambda: found.append(extractor().transform(X))) for _ in range(3)]
        for thread in several:
            thread.start()
        for thread in several:
            thread.join()
        assert torch.get_num_threads() == 3
        return found

    for found in in_child(lambda: (extractor().transform(X), in_child(in_threads)))[1]:
        assert relative_difference(found, expected) < 1e-5


def test_forked_children_share_a_store(tmp_path: Path) -> None:
    cached = extractor(cache=tmp_path)
    expected = cached.transform(X[:4])
    known, new = in_child(lambda: (cached.transform(X[:4]), cached.transform(X)))
    np.testing.assert_array_equal(known, expected)
    assert relative_difference(new, extractor().transform(X)) < 1e-5


class Estimator(threads.ForkSafeMethods):
    """Whatever public methods estimators get."""

    def method(self, given: int) -> tuple[int, int]:
        """Threads of torch, and what it was given."""
        return torch.get_num_threads(), given


class Derived(Estimator):
    def another(self, given: int) -> tuple[int, int]:
        return self.method(given)


def test_every_public_method_of_an_estimator_is_safe() -> None:
    assert issubclass(PretrainedFeatureExtractor, threads.ForkSafeMethods)
    assert issubclass(FineTuneClassifier, threads.ForkSafeMethods)
    for method in (Estimator().method, Derived().method, Derived().another):
        assert method(7) == (3, 7)
        assert in_child(lambda method=method: method(7)) == (1, 7)
        assert list(inspect.signature(method).parameters) == ["given"]


def test_functions_are_safe_as_methods_are(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def unreadable_rows(*_: Any) -> dict[int, Any]:
        seen.append(torch.get_num_threads())
        return {}

    def names_of(*_: Any) -> list[str]:
        return []

    def architecture(*_: Any) -> None:
        seen.append(torch.get_num_threads())

    monkeypatch.setattr("featx.images.unreadable.unreadable_rows", unreadable_rows)
    monkeypatch.setattr("featx.backbones.listing.names_of", names_of)
    monkeypatch.setattr("featx.backbones.networks.NetworkSpec.architecture", architecture)

    def call() -> list[int]:
        find_unreadable(X)
        list_layers("featx_micro")
        return seen

    assert in_child(call) == [1, 1]


FORKS_FIRST = """
import os, sys
import numpy as np
from featx import PretrainedFeatureExtractor
assert "torch" not in sys.modules
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
import torch
from torch import nn
torch.set_num_threads(3)
seen = []
class Counting(nn.Conv2d):
    def forward(self, images):
        seen.append(torch.get_num_threads())
        return super().forward(images)
network = nn.Sequential(Counting(3, 4, 3))
PretrainedFeatureExtractor(network, layers="0", image_size=32).transform(np.zeros((4, 40, 40, 3), np.uint8))
assert set(seen) == {3}, seen
"""

# Loaded and used once before it forks.
SERVER = """
import io, json
import numpy as np
import torch
torch.set_num_threads(3)
from featx import PretrainedFeatureExtractor
extractor = PretrainedFeatureExtractor("featx_micro", image_size=64, engine=ENGINE)
IMAGES = np.random.default_rng(0).integers(0, 256, (8, 96, 96, 3), dtype=np.uint8)
extractor.transform(IMAGES)

def application(environ, start_response):
    before = torch.get_num_threads()
    rows = extractor.transform(IMAGES)
    body = json.dumps({"rows": rows.tolist(), "threads": [before, torch.get_num_threads()]}).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""


def test_child_forked_before_torch_was_there_uses_all_threads() -> None:
    done = subprocess.run([sys.executable, "-c", FORKS_FIRST], timeout=PATIENCE_S, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("engine", ENGINES)
def test_multiprocessing_backend_of_joblib_gives_the_same_rows(engine: str) -> None:
    expected = extractor(engine=engine).transform(X)

    def call() -> np.ndarray:
        with joblib.parallel_backend("multiprocessing", n_jobs=2):
            transform = joblib.delayed(extractor(engine=engine).transform)
            parts = joblib.Parallel()(transform(part) for part in (X[:4], X[4:]))
        return np.concatenate(parts)

    assert relative_difference(in_child(call), expected) < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_preforking_server_gives_the_same_rows(engine: str, tmp_path: Path) -> None:
    (tmp_path / "served.py").write_text(SERVER.replace("ENGINE", repr(engine)))
    expected = extractor().transform(X)
    address = tmp_path / "socket"
    options = ["--preload", "--workers", "2", "--bind", f"unix:{address}", "--chdir", str(tmp_path)]
    environment = {**os.environ, "HOME": str(tmp_path)}
    server = subprocess.Popen(
        [sys.executable, "-m", "gunicorn", *options, "served:application"],
        env=environment,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        for _ in range(3):
            answer = _ask(address, server)
            assert relative_difference(np.asarray(answer["rows"]), expected) < 1e-5
            assert answer["threads"] == [3, 3]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.communicate()


def _ask(address: Path, server: subprocess.Popen[bytes]) -> dict[str, Any]:
    """The server's answer, once it is there."""
    until = time.monotonic() + PATIENCE_S
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(PATIENCE_S)
    while server.poll() is None and time.monotonic() < until:
        try:
            connection.sock.connect(str(address))
            break
        except (FileNotFoundError, ConnectionRefusedError):
            time.sleep(0.1)
    connection.request("GET", "/")
    answer: dict[str, Any] = json.loads(connection.getresponse().read())
    connection.close()
    return answer
