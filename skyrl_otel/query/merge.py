"""Records of several sources as one stream, in the order that `Record.order` gives."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from operator import attrgetter

from skyrl_otel.query.records import Record

_ORDER = attrgetter("order")


def merge(*streams: Iterable[Record]) -> Iterator[Record]:
    """Each stream must be in order already."""
    return iter(streams[0]) if len(streams) == 1 else heapq.merge(*streams, key=_ORDER)


def in_order(rows: Iterable[Record], *, newest_first: bool = False) -> Iterator[Record]:
    """Put records that come by time into full order. Holds only those of one moment."""
    moment: list[Record] = []
    for record in rows:
        if moment and record.time_unix_nano != moment[0].time_unix_nano:
            yield from sorted(moment, key=_ORDER, reverse=newest_first)
            moment = []
        moment.append(record)
    yield from sorted(moment, key=_ORDER, reverse=newest_first)
