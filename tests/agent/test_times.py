"""What a format leaves out of a time is completed from the mark, right across midnight, New Year and summer time."""

from __future__ import annotations

import datetime

import pytest

from skyrl_otel.agent.assemble import State
from skyrl_otel.agent.reader import Reader, View
from skyrl_otel.agent.times import LATE_GRAIN, SECOND, Clock
from skyrl_otel.spool.decisions import Decision
from tests.agent.test_reader import NOW, PREFIX, STREAM, received

VLLM = "%m-%d %H:%M:%S"
HOUR = 3600


def utc(text: str) -> int:
    return int(datetime.datetime.fromisoformat(text + "+00:00").timestamp()) * SECOND


@pytest.mark.parametrize(
    ("layout", "when", "mark", "zones", "meant"),
    [
        (VLLM, b"11-23 05:20:11", "2026-11-23T05:20:12", (0, 0), "2026-11-23T05:20:11"),
        (VLLM, b"11-23 06:20:11", "2026-11-23T05:20:12", (HOUR, HOUR), "2026-11-23T05:20:11"),
        # The last line of a year, seen in the next; and the first, by a node whose clock is behind UTC.
        (VLLM, b"12-31 23:59:59", "2027-01-01T00:00:00", (0, 0), "2026-12-31T23:59:59"),
        (VLLM, b"12-31 19:00:01", "2027-01-01T00:00:02", (-5 * HOUR, -5 * HOUR), "2027-01-01T00:00:01"),
        (VLLM, b"02-29 12:00:00", "2028-02-29T12:00:01", (0, 0), "2028-02-29T12:00:00"),
        # A clock a little ahead of the agent's look, across New Year.
        (VLLM, b"01-01 00:00:01", "2026-12-31T23:59:59", (0, 0), "2027-01-01T00:00:01"),
        # No date at all, across midnight.
        ("%H:%M:%S", b"23:59:59", "2026-11-24T00:00:00", (0, 0), "2026-11-23T23:59:59"),
        ("%H:%M:%S", b"00:00:00", "2026-11-24T00:00:00", (0, 0), "2026-11-24T00:00:00"),
        # Berlin, 25 October 2026: 03:00 CEST (+2) becomes 02:00 CET (+1). Written before, seen after; then written after.
        (VLLM, b"10-25 02:59:59", "2026-10-25T01:00:01", (HOUR, 2 * HOUR), "2026-10-25T00:59:59"),
        (VLLM, b"10-25 02:00:00", "2026-10-25T01:00:01", (HOUR, 2 * HOUR), "2026-10-25T01:00:00"),
        # Berlin, 29 March 2026: 02:00 CET (+1) becomes 03:00 CEST (+2).
        (VLLM, b"03-29 01:59:59", "2026-03-29T01:00:01", (2 * HOUR, HOUR), "2026-03-29T00:59:59"),
        (VLLM, b"03-29 03:00:00", "2026-03-29T01:00:01", (2 * HOUR, HOUR), "2026-03-29T01:00:00"),
    ],
)
def test_what_is_missing_is_completed(layout: str, when: bytes, mark: str, zones: tuple[int, int], meant: str) -> None:
    clock = Clock(layout)
    for _ in range(2):  # worked out, then remembered
        found = clock.second(when, None, utc(mark), zones)
        assert found is not None
        assert found[0] == utc(meant)


@pytest.mark.parametrize(("zone", "hours"), [(b"Z", 0), (b"+02:00", -2), (b"-0530", 5.5)])
def test_a_zone_that_is_said_holds(zone: bytes, hours: float) -> None:
    found = Clock("%Y-%m-%d %H:%M:%S").second(b"2026-11-23 05:20:11", zone, utc("2026-11-23T05:20:11"), (HOUR, HOUR))
    assert found is not None
    assert found[0] == utc("2026-11-23T05:20:11") + int(hours * HOUR * SECOND)


@pytest.mark.parametrize("when", [b"13-01 00:00:00", b"02-30 00:00:00", b"11-23 25:00:00"])
def test_no_date_is_no_time(when: bytes) -> None:
    assert Clock(VLLM).second(when, None, NOW, (0, 0)) is None


def read(line: bytes, mark: int) -> tuple[int, dict[str, object]]:
    view = View(
        [Decision(0, "out", 0, len(line), "mark", mark)], [Decision(1, "out", 0, 0, "identity", 0)], [len(line)], []
    )
    result = Reader(PREFIX, STREAM).read(line, 0, State(), view)
    (record,) = received([record for section in result.sections for record in section.records])
    return record.time, record.attributes


def test_a_second_is_completed_from_the_mark_and_never_runs_ahead_of_it() -> None:
    line = b"INFO 11-23 05:35:41 [core.py:1] x\n"
    assert read(line, NOW + 345_000_000)[0] == NOW + 345_000_000
    assert read(line, NOW + 5 * SECOND)[0] == NOW + SECOND - LATE_GRAIN + len(line)


@pytest.mark.parametrize("seconds", [-310, 86_500])
def test_a_time_that_cannot_be_is_an_attribute(seconds: int) -> None:
    line = b"2026-11-23 05:35:41.000 | INFO     | a:b:1 - x\n"
    mark = NOW + seconds * SECOND
    time, attributes = read(line, mark)
    assert time == mark
    assert attributes["skyrl.stated_time_unix_nano"] == NOW
