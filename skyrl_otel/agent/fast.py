"""The fast way of a common line: its header was met before, so all but the body, the offsets and the lengths is at hand.

A header of some format decides everything by itself, and formats that repeat theirs end it in bytes that do not stand in it
(`Format.stop`). So the bytes up to there are looked up; what they stand for is already encoded. Where only the time is new,
one match puts it together with what is known of the rest.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from skyrl_otel.agent import otlp
from skyrl_otel.agent.block import Block, Context, Learned
from skyrl_otel.agent.recognise import Matcher, Recogniser

_MOST_HEADERS = 4096
_LONGEST_BODY = 4096

_VARINTS = [otlp.varint(size) for size in range(2 * _LONGEST_BODY)]
_BODIES = [
    b"\x2a" + otlp.varint(1 + len(otlp.varint(size)) + size) + b"\x0a" + otlp.varint(size) for size in range(_LONGEST_BODY)
]
_fixed64 = struct.Struct("<Q").pack


class Fast:
    """Headers whose meaning is known to the last byte, and lines that have them.

    All of them mean the same under the marks in [first, end) of `_marks`, are of one format and scope, and either all or none
    have a child's prefix; `prefixed` is 1 or 0. Each was met since `clear`, so its child is in the state of the block.
    """

    def __init__(self, prefix: bytes, recogniser: Recogniser) -> None:
        self._prefix = prefix
        self._recogniser = recogniser
        self._uids: dict[int, bytes] = {}
        self.clear()

    def clear(self) -> None:
        """Know nothing."""
        self._forget_times()
        self._matcher: Matcher | None = None
        self._fields: dict[object, bytes] = {}
        self._stop = self._scope = b""
        self.prefixed = 0

    def _forget_times(self) -> None:
        self._known: dict[bytes, bytes] = {}
        self._marks = (0, 1 << 64)
        self._zones: tuple[int, int] | None = None

    def take(
        self, lines: Iterator[bytes], start: int, context: Context, block: Block
    ) -> tuple[bytes | None, int, int]:
        """Records of the next lines as long as their headers are known.

        Returns:
            The first line that is not known (None at the end of the lines), its offset, and how many were taken.
        """
        if not self._marks[0] <= context.mark < self._marks[1] or context.zones != self._zones:
            self._forget_times()
            self._zones = context.zones
        if self._matcher is None:
            return next(lines, None), start, 0
        digits = len(str(start))
        ceiling = 10**digits
        uid = self._uid(2 * digits)
        rest = len(uid) + 2 * digits + 1 + 9  # the uid, the "-" in it, the observed time
        observed = b"\x59" + _fixed64(context.mark)
        layout = b"\x12%b%b%b%b" + uid.replace(b"%", b"%%") + b"%d-%d" + observed.replace(b"%", b"%%")
        records = block.records_for(context.identity, self._scope)
        before = len(records)
        append, get, varints, bodies, stop = records.append, self._known.get, _VARINTS, _BODIES, self._stop
        for line in lines:
            head, _, body = line.partition(stop)
            size = len(body)
            end = start + len(line) + 1
            known = get(head)
            if known is None or not size:
                known = self._recall(head, context) if size else None
                if known is None:
                    return line, start, len(records) - before
                get = self._known.get
            if end >= ceiling or size >= _LONGEST_BODY:
                return line, start, len(records) - before
            opening = bodies[size]
            append(layout % (varints[len(known) + len(opening) + size + rest], known, opening, body, start, end))
            start = end
        return None, start, len(records) - before

    def _recall(self, head: bytes, context: Context) -> bytes | None:
        """What a header means of which all but the time was met before."""
        assert self._matcher is not None
        match = self._matcher.whole.fullmatch(head + self._stop)
        if match is None:
            return None
        fields = self._fields.get(self._matcher.identity_of_whole(match))
        if fields is None:
            return None
        found = self._matcher.time_of_whole(match, context.mark, context.zones)
        if found is None:
            return None
        return self._keep(head, *found, fields, context)

    def learn(self, line: bytes, header: Learned, context: Context) -> None:
        """Keep the header of `line`, if it is one that will come again."""
        size = header.end - len(header.stop)
        if line.find(header.stop) != size:
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
        self._fields[self._matcher.identity_of_whole(match)] = header.fields
        self._keep(line[:size], header.time, header.holds, header.fields, context)

    def _keep(self, head: bytes, time: int, holds: tuple[int, int], fields: bytes, context: Context) -> bytes:
        low, high = max(self._marks[0], holds[0]), min(self._marks[1], holds[1])
        if len(self._known) >= _MOST_HEADERS or not low <= context.mark < high:
            self._forget_times()
            low, high = holds
        self._marks, self._zones = (low, high), context.zones
        known = self._known[head] = b"\x09" + _fixed64(time) + fields
        return known

    def _uid(self, digits: int) -> bytes:
        """The attribute of a uid whose two numbers have so many digits, up to the first of them."""
        if digits not in self._uids:
            size = len(self._prefix) + digits + 1
            whole = otlp.attributes({"log.record.uid": "x" * size})
            self._uids[digits] = whole[:-size] + self._prefix
        return self._uids[digits]
