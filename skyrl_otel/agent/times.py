"""Times as people write them to nanoseconds since 1970, with what is missing taken from the time mark.

A line was written before it was seen, usually just before. So the mark tells the year, the date and, where a second is all
that a format gives, the part of it. The time zone is the node's; it is journaled, and after a change of it (summer time)
the one is taken that brings the line closest to its mark.
"""

from __future__ import annotations

import calendar
import datetime
import re
from collections.abc import Mapping

SECOND = 1_000_000_000
DAY = 86_400 * SECOND
AHEAD, BEHIND = 300 * SECOND, DAY
"""A time further ahead of its mark, or behind it, is not believed."""

LATE_GRAIN = 1_000_000
"""A line that was seen after its second ended is put into the last millisecond of it, by its offset."""

_NEAR = 100 * DAY
_MOST = 4096
_FIELDS: Mapping[str, str] = {
    "Y": r"(?P<Y>\d{4})",
    "y": r"(?P<y>\d{2})",
    "m": r"(?P<m>\d{1,2})",
    "b": r"(?P<b>[A-Z][a-z]{2})",
    "d": r"(?P<d>\d{1,2})",
    "H": r"(?P<H>\d{2})",
    "M": r"(?P<M>\d{2})",
    "S": r"(?P<S>\d{2})",
}
_MONTHS = {name: number for number, name in enumerate(calendar.month_abbr) if name} | {"": 0}
_ZONE = re.compile(rb"\s*(?:(Z|UTC)|([+-])(\d{2}):?(\d{2}))$")
# Naive on purpose: fields as they stand, in whatever zone that will turn out to be.
_EPOCH = datetime.datetime(1970, 1, 1)  # noqa: DTZ001


class Clock:
    """The times of one format. `zones` are the seconds east of UTC in force at the line, and before that.

    Keeps what it worked out for each second, with the marks for which that holds.
    """

    def __init__(self, layout: str) -> None:
        pattern = re.sub(r"%([A-Za-z])", lambda letter: _FIELDS[letter[1]], layout.replace(".", r"\."))
        self._pattern = re.compile(pattern.encode())
        self._known: dict[tuple[bytes, bytes | None, tuple[int, int]], tuple[int, int, int]] = {}

    def second(self, when: bytes, zone: bytes | None, mark: int, zones: tuple[int, int]) -> tuple[int, int, int] | None:
        """(time of the whole second, first mark, end of the marks) for which that is the answer; None if it is no date."""
        key = (when, zone, zones)
        known = self._known.get(key)
        if known is not None and known[1] <= mark < known[2]:
            return known
        found = self._work_out(when, zone, mark, zones)
        if found is not None:
            if len(self._known) >= _MOST:
                self._known.clear()
            self._known[key] = found
        return found

    def _work_out(
        self, when: bytes, zone: bytes | None, mark: int, zones: tuple[int, int]
    ) -> tuple[int, int, int] | None:
        match = self._pattern.fullmatch(when)
        if match is None:
            return None
        offsets = _offsets(zone, zones)
        fields = match.groupdict()
        candidates = []
        for offset in offsets:
            here = _EPOCH + datetime.timedelta(microseconds=mark // 1000 + offset * 1_000_000)
            for naive in _readings(fields, here):
                candidates.append(((naive - _EPOCH) // datetime.timedelta(seconds=1) - offset) * SECOND)
        if not candidates:
            return None
        possible = [time for time in candidates if time <= mark + AHEAD] or candidates
        best = min(possible, key=lambda time: abs(mark - time))
        if len(candidates) == 1:
            return best, 0, 1 << 64
        if len(offsets) == 1 and "S" in fields and not {"d", "Y", "y"}.isdisjoint(fields) and abs(mark - best) < _NEAR:
            return best, best - AHEAD, best + _NEAR  # only the year was in question
        return best, mark, mark + 1


def part_of_second(second: int, mark: int) -> int:
    """The time of a line of which only the second is known: when it was seen, as far as that is within that second."""
    return min(max(mark, second), second + SECOND - 1)


def fraction_ns(digits: bytes) -> int:
    """Decimal places to nanoseconds."""
    return int(digits[:9].ljust(9, b"0"))


def is_believed(time: int, mark: int) -> bool:
    """Whether `time` may be the time of a line that was seen by `mark`."""
    return mark - BEHIND <= time <= mark + AHEAD


def _offsets(zone: bytes | None, zones: tuple[int, int]) -> tuple[int, ...]:
    match = _ZONE.match(zone) if zone else None
    if match is None:
        return zones if zones[0] != zones[1] else zones[:1]
    if match[1]:
        return (0,)
    seconds = int(match[3]) * 3600 + int(match[4]) * 60
    return (-seconds if match[2] == b"-" else seconds,)


def _readings(fields: Mapping[str, bytes], here: datetime.datetime) -> list[datetime.datetime]:
    """All dates near `here` that the fields can mean."""
    day = datetime.timedelta(days=1)
    if "d" not in fields:
        dates = [here - day, here, here + day]
    else:
        months = int(fields["m"]) if "m" in fields else _MONTHS.get(fields["b"].decode(), 0)
        if "Y" in fields:
            years = [int(fields["Y"])]
        elif "y" in fields:
            years = [2000 + int(fields["y"])]
        else:
            years = [here.year - 1, here.year, here.year + 1]
        dates = [date for year in years if (date := _date(year, months, int(fields["d"])))]
    clock = (int(fields["H"]), int(fields["M"]), int(fields["S"]))
    if clock[0] > 23 or clock[1] > 59 or clock[2] > 60:
        return []
    midnight = datetime.time()
    took = datetime.timedelta(hours=clock[0], minutes=clock[1], seconds=clock[2])
    return [datetime.datetime.combine(date.date(), midnight) + took for date in dates]


def _date(year: int, month: int, day: int) -> datetime.datetime | None:
    try:
        return datetime.datetime(year, month, day)  # noqa: DTZ001
    except ValueError:
        return None
