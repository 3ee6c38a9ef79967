"""The records of one block, line by line: headers, events, and what becomes of events that are still open at its end.

Records stand in the order in which their first lines were written. An event that is still open keeps its place, and all from
there on is read again when more is known; lines that closed events took from beyond that place are *claimed*, in the state.
"""

from __future__ import annotations

import bisect
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from skyrl_otel.agent import otlp
from skyrl_otel.agent.assemble import Piece, State, remembered
from skyrl_otel.agent.events import MOST_OPEN, Event, Line, encoded_attributes, kind_of
from skyrl_otel.agent.recognise import TEXT_SCOPE, Child, Header, Matcher, Recogniser
from skyrl_otel.agent.redact import Redactor
from skyrl_otel.agent.times import LATE_GRAIN

MARKER = re.compile(rb":(?:job_id|actor_name|task_name):|skyrl-otel: output of this actor is recorded")
"""Lines of Ray and of ours that are no output of anybody."""

# ECMA-48 control sequences (none has more than two intermediate bytes; what has is text), OSC strings up to BEL or ST, and the
# two- and three-byte escapes.
_ANSI = re.compile(rb"\x1b(?:\[[0-?]*[ -/]{0,2}[@-~]|\][^\x07\x1b\n]*(?:\x07|\x1b\\)|[()][0-9A-B]|[@-Z\\^_=>78cM])")
_ERROR = b"\x10\x11" + otlp.field(b"\x1a", b"ERROR")
_LAST = otlp.attributes({"skyrl.part.last": True})
_TORN = otlp.attributes({"skyrl.torn": True})
_UID_KEY = otlp.field(b"\x0a", b"log.record.uid")
times = struct.Struct("<cQcQ").pack
"""The fields time_unix_nano and observed_time_unix_nano."""


class Context(NamedTuple):
    """What decisions say of a line: its mark, its identity, and the seconds east of UTC in force there and before.

    `lag` and the offset of its end make its moment (agent/moments.py).
    """

    mark: int
    identity: int
    zones: tuple[int, int]
    lag: int


class Odd(Exception):
    """A block is not just whole lines of which each is one process's."""


@dataclass(frozen=True, slots=True)
class Section:
    """Records of one file under one identity and scope, in order. `records` are `count` of them, one or more in each bytes
    object; `size` is their bytes."""

    identity_seq: int
    scope: bytes
    records: tuple[bytes, ...]
    count: int
    size: int


class Result(NamedTuple):
    """What was read: records up to the offset `end`, and the state there. `waits`: an event that is open keeps the rest."""

    sections: list[Section]
    end: int
    state: State
    waits: bool


class Learned(NamedTuple):
    """A header that decides all of its line but the message; see `Header`. `fields` are those of time and body excepted."""

    matcher: Matcher
    end: int
    stop: bytes
    scope: bytes
    time: int
    holds: tuple[int, int]
    fields: bytes


class Group(NamedTuple):
    """Records that will be a `Section`; `counts` says how many each bytes object holds."""

    identity: int
    scope: bytes
    records: list[bytes]
    counts: list[int]

    def add(self, records: bytes, count: int = 1) -> None:
        """Put these behind the others."""
        self.records.append(records)
        self.counts.append(count)

    def upto(self, size: int) -> Group:
        """The first `size` bytes objects of it."""
        return Group(self.identity, self.scope, self.records[:size], self.counts[:size])


class _Place(NamedTuple):
    """Where the record of an open event will stand, and what was known when it began."""

    group: int
    at: int
    children: tuple[bytes, ...]
    fields: bytes
    observed: int


