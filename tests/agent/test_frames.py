"""Records that a process encoded itself: read from segments, sent once, torn ones counted, whatever happens in between."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_otel.agent import writer
from skyrl_otel.agent.batch import build
from skyrl_otel.agent.writer import Writer
from skyrl_otel.capture.levels import Levels
from skyrl_otel.capture.records import Records
from skyrl_otel.capture.taker import make_take
from skyrl_otel.spool import frames, layout
from skyrl_otel.spool.writer import WriterFolder
from tests.agent.conftest import SECOND
from tests.receiver import Received, decode


class Bench:
    """A writer's folder with our records in it, and the agent's view of it, by a clock of the test's."""

    def __init__(self, root: Path) -> None:
        self.folder = WriterFolder.create(layout.open_run(root, "run"), facts={"role": "r"})
        self.records = Records(lambda: None)
        self.records.use(self.folder)
        self.take = make_take(self.records, Levels({}))
        self.agent = self.start()
        self.now = 1000 * SECOND
        self.events: list[Received] = []

    def start(self) -> Writer:
        return Writer("run", self.folder.writer_id, self.folder.path)

    def log(self, message: str) -> None:
        assert self.take(logging.LogRecord("a.b", 20, "/src/x.py", 7, message, (), None, "work"))

    def collect(self, rounds: int = 8) -> list[str]:
        """What is sent and accepted now."""
        bodies = []
        for _ in range(rounds):
            self.now += 2 * SECOND
            self.agent.observe(self.now)
            batch = build([self.agent])
            batch.accept()
            if batch:
                self.agent.write_checkpoint()
            found = decode(batch.body)
            self.events += [record for record in found if record.event]
            bodies += [record.body for record in found if not record.event]
        return bodies


@pytest.fixture
def bench(spool_root: Path) -> Iterator[Bench]:
    bench = Bench(spool_root)
    yield bench
    bench.agent.close()
    bench.folder.close()


def test_a_record_arrives_with_all_it_knows(bench: Bench) -> None:
    bench.log("hello")
    bench.agent.observe(bench.now)
    bench.agent.observe(bench.now)
    record = next(r for r in decode(build([bench.agent]).body) if not r.event)
    assert (record.body, record.severity) == ("hello", 9)
    size = os.stat(bench.folder.path / "records.0").st_size
    assert record.attributes["log.record.uid"] == f"{bench.folder.writer_id}/records/0/0-{size}"
    assert record.attributes["code.file.path"] == "/src/x.py" and record.attributes["code.line.number"] == 7
    assert record.resource["skyrl.role"] == "r"


def test_segments_follow_each_other_and_go_when_acknowledged(bench: Bench) -> None:
    for number in range(4):
        bench.log(f"line {number}")
        bench.records.next_segment()
    bench.log("last")
    assert bench.collect() == ["line 0", "line 1", "line 2", "line 3", "last"]
    assert sorted(p.name for p in bench.folder.path.glob("records.*")) == ["records.4"]
    assert bench.agent.is_alive()


def test_a_later_agent_goes_on_where_the_first_was_acknowledged(bench: Bench) -> None:
    bench.log("one")
    assert bench.collect() == ["one"]
    bench.log("two")
    bench.agent.observe(bench.now)
    first = decode(build([bench.agent]).body)  # sent, never acknowledged
    bench.agent.close()
    bench.records.next_segment()
    bench.log("three")
    bench.agent = bench.start()
    bench.agent.observe(bench.now)
    assert decode(build([bench.agent]).body) == first
    bench.agent.close()
    bench.agent = bench.start()
    assert bench.collect() == ["two", "three"]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_torn_frame_never_swallows_the_next(data: st.DataObject) -> None:
    root = Path(tempfile.mkdtemp(prefix="sk-", dir="/var/tmp"))
    bench = Bench(root)
    wanted = []
    torn = 0
    for number in range(data.draw(st.integers(1, 6))):
        if data.draw(st.booleans()):
            frame = frames.encode(b"\x0a\x02\x0a\x00\x12" + data.draw(st.binary(min_size=3, max_size=40)))
            cut = data.draw(st.integers(1, len(frame) - 1))
            os.write(bench.records.fd, frame[:cut])
            torn += cut
        bench.log(f"whole {number}")
        wanted.append(f"whole {number}")
    assert bench.collect(20) == wanted
    lost = [event.attributes for event in bench.events if event.event == "skyrl.loss"]
    assert sum(attributes["skyrl.lost.bytes"] for attributes in lost) == torn
    bench.agent.close()
    bench.folder.close()
    shutil.rmtree(root)


def test_the_torn_end_of_a_dead_writer_is_counted_once(bench: Bench) -> None:
    bench.log("whole")
    os.write(bench.records.fd, frames.encode(b"\x0a" * 100)[:50])
    assert bench.collect() == ["whole"]
    assert not [event for event in bench.events if event.event == "skyrl.loss"], "it may be a write in progress"
    bench.folder.close()
    bench.records.use(None)
    assert bench.collect() == []
    [loss] = [event for event in bench.events if event.event == "skyrl.loss"]
    assert loss.attributes["skyrl.lost.bytes"] == 50
    assert bench.agent.is_delivered


def test_a_record_of_ten_megabytes_comes_whole(bench: Bench) -> None:
    text = "é" * 5_000_000
    bench.log(text)
    bench.log("after")
    assert bench.collect() == [text, "after"]


def test_past_the_cap_whole_records_go_and_are_counted(bench: Bench) -> None:
    for number in range(50):
        bench.log(f"line {number}")
    bench.records.next_segment()
    for number in range(50, 60):
        bench.log(f"line {number}")
    bench.agent.observe(bench.now)
    file = bench.agent.files["records"]
    assert file.backlog == sum(p.stat().st_size for p in bench.folder.path.glob("records.*"))
    given_up = file.give_up(1000, "full")
    assert 1000 <= given_up < 2000
    given_up += file.give_up(1 << 30, "full") + file.give_up(1 << 30, "full")
    bench.agent.flush()
    file.punch_losses()
    assert file.backlog == 0
    bench.log("after")
    assert bench.collect(12) == ["after"]
    assert sum(e.attributes.get("skyrl.lost.bytes", 0) for e in bench.events) == given_up


def test_what_went_from_segments_to_come_is_counted_once_by_a_later_agent_too(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_JOURNAL_BYTES", 0)  # the journal is written anew at each occasion
    for number in range(3):
        bench.log("x" * 5000 if number else "first")
        bench.records.next_segment()
    bench.agent.observe(bench.now)
    given_up = 0
    while size := bench.agent.files["records"].give_up(1 << 30, "full"):
        given_up += size
    own = bench.agent.own
    own.accept(len(own.take(1 << 20)))
    bench.agent.write_checkpoint()
    bench.agent.files["records"].punch_losses()
    for _ in range(2):
        bench.agent.close()
        bench.agent = bench.start()
        bench.agent.observe(bench.now)
        assert bench.agent.files["records"].give_up(1 << 30, "full") == 0
        assert bench.agent.files["records"].backlog == 0
    bench.log("after")
    assert bench.collect(12) == ["after"]
    assert bench.agent.own.lost_bytes == given_up
    assert not [event for event in bench.events if event.event == "skyrl.loss"], "said before"
