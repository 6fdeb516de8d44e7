"""What has to be done around a fork, on systems that can fork."""

from __future__ import annotations

import os
from collections.abc import Callable


def at_fork(
    *,
    after_in_child: Callable[[], None],
    before: Callable[[], None] | None = None,
    after_in_parent: Callable[[], None] | None = None,
) -> None:
    """Have something done in every forked child from now on, and around the fork in its parent.

    Nothing where the system has no fork: every process then begins anew.
    """
    if hasattr(os, "register_at_fork"):
        given = {"before": before, "after_in_parent": after_in_parent, "after_in_child": after_in_child}
        os.register_at_fork(**{when: call for when, call in given.items() if call is not None})
