"""onnxruntime's sessions: one for each process, graph, choice of outputs and number of threads."""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from collections import OrderedDict
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from featx.activations.exported.graph import INPUT, Graph
from featx.exceptions import OutOfMemory
from featx.system.devices import LESS
from featx.system.forks import at_fork
from featx.system.locks import ForkSafeLock
from featx.system.packages import is_installed

# Each holds the weights of its graph.
_MOST_OPEN = 4
_SILENCE = "ORT_DISABLE_TELEMETRY"
_TOO_LITTLE = ("Failed to allocate memory", "bad allocation", "bad_alloc")

_SESSIONS: OrderedDict[tuple[str, tuple[str, ...], int], Any] = OrderedDict()
_LOCK = ForkSafeLock()


def run(graph: Graph, tiles: np.ndarray, outputs: Sequence[str], n_threads: int) -> list[np.ndarray]:
    """What a graph makes of tiles (n, ...): an array (n, width) for each output; what leads to no other is left out.

    Raises
    ------
    OutOfMemory
    """
    try:
        found: list[np.ndarray] = _session(graph, tuple(outputs), n_threads).run([*outputs], {INPUT: tiles})
    except Exception as error:
        if not any(words in str(error) for words in _TOO_LITTLE):
            raise
        needed = f"Memory for a batch of {len(tiles)} images is expected, and there is too little."
        raise OutOfMemory(f"{needed} {LESS}") from error
    return found


def _session(graph: Graph, outputs: tuple[str, ...], n_threads: int) -> Any:
    with _LOCK.held():
        key = graph.key, outputs, n_threads
        session = _SESSIONS.get(key) or _opened(_cut(graph, outputs), n_threads)
        _SESSIONS[key] = session
        _SESSIONS.move_to_end(key)
        while len(_SESSIONS) > _MOST_OPEN:
            _SESSIONS.popitem(last=False)
        return session


def _cut(graph: Graph, outputs: tuple[str, ...]) -> bytes:
    """The part of a graph that leads to some outputs: onnxruntime computes all that it is given."""
    if {*outputs} == {*graph.outputs} or not is_installed("onnx"):
        return graph.model
    import onnx
    from onnx.utils import Extractor

    cut: bytes = Extractor(onnx.load_from_string(graph.model)).extract_model([INPUT], [*outputs]).SerializeToString()
    return cut


def _opened(model: bytes, n_threads: int) -> Any:
    runtime = _runtime()
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors
    # A number that is given binds threads to no core.
    options.intra_op_num_threads, options.inter_op_num_threads = n_threads, 1
    # Threads that spin for work take cores from whatever decodes and fits meanwhile.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _runtime() -> ModuleType:
    """onnxruntime, loaded so that it opens no connection: from 1.29 on it reports its use, by a thread of its own.

    Without that thread a forked child can end as any process does, and does not wait for it for ever.
    """
    if "onnxruntime" in sys.modules:
        return sys.modules["onnxruntime"]
    given = os.environ.get(_SILENCE)
    os.environ[_SILENCE] = "1"
    try:
        return importlib.import_module("onnxruntime")
    finally:
        if given is None:
            del os.environ[_SILENCE]
        else:
            os.environ[_SILENCE] = given


def _leave_to_the_parent() -> None:
    """A forked child has not the threads of the parent's sessions: running one waits for ever, freeing one crashes."""
    for session in _SESSIONS.values():
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))  # for good, also when the interpreter ends
    _SESSIONS.clear()


at_fork(after_in_child=_leave_to_the_parent)
