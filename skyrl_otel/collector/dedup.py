"""Which records are new, without a unique index: per source a low-water mark and the spans seen above it.

A source is "writer/file/generation" and its agent announces with each request a start below which nothing will ever be
sent again. What lies above is a few batches, so all of it fits in memory; the store keeps a copy for the next life.
A unique index over uids would cost four fifths of the insert rate (227k rows/s without, 42k with).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from skyrl_otel.collector.decode import Row


@dataclass(frozen=True, slots=True)
class Sifted:
    """What of a batch is new, and what the store must remember of it, both by source.

    `spans` holds start, end, start, end, … of the new rows; `low_water` the marks that rose.
    """

    fresh: list[Row]
    repeats: int
    below_low_water: int
    spans: dict[str, array[int]]
    low_water: dict[str, int]


class SeenSpans:
    """The spans of one source that were stored and could come again."""

    __slots__ = ("_ends", "_starts", "low_water")

    def __init__(self) -> None:
        self.low_water = 0
        # Two flat arrays in the order of starts: 16 bytes a record, and the usual case is an append at the end.
        self._starts: array[int] = array("Q")
        self._ends: array[int] = array("Q")

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, start: int, end: int) -> bool:
        """Remember a span; False if it is known already."""
        starts, ends = self._starts, self._ends
        if not starts or start > starts[-1]:
            starts.append(start)
            ends.append(end)
            return True
        at = bisect_left(starts, start)
        while at < len(starts) and starts[at] == start:
            if ends[at] == end:
                return False
            at += 1
        starts.insert(at, start)
        ends.insert(at, end)
        return True

    def raise_low_water(self, mark: int) -> bool:
        """Forget the spans that start below `mark`; False if the mark is not new. It never falls: an agent that came
        back with an older checkpoint sends again what this side has long forgotten."""
        if mark <= self.low_water:
            return False
        self.low_water = mark
        keep = bisect_left(self._starts, mark)
        del self._starts[:keep], self._ends[:keep]
        return True


class Deduplicator:
    """All sources of one run. Not thread safe: it belongs to the committer's thread.

    It is changed before the transaction that says so is committed; after a failed one the owner makes a new one from
    the store.
    """

    def __init__(self) -> None:
        self._sources: dict[str, SeenSpans] = {}

    def restore(self, source: str, low_water: int, spans: Iterable[array[int]]) -> None:
        """Take over what an earlier life stored."""
        seen = self._sources.setdefault(source, SeenSpans())
        for pairs in spans:
            for start, end in zip(pairs[::2], pairs[1::2], strict=True):
                seen.add(start, end)
        seen.raise_low_water(low_water)

    def sift(self, rows: Iterable[Row], low_water: Mapping[str, int]) -> Sifted:
        """Tell new rows from repeats. Rows without a source are always new."""
        risen = {}
        for source, mark in low_water.items():
            if self._sources.setdefault(source, SeenSpans()).raise_low_water(mark):
                risen[source] = mark
        fresh: list[Row] = []
        repeats = below = 0
        spans: dict[str, array[int]] = {}
        name: str | None = None
        seen = SeenSpans()
        new: array[int] = array("Q")
        for row in rows:
            if row.source is None:
                fresh.append(row)
                continue
            if row.source != name:
                name = row.source
                seen = self._sources.setdefault(name, SeenSpans())
                new = spans.setdefault(name, array("Q"))
            if row.start < seen.low_water:
                below += 1
            elif seen.add(row.start, row.end):
                new.append(row.start)
                new.append(row.end)
                fresh.append(row)
            else:
                repeats += 1
        return Sifted(fresh, repeats, below, {source: pairs for source, pairs in spans.items() if pairs}, risen)
