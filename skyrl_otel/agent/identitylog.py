"""What a writer has said of itself so far, and what of it its lines still wait for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from skyrl_otel.spool import identity
from skyrl_otel.spool.identity import IdentityLine
from skyrl_otel.spool.layout import read_file

_ACTOR_WAIT_NS = 300_000_000
_RANK_WAIT_NS = 2_000_000_000


class Unwritten(NamedTuple):
    """Records that the process could not write, as the identity line `seq` says: more than the line before it by `size_bytes`."""

    seq: int
    size_bytes: int
    why: str


class IdentityLog:
    """The lines of one `identity` file. `facts` is the identity in force now."""

    __slots__ = ("_awaits_since", "facts", "lines", "path", "size")

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.size = -1
        self.lines: list[IdentityLine] = []
        self.facts: Mapping[str, Any] = {}
        self._awaits_since = 0

    def read(self, now: int) -> list[IdentityLine] | None:
        """The lines that are new since the last look; None if the file is as it was. Raises OSError."""
        size = os.stat(self.path).st_size
        if size == self.size:
            return None
        lines = identity.parse(read_file(Path(self.path)))
        self.size = size
        fresh, self.lines = lines[len(self.lines) :], lines
        self.facts = identity.in_force(lines, self.seq)
        if any("awaits" in line.changes for line in fresh):
            self._awaits_since = now
        return fresh

    @property
    def seq(self) -> int:
        """Of the newest line; -1 where there is none."""
        return self.lines[-1].seq if self.lines else -1

    def in_force(self, seq: int) -> Mapping[str, Any]:
        """The identity as it was when line `seq` was the newest."""
        return identity.in_force(self.lines, seq)

    def behind(self, seq: int) -> list[IdentityLine]:
        """The lines that came after line `seq`."""
        return [line for line in self.lines if line.seq > seq]

    @property
    def awaits(self) -> str:
        """What lines still wait for: "actor", "rank" or ""."""
        return _awaited(self.facts)

    def has_waited(self, first_seen: int, now: int) -> bool:
        """Whether lines of which the first was seen at `first_seen` have waited long enough; times in nanoseconds."""
        awaits = self.awaits
        if awaits == "actor":
            return now - first_seen >= _ACTOR_WAIT_NS
        return awaits != "rank" or now - self._awaits_since >= _RANK_WAIT_NS

    @property
    def settled_seq(self) -> int:
        """The line that ended the waiting, else the newest one: lines that waited are of that identity."""
        for line in self.lines:
            if not _awaited(self.in_force(line.seq)):
                return line.seq
        return self.seq

    def unwritten(self) -> Iterator[Unwritten]:
        """One for each line that tells of more lost records than those before it."""
        before = 0
        for line in self.lines:
            lost = line.changes.get("lost")
            if not isinstance(lost, dict):
                continue
            size, count = int(lost.get("bytes", 0)), int(lost.get("records", 0))
            if size > before:
                why = f"the process could not write {count} records so far ({lost.get('why')})"
                yield Unwritten(line.seq, size - before, why)
            before = size


def _awaited(facts: Mapping[str, Any]) -> str:
    awaits = facts.get("awaits", "")
    if (awaits == "rank" and "rank" in facts) or (awaits == "actor" and "actor_id" in facts):
        return ""
    return str(awaits)