class Block:
    """Takes lines in order; `finish` gives their records.

    Lines come with their secrets masked. What only shows when escapes are gone, quotes are read or lines are joined is
    masked here.
    """

    def __init__(
        self,
        recogniser: Recogniser,
        prefix: bytes,
        attributes: bytes,
        base: int,
        state: State,
        cuts: Sequence[int],
        skip_markers: bool,
        redactor: Redactor,
    ) -> None:
        self.has_forgotten = False
        self._recogniser = recogniser
        self._prefix = prefix
        self._attributes = attributes
        self._base = base
        self._children = state.children
        self._claimed = state.claimed
        self._taken: list[tuple[int, tuple[int, int]]] = []
        self._cuts = cuts
        self._skip_markers = skip_markers
        self._redactor = redactor
        self._groups: list[Group] = []
        self._open: dict[bytes, Event] = {}
        self._places: dict[bytes, _Place] = {}

    @property
    def is_open(self) -> bool:
        """Whether an event waits for its next line."""
        return bool(self._open)

    def remember(self, child: bytes) -> None:
        """A child's prefix was seen."""
        if child not in self._children:
            before = len(self._children)
            self._children = remembered(self._children, child)
            self.has_forgotten = self.has_forgotten or len(self._children) == before

    def group(self, identity: int, scope: bytes) -> Group:
        """What takes the next records of that identity and scope."""
        if self._groups:
            last = self._groups[-1]
            if last.identity == identity and last.scope == scope:
                return last
        self._groups.append(Group(identity, scope, [], []))
        return self._groups[-1]

    # -- lines ---------------------------------------------------------------------------------------------------------

    def line(self, start: int, end: int, raw: bytes, context: Context, *, plain: bool) -> Learned | None:
        """A whole line; `plain`: its bytes can be shown as they are. Returns its header if it is worth learning."""
        if self._claimed and self._is_claimed(start):
            return None
        if self._skip_markers and raw[:1] in b":s" and MARKER.match(raw):
            return None
        text, hidden = (raw, 0) if plain else self._shown(raw)
        moment = context.lag + end
        child, rest = self._child(text)
        header = self._header(rest, moment, context)
        message = rest if header is None else _message(rest, header)
        key = child.prefix if child else b""
        line = Line(start, end, message, header, moment, hidden > 0)
        if self._open and self._belongs(key, line):
            return None
        kind = kind_of(message, header)
        fields = self._fields(header, child)
        if kind and not hidden:
            self._begin(key, Event(key, kind, line), header, fields, context)
            return None
        extra = otlp.attributes({"skyrl.bar.states": hidden}) if hidden else b""
        self._write(start, end, message, header, fields, extra, context)
        if header is None or not header.format.stop or hidden:
            return None
        if not header.believed or header.grain != LATE_GRAIN:
            return None
        size, scope = header.end + len(key), header.static.scope
        return Learned(header.matcher, size, header.format.stop, scope, header.time, header.holds, fields)

    def piece(self, piece: Piece, context: Context, *, begins: bool) -> None:
        """A line, a part of one or a torn one; `begins`: it is the first of its line."""
        if piece.part < 0 and not piece.torn and begins:
            self.line(piece.start, piece.end, piece.body, context, plain=False)
            return
        if self._open:
            self._expire(piece.start, context.lag + piece.end)
        if self._skip_markers and piece.body[:1] in b":s" and MARKER.match(piece.body):
            return
        text, hidden = self._shown(piece.body)
        header, fields = None, self._attributes
        if piece.part <= 0:
            child, text = self._child(text)
            header = self._header(text, context.lag + piece.end, context)
            fields = self._fields(header, child)
        extra = b""
        if piece.part >= 0:
            extra = otlp.attributes({"skyrl.part": piece.part})
            if piece.last:
                extra += _LAST
        if piece.torn:
            extra += _TORN
        if hidden:
            extra += otlp.attributes({"skyrl.bar.states": hidden})
        message = text if header is None else _message(text, header)
        self._write(piece.start, piece.end, message, header, fields, extra, context)

    def _shown(self, raw: bytes) -> tuple[bytes, int]:
        text, hidden = shown(raw)
        return (text if text is raw else self._redactor.text(text)), hidden

    def _header(self, text: bytes, moment: int, context: Context) -> Header | None:
        header = self._recogniser.header(text, moment, context.zones)
        if header is None or header.message is None:
            return header
        static, redactor = header.static, self._redactor
        if not redactor.awake(static.fields + b" " + static.scope + b" " + header.message):
            return header
        static = static._replace(fields=redactor.record(static.fields), scope=redactor.scope(static.scope))
        return header._replace(message=redactor.text(header.message), static=static)

    def _child(self, text: bytes) -> tuple[Child | None, bytes]:
        child = self._recogniser.child(text) if text[:1] in b"([" else None
        return child, text if child is None else text[len(child.prefix) :]

    def _fields(self, header: Header | None, child: Child | None) -> bytes:
        fields = self._attributes
        if header is not None:
            fields = header.static.fields + header.static.pid_after(child) + fields
        return fields if child is None else fields + child.fields

    def _write(
        self, start: int, end: int, message: bytes, header: Header | None, fields: bytes, extra: bytes, context: Context
    ) -> None:
        moment = context.lag + end
        if header is None:
            # The shape that collector/wire.py reads without a decoder.
            attributes = fields + _uid(b"%b%d-%d" % (self._prefix, start, end)) + extra
            self.group(context.identity, TEXT_SCOPE).add(otlp.text_record(moment, message, attributes))
            return
        record = self._record(header.time + end % header.grain, fields, message, start, end, extra, moment)
        self.group(context.identity, header.static.scope).add(record)

    def _record(
        self, time: int, fields: bytes, body: bytes, start: int, end: int, extra: bytes, observed: int
    ) -> bytes:
        size = len(body)
        opening = otlp.BODIES[size] if size < otlp.LONGEST_BODY else None
        if opening is None:
            opening = b"\x2a%b\x0a%b" % (otlp.varint(1 + len(otlp.varint(size)) + size), otlp.varint(size))
        uid = _uid(b"%b%d-%d" % (self._prefix, start, end))
        # `Fast` writes these in the same order: what goes with a body's size, with a header, with a line.
        rest = b"%b%b%b%b%b%b" % (opening, body, fields, uid, extra, times(b"\x09", time, b"\x59", observed))
        total = len(rest)
        return b"\x12" + (otlp.LENGTHS[total] if total < len(otlp.LENGTHS) else otlp.varint(total)) + rest

    # -- events --------------------------------------------------------------------------------------------------------

    def _belongs(self, key: bytes, line: Line) -> bool:
        """Give `line` to the open event of its process; ends those that it or the time ends."""
        self._expire(line.start, line.mark)
        event = self._open.get(key)
        if event is None:
            return False
        if event.add(line):
            if event.is_complete:
                self._close(key)
            return True
        if not event.bears(line):
            self._close(key)
        return False

    def _begin(self, key: bytes, event: Event, header: Header | None, fields: bytes, context: Context) -> None:
        if key in self._open:
            self._close(key)
        if len(self._open) >= MOST_OPEN:
            self._close(next(iter(self._open)))
        if header is None or not header.static.severity:
            fields = (_ERROR if event.is_error else b"") + fields
        scope = TEXT_SCOPE if header is None else header.static.scope
        group = self.group(context.identity, scope)
        place = _Place(len(self._groups) - 1, len(group.records), self._children, fields, event.mark)
        group.add(b"")
        self._open[key], self._places[key] = event, place

    def _expire(self, start: int, mark: int) -> None:
        for key in [key for key, event in self._open.items() if event.has_expired(start, mark)]:
            self._close(key)
        if self._cuts and self._open:
            self._cut(start)

    def _cut(self, upto: int) -> None:
        for key in [key for key, event in self._open.items() if self._is_cut(event.end, upto)]:
            self._close(key)

    def _is_cut(self, low: int, high: int) -> bool:
        index = bisect.bisect_left(self._cuts, low)
        return index < len(self._cuts) and self._cuts[index] <= high

    def _close(self, key: bytes) -> None:
        event, place = self._open.pop(key), self._places.pop(key)
        event.mask(self._redactor.text)
        start, end = event.ranges[0]
        header = event.header
        time = event.mark if header is None else header.time + event.first_end % header.grain
        record = self._record(time, place.fields, event.body(), start, end, encoded_attributes(event), place.observed)
        self._groups[place.group].records[place.at] = record
        self._taken += [(event.start, taken) for taken in event.ranges[1:]]

    def _is_claimed(self, start: int) -> bool:
        return any(low <= start < high for low, high in self._claimed)

    # -- the end -------------------------------------------------------------------------------------------------------

    def finish(self, end: int) -> Result:
        """The records up to `end`, or to the first event that must wait. The state's `part` and `tears` are not known here."""
        self._cut(end)
        groups, children = self._groups, self._children
        waits = bool(self._open)
        if waits:
            key = min(self._open, key=lambda key: self._open[key].start)
            place, end = self._places[key], self._open[key].start
            groups = [*groups[: place.group], groups[place.group].upto(place.at)]
            children = place.children
        claimed = [taken for began, taken in self._taken if began < end and taken[1] > end]
        claimed += [taken for taken in self._claimed if taken[1] > end]
        sections = [
            Section(identity, scope, tuple(records), sum(counts), sum(map(len, records)))
            for identity, scope, records, counts in groups
            if records
        ]
        return Result(sections, end, State(0, children, False, claimed=tuple(sorted(claimed))), waits)


def shown(raw: bytes) -> tuple[bytes, int]:
    """A line as people see it, valid UTF-8, and how many earlier states of a progress bar are not in it."""
    hidden = 0
    if b"\r" in raw:
        states = [state for state in raw.split(b"\r") if state.strip()]  # blanks wipe what was there
        raw = states[-1] if states else b""
        hidden = max(len(states) - 1, 0)
    if b"\x1b" in raw:
        raw = _ANSI.sub(b"", raw)
    if b"\0" in raw:
        raw = raw.replace(b"\0", "\ufffd".encode())
    if not raw.isascii():
        try:
            raw.decode()
        except UnicodeDecodeError:
            raw = raw.decode("utf-8", "replace").encode()
    return raw, hidden


def _message(text: bytes, header: Header) -> bytes:
    return text[header.end :] if header.message is None else header.message


def _uid(uid: bytes) -> bytes:
    # KeyValue("log.record.uid", string): fixed key, one length byte as long as the uid is below 101 bytes.
    size = len(uid)
    if size > 100:
        return otlp.attributes({"log.record.uid": uid.decode()})
    inner = _UID_KEY + b"\x12%c\x0a%c%b" % (size + 2, size, uid)
    return b"\x32%c%b" % (len(inner), inner)
