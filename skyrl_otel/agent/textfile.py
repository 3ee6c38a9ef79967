"""One text file of a writer: how far it is seen, sent and acknowledged, and the records between.

Four offsets, acked <= sent <= seen <= size. What lies below `acked` may be punched; what lies below `sent` is in a request
that is under way; `seen` is the newest time mark; `size` is the file's at the last look. Nothing is buffered: unsent bytes
are read again from the file.
"""

from __future__ import annotations

import bisect
import os
import stat
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from skyrl_otel.agent import assemble, otlp
from skyrl_otel.agent.assemble import State
from skyrl_otel.agent.block import MARKER, Section
from skyrl_otel.agent.events import EVENT_NS
from skyrl_otel.agent.moments import Moments
from skyrl_otel.agent.reader import Reader, View
from skyrl_otel.agent.redact import Redactor
from skyrl_otel.spool.checkpoint import Position
from skyrl_otel.spool.decisions import Decision
from skyrl_otel.spool.layout import open_file, punch

PARTIAL_S = 1.0
"""A partial line older than this is sent as it is and continued later."""

_READ_BYTES = 3 * assemble.PART_BYTES
"""Enough to always hold a whole line or the part of one, and in a stream that tears lines the one after it too."""

_MANY_MARKS = 256
"""Past this a file gets a new mark only when the last one is as old as a `_MANY_MARKS`th of the first one's age: in an outage
times grow coarse (by 0.4 % of its length), and memory and journal with the logarithm of it."""

_LINE_BYTES = 128
"""Shorter lines count as much as one of this length: a record has about 200 bytes beyond its line."""

_MAYBE_LOST = "truncated after an agent ended that may have sent some of it"
"""Why of an upper bound: that agent did not live to hear what the receiver took."""

_SETTLE_NS = 300_000_000
BAR_S = 10.0
"""A progress bar, which is a line that is written over and over, is sent as it stands that often."""

_LAST_BYTES = 8192
_TAIL_BYTES = 64
_PUNCH_BYTES = 1 << 20
_BLOCK = 4096

_ATTRIBUTES = {
    "out": otlp.attributes({"log.iostream": "stdout"}),
    "err": otlp.attributes({"log.iostream": "stderr"}),
}

Decide = Callable[[str, int, int, str, object], Decision]
"""Journal a decision: (file, generation, offset, kind, value)."""


@dataclass(frozen=True, slots=True)
class Move:
    """`to` becomes the acknowledged position of `file` when the request that holds [before, to) is accepted."""

    file: TextFile
    before: Position
    to: Position

    is_skip: bool = False
    """Over what was given up and is counted already."""

    @property
    def size(self) -> int:
        """Bytes that the receiver is to take."""
        return 0 if self.is_skip else self.to.offset - self.before.offset


