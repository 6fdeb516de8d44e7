"""Calls in forked children, with an end to patience."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

PATIENCE_S = 60


def in_child(call: Callable[[], Any]) -> Any:
    """What a call gives in a forked child, or its exception; a child that hangs is killed."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_send, args=(writer, call))
    child.start()
    try:
        if not reader.poll(PATIENCE_S):
            raise TimeoutError("the child hangs")
        found = pickle.loads(reader.recv_bytes())  # what was written a moment ago
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid or 0, signal.SIGKILL)  # with what it has forked itself
        child.join()
    if isinstance(found, BaseException):
        raise found
    return found


def _send(writer: Any, call: Callable[[], Any]) -> None:
    os.setsid()
    try:
        found = call()
    except BaseException as error:
        found = error
    writer.send_bytes(pickle.dumps(found))
