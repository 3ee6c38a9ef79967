"""The records of a writer: segments of frames, each an OTLP `ScopeLogs` that its process encoded.

A segment is a generation, so that offsets, marks, identities and the checkpoint are those of any file. What stands between
two frames is the rest of one that a kill or a full disk tore: it is counted lost, once, and passed over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from skyrl_otel.agent import holes, otlp
from skyrl_otel.agent.block import Section
from skyrl_otel.agent.decided import Decided
from skyrl_otel.agent.moments import Moments
from skyrl_otel.agent.redact import Redactor
from skyrl_otel.agent.rotation import Inode
from skyrl_otel.agent.tail import Decide, Move, Tail
from skyrl_otel.spool import frames
from skyrl_otel.spool.checkpoint import Position
from skyrl_otel.spool.decisions import Decision
from skyrl_otel.spool.layout import open_file

_READ_BYTES = 1 << 20
_NOTE = b"{"


class Note(NamedTuple):
    """[start, end) of the followed file `name`, which is `inode`, is the console echo of a record."""

    name: str
    inode: Inode
    start: int
    end: int


class FrameFile(Tail):
    """`records.<n>` of one folder, read in the order of n; a segment that is acknowledged is removed.

    `take_note` gets each echo note when it is first seen.
    """

    def __init__(
        self, writer_id: str, folder: Path, decide: Decide, redactor: Redactor, take_note: Callable[[Note], None]
    ) -> None:
        super().__init__(writer_id, "records", folder / "records.0", decide, Moments())
        self._redactor = redactor
        self._folder = folder
        self._take_note = take_note
        self._noted = 0
        # What was given up in segments that are not begun yet: generation → losses.
        self._later_losses: dict[int, list[Decision]] = {}
        self._next_path = str(self._segment_path(1))
        self._is_last = False  # whether there was no further segment at the last look

    # -- recovery ------------------------------------------------------------------------------------------------------

    def restore(self, position: Position | None, decisions: list[Decision]) -> None:
        super().restore(position, decisions)
        for decision in decisions:
            if decision.kind == "loss" and decision.generation > self.generation:
                self._later_losses.setdefault(decision.generation, []).append(decision)
        self._point()

    def _point(self) -> None:
        self.path = self._folder / f"records.{self.acked.generation}"
        self._next_path = str(self._segment_path(1))
        self._noted = self.acked.offset

    def _start_generation(self, decision: Decision) -> None:
        super()._start_generation(decision)
        self.decided = Decided(decision, self._later_losses.pop(decision.generation, []))
        self._point()

    # -- looking -------------------------------------------------------------------------------------------------------

    def observe(self, now: int, *, final: bool = False) -> bool:
        grew = super().observe(now, final=final)
        if self._fd >= 0 and self._noted < self.seen:
            self._read_notes()
        while not grew and self._fd >= 0 and self._has_next():
            if self.unacked:
                self._end_tail()
                break
            if not self._next_segment():
                break
            grew = super().observe(now, final=final)
        return grew

    def _segment_path(self, ahead: int) -> Path:
        return self._folder / f"records.{self.generation + ahead}"

    def _has_next(self) -> bool:
        self._is_last = not os.path.exists(self._next_path)
        return not self._is_last

    def _later(self) -> Iterator[tuple[int, int]]:
        """(generation, size) of the segments behind the present one."""
        ahead = 1
        while True:
            try:
                yield self.generation + ahead, os.stat(self._segment_path(ahead)).st_size
            except OSError:
                return
            ahead += 1

    @property
    def backlog(self) -> int:
        if self._is_last:
            return super().backlog
        given_up: int = sum(loss.value["bytes"] for losses in self._later_losses.values() for loss in losses)
        return super().backlog + max(sum(size for _, size in self._later()) - given_up, 0)

    def _next_segment(self) -> bool:
        if os.fstat(self._fd).st_size > self.seen:
            return False  # written between the look and now
        self._go_on_with(os.stat(self._segment_path(1)))
        return True

    def _read_notes(self) -> None:
        """Look for echo notes in what is new; they must be known before the text that they are about is taken."""
        data = os.pread(self._fd, self.seen - self._noted, self._noted)
        if frames.MAGIC not in data:
            return
        end = self._noted
        for item in frames.scan(data, self._noted):
            end = item.end
            if isinstance(item, frames.Frame) and item.payload[:1] == _NOTE:
                try:
                    fields = json.loads(item.payload)
                    inode = (fields["dev"], fields["ino"])
                    self._take_note(Note(fields["echo"], inode, fields["start"], fields["end"]))
                except (ValueError, KeyError, TypeError):
                    continue
        self._noted = end

    # -- records -------------------------------------------------------------------------------------------------------

    def cut_partial(self, now: int, *, final: bool) -> None:
        """The writer is gone: what is no whole frame by now never will be."""
        if final and self.unacked:
            self._end_tail()

    def _end_tail(self) -> None:
        """All whole frames are sent and something is left behind them: the rest of a torn one."""
        if self.held or self._fd < 0 or not self._waits:
            return
        start = self.sent.offset
        if self.unsent and self.decided.loss_at(start) is None:
            self._lose(start, self.unsent, "a record that its process could not finish", skip=True)
            self._partial_at = None

    def _take(self, limit: int, budget: int) -> tuple[Move | None, list[Section]]:
        before = self.sent
        start = before.offset
        found = self._frames(start, limit, budget)
        if found and isinstance(found[0], frames.Gap):
            gap = found[0]
            return self._skip(self._lose(start, gap.end - start, "a record was torn", skip=True))
        whole = [item for item in found if isinstance(item, frames.Frame)]
        gaps = [item.start for item in found if isinstance(item, frames.Gap)]
        if gaps:  # up to the torn one; it is next time's first
            whole = [item for item in whole if item.start < gaps[0]]
        if not whole:
            self._partial_at = self._here
            return None, []
        self.sent = Position(self.generation, whole[-1].end)
        return Move(self, before, self.sent), self._frame_sections(whole)

    def _frames(self, start: int, limit: int, budget: int) -> list[frames.Frame | frames.Gap]:
        """Those in about `budget` bytes from `start`, or the first one however long it is."""
        wanted = min(limit - start, max(budget, 4096))
        while True:
            data = os.pread(self._fd, wanted, start)
            found = list(frames.scan(data, start))
            if found or len(data) < wanted or wanted >= limit - start:
                return found
            wanted = min(limit - start, wanted * 4)

    def _frame_sections(self, found: list[frames.Frame]) -> list[Section]:
        sections: list[Section] = []
        starts = [(decision.offset, decision.value) for decision in self.decided.identities]
        index = 0
        prefix = f"{self.writer_id}/{self.name}/{self.generation}/"
        records: list[bytes] = []
        current: tuple[int, bytes] | None = None
        size = 0
        # An echo note is no record.
        split = [(frame, *parts) for frame in found if (parts := split_scope_logs(frame.payload)) is not None]
        masked = self._redactor.records([record for _, _, record in split])
        for (frame, scope, _), record in zip(split, masked, strict=True):
            while index + 1 < len(starts) and starts[index + 1][0] <= frame.start:
                index += 1
            if current != (starts[index][1], scope):
                if current is not None:
                    sections.append(Section(*current, tuple(records), len(records), size))
                current, records, size = (starts[index][1], scope), [], 0
            record += otlp.uid_attribute(f"{prefix}{frame.start}-{frame.end}".encode())
            record = b"\x12" + otlp.varint(len(record)) + record
            records.append(record)
            size += len(record)
        if current is not None:
            sections.append(Section(*current, tuple(records), len(records), size))
        return sections

    # -- space ---------------------------------------------------------------------------------------------------------

    def give_back(self) -> None:
        """Punch the present segment, remove those before it. Raises OSError."""
        super().give_back()
        generation = self.acked.generation - 1
        while generation >= 0:
            try:
                os.unlink(self._folder / f"records.{generation}")
            except FileNotFoundError:
                return
            generation -= 1

    def give_up(self, size: int, why: str) -> int:
        """As `Tail.give_up`; of a segment that is not begun yet, all that is in it."""
        return super().give_up(size, why) or self._give_up_later(why)

    def _record_end(self, offset: int) -> int:
        after = next(iter(frames.scan(os.pread(self._fd, _READ_BYTES, offset), offset)), None)
        if after is None:
            return self.seen
        return after.end if isinstance(after, frames.Gap) else offset

    def _give_up_later(self, why: str) -> int:
        """All that the next segment of which something is left holds by now."""
        for generation, size in self._later():
            known = self._later_losses.setdefault(generation, [])
            start = sum(loss.value["bytes"] for loss in known)
            more: int = size - start
            if more > 0:
                value = {"bytes": more, "why": why, "skip": True}
                known.append(self._decide(self.name, generation, start, "loss", value))
                return more
        return 0

    def punch_losses(self) -> None:
        super().punch_losses()
        for generation, losses in self._later_losses.items():
            descriptor = open_file(self._folder / f"records.{generation}", os.O_RDWR)
            try:
                holes.dig_to(descriptor, sum(loss.value["bytes"] for loss in losses))
            finally:
                os.close(descriptor)

    def kept_decisions(self) -> list[Decision]:
        return super().kept_decisions() + [loss for losses in self._later_losses.values() for loss in losses]

    def last_line(self) -> tuple[int, str]:
        """The text of what its process recorded last, if it is near the end of what was written."""
        if self._fd < 0:
            return 0, ""
        found = os.fstat(self._fd)
        base = max(found.st_size - 65536, 0)
        text = ""
        for item in frames.scan(os.pread(self._fd, 65536, base), base):
            split = split_scope_logs(item.payload) if isinstance(item, frames.Frame) else None
            if split is not None:
                text = otlp.body_of(split[1]) or text
        return (found.st_mtime_ns, text[-500:].strip()) if text else (0, "")


def split_scope_logs(payload: bytes) -> tuple[bytes, bytes] | None:
    """(the scope as the field of ScopeLogs, the record without tag and length); None for an echo note."""
    if payload[:1] != b"\x0a":
        return None
    size, position = otlp.read_varint(payload, 1)
    scope_end = position + size
    _, start = otlp.read_varint(payload, scope_end + 1)
    return payload[:scope_end], payload[start:]
