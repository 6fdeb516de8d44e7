"""Who follows a search: is told of it, and may end it."""

from __future__ import annotations

from typing import Any


class Follower:
    """One who only listens; others override what they want to know."""

    #: Whether Ctrl-C ends the search, once a recipe is judged, and what is best by then is taken.
    ends_on_interrupt = False

    def tried(self, row: dict[str, Any]) -> None:
        """A recipe is judged, or not to be tried; ``row`` is its line of the leaderboard."""

    def wants_end(self) -> bool:
        """Asked between the folds: whether it was interrupted, and nobody has noticed."""
        return False

    def chosen(self, search: Any, entry: Any) -> None:
        """The search is over, and this entry of it has won; it learns from all images now."""


class Printing(Follower):
    """Prints a line for each recipe."""

    def tried(self, row: dict[str, Any]) -> None:
        """The line."""
        print(told(row))


def told(row: dict[str, Any]) -> str:
    """A line of the leaderboard in words."""
    name = " ".join(filter(None, [row["recipe"], row["choice"]]))
    n_folds = f"{row['n_folds']} fold{'s' * (row['n_folds'] != 1)}"
    found = f"{row['mean']:.3f} +- {row['spread']:.3f} ({n_folds}), {row['seconds']:.0f} s" if row["n_folds"] else ""
    return f"{name}: {'; '.join(filter(None, [found, row['not_tried']]))}"
