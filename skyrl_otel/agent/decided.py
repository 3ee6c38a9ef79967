"""What is decided about one generation of a file: the part of its writer's journal that a second reading needs.

A value without a file: offsets and decisions in, offsets and decisions out. Each kind has a list, by offset.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable

from skyrl_otel.spool.decisions import Decision

_MANY_MARKS = 256
"""Past this a file gets a new mark only when the last one is as old as a `_MANY_MARKS`th of the first one's age: in an outage
times grow coarse (by 0.4 % of its length), and memory and journal with the logarithm of it."""


class Decided:
    """`generation` is the decision that began this one, None for the first. `losses` are ranges of the file to pass over."""

    __slots__ = ("cuts", "echoes", "generation", "identities", "losses", "marks", "zones")

    def __init__(self, generation: Decision | None = None, losses: Iterable[Decision] = ()) -> None:
        self.generation = generation
        self.marks: list[Decision] = []
        self.cuts: list[Decision] = []
        self.identities: list[Decision] = []
        self.zones: list[Decision] = []
        self.losses = list(losses)
        self.echoes: list[Decision] = []

    def add(self, decision: Decision) -> None:
        """Take up a decision of any kind; one that says nothing of this generation's bytes is left out."""
        match decision.kind:
            case "mark":
                self.marks.append(decision)
            case "cut":
                self.cuts.append(decision)
            case "identity":
                self.identities.append(decision)
            case "zone":
                self.zones.append(decision)
            case "echo":
                bisect.insort(self.echoes, decision, key=_offset)
            case "loss" if decision.value.get("skip", True):  # else its bytes are in the file no more
                bisect.insort(self.losses, decision, key=_offset)

    def all(self) -> list[Decision]:
        """What a rewritten journal must still hold."""
        own = [self.generation] if self.generation else []
        return [*own, *self.marks, *self.cuts, *self.identities, *self.losses, *self.echoes, *self.zones]

    def forget(self, acked: int) -> None:
        """Drop what only says something of bytes below `acked`."""
        if self.marks and self.marks[0].offset <= acked:
            self.marks = [mark for mark in self.marks if mark.offset > acked]
        if self.cuts:
            self.cuts = [cut for cut in self.cuts if cut.offset > acked]
        if self.echoes and self.echoes[0].offset < acked:
            self.echoes = [echo for echo in self.echoes if end_of(echo) > acked]
        if self.losses:
            self.losses = [loss for loss in self.losses if end_of(loss) > acked]
        while len(self.identities) > 1 and self.identities[1].offset <= acked:
            self.identities.pop(0)
        while len(self.zones) > 2 and self.zones[2].offset <= acked:  # the one before counts too (agent/times.py)
            self.zones.pop(0)

    def is_crowded(self, now: int) -> bool:
        """Whether there are so many marks that the next one is not due at `now`, in nanoseconds."""
        marks = self.marks
        return len(marks) > _MANY_MARKS and (now - marks[-1].value) * _MANY_MARKS < now - marks[0].value

    def mark_of(self, offset: int) -> Decision:
        """The mark of the byte at `offset`, which is below the newest mark."""
        return self.marks[bisect.bisect_right(self.marks, offset, key=_offset)]

    def loss_at(self, offset: int) -> Decision | None:
        """The range given up that `offset` lies in."""
        for loss in self.losses:
            if loss.offset > offset:
                return None
            if offset < end_of(loss):
                return loss
        return None

    def up_to_loss(self, start: int, end: int) -> int:
        """How far from `start` to `end` nothing is given up."""
        return min((loss.offset for loss in self.losses if start < loss.offset < end), default=end)

    def behind_losses(self, offset: int) -> int:
        """`offset`, or the end of the ranges given up that it lies in."""
        for loss in self.losses:
            if loss.offset <= offset:
                offset = max(offset, end_of(loss))
        return offset

    def given_up(self, acked: int) -> int:
        """Bytes above `acked` that were given up."""
        return sum(min(end_of(loss) - acked, loss.value["bytes"]) for loss in self.losses)

    def has_echo(self, start: int) -> bool:
        """Whether the echo that begins at `start` is known."""
        place = bisect.bisect_left(self.echoes, start, key=_offset)
        return place < len(self.echoes) and self.echoes[place].offset == start

    def edges(self, start: int, end: int) -> set[int]:
        """Offsets behind `start` that no record may reach across: all cuts, and where echoes up to `end` begin and end."""
        edges = {cut.offset for cut in self.cuts if cut.offset > start}
        for echo in self.echoes:
            if echo.offset >= end:
                break
            edges.update(edge for edge in (echo.offset, end_of(echo)) if start < edge <= end)
        return edges


def end_of(decision: Decision) -> int:
    """Where the range of a loss or an echo ends."""
    end: int = decision.offset + decision.value["bytes"]
    return end


def _offset(decision: Decision) -> int:
    return decision.offset
