"""The fast way of a common line: its header was met before, so all but the body, the offsets and the lengths is at hand.

A header of some format decides everything by itself, and formats that repeat theirs end it in bytes that do not stand in it
(`Format.stop`). So the bytes up to there are looked up; what they stand for is already encoded. Where only the time is new,
one match puts it together with what is known of the rest.
"""

from __future__ import annotations

from collections.abc import Iterator

from skyrl_otel.agent import otlp
from skyrl_otel.agent.block import Block, Context, Learned, times
from skyrl_otel.agent.recognise import Matcher, Recogniser
from skyrl_otel.agent.times import LATE_GRAIN

_MOST_HEADERS = 1024

_VARINTS, _BODIES, _LONGEST_BODY = otlp.LENGTHS, otlp.BODIES, otlp.LONGEST_BODY
_Known = tuple[bytes, "list[bytes | None]", int]
_MOST_TABLES = 128
_lengths: dict[int, list[bytes | None]] = {}  # of all streams: constants, made when first needed
_TIMES_BYTES = len(times(b"\x09", 0, b"\x59", 0))


class Fast:
    """Headers whose meaning is known to the last byte, and lines that have them.

    All of them mean the same under the marks in [first, end) of `_marks`, are of one format and scope, and either all or none
    have a child's prefix; `prefixed` is 1 or 0. Each was met since `clear`, so its child is in the state of the block.
    """

    def __init__(self, prefix: bytes, recogniser: Recogniser) -> None:
        self._prefix = prefix
        self._recogniser = recogniser
        self._rest = 0
        self.clear()

    def clear(self) -> None:
        """Know nothing."""
        self._forget_times()
        self._matcher: Matcher | None = None
        self._fields: dict[object, bytes] = {}
        self._stop = self._scope = b""
        self.prefixed = 0

    def _forget_times(self) -> None:
        self._known: dict[bytes, _Known] = {}
        self._times: dict[bytes, int] = {}
        self._marks = (0, 1 << 64)
        self._zones: tuple[int, int] | None = None

    def take(self, lines: Iterator[bytes], start: int, context: Context, block: Block) -> tuple[bytes | None, int, int]:
        """Records of the next lines as long as their headers are known.

        Returns:
            The first line that is not known (None at the end of the lines), its offset, and how many were taken.
        """
        first = context.lag + start
        if first < self._marks[0] or context.mark >= self._marks[1] or context.zones != self._zones:
            self._forget_times()
            self._zones = context.zones
        if self._matcher is None:
            return next(lines, None), start, 0
        layout, rest = self._layout(len(str(start)))
        if rest != self._rest:
            self._rest, self._known = rest, {}
        records = block.records_for(context.identity, self._scope)
        before = len(records)
        append, known, bodies, stop = records.append, self._known, _BODIES, self._stop
        lag, grain, pack = context.lag, LATE_GRAIN, times
        for line in lines:
            head, _, body = line.partition(stop)
            try:
                fields, lengths, second = known[head]
                size = len(body)
                end = start + len(line) + 1
                # TypeError where the body is empty, as it is without a stop: the tables have None for that.
                append(
                    layout
                    % (
                        lengths[size],
                        pack(b"\x09", second + end % grain, b"\x59", lag + end),
                        fields,
                        bodies[size],
                        body,
                        start,
                        end,
                    )
                )
            except (KeyError, IndexError, TypeError):
                size, end = len(body), start + len(line) + 1
                recalled = self._recall(head, context, first) if 0 < size < _LONGEST_BODY else None
                if recalled is None:
                    return line, start, len(records) - before
                fields, lengths, second = recalled
                append(
                    layout
                    % (
                        lengths[size],
                        pack(b"\x09", second + end % grain, b"\x59", lag + end),
                        fields,
                        bodies[size],
                        body,
                        start,
                        end,
                    )
                )
                known = self._known
            start = end
        return None, start, len(records) - before

    def _layout(self, digits: int) -> tuple[bytes, int]:
        """A record whose uid's numbers have so many digits, as a template for length, times, fields, body and offsets; and the
        bytes of it that are the same for all."""
        size = len(self._prefix) + 2 * digits + 1
        uid = otlp.attributes({"log.record.uid": "x" * size})[:-size] + self._prefix
        return b"\x12%b%b%b%b%b" + uid.replace(b"%", b"%%") + b"%d-%d", len(uid) + 2 * digits + 1 + _TIMES_BYTES

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
            known = self._known[head] = (fields, _lengths_for(len(fields) + self._rest), time)
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
        sort = (header.stop, header.scope, header.prefixed)
        if self._matcher is None:
            self._stop, self._scope, self.prefixed = sort
            self._matcher = header.matcher
        elif sort != (self._stop, self._scope, self.prefixed) or header.matcher is not self._matcher:
            return
        match = self._matcher.whole.fullmatch(line[: header.end])
        if match is None:
            return
        if len(self._fields) >= _MOST_HEADERS:
            self._fields.clear()
        if len(header.fields) > _LONGEST_BODY:
            return
        self._fields[self._matcher.identity_of_whole(match)] = header.fields
        self._keep(line[:size], header.time, header.holds, header.fields, context, context.lag + start)

    def _keep(
        self, head: bytes, time: int, holds: tuple[int, int], fields: bytes, context: Context, first: int
    ) -> _Known | None:
        if not holds[0] <= first <= context.mark < holds[1]:
            return None
        low, high = max(self._marks[0], holds[0]), min(self._marks[1], holds[1])
        if len(self._known) >= _MOST_HEADERS or not low <= first <= context.mark < high:
            self._forget_times()
            low, high = holds
        self._marks, self._zones = (low, high), context.zones
        known = self._known[head] = (fields, _lengths_for(len(fields) + self._rest), time)
        return known


def _lengths_for(rest: int) -> list[bytes | None]:
    """The encoded length of a record, by the length of its body, where all but the body has `rest` bytes."""
    lengths = _lengths.get(rest)
    if lengths is None:
        if len(_lengths) >= _MOST_TABLES:
            _lengths.clear()
        lengths = _lengths[rest] = [
            _VARINTS[size + len(body) + rest] if body else None for size, body in enumerate(_BODIES)
        ]
    return lengths
