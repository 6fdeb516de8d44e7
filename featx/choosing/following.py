"""Who follows a search: is told of it, and may end it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featx.choosing.search import Entry, Search


class Follower:
    """One who only listens; others override what they want to know."""

    #: Whether Ctrl-C ends the search, once a recipe is judged, and what is best by then is taken.
    ends_on_interrupt = False

    def tried(self, row: dict[str, Any]) -> None:
        """A recipe is judged, or not to be tried; ``row`` is its line of the leaderboard."""

    def wants_end(self) -> bool:
        """Asked between the folds: whether it was interrupted, and nobody has noticed."""
        return False

    def chosen(self, search: Search, entry: Entry) -> None:
        """The search is over, and this has won; it learns from all images now."""


class Printing(Follower):
    """Prints a line for each recipe."""

    def tried(self, row: dict[str, Any]) -> None:
        """The line."""
        from featx.choosing.search import told

        print(told(row))
