"""What waits at the end of a text file, and when it is sent as it stands: half a line, a running progress bar, an open event.

Pure: the caller reads the bytes, knows the clock, and journals the cut.
"""

from __future__ import annotations

PARTIAL_S = 1.0
"""A partial line older than this is sent as it is and continued later."""

BAR_S = 10.0
"""A progress bar, which is a line that is written over and over, is sent as it stands that often."""

LAST_BYTES = 8192
"""Of so many bytes at the end the partial line is looked at."""

_PARTIAL_NS, _BAR_NS = int(PARTIAL_S * 1e9), int(BAR_S * 1e9)


class PartialLine:
    """The line without an end of one file. `_bar_since` is when a progress bar was sent last, or began."""

    __slots__ = ("_bar_since",)

    def __init__(self) -> None:
        self._bar_since = 0

    def is_due(self, end: bytes, now: int, idle: int, *, waits: bool) -> bool:
        """Whether a cut is due at the end of the file.

        Args:
            end: the last bytes of the file, of those that are not sent.
            now: in nanoseconds, as `idle`, for how long nothing was written.
            waits: a line or event before the partial line is not complete either.
        """
        partial = end[end.rfind(b"\n") + 1 :]
        if b"\r" not in partial:
            self._bar_since = 0
            return idle >= _PARTIAL_NS and bool(waits or partial)
        if not self._bar_since:
            self._bar_since = now
            return False
        if now - self._bar_since < _BAR_NS:
            return False
        self._bar_since = now
        return True


def is_old(seen_at: int, now: int) -> bool:
    """Whether bytes first seen at `seen_at` have waited long enough; both in nanoseconds."""
    return now - seen_at >= _PARTIAL_NS
