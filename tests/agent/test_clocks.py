"""What a clock or a zone decides is journaled: a second reading gives the same bytes, whatever those say by then."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from skyrl_otel.agent.batch import build
from skyrl_otel.agent.partial import BAR_S
from skyrl_otel.agent.writer import Writer
from skyrl_otel.spool import layout
from skyrl_otel.spool.decisions import Decision, Journal
from skyrl_otel.spool.writer import WriterFolder
from tests.receiver import Received, decode

SECOND = 1_000_000_000
BERLIN = "CET-1CEST,M3.5.0,M10.5.0/3"  # as POSIX writes it, for a machine without a zone database
NEW_YORK = "EST5EDT,M3.2.0,M11.1.0"


def utc(text: str) -> int:
    return int(datetime.datetime.fromisoformat(text + "+00:00").timestamp()) * SECOND


class Story:
    """A writer, and an agent whose clock is the test's; what is sent is answered, but no checkpoint is written."""

    def __init__(self, root: Path, now: int = 0) -> None:
        run = layout.open_run(root, "run")
        self.folder = WriterFolder.create(run, facts={"role": "r"})
        self.now = now
        self.agent = self.start()

    def start(self) -> Writer:
        return Writer("run", self.folder.writer_id, self.folder.path)

    def write(self, data: bytes, at: int) -> None:
        os.write(self.folder.fds["out"], data)
        self.look(at)

    def look(self, at: int) -> None:
        self.now = at
        self.agent.observe(at)

    def sent(self) -> dict[str, Received]:
        """What goes out now of the text, by uid."""
        found: dict[str, Received] = {}
        while batch := build([self.agent], 1 << 20):
            found |= {record.uid: record for record in decode(batch.body) if "/out/" in record.uid}
            batch.accept()
        return found

    def again(self) -> dict[str, Received]:
        """What another agent sends, which knows the decisions and no checkpoint."""
        self.agent.close()
        self.agent = self.start()
        self.look(self.now + 3600 * SECOND)
        return self.sent()

    def decided(self, kind: str) -> list[Decision]:
        self.agent.close()
        journal = Journal.open(self.folder.path / "decisions")
        try:
            return [decision for decision in journal.decisions if decision.kind == kind and decision.file == "out"]
        finally:
            journal.close()


@pytest.fixture
def zone() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch
    time.tzset()


def move_to(patch: pytest.MonkeyPatch, zone: str) -> None:
    patch.setenv("TZ", zone)
    time.tzset()


@pytest.mark.parametrize(
    ("zone_name", "lines", "offsets"),
    [
        (  # 25 October 2026: 03:00 CEST becomes 02:00 CET
            BERLIN,
            {"10-25 02:59:58": "2026-10-25T00:59:58", "10-25 02:00:02": "2026-10-25T01:00:02"},
            [7200, 3600],
        ),
        (  # 29 March 2026: 02:00 CET becomes 03:00 CEST
            BERLIN,
            {"03-29 01:59:58": "2026-03-29T00:59:58", "03-29 03:00:02": "2026-03-29T01:00:02"},
            [3600, 7200],
        ),
        (  # New Year, five hours after that of UTC
            NEW_YORK,
            {"12-31 23:59:58": "2027-01-01T04:59:58", "01-01 00:00:02": "2027-01-01T05:00:02"},
            [-18000],
        ),
        ("UTC0", {"12-31 23:59:58": "2026-12-31T23:59:58", "01-01 00:00:02": "2027-01-01T00:00:02"}, [0]),
    ],
)
def test_a_change_of_the_zone_and_the_year_is_read_again_as_it_was(
    spool_root: Path, zone: pytest.MonkeyPatch, zone_name: str, lines: dict[str, str], offsets: list[int]
) -> None:
    move_to(zone, zone_name)
    story = Story(spool_root)
    for stated, meant in lines.items():
        story.write(f"INFO {stated} [a.py:1] at {meant}\n".encode(), utc(meant) + SECOND // 2)
    story.look(story.now + 5 * SECOND)
    first = story.sent()
    assert [record.time // SECOND for record in first.values()] == [utc(meant) // SECOND for meant in lines.values()]

    for elsewhere in ("UTC0", NEW_YORK, BERLIN):
        move_to(zone, elsewhere)
        assert {uid: record.raw for uid, record in story.again().items()} == {
            uid: record.raw for uid, record in first.items()
        }
    journaled = [decision.value for decision in story.decided("zone")]
    assert journaled == offsets
    story.folder.close()


def test_a_running_bar_is_sampled_every_ten_seconds_and_its_states_are_counted(spool_root: Path) -> None:
    story = Story(spool_root, now=utc("2026-11-24T00:00:00"))
    story.write(b"before\n", story.now)
    story.look(story.now + 5 * SECOND)
    first = story.sent()
    states = 0
    for step in range(450):  # 45 s in steps of 0.1 s, a state in two of three
        if step % 3:
            states += 1
            story.write(b"\rtrain: %3d/300" % states, story.now + SECOND // 10)
        else:
            story.look(story.now + SECOND // 10)
        first |= story.sent()
    story.write(b"\n", story.now + SECOND // 10)
    story.look(story.now + 5 * SECOND)
    first |= story.sent()
    before, *bars = first.values()

    assert before.body == "before"
    assert len(bars) == 5  # four samples of the running one, and its end
    assert all(later.observed - earlier.observed >= (BAR_S - 1) * SECOND for earlier, later in pairwise(bars[:-1]))
    assert sum(1 + record.attributes.get("skyrl.bar.states", 0) for record in bars) == states
    assert bars[-1].body == "train: 300/300"
    assert {uid: record.raw for uid, record in story.again().items()} == {
        uid: record.raw for uid, record in first.items()
    }
    cuts = [decision.offset for decision in story.decided("cut")]
    assert cuts == [int(record.uid.rpartition("-")[2]) for record in bars[:-1]]
    story.folder.close()