class TextFile:
    """`followed` files belong to somebody else: they are found by path, may rotate, and are never punched."""

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
        inode: tuple[int, int] | None = None,
        moments: Moments | None = None,
        has_echoes: bool = False,
        redactor: Redactor | None = None,
    ) -> None:
        self.writer_id = writer_id
        self.name = name
        self.path = path
        self.followed = followed
        self.skip_markers = skip_markers
        self.acked = Position(0, first_offset)
        self.sent = self.acked
        self.size = self.seen = first_offset
        self.held = False
        self.marks: list[Decision] = []
        self.cuts: list[Decision] = []
        self.identities: list[Decision] = []
        self.losses: list[Decision] = []
        self.echoes: list[Decision] = []
        self.zones: list[Decision] = []
        self.generation_decision: Decision | None = None
        self._decide = decide
        self._moments = moments or Moments()
        self._fd = -1
        self._inode = inode
        self._floor = 0
        self._maybe_sent = 0
        self._punched = self._punched_losses = 0
        self._redactor = redactor or Redactor()
        self._has_echoes = has_echoes
        self._settling: tuple[int, int] | None = None
        self._partial_at: tuple[int, int, int] | None = None
        self._event_waits = False
        self._bar_since = 0
        self._reader: Reader | None = None
        self._reader_of = -1

    # -- recovery ------------------------------------------------------------------------------------------------------

    def restore(self, position: Position | None, decisions: list[Decision]) -> None:
        """Take up where an earlier agent stopped: its checkpoint and its journal."""
        if position is not None:
            self.acked = position
        for decision in decisions:
            if decision.kind == "generation":
                if decision.generation > self.acked.generation:
                    unsure = decision.offset - self.acked.offset
                    self._start_generation(decision)
                    if unsure > 0:
                        self._lose(0, unsure, _MAYBE_LOST, skip=False)
                elif decision.generation == self.acked.generation:
                    self.generation_decision = decision
                    self._inode = (decision.value["dev"], decision.value["ino"])
            elif decision.generation == self.acked.generation and not _is_of_bytes_gone(decision):
                self._sorted_list(decision).append(decision)
            if decision.kind == "mark":
                self._moments.taken(decision.value)
        self.losses.sort(key=lambda loss: loss.offset)
        self.sent = self.acked
        self.size = self.seen = max([self.acked.offset, *(mark.offset for mark in self.marks)])
        # What an earlier agent sent it sent below its last mark: nothing new may change the meaning of those bytes.
        self._floor = self.seen if self.identities else self.acked.offset
        self._maybe_sent = self.seen
        self.echoes.sort(key=_offset)
        self._forget()

    def _sorted_list(self, decision: Decision) -> list[Decision]:
        lists = {"mark": self.marks, "cut": self.cuts, "identity": self.identities, "loss": self.losses}
        lists["echo"], lists["zone"] = self.echoes, self.zones
        return lists.get(decision.kind, [])

    # -- looking -------------------------------------------------------------------------------------------------------

    @property
    def generation(self) -> int:
        return self.sent.generation

    @property
    def unacked(self) -> int:
        return self.size - self.acked.offset

    @property
    def backlog(self) -> int:
        """Bytes that are still to be delivered; what was given up is not."""
        acked = self.acked.offset
        given_up = (min(loss.offset + loss.value["bytes"] - acked, loss.value["bytes"]) for loss in self.losses)
        left: int = self.size - acked - sum(given_up)
        return max(left, 0)

    @property
    def unsent(self) -> int:
        return self.seen - self.sent.offset

    @property
    def ready(self) -> bool:
        """Whether `take` may find something: all that is unsent and is not known to be a partial line."""
        return self.unsent > 0 and not self.held and not self._waits

    @property
    def is_drained(self) -> bool:
        """Everything is acknowledged but a partial line that is waited for."""
        if self.unacked == 0:
            return True
        return self.sent.offset == self.acked.offset and self._waits and self.size == self.seen

    @property
    def _here(self) -> tuple[int, int, int]:
        return self.sent.offset, self.seen, len(self.cuts)

    @property
    def _waits(self) -> bool:
        """What is unsent is known to be a partial line."""
        return self._partial_at == self._here

    def observe(self, now: int, *, final: bool = False) -> bool:
        """Look at the file's size and mark it; True if it grew. Raises OSError for trouble of the spool itself.

        Args:
            final: nobody may look again soon: mark, however many marks there are.
        """
        if self._fd < 0 and not self._open():
            return False
        size = os.fstat(self._fd).st_size
        if size < self.size:
            self._replaced(size, "truncated by its writer")
            size = os.fstat(self._fd).st_size
        self.size = size
        if size > self.seen:
            seen_at = now
            if not final:
                size, seen_at = self._settled(size, now)
            if size > self.seen and (final or not self._is_crowded(now)):
                self._mark(size, seen_at)
            return True
        if not self.followed or not self._next_generation():
            return False
        self.observe(now)
        return True

    def _is_crowded(self, now: int) -> bool:
        marks = self.marks
        return len(marks) > _MANY_MARKS and (now - marks[-1].value) * _MANY_MARKS < now - marks[0].value

    def _settled(self, size: int, now: int) -> tuple[int, int]:
        """Up to where bytes may be read, and when those were seen: where echoes are noted, notes get a moment to come."""
        if not self._has_echoes:
            return size, now
        if self._settling is None:
            self._settling = (size, now)
        if now - self._settling[1] < _SETTLE_NS:
            return self.seen, now
        settled, self._settling = self._settling, None
        return settled

    def _mark(self, size: int, now: int) -> None:
        east = time.localtime(now // 1_000_000_000).tm_gmtoff
        if not self.zones or self.zones[-1].value != east:
            self.zones.append(self._decide(self.name, self.generation, self.seen, "zone", east))
        moment = self._moments.take(now, size - self.seen)
        self.marks.append(self._decide(self.name, self.generation, size, "mark", moment))
        self.seen = size

    def _open(self) -> bool:
        path = self._find() if self._inode else self.path
        try:
            descriptor = open_file(path, os.O_RDONLY if self.followed else os.O_RDWR)
        except FileNotFoundError:
            return False
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            os.close(descriptor)
            return False
        self._fd = descriptor
        inode = (found.st_dev, found.st_ino)
        if self._inode is not None and inode != self._inode:
            self._inode = inode
            self._replaced(found.st_size, "replaced while nobody read it")
        self._inode = inode
        if not self.followed:
            self._punched = _first_data(descriptor)
        return True

    def is_gone(self) -> bool:
        """Whether a file that was read can be found no more, under no name. Raises OSError."""
        return self._fd < 0 and self._inode is not None and not self._open()

    def count_gone(self) -> None:
        """What was seen of a file that is gone, and not acknowledged, is lost."""
        if self.unacked:
            self._replaced(0, "its file was removed")

    def _find(self) -> Path:
        """The file by its inode: rotation by rename leaves it at `path`, `path.1`, `path.2`, …"""
        for path in (self.path, *self._rotated()):
            try:
                found = os.stat(path, follow_symlinks=False)
            except OSError:
                continue
            if (found.st_dev, found.st_ino) == self._inode:
                return path
        return self.path

    def _rotated(self) -> list[Path]:
        if not self.followed:
            return []
        try:
            return [entry for entry in self.path.parent.iterdir() if entry.name.startswith(self.path.name + ".")]
        except OSError:
            return []

    def _next_generation(self) -> bool:
        """A followed file that is delivered to its end and has a successor: go on with the oldest that is newer.

        Not before the last byte is acknowledged: until then it may have to be read again.
        """
        if self.unacked:
            return False
        try:
            current = os.stat(self.path)
        except OSError:
            return False
        if (current.st_dev, current.st_ino) == self._inode:
            return False
        mine = os.fstat(self._fd)
        if mine.st_size > self.seen:
            return False
        candidates = [(current.st_mtime_ns, current)]
        for path in self._rotated():
            try:
                found = os.stat(path)
            except OSError:
                continue
            if (found.st_dev, found.st_ino) != self._inode and found.st_mtime_ns >= mine.st_mtime_ns:
                candidates.append((found.st_mtime_ns, found))
        successor = min(candidates, key=lambda candidate: candidate[0])[1]
        os.close(self._fd)
        self._fd = -1
        self._inode = (successor.st_dev, successor.st_ino)
        self._new_generation(0)
        self._open()  # at once: a writer that ended must not seem delivered before its last file is seen
        return True

    def _replaced(self, size: int, why: str) -> None:
        """The bytes are not the ones we knew: count what was seen and not read, begin again at 0."""
        lost = self.size - self.sent.offset
        unsure = max(self._maybe_sent - self.sent.offset, 0)
        if self._fd >= 0:
            found = os.fstat(self._fd)
            self._inode = (found.st_dev, found.st_ino)
        self._new_generation(lost)
        for size, reason in ((unsure, _MAYBE_LOST), (lost - unsure, why)):
            if size:
                self._lose(0, size, reason, skip=False)

    def _new_generation(self, lost: int) -> None:
        assert self._inode is not None
        value = {"dev": self._inode[0], "ino": self._inode[1], "lost": lost}
        identity = self.identities[-1].value if self.identities else None
        decision = self._decide(self.name, self.generation + 1, self.sent.offset, "generation", value)
        self._start_generation(decision)
        if identity is not None:
            self.identities.append(self._decide(self.name, self.generation, 0, "identity", identity))

    def _start_generation(self, decision: Decision) -> None:
        self.generation_decision = decision
        self.acked = self.sent = Position(decision.generation, 0)
        self._inode = (decision.value["dev"], decision.value["ino"])
        self.size = self.seen = self._floor = self._maybe_sent = self._punched = self._punched_losses = 0
        self.marks, self.cuts, self.identities, self.losses = [], [], [], []
        self.echoes, self.zones = [], []
        self._settling = None

    def _lose(self, offset: int, size: int, why: str, *, skip: bool) -> Decision:
        value = {"bytes": size, "why": why, "skip": skip}
        decision = self._decide(self.name, self.generation, offset, "loss", value)
        if skip:
            self.losses.append(decision)
        return decision

    def note_echo(self, dev: int, ino: int, start: int, end: int) -> None:
        """[start, end) of a file is the console echo of a record; passed over, unless it may have been sent already."""
        # An event that was sent may have taken lines from behind `sent`.
        taken = max((end for _, end in State.from_json(self.sent.state).claimed), default=0)
        if (dev, ino) != self._inode or start < max(self.sent.offset, self._floor, taken):
            return
        place = bisect.bisect_left(self.echoes, start, key=_offset)
        if place < len(self.echoes) and self.echoes[place].offset == start:
            return
        decision = self._decide(self.name, self.generation, start, "echo", {"bytes": end - start})
        self.echoes.insert(place, decision)

    def _echo_edges(self, start: int, end: int) -> list[int]:
        """Where echoes begin and end between two offsets: no line may reach across."""
        edges: list[int] = []
        for echo in self.echoes:
            if echo.offset >= end:
                break
            edges += (echo.offset, echo.offset + echo.value["bytes"])
        return [edge for edge in edges if start < edge <= end]

    # -- identity ------------------------------------------------------------------------------------------------------

    def assign(self, identity_seq: int, size: int) -> None:
        """Identity `identity_seq` is in force from `size` on, as far as nothing was sent from there yet."""
        offset = max(size, self.sent.offset, self._floor)
        if self.identities:
            offset = max(offset, self.identities[-1].offset)
            if self.identities[-1].value == identity_seq:
                return
        self.identities.append(self._decide(self.name, self.generation, offset, "identity", identity_seq))

    def release(self, identity_seq: int) -> None:
        """The waiting is over: all that is not sent belongs to `identity_seq`."""
        self.held = False
        if not self.identities:
            self.identities.append(self._decide(self.name, self.generation, self.sent.offset, "identity", identity_seq))
        else:
            self.assign(identity_seq, self.sent.offset)

    # -- records -------------------------------------------------------------------------------------------------------

    def cut_partial(self, now: int, *, final: bool) -> None:
        """Decide that what waits at the end, if it is old enough or the last, is sent as it is."""
        if not self.unsent or self.held or not self.marks or self._fd < 0:
            return
        newest = self.marks[-1]
        if newest.offset != self.size or (self.cuts and self.cuts[-1].offset >= self.seen):
            return
        idle = now - newest.value
        waits = self._waits
        if final:
            if waits or os.pread(self._fd, 1, self.seen - 1) not in (b"\n", b""):
                self._cut(self.seen)
            return
        if waits and self._event_waits and idle >= EVENT_NS:
            self._cut_events()
        first = bisect.bisect_right(self.marks, self.sent.offset, key=lambda mark: mark.offset)
        if now - self.marks[first].value < PARTIAL_S * 1e9:
            return
        end = os.pread(self._fd, _LAST_BYTES, max(self.seen - _LAST_BYTES, self.sent.offset))
        partial = end[end.rfind(b"\n") + 1 :]
        if b"\r" not in partial:
            self._bar_since = 0
            if idle >= PARTIAL_S * 1e9 and (waits or partial):
                self._cut(self.seen)
        elif not self._bar_since:
            self._bar_since = now
        elif now - self._bar_since >= BAR_S * 1e9:
            self._bar_since = now
            self._cut(self.seen)

    def _cut(self, offset: int) -> None:
        self.cuts.append(self._decide(self.name, self.generation, offset, "cut", None))

    def _cut_events(self) -> None:
        """End the events that wait, but not the line that is being written behind them."""
        size = min(self.unsent, assemble.PART_BYTES)
        newline = os.pread(self._fd, size, self.seen - size).rfind(b"\n")
        offset = self.seen - size + newline + 1
        if newline >= 0 and (not self.cuts or self.cuts[-1].offset < offset):
            self._cut(offset)

    def take(self, budget: int) -> tuple[Move | None, list[Section]]:
        """The next records, at least one if there is a complete one, about `budget` bytes of them; moves `sent`.

        Returns:
            (None, []) where there is nothing to send. Raises OSError.
        """
        if self.held or self.unsent <= 0 or self._fd < 0 or not self.identities:
            return None, []
        before_position = self.sent
        start = before_position.offset
        limit = self.seen
        for loss in self.losses:
            if loss.offset <= start < loss.offset + loss.value["bytes"]:
                return self._skip(loss)
            if loss.offset > start:
                limit = min(limit, loss.offset)
                break
        most = max(budget // _LINE_BYTES, 1)
        reader, state = self._reader_here(), State.from_json(self.sent.state)
        for size in (budget, max(budget, _READ_BYTES)):
            data = self._read(start, min(limit - start, size))
            if data is None:
                return None, []
            cuts = self._cuts_in(start, start + len(data), limit)
            view = View(self.marks, self.identities, cuts, self.zones, self.echoes)
            result = reader.read(data, start, state, view, most=most, one=size > budget)
            if result.end > start or start + len(data) == limit:
                break
        if result.end == start:
            self._partial_at = self._here
            self._event_waits = result.waits
            return None, []
        end = result.end
        tail = zlib.crc32(os.pread(self._fd, min(end, _TAIL_BYTES), max(end - _TAIL_BYTES, 0)))
        self.sent = Position(self.generation, end, result.state.to_json(), tail)
        return Move(self, before_position, self.sent), result.sections

    def _cuts_in(self, start: int, end: int, limit: int) -> list[int]:
        """Where no record may reach across, of what is read between two offsets."""
        cuts = {cut.offset for cut in self.cuts if cut.offset > start}
        if end == limit < self.seen:
            cuts.add(limit)  # the line in front of a given-up range ends where that begins
        return sorted(cuts.union(self._echo_edges(start, end)))

    def _read(self, start: int, size: int) -> bytes | None:
        """The bytes from `start` on, if those before are the ones that were read; else a new generation begins."""
        before = min(start, _TAIL_BYTES)
        data = os.pread(self._fd, before + size, start - before)
        if len(data) < before + size:
            return None
        if self.sent.tail and zlib.crc32(data[:before]) != self.sent.tail:
            self._replaced(self.seen, "overwritten by its writer")
            return None
        return data[before:]

    def _skip(self, loss: Decision) -> tuple[Move | None, list[Section]]:
        before = self.sent
        self.sent = Position(self.generation, loss.offset + loss.value["bytes"])
        return Move(self, before, self.sent, is_skip=True), []

    def _reader_here(self) -> Reader:
        if self._reader is None or self._reader_of != self.generation:
            prefix = f"{self.writer_id}/{self.name}/{self.generation}/".encode()
            attributes = _ATTRIBUTES[self.name]
            self._reader = Reader(prefix, attributes, skip_markers=self.skip_markers, redactor=self._redactor)
            self._reader_of = self.generation
        return self._reader

    # -- after the answer ----------------------------------------------------------------------------------------------

    def accept(self, position: Position) -> None:
        """All below `position` is acknowledged; the caller writes the checkpoint before `give_back`."""
        if position.generation == self.acked.generation and position.offset > self.acked.offset:
            self.acked = position
            self._forget()

    def undo(self, move: Move) -> None:
        """The newest `take` was not accepted and will not be sent as it was: take it again later, if it is still there."""
        if move.before.generation == self.generation:
            self.sent = move.before
        elif move.size:
            self._lose(0, move.size, "truncated before it could be sent again", skip=False)

    def refuse(self, move: Move, why: str) -> None:
        """The receiver will never take the bytes of `move`; counted lost, and skipped by a later reading."""
        if not move.size:
            return
        is_here = move.before.generation == self.generation
        self._lose(move.before.offset if is_here else 0, move.size, why, skip=is_here)

    def give_back(self) -> None:
        """Punch what the checkpoint on disk has passed. Raises OSError."""
        if self.followed or self._fd < 0:
            return
        end = (self.acked.offset - _TAIL_BYTES) // _BLOCK * _BLOCK
        while end - self._punched >= _PUNCH_BYTES:
            punch(self._fd, self._punched, _PUNCH_BYTES)
            self._punched += _PUNCH_BYTES

    def give_up(self, size: int, why: str) -> int:
        """Drop about `size` of the oldest bytes that are not under way; how many it were. Raises OSError."""
        start = max(self.sent.offset, self._floor)
        for loss in self.losses:
            if loss.offset <= start:
                start = max(start, loss.offset + loss.value["bytes"])
        if size <= 0 or self.followed or self._fd < 0 or start >= self.seen:
            return 0
        end = min(start + size, self.seen)
        data = os.pread(self._fd, assemble.PART_BYTES, end)
        newline = data.find(b"\n")
        end = min(end + newline + 1, self.seen) if newline >= 0 else end
        self._lose(start, end - start, why, skip=True)
        return end - start

    def punch_losses(self) -> None:
        """Give the disk what `give_up` gave up; only after the journal is on disk. Raises OSError."""
        for loss in self.losses:
            first = max(-(-loss.offset // _BLOCK) * _BLOCK, self._punched_losses)
            last = (loss.offset + loss.value["bytes"] - _TAIL_BYTES) // _BLOCK * _BLOCK
            while first < last:
                punch(self._fd, first, min(_PUNCH_BYTES, last - first))
                first += _PUNCH_BYTES
            self._punched_losses = max(self._punched_losses, last)

    def last_line(self) -> tuple[int, str]:
        """(mtime, the last line that is not empty), at most 500 characters; (0, "") if there is none."""
        if self._fd < 0:
            return 0, ""
        found = os.fstat(self._fd)
        data = os.pread(self._fd, 8192, max(found.st_size - 8192, 0)).strip(b"\0\r\n\t ")
        lines = [line for line in data.split(b"\n") if line.strip() and not MARKER.match(line)]
        return (found.st_mtime_ns, lines[-1][-500:].decode("utf-8", "replace").strip()) if lines else (0, "")

    def kept_decisions(self) -> list[Decision]:
        """What a rewritten journal must still hold of this file."""
        own = [self.generation_decision] if self.generation_decision else []
        own += [*self.marks, *self.cuts, *self.identities, *self.losses, *self.echoes, *self.zones]
        return own

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _forget(self) -> None:
        acked = self.acked.offset
        if self.marks and self.marks[0].offset <= acked:
            self.marks = [mark for mark in self.marks if mark.offset > acked]
        if self.cuts:
            self.cuts = [cut for cut in self.cuts if cut.offset > acked]
        if self.echoes and self.echoes[0].offset < acked:
            self.echoes = [echo for echo in self.echoes if echo.offset + echo.value["bytes"] > acked]
        if self.losses:
            self.losses = [loss for loss in self.losses if loss.offset + loss.value["bytes"] > acked]
        while len(self.identities) > 1 and self.identities[1].offset <= acked:
            self.identities.pop(0)
        while len(self.zones) > 2 and self.zones[2].offset <= acked:
            self.zones.pop(0)


def _is_of_bytes_gone(decision: Decision) -> bool:
    """A loss of bytes that are in the file no more: nothing to skip."""
    return decision.kind == "loss" and not decision.value.get("skip", True)


def _offset(decision: Decision) -> int:
    return decision.offset


def _first_data(descriptor: int) -> int:
    try:
        return os.lseek(descriptor, 0, os.SEEK_DATA) // _BLOCK * _BLOCK
    except OSError:  # ENXIO: no data at all
        return 0
