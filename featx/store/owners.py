"""Who holds a lease, and whether it is still there to use it."""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

#: Seconds after which others take over the work of an owner that does not renew its lease.
LEASE_S = 10.0


@dataclass(frozen=True)
class Owner:
    """A process at work on a store.

    Attributes
    ----------
    boot, namespace : str
        Identity of the running system and of its process numbers; empty where the system does not tell.
    pid : int
    started : str
        When the process started, in the system's own ticks: another process may get the same number.
    expires : float
        When the lease runs out, in seconds of the system's monotonic clock, which all processes share.
    """

    boot: str
    namespace: str
    pid: int
    started: str
    expires: float

    @classmethod
    def here(cls) -> Owner:
        """The process that asks, with a fresh lease."""
        # By the monotonic clock: the time of day may jump, and would end leases or make them last.
        return cls(_boot(), _namespace(), os.getpid(), _state_and_start(os.getpid())[1], time.monotonic() + LEASE_S)

    @classmethod
    def parse(cls, record: bytes) -> Owner:
        """From what `record` made."""
        return cls(**json.loads(record))

    def record(self) -> bytes:
        """As bytes for the store."""
        return json.dumps(asdict(self)).encode()

    def is_gone(self) -> bool:
        """Whether it can no longer finish its work: its lease ran out, or its process or system ended."""
        left = self.expires - time.monotonic()
        # More than a whole lease left: it was written before a restart that this system does not tell of.
        if self.boot != _boot() or not 0 <= left <= LEASE_S:
            return True
        if not self.started or self.namespace != _namespace():
            return False  # its process cannot be seen from here
        state, started = _state_and_start(self.pid)
        return started != self.started or state in "ZX"


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _namespace() -> str:
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _state_and_start(pid: int) -> tuple[str, str]:
    """Letter of a process's state ("Z": killed, not yet buried) and its start; empty where there is no such process."""
    with contextlib.suppress(OSError):
        # The name in parentheses may hold anything, so what counts is after the last one.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], fields[19]
    return "", ""
