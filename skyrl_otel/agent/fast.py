"""The fast way of a common line: its header was met before, so all but the body, the offsets and the lengths is at hand.

A header of some format decides everything by itself, and formats that repeat theirs end it in bytes that do not stand in it
(`Format.stop`). So the bytes up to there are looked up; what they stand for is already encoded. Where only the time is new,
one match puts it together with what is known of the rest.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from skyrl_otel.agent import otlp
from skyrl_otel.agent.assemble import CHILD
from skyrl_otel.agent.block import Block, Context, Learned, Odd
from skyrl_otel.agent.find import has
from skyrl_otel.agent.recognise import Matcher, Recogniser
from skyrl_otel.agent.times import LATE_GRAIN

_MOST_HEADERS = 1024
_MOST_TABLES = 64

_Known = tuple["list[bytes | None]", bytes, int]
_openings: dict[int, list[bytes | None]] = {}  # of all streams: constants, by what stands behind a body, and its size
_PIECES = 7
"""Bytes objects of a record, of which the second is its body."""

# The fields time_unix_nano and observed_time_unix_nano, each with its tag.
_times = struct.Struct("<BQBQ")


class Fast:
    """Headers whose meaning is known to the last byte, and lines that have them.

    All of them mean the same under the marks in [first, end) of `_marks`, and are of one format and scope. Each was met since
    `clear`, so its child is in the state of the block. `_fields` and `_known` have what stands between a record's body and
    the offsets in its uid; that the offsets have `_digits` digits goes into the lengths there.
    """

    def __init__(self, prefix: bytes, recogniser: Recogniser) -> None:
        self._prefix = prefix
        self._recogniser = recogniser
        self._digits = 0
        self._uid = b""
        self.clear()

    def clear(self) -> None:
        """Know nothing."""
        self._forget_times()
        self._matcher: Matcher | None = None
        self._fields: dict[object, bytes] = {}
        self._stop = self._scope = b""

    def _forget_times(self) -> None:
        self._known: dict[bytes, _Known] = {}
        self._times: dict[bytes, int] = {}
        self._marks = (0, 1 << 64)
        self._zones: tuple[int, int] | None = None

    def take(self, lines: Iterator[bytes], start: int, context: Context, block: Block) -> tuple[bytes | None, int]:
        """Records of the next lines as long as their headers are known.

        Returns:
            The first line that is not known (None at the end of the lines), and its offset.

        Raises:
            Odd: some line is, or may be, torn.
        """
        first = context.lag + start
        if first < self._marks[0] or context.mark >= self._marks[1] or context.zones != self._zones:
            self._forget_times()
            self._zones = context.zones
        self._begin_at(start)
        if self._matcher is None:
            return next(lines, None), start
        pieces: list[bytes] = []
        known, stop, lag, grain, times = self._known, self._stop, context.lag, LATE_GRAIN, _times.pack
        begin = b"%d" % start
        missed = None
        for line in lines:
            head, found, body = line.partition(stop)
            try:
                openings, fields, second = known[head]
                opening = openings[len(body)]
            except (KeyError, IndexError):
                recalled = self._recall(head, context, first) if found and len(body) < otlp.LONGEST_BODY else None
                if recalled is None:
                    missed = line
                    break
                openings, fields, second = recalled
                opening, known = openings[len(body)], self._known
            if opening is None:
                if not body:  # perhaps because there is no `stop` before it
                    missed = line
                    break
                opening = openings[len(body)] = _opening(len(body), self._behind(fields))
            end = start + len(line) + 1
            limit = b"%d" % end
            pieces += opening, body, fields, begin, b"-", limit, times(0x09, second + end % grain, 0x59, lag + end)
            start, begin = end, limit
        if pieces:
            _refuse_torn(stop.join([b"", *pieces[1::_PIECES]]))
            block.group(context.identity, self._scope).add(b"".join(pieces), len(pieces) // _PIECES)
        return missed, start

    def _begin_at(self, start: int) -> None:
        """Offsets are those of lines from here on: nothing is known of lines whose offsets have less digits."""
        digits = len(str(start))
        if digits != self._digits:
            self.clear()
            self._digits = digits
            size = len(self._prefix) + 2 * digits + 1
            self._uid = otlp.attributes({"log.record.uid": "x" * size})[:-size] + self._prefix

    def _recall(self, head: bytes, context: Context, first: int) -> _Known | None:
        """What a header means of which all but the time was met before."""
        assert self._matcher is not None
        match = self._matcher.whole.fullmatch(head + self._stop)
        if match is None:
            return None
        fields = self._fields.get(self._matcher.identity_of_whole(match))
        if fields is None:
            return None
        time = self._times.get(match["when"])
        if time is not None and len(self._known) < _MOST_HEADERS:
            known = self._known[head] = (self._openings_for(fields), fields, time)
            return known
        found = self._matcher.time_of_whole(match, first, context.zones)
        if found is None:
            return None
        time, holds = found
        kept = self._keep(head, time, holds, fields, context, first)
        if kept is not None:
            self._times[match["when"]] = time
        return kept

    def learn(self, line: bytes, start: int, header: Learned, context: Context) -> None:
        """Keep the header of `line`, which begins at `start`, if it is one that will come again."""
        size = header.end - len(header.stop)
        if line.find(header.stop) != size or not header.matcher.is_whole_second:
            return
        self._begin_at(start)
        if self._matcher is None:
            self._stop, self._scope, self._matcher = header.stop, header.scope, header.matcher
        elif (header.stop, header.scope) != (self._stop, self._scope) or header.matcher is not self._matcher:
            return
        match = self._matcher.whole.fullmatch(line[: header.end])
        if match is None:
            return
        if len(self._fields) >= _MOST_HEADERS:
            self._fields.clear()
        if len(header.fields) > otlp.LONGEST_BODY:
            return
        fields = self._fields[self._matcher.identity_of_whole(match)] = header.fields + self._uid
        self._keep(line[:size], header.time, header.holds, fields, context, context.lag + start)

    def _keep(
        self, head: bytes, time: int, holds: tuple[int, int], fields: bytes, context: Context, first: int
    ) -> _Known | None:
        if not holds[0] <= first <= context.mark < holds[1]:
            return None
        if context.zones != self._zones:  # it changed while an event was open, so `take` did not see it
            self._forget_times()
        low, high = max(self._marks[0], holds[0]), min(self._marks[1], holds[1])
        if len(self._known) >= _MOST_HEADERS or not low <= first <= context.mark < high:
            self._forget_times()
            low, high = holds
        self._marks, self._zones = (low, high), context.zones
        known = self._known[head] = (self._openings_for(fields), fields, time)
        return known

    def _openings_for(self, fields: bytes) -> list[bytes | None]:
        rest = self._behind(fields)
        openings = _openings.get(rest)
        if openings is None:
            if len(_openings) >= _MOST_TABLES:
                _openings.clear()
            openings = _openings[rest] = [None] * otlp.LONGEST_BODY
        return openings

    def _behind(self, fields: bytes) -> int:
        """How long all is that stands behind the body."""
        return len(fields) + 2 * self._digits + 1 + _times.size


def _opening(size: int, rest: int) -> bytes:
    """What stands before a body of `size` bytes in a record of which all behind the body has `rest` bytes."""
    body = otlp.BODIES[size] or b""
    return b"\x12%b%b" % (otlp.varint(len(body) + size + rest), body)


def _refuse_torn(bodies: bytes) -> None:
    """Raises Odd where a child's prefix may stand in a line but at its beginning."""
    if has(bodies, b" pid=") and CHILD.search(bodies):
        raise Odd
