"""The times that marks and events get: one moment is one record's on its node.

Loki merges entries of one nanosecond by their text alone where chunks overlap, and shows them in no order; so two records
of a node must not share one. A mark stands for all bytes since the mark before it, and reserves a nanosecond for each of
them: a line's time is its mark's, less the bytes between the line's end and the mark's offset. That needs no knowledge of
lines when the mark is made, and it is a pure function of bytes and decisions.
"""

from __future__ import annotations


class Moments:
    """Hands out times that only grow. At a billion bytes a second they begin to run ahead of the clock."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last = 0

    def take(self, now: int, size: int = 1) -> int:
        """The last of `size` nanoseconds that nobody else has; `now`, unless those before it are taken."""
        self._last = max(now, self._last + size)
        return self._last

    def taken(self, moment: int) -> None:
        """An earlier agent handed out `moment`."""
        self._last = max(self._last, moment)
