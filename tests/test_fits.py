"""scikit-learn's fits on one thread each: what they find, what they leave, and how they end."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from joblib import Parallel, delayed, parallel_config
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_predict
from threadpoolctl import OpenBLASController, threadpool_info, threadpool_limits

from featx import FineTuneClassifier, PretrainedFeatureExtractor
from featx.choosing import probes
from featx.system import fits
from featx.system.fits import one_thread, run_fits

MUCH = 2**40
PATIENCE_S = 60


def blas_threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """BLAS as on a machine with three cores, whatever this one and its environment have."""
    monkeypatch.setattr("joblib.cpu_count", lambda: 3)
    limits = threadpool_limits(3, user_api="blas")
    getattr(OpenBLASController, "clear_controlling_thread", int)()  # as if it had begun so
    assert blas_threads() == {3}
    yield
    limits.restore_original_limits()


def random_rows(n: int = 90, n_features: int = 20) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    y = np.arange(n) % 3
    centres = generator.normal(size=(3, n_features))
    rows = generator.normal(size=(n, n_features)) + 0.5 * centres[y]
    return rows.astype(np.float32), np.array(["ant", "bee", "cat"])[y]


def who(_: int) -> int:
    time.sleep(0.02)  # so that one thread cannot do everything before the others begin
    return threading.get_ident()


def threads_of_a_run(n_calls: int = 6) -> int:
    calls = [lambda number=number: who(number) for number in range(n_calls)]
    return len(set(run_fits(calls, MUCH, 1)))


# What they find.


@pytest.mark.parametrize("n_at_once", [1, 3])
def test_scores_are_those_of_a_grid_search_to_the_bit(
    n_at_once: int, three_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fits, "_n_at_once", lambda *_: n_at_once)
    rows, y = random_rows()
    untouched = rows.copy()
    folds = StratifiedKFold(4, shuffle=True, random_state=0)
    found = probes.accuracies_of(rows, y, folds)
    with threadpool_limits(1, user_api="blas"):
        grid = {"logisticregression__C": probes.C_VALUES}
        search = GridSearchCV(probes.classifier(), grid, cv=folds, refit=False).fit(rows, y)
    wanted = np.stack([search.cv_results_[f"split{fold}_test_score"] for fold in range(4)], axis=1)
    assert len(np.unique(wanted)) > 3
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(rows, untouched)


@pytest.mark.parametrize("n_at_once", [1, 3])
def test_probabilities_of_held_out_rows_are_those_of_scikit_learn_to_the_bit(
    n_at_once: int, three_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fits, "_n_at_once", lambda *_: n_at_once)
    rows, y = random_rows()
    folds = StratifiedKFold(4, shuffle=True, random_state=0)
    with threadpool_limits(1, user_api="blas"):
        wanted = cross_val_predict(probes.classifier(0.1), rows, y, cv=folds, method="predict_proba")
    np.testing.assert_array_equal(probes.probabilities_of(rows, y, folds, 0.1), wanted)


def test_folds_let_go_of_their_rows_after_the_last_fit() -> None:
    rows, y = random_rows()
    (fold, *_) = probes._folds(rows, y, StratifiedKFold(4), n_fits=2)
    fold.accuracy(1.0)
    assert fold._made is not None
    fold.accuracy(0.1)
    assert fold._made is None


def test_results_come_in_the_order_of_the_calls(three_threads: None) -> None:
    pauses = [0.06, 0.0, 0.03, 0.0, 0.01]

    def call(number: int) -> int:
        time.sleep(pauses[number])
        return number

    calls = [lambda number=number: call(number) for number in range(5)]
    assert run_fits(calls, MUCH, 1) == [0, 1, 2, 3, 4]


# How many threads.


def test_each_fit_has_one_thread_of_blas_and_torch_keeps_its_own(three_threads: None) -> None:
    before = torch.get_num_threads()
    found = run_fits([lambda: (blas_threads(), torch.get_num_threads()) for _ in range(6)], MUCH, 1)
    with one_thread():
        here = blas_threads(), torch.get_num_threads()
    assert all(blas == {1} for blas, _ in (*found, here))
    assert here[1] == before == torch.get_num_threads()


@pytest.mark.parametrize(
    ("n_calls", "work", "n_bytes", "n_wanted"),
    [
        (25, MUCH, 1, 3),
        (2, MUCH, 1, 2),
        (25, 243 * 512 * 2, 1, 1),  # little work
        (25, 3068 * 1280 * 10, 1, 3),
        (25, MUCH, 2**30, 2),  # much memory
        (25, MUCH, 2**40, 1),
        (0, MUCH, 1, 1),
    ],
)
def test_how_many_run_at_once_follows_from_sizes(
    n_calls: int, work: int, n_bytes: int, n_wanted: int, three_threads: None
) -> None:
    assert fits._n_at_once(n_calls, work, n_bytes) == n_wanted


def test_as_many_run_at_once_as_blas_had_threads(three_threads: None) -> None:
    assert threads_of_a_run() == 3
    with threadpool_limits(2, user_api="blas"):
        assert threads_of_a_run() == 2
    with one_thread():
        assert threads_of_a_run() == 1


def test_fits_inside_of_a_fit_start_no_more_threads(three_threads: None) -> None:
    assert set(run_fits([threads_of_a_run] * 3, MUCH, 1)) == {1}


def test_fits_in_a_worker_start_no_more_threads() -> None:
    with parallel_config("loky", inner_max_num_threads=1):
        found = Parallel(n_jobs=2)(delayed(_in_worker)() for _ in range(2))
    assert {n_threads for n_threads, _ in found} == {1}
    assert os.getpid() not in {process for _, process in found}


def _in_worker() -> tuple[int, int]:
    return threads_of_a_run(), os.getpid()


# What they leave.


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("n_at_once", [1, 3])
def test_thread_counts_are_afterwards_as_found(
    error: type[BaseException] | None, n_at_once: int, three_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call() -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(fits, "_n_at_once", lambda *_: n_at_once)
    before = torch.get_num_threads()
    with suppress(*[error] if error else []):
        run_fits([call] * 4, MUCH, 1)
    counts = list[Any]()
    thread = threading.Thread(target=lambda: counts.append((blas_threads(), torch.get_num_threads())))
    thread.start()
    thread.join()
    assert [(blas_threads(), torch.get_num_threads()), *counts] == [({3}, before)] * 2


def test_the_last_of_several_threads_puts_the_counts_back(three_threads: None) -> None:
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        contexts = one_thread(), one_thread()
        for thread, context in zip((first, second), contexts, strict=True):
            thread.submit(context.__enter__).result()
        assert blas_threads() == {1}
        first.submit(contexts[0].__exit__, None, None, None).result()
        assert blas_threads() == {1}
        second.submit(contexts[1].__exit__, None, None, None).result()
        assert blas_threads() == {3}


class Library:
    """A BLAS, one for the whole process or, as a build on OpenMP, with a count for each thread."""

    def __init__(self, of_each_thread: bool) -> None:
        self.filepath = f"libblas-{id(self)}.so"
        self._counts: Any = threading.local() if of_each_thread else Plain()

    @property
    def num_threads(self) -> int:
        return getattr(self._counts, "count", 8)

    def set_num_threads(self, count: int) -> None:
        self._counts.count = count


class Plain:
    """Something to set attributes of."""


def test_each_fit_has_one_thread_of_a_blas_that_counts_for_each_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(of_each_thread=True)
    monkeypatch.setattr(fits, "_libraries", lambda: [library])
    monkeypatch.setattr("joblib.cpu_count", lambda: 3)
    assert run_fits([lambda: library.num_threads] * 6, MUCH, 1) == [1] * 6
    assert library.num_threads == 8


def test_a_library_that_was_loaded_meanwhile_has_its_count_back(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = [Library(of_each_thread=False)]
    monkeypatch.setattr(fits, "_libraries", lambda: loaded)
    with one_thread():
        loaded.append(Library(of_each_thread=False))
        with one_thread():
            assert [library.num_threads for library in loaded] == [1, 1]
    assert [library.num_threads for library in loaded] == [8, 8]


# How they end.


def endless() -> None:
    """As a fit: steps in Python around something that lets others run."""
    for _ in itertools.count():
        time.sleep(0.001)


def test_an_error_ends_what_still_runs_and_begins_no_more(three_threads: None) -> None:
    begun = list[int]()

    def fail() -> None:
        while len(begun) < 2:
            time.sleep(0.001)
        raise ValueError("it does not converge")

    def forever(number: int) -> None:
        begun.append(number)
        endless()

    calls: list[Callable[[], None]] = [lambda: forever(0), fail, lambda: forever(1)]
    calls += [lambda number=number: forever(number) for number in range(2, 9)]
    n_before = threading.active_count()
    with pytest.raises(ValueError, match="does not converge"):
        run_fits(calls, MUCH, 1)
    assert sorted(begun)[:2] == [0, 1]
    assert len(begun) <= 3  # the one that failed may have made room before it was noticed
    assert threading.active_count() == n_before


BEGIN = """
import itertools, os, signal, sys, threading
import joblib, numpy as np
from sklearn.linear_model import LogisticRegression
from threadpoolctl import OpenBLASController, threadpool_info, threadpool_limits
from featx.choosing import probes
from featx.cli import main
from featx.system import fits

signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background start with Ctrl-C ignored
rows = np.random.default_rng(0).normal(size=(300, 600)).astype(np.float32)

def fit(*_):
    os.write(1, b"begun\\n")
    for _ in itertools.count():
        LogisticRegression(C=1e3).fit(rows, np.arange(300) % 3)

def blas():
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}

fits._n_at_once = lambda *_: 2
limits = threadpool_limits(2, user_api="blas")
"""
IN_PYTHON = """
try:
    fits.run_fits([fit] * 9, 1, 1)
except KeyboardInterrupt:
    print(blas(), threading.active_count(), flush=True)
"""
ON_THE_COMMAND_LINE = """
probes._Fold.accuracy = fit
sys.argv = ["featx", "search", sys.argv[1], "--backbones", "featx_micro", "--no-cache"]
main()
"""


def interrupted(code: str, *words: object) -> tuple[int, str, str]:
    """Exit code, output and errors of a process that has Ctrl-C while two fits run; none is left of its group."""
    command = [sys.executable, "-c", BEGIN + code, *map(str, words)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["begun\n"] * 2
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=PATIENCE_S)
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output, errors


def test_ctrl_c_ends_all_fits_and_puts_the_counts_back() -> None:
    assert interrupted(IN_PYTHON) == (0, "{2} 1\n", "")


def test_ctrl_c_while_a_command_fits_ends_it_as_anywhere(tmp_path: Path) -> None:
    for label, number in itertools.product("ab", range(3)):
        (tmp_path / label).mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (40 * number, 9, 9)).save(tmp_path / label / f"{number}.png")
    code, output, errors = interrupted(ON_THE_COMMAND_LINE, tmp_path)
    assert (code, output) == (130, "")
    assert errors.splitlines()[-1] == "Interrupted."


# Where featx fits.


class Recorder(LogisticRegression):
    """A logistic regression that cannot be pickled, and tells with how many threads it was fitted."""

    found: ClassVar[list[tuple[set[int], int]]] = []

    def fit(self, *given: Any, **by_name: Any) -> Any:
        self.found.append((blas_threads(), threading.get_ident()))
        self.lock_ = threading.Lock()
        return super().fit(*given, **by_name)


@pytest.fixture
def recorded(three_threads: None) -> list[tuple[set[int], int]]:
    Recorder.found.clear()
    return Recorder.found


def images(n: int = 24) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), np.arange(n) % 3


def test_layer_scores_come_from_fits_on_one_thread_and_passes_on_torchs_threads(
    recorded: list[tuple[set[int], int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plots = pytest.importorskip("featx.plots", reason="needs matplotlib")
    passes = list[int]()
    transform = PretrainedFeatureExtractor.transform

    def seen(self: Any, X: Any) -> Any:
        passes.append(torch.get_num_threads())
        return transform(self, X)

    monkeypatch.setattr(PretrainedFeatureExtractor, "transform", seen)
    before = torch.get_num_threads()
    model = PretrainedFeatureExtractor("featx_micro")
    plots.LayerScoreDisplay.from_estimator(model, *images(), layers=[-1], classifier=Recorder(), cv=2)
    assert [blas for blas, _ in recorded] == [{1}] * 2
    assert set(passes) == {before}
    assert blas_threads() == {3}


def test_layer_scores_are_shared_out_as_joblib_is_told(recorded: list[tuple[set[int], int]]) -> None:
    plots = pytest.importorskip("featx.plots", reason="needs matplotlib")
    model = PretrainedFeatureExtractor("featx_micro")
    with parallel_config("threading", n_jobs=2):
        plots.LayerScoreDisplay.from_estimator(model, *images(), layers=[0, -1], classifier=Recorder(), cv=3)
    assert {tuple(blas) for blas, _ in recorded} == {(1,)}
    assert threading.get_ident() not in {thread for _, thread in recorded}


@pytest.mark.parametrize("multilabel", [False, True])
def test_a_head_starts_from_fits_on_one_thread(
    multilabel: bool, recorded: list[tuple[set[int], int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featx.training.classification.LogisticRegression", Recorder)
    X, y = images()
    labels = np.eye(3, dtype=int)[y] if multilabel else y
    FineTuneClassifier("featx_micro", freeze="all", epochs=1, random_state=0).fit(X, labels)
    assert [blas for blas, _ in recorded] == [{1}] * (3 if multilabel else 1)
    assert blas_threads() == {3}


def test_a_model_is_learnt_on_one_thread(recorded: list[tuple[set[int], int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "LogisticRegression", Recorder)
    rows, y = random_rows()
    probes.learn(rows, y, 1.0)
    probes.accuracies_of(rows, y, StratifiedKFold(2))
    assert [blas for blas, _ in recorded] == [{1}] * (1 + 2 * len(probes.C_VALUES))
