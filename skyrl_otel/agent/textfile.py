"""The text of a writer: what it prints to `out` and `err`, or a file that it, or somebody else, writes and rotates."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

from skyrl_otel.agent import assemble, otlp, rotation
from skyrl_otel.agent.assemble import State
from skyrl_otel.agent.block import MARKER, Section
from skyrl_otel.agent.events import EVENT_NS
from skyrl_otel.agent.holes import TAIL_BYTES
from skyrl_otel.agent.moments import Moments
from skyrl_otel.agent.partial import LAST_BYTES, PartialLine, is_old
from skyrl_otel.agent.reader import Reader, View
from skyrl_otel.agent.redact import Redactor
from skyrl_otel.agent.rotation import Inode
from skyrl_otel.agent.tail import Decide, Move, Tail
from skyrl_otel.spool.checkpoint import Position
from skyrl_otel.spool.decisions import Decision

_READ_BYTES = 3 * assemble.PART_BYTES
"""Enough to always hold a whole line or the part of one, and in a stream that tears lines the one after it too."""

_LINE_BYTES = 128
"""Shorter lines count as much as one of this length: a record has about 200 bytes beyond its line."""

_SETTLE_NS = 300_000_000
"""Where console echoes are noted, the notes get this long to come."""

_ATTRIBUTES = {
    "out": otlp.attributes({"log.iostream": "stdout"}),
    "err": otlp.attributes({"log.iostream": "stderr"}),
}


class TextFile(Tail):
    """`followed` files are found by path and may rotate. `has_echoes`: records of the same process may be printed there too."""

    def __init__(
        self,
        writer_id: str,
        name: str,
        path: Path,
        decide: Decide,
        *,
        followed: bool = False,
        first_offset: int = 0,
        skip_markers: bool = False,
        inode: Inode | None = None,
        moments: Moments | None = None,
        has_echoes: bool = False,
        redactor: Redactor | None = None,
    ) -> None:
        moments = moments or Moments()
        super().__init__(
            writer_id, name, path, decide, moments, followed=followed, first_offset=first_offset, inode=inode
        )
        self._skip_markers = skip_markers
        self._has_echoes = has_echoes
        self._redactor = redactor or Redactor()
        self._settling: tuple[int, int] | None = None
        self._partial = PartialLine()
        self._event_waits = False
        self._reader: Reader | None = None
        self._reader_of = -1

    # -- looking -------------------------------------------------------------------------------------------------------

    def _location(self) -> Path:
        return rotation.find(self.path, self._inode) if self.followed and self._inode else self.path

    def _next_generation(self) -> bool:
        """Not before the last byte is acknowledged: until then it may have to be read again."""
        if self.unacked or self._inode is None or not rotation.has_moved(self.path, self._inode):
            return False
        mine = os.fstat(self._fd)
        found = rotation.successor(self.path, mine) if mine.st_size <= self.seen else None
        if found is None:
            return False
        self._go_on_with(found)
        self._open()  # at once: a writer that ended must not seem delivered before its last file is seen
        return True

    def _start_generation(self, decision: Decision) -> None:
        super()._start_generation(decision)
        self._settling = None

    def _readable(self, size: int, now: int) -> tuple[int, int]:
        if not self._has_echoes:
            return size, now
        if self._settling is None:
            self._settling = (size, now)
        if now - self._settling[1] < _SETTLE_NS:
            return self.seen, now
        settled, self._settling = self._settling, None
        return settled

    def note_echo(self, inode: Inode, start: int, end: int) -> None:
        """[start, end) of a file is the console echo of a record; passed over, unless it may have been sent already."""
        # An event that was sent may have taken lines from behind `sent`.
        taken = max((end for _, end in State.from_json(self.sent.state).claimed), default=0)
        if inode != self._inode or start < max(self.sent.offset, self._floor, taken) or self.decided.has_echo(start):
            return
        self.decided.add(self._decide(self.name, self.generation, start, "echo", {"bytes": end - start}))

    # -- the end -------------------------------------------------------------------------------------------------------

    def cut_partial(self, now: int, *, final: bool) -> None:
        """Decide that what waits at the end, if it is old enough or the last, is sent as it is."""
        if not self.unsent or self.held or not self.decided.marks or self._fd < 0:
            return
        newest, cuts = self.decided.marks[-1], self.decided.cuts
        if newest.offset != self.size or (cuts and cuts[-1].offset >= self.seen):
            return
        if final:
            if self._waits or os.pread(self._fd, 1, self.seen - 1) not in (b"\n", b""):
                self._cut(self.seen)
            return
        idle, waits = now - newest.value, self._waits
        if waits and self._event_waits and idle >= EVENT_NS:
            self._cut_events()
        if not is_old(self.decided.mark_of(self.sent.offset).value, now):
            return
        end = os.pread(self._fd, LAST_BYTES, max(self.seen - LAST_BYTES, self.sent.offset))
        if self._partial.is_due(end, now, idle, waits=waits):
            self._cut(self.seen)

    def _cut(self, offset: int) -> None:
        self.decided.cuts.append(self._decide(self.name, self.generation, offset, "cut", None))

    def _cut_events(self) -> None:
        """End the events that wait, but not the line that is being written behind them."""
        size = min(self.unsent, assemble.PART_BYTES)
        newline = os.pread(self._fd, size, self.seen - size).rfind(b"\n")
        offset = self.seen - size + newline + 1
        cuts = self.decided.cuts
        if newline >= 0 and (not cuts or cuts[-1].offset < offset):
            self._cut(offset)

    def _record_end(self, offset: int) -> int:
        newline = os.pread(self._fd, assemble.PART_BYTES, offset).find(b"\n")
        return min(offset + newline + 1, self.seen)

    def last_line(self) -> tuple[int, str]:
        """(mtime, the last line that is not empty), at most 500 characters; (0, "") if there is none."""
        if self._fd < 0:
            return 0, ""
        found = os.fstat(self._fd)
        data = os.pread(self._fd, LAST_BYTES, max(found.st_size - LAST_BYTES, 0)).strip(b"\0\r\n\t ")
        lines = [line for line in data.split(b"\n") if line.strip() and not MARKER.match(line)]
        return (found.st_mtime_ns, lines[-1][-500:].decode("utf-8", "replace").strip()) if lines else (0, "")

    # -- records -------------------------------------------------------------------------------------------------------

    def _take(self, limit: int, budget: int) -> tuple[Move | None, list[Section]]:
        before = self.sent
        start = before.offset
        reader, state = self._reader_here(), State.from_json(before.state)
        for size in (budget, max(budget, _READ_BYTES)):
            data = self._read(start, min(limit - start, size))
            if data is None:
                return None, []
            view = self._view(start, start + len(data), limit)
            result = reader.read(data, start, state, view, most=max(budget // _LINE_BYTES, 1), one=size > budget)
            if result.end > start or start + len(data) == limit:
                break
        if result.end == start:
            self._partial_at = self._here
            self._event_waits = result.waits
            return None, []
        self.sent = Position(self.generation, result.end, result.state.to_json(), self._tail_of(result.end))
        return Move(self, before, self.sent), result.sections

    def _view(self, start: int, end: int, limit: int) -> View:
        """What is decided of the bytes that are read between two offsets."""
        decided = self.decided
        cuts = decided.edges(start, end)
        if end == limit < self.seen:
            cuts.add(limit)  # the line in front of a given-up range ends where that begins
        return View(decided.marks, decided.identities, sorted(cuts), decided.zones, decided.echoes)

    def _read(self, start: int, size: int) -> bytes | None:
        """The bytes from `start` on, if those before are the ones that were read; else a new generation begins."""
        before = min(start, TAIL_BYTES)
        data = os.pread(self._fd, before + size, start - before)
        if len(data) < before + size:
            return None
        if self.sent.tail and zlib.crc32(data[:before]) != self.sent.tail:
            self._replaced("overwritten by its writer")
            return None
        return data[before:]

    def _tail_of(self, end: int) -> int:
        return zlib.crc32(os.pread(self._fd, min(end, TAIL_BYTES), max(end - TAIL_BYTES, 0)))

    def _reader_here(self) -> Reader:
        if self._reader is None or self._reader_of != self.generation:
            prefix = f"{self.writer_id}/{self.name}/{self.generation}/".encode()
            attributes = _ATTRIBUTES[self.name]
            self._reader = Reader(prefix, attributes, skip_markers=self._skip_markers, redactor=self._redactor)
            self._reader_of = self.generation
        return self._reader
