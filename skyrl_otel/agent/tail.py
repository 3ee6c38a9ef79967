"""A file of a writer as it grows: how far it is seen, sent and acknowledged. What its bytes mean is a subclass's matter.

Four offsets, acked <= sent <= seen <= size. What lies below `acked` may be punched; what lies below `sent` is in a request
that is under way; `seen` is the newest time mark; `size` is the file's at the last look. Nothing is buffered: unsent bytes
are read again from the file.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from skyrl_otel.agent import holes
from skyrl_otel.agent.block import Section
from skyrl_otel.agent.decided import Decided, end_of
from skyrl_otel.agent.holes import Holes
from skyrl_otel.agent.moments import Moments
from skyrl_otel.agent.rotation import Inode, inode_of
from skyrl_otel.spool.checkpoint import Position
from skyrl_otel.spool.decisions import Decision
from skyrl_otel.spool.layout import open_file

_MAYBE_LOST = "truncated after an agent ended that may have sent some of it"
"""Why of an upper bound: that agent did not live to hear what the receiver took."""

Decide = Callable[[str, int, int, str, object], Decision]
"""Journal a decision: (file, generation, offset, kind, value)."""


@dataclass(frozen=True, slots=True)
class Move:
    """`to` becomes the acknowledged position of `file` when the request that holds [before, to) is accepted."""

    file: Tail
    before: Position
    to: Position

    is_skip: bool = False
    """Over what was given up and is counted already."""

    @property
    def size(self) -> int:
        """Bytes that the receiver is to take."""
        return 0 if self.is_skip else self.to.offset - self.before.offset


class Tail:
    """`name` is the file's in uids, checkpoint and journal. A `followed` file is somebody else's: it is never punched nor capped.

    `held`: its lines wait for the identity of their process.
    """

    def __init__(
        self,
        writer_id: str,
        name: str,
        path: Path,
        decide: Decide,
        moments: Moments,
        *,
        followed: bool = False,
        first_offset: int = 0,
        inode: Inode | None = None,
    ) -> None:
        self.writer_id = writer_id
        self.name = name
        self.path = path
        self.followed = followed
        self.acked = Position(0, first_offset)
        self.sent = self.acked
        self.size = self.seen = first_offset
        self.held = False
        self.decided = Decided()
        self._decide = decide
        self._moments = moments
        self._fd = -1
        self._inode = inode
        self._floor = 0  # below this an earlier agent may have sent: what those bytes mean is settled
        self._maybe_sent = 0  # up to here an earlier agent had seen
        self._holes = Holes()
        self._partial_at: tuple[int, int, int] | None = None

    # -- what a subclass knows -----------------------------------------------------------------------------------------

    def _take(self, limit: int, budget: int) -> tuple[Move | None, list[Section]]:
        """As `take`, of the bytes from `sent` to `limit`, of which none is given up."""
        raise NotImplementedError

    def cut_partial(self, now: int, *, final: bool) -> None:
        """Decide what becomes of an incomplete rest at the end, if it is old enough or the last. Raises OSError."""
        raise NotImplementedError

    def last_line(self) -> tuple[int, str]:
        """(mtime, the last text that is not empty), at most 500 characters; (0, "") if there is none. Raises OSError."""
        raise NotImplementedError

    def _record_end(self, offset: int) -> int:
        """Where the record ends that holds the byte at `offset`, `offset` itself if one begins there."""
        raise NotImplementedError

    def _next_generation(self) -> bool:
        """Go on with the file that comes after this one; True if there is one and this one is delivered to its end."""
        return False

    def _location(self) -> Path:
        return self.path

    def _readable(self, size: int, now: int) -> tuple[int, int]:
        """Up to where of `size` the file may be read by now, and when that was seen."""
        return size, now

    # -- recovery ------------------------------------------------------------------------------------------------------

    def restore(self, position: Position | None, decisions: list[Decision]) -> None:
        """Take up where an earlier agent stopped: its checkpoint and its journal."""
        if position is not None:
            self.acked = position
        for decision in decisions:
            if decision.kind == "generation":
                self._restore_generation(decision)
        for decision in decisions:
            if decision.generation == self.acked.generation:
                self.decided.add(decision)
            if decision.kind == "mark":
                self._moments.taken(decision.value)
        self.sent = self.acked
        self.size = self.seen = max([self.acked.offset, *(mark.offset for mark in self.decided.marks)])
        # What an earlier agent sent it sent below its last mark: nothing new may change the meaning of those bytes.
        self._floor = self.seen if self.decided.identities else self.acked.offset
        self._maybe_sent = self.seen
        self.decided.forget(self.acked.offset)

    def _restore_generation(self, decision: Decision) -> None:
        if decision.generation > self.acked.generation:
            unsure = decision.offset - self.acked.offset
            self._start_generation(decision)
            if unsure > 0:
                self._lose(0, unsure, _MAYBE_LOST, skip=False)
        elif decision.generation == self.acked.generation:
            self.decided.generation = decision
            self._inode = (decision.value["dev"], decision.value["ino"])

    # -- how far -------------------------------------------------------------------------------------------------------

    @property
    def generation(self) -> int:
        return self.sent.generation

    @property
    def unacked(self) -> int:
        return self.size - self.acked.offset

    @property
    def unsent(self) -> int:
        return self.seen - self.sent.offset

    @property
    def backlog(self) -> int:
        """Bytes that are still to be delivered; what was given up is not."""
        acked = self.acked.offset
        return max(self.size - acked - self.decided.given_up(acked), 0)

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
    def _waits(self) -> bool:
        """What is unsent is known to be incomplete."""
        return self._partial_at == self._here

    @property
    def _here(self) -> tuple[int, int, int]:
        return self.sent.offset, self.seen, len(self.decided.cuts)

    # -- looking -------------------------------------------------------------------------------------------------------

    def observe(self, now: int, *, final: bool = False) -> bool:
        """Look at the file's size and mark it; True if it grew. Raises OSError for trouble of the spool itself.

        Args:
            final: nobody may look again soon: mark, however many marks there are.
        """
        if self._fd < 0 and not self._open():
            return False
        size = os.fstat(self._fd).st_size
        if size < self.size:
            self._replaced("truncated by its writer")
            size = os.fstat(self._fd).st_size
        self.size = size
        if size > self.seen:
            self._mark_up_to(size, now, final)
            return True
        if not self.followed or not self._next_generation():
            return False
        self.observe(now)
        return True

    def _mark_up_to(self, size: int, now: int, final: bool) -> None:
        seen_at = now
        if not final:
            size, seen_at = self._readable(size, now)
        if size > self.seen and (final or not self.decided.is_crowded(now)):
            self._mark(size, seen_at)

    def _mark(self, size: int, now: int) -> None:
        zones = self.decided.zones
        east = time.localtime(now // 1_000_000_000).tm_gmtoff
        if not zones or zones[-1].value != east:
            zones.append(self._decide(self.name, self.generation, self.seen, "zone", east))
        moment = self._moments.take(now, size - self.seen)
        self.decided.marks.append(self._decide(self.name, self.generation, size, "mark", moment))
        self.seen = size

    def _open(self) -> bool:
        try:
            descriptor = open_file(self._location(), os.O_RDONLY if self.followed else os.O_RDWR)
        except FileNotFoundError:
            return False
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            os.close(descriptor)
            return False
        self._fd = descriptor
        inode = inode_of(found)
        was_replaced = self._inode is not None and inode != self._inode
        self._inode = inode
        if was_replaced:
            self._replaced("replaced while nobody read it")
        if not self.followed:
            self._holes = Holes(holes.first_data(descriptor))
        return True

    def is_gone(self) -> bool:
        """Whether a file that was read can be found no more, under no name. Raises OSError."""
        return self._fd < 0 and self._inode is not None and not self._open()

    def count_gone(self) -> None:
        """What was seen of a file that is gone, and not acknowledged, is lost."""
        if self.unacked:
            self._replaced("its file was removed")

    # -- generations ---------------------------------------------------------------------------------------------------

    def _replaced(self, why: str) -> None:
        """The bytes are not the ones we knew: count what was seen and not read, begin again at 0."""
        lost = self.size - self.sent.offset
        unsure = max(self._maybe_sent - self.sent.offset, 0)
        if self._fd >= 0:
            self._inode = inode_of(os.fstat(self._fd))
        self._new_generation(lost)
        for size, reason in ((unsure, _MAYBE_LOST), (lost - unsure, why)):
            if size:
                self._lose(0, size, reason, skip=False)

    def _go_on_with(self, found: os.stat_result) -> None:
        """The file is read to its end; `found` is the next one."""
        os.close(self._fd)
        self._fd = -1
        self._inode = inode_of(found)
        self._new_generation(0)

    def _new_generation(self, lost: int) -> None:
        assert self._inode is not None
        value = {"dev": self._inode[0], "ino": self._inode[1], "lost": lost}
        identity = self.identity
        decision = self._decide(self.name, self.generation + 1, self.sent.offset, "generation", value)
        self._start_generation(decision)
        if identity is not None:
            self._identify(0, identity)

    def _start_generation(self, decision: Decision) -> None:
        self.decided = Decided(decision)
        self.acked = self.sent = Position(decision.generation, 0)
        self._inode = (decision.value["dev"], decision.value["ino"])
        self.size = self.seen = self._floor = self._maybe_sent = 0
        self._partial_at = None
        self._holes = Holes()

    def _lose(self, offset: int, size: int, why: str, *, skip: bool) -> Decision:
        value = {"bytes": size, "why": why, "skip": skip}
        decision = self._decide(self.name, self.generation, offset, "loss", value)
        self.decided.add(decision)
        return decision

    # -- whose lines they are ------------------------------------------------------------------------------------------

    @property
    def identity(self) -> int | None:
        """The seq of the newest identity that was assigned."""
        identities = self.decided.identities
        return identities[-1].value if identities else None

    def assign(self, identity_seq: int, size: int) -> None:
        """Identity `identity_seq` is in force from `size` on, as far as nothing was sent from there yet."""
        offset = max(size, self.sent.offset, self._floor)
        identities = self.decided.identities
        if identities:
            offset = max(offset, identities[-1].offset)
            if identities[-1].value == identity_seq:
                return
        self._identify(offset, identity_seq)

    def release(self, identity_seq: int) -> None:
        """The waiting is over: all that is not sent belongs to `identity_seq`."""
        self.held = False
        if self.identity is None:
            self._identify(self.sent.offset, identity_seq)
        else:
            self.assign(identity_seq, self.sent.offset)

    def _identify(self, offset: int, identity_seq: int) -> None:
        self.decided.identities.append(self._decide(self.name, self.generation, offset, "identity", identity_seq))

    # -- taking, and what becomes of it --------------------------------------------------------------------------------

    def take(self, budget: int) -> tuple[Move | None, list[Section]]:
        """The next records, at least one if there is a complete one, about `budget` bytes of them; moves `sent`.

        Returns:
            (None, []) where there is nothing to send. Raises OSError.
        """
        if self.held or self.unsent <= 0 or self._fd < 0 or not self.decided.identities:
            return None, []
        start = self.sent.offset
        loss = self.decided.loss_at(start)
        if loss is not None:
            return self._skip(loss)
        return self._take(self.decided.up_to_loss(start, self.seen), budget)

    def _skip(self, loss: Decision) -> tuple[Move | None, list[Section]]:
        before = self.sent
        self.sent = Position(self.generation, end_of(loss))
        return Move(self, before, self.sent, is_skip=True), []

    def accept(self, position: Position) -> None:
        """All below `position` is acknowledged; the caller writes the checkpoint before `give_back`."""
        if position.generation == self.acked.generation and position.offset > self.acked.offset:
            self.acked = position
            self.decided.forget(position.offset)

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

    # -- space ---------------------------------------------------------------------------------------------------------

    def give_back(self) -> None:
        """Punch what the checkpoint on disk has passed. Raises OSError."""
        if not self.followed and self._fd >= 0:
            self._holes.dig_behind(self._fd, self.acked.offset)

    def give_up(self, size: int, why: str) -> int:
        """Drop about `size` of the oldest bytes that are not under way, whole records; how many it were. Raises OSError."""
        start = self.decided.behind_losses(max(self.sent.offset, self._floor))
        if size <= 0 or self.followed or self._fd < 0 or start >= self.seen:
            return 0
        end = self._record_end(min(start + size, self.seen))
        self._lose(start, end - start, why, skip=True)
        return end - start

    def punch_losses(self) -> None:
        """Give the disk what `give_up` gave up; only after the journal is on disk. Raises OSError."""
        self._holes.dig_losses(self._fd, ((loss.offset, end_of(loss)) for loss in self.decided.losses))

    def kept_decisions(self) -> list[Decision]:
        """What a rewritten journal must still hold of this file."""
        return self.decided.all()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
