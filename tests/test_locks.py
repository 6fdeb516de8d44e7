"""Locks in threads and forked children."""

from __future__ import annotations

import multiprocessing
import threading

import pytest

from featx.system.locks import ForkSafeLock


def test_one_thread_at_a_time_and_again_from_within() -> None:
    lock, entered = ForkSafeLock(), threading.Event()

    def enter() -> None:
        with lock.held():
            entered.set()

    with lock.held(), lock.held():
        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.1)
    thread.join(10)
    assert entered.is_set()


def _enter(lock: ForkSafeLock) -> None:
    with lock.held():
        pass


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_forked_child_finds_a_held_lock_free() -> None:
    lock, held, done = ForkSafeLock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock.held():
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert held.wait(10)
        child = multiprocessing.get_context("fork").Process(target=_enter, args=(lock,))
        child.start()
        child.join(30)
        code = child.exitcode
        child.kill()
        child.join()
        assert code == 0
    finally:
        done.set()
        thread.join()
