"""What the agent knows of a writer, each part by itself: what it said, how it ended, the records about it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from skyrl_otel.agent import ownrecords
from skyrl_otel.agent.ending import Ending, Exit
from skyrl_otel.agent.identitylog import IdentityLog
from skyrl_otel.agent.ownrecords import OwnRecords
from skyrl_otel.spool import identity
from skyrl_otel.spool.decisions import Decision, Kind
from skyrl_otel.spool.identity import IdentityLine
from tests.agent.conftest import SECOND


class Said:
    """An identity file that is written line by line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.touch(mode=0o600)
        self.log = IdentityLog(path)
        self.log.read(0)

    def say(self, now: int = 0, **changes: Any) -> list[IdentityLine] | None:
        line = IdentityLine(self.log.seq + 1, {"out": (0, 0)}, changes)
        with self.path.open("ab") as file:
            file.write(identity.encode(line))
        return self.log.read(now)


@pytest.fixture
def said(spool_root: Path) -> Said:
    return Said(spool_root / "identity")


def test_only_new_lines_are_news(said: Said) -> None:
    assert [line.seq for line in said.say(role="policy") or ()] == [0]
    assert said.log.read(0) is None
    assert [line.seq for line in said.say(rank=1, role=None) or ()] == [1]
    assert said.log.facts == {"rank": 1}
    assert said.log.in_force(0) == {"role": "policy"}


def test_lines_wait_for_the_actor_from_when_they_were_seen_and_for_the_rank_from_when_it_was_promised(
    said: Said,
) -> None:
    assert said.log.has_waited(0, 0), "of nobody nothing is awaited"
    said.say(awaits="actor")
    assert not said.log.has_waited(100 * SECOND, 100 * SECOND + 299_999_999)
    assert said.log.has_waited(100 * SECOND, 100 * SECOND + 300_000_000)
    said.say(200 * SECOND, actor_id="a", awaits="rank")
    assert not said.log.has_waited(0, 202 * SECOND - 1)
    assert said.log.has_waited(0, 202 * SECOND)
    said.say(rank=3)
    assert said.log.awaits == ""


def test_what_waited_is_of_the_line_that_ended_the_waiting(said: Said) -> None:
    said.say(awaits="actor")
    said.say(pid=7)
    assert said.log.settled_seq == 1, "the newest, where nothing ended it"
    said.say(actor_id="a")
    said.say(rank=0)
    assert said.log.settled_seq == 2
    assert [line.seq for line in said.log.behind(2)] == [3]


def test_each_increase_of_what_a_process_could_not_write_is_told(said: Said) -> None:
    for size in (10, 10, 35):
        said.say(lost={"bytes": size, "records": size // 5, "why": "disk full"})
    assert [(line.seq, line.size_bytes) for line in said.log.unwritten()] == [(0, 10), (2, 25)]


def decision(seq: int, kind: Kind, **value: Any) -> Decision:
    return Decision(seq, "", 0, 0, kind, {"identity": 0, "time": seq, **value})


def test_own_records_are_taken_in_order_and_come_back_in_order() -> None:
    own = OwnRecords(lambda found: b"%d" % found.seq * 10)
    for seq in range(4):
        own.add(decision(seq, "loss", bytes=5))
    assert own.take(15) == [(0, b"0" * 10), (0, b"1" * 10)]
    assert own.take(1) == [(0, b"2" * 10)], "at least one"
    assert own.low_water(9) == 0
    own.undo(1)
    own.accept(2)
    assert own.low_water(9) == 2
    assert [record for _, record in own.take(100)] == [b"2" * 10, b"3" * 10]
    own.accept(2)
    assert own.all_delivered and own.low_water(9) == 9 and own.lost_bytes == 20


def test_a_later_agent_sends_what_is_not_delivered_and_decides_nothing_twice() -> None:
    own = OwnRecords(lambda _: b"")
    decisions = [decision(0, "event"), decision(1, "loss", bytes=7, of=4), decision(2, "mark"), decision(3, "end")]
    own.restore(decisions, 3)
    assert [found.seq for found in own.waiting] == [3]
    assert own.has("event") and own.has("end") and own.has_counted(4) and not own.has_counted(5)
    assert {found.seq for found in own.kept()} == {0, 1, 3}
    assert own.lost_bytes == 7


@pytest.mark.parametrize(
    ("goodbye", "meant"),
    [
        (None, Exit()),
        ({"code": 3}, Exit(code=3)),
        ({"code": None}, Exit()),
        ({"signal": 9}, Exit(signal=9)),
        ("nonsense", Exit()),
    ],
)
def test_where_the_kernel_says_nothing_the_goodbye_counts(goodbye: object, meant: Exit) -> None:
    assert Ending().exit(goodbye, SECOND) == meant


def test_a_process_that_is_not_reaped_gets_half_a_second_to_be() -> None:
    child = subprocess.Popen(["true"])
    process = Ending()
    process.watch(child.pid, lambda: True)
    if process.pidfd is None:
        pytest.skip("this kernel has no pidfd")
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process.is_due
    assert process.exit(None, SECOND) is None
    assert process.exit({"code": 0}, SECOND) == Exit(code=0)
    assert process.exit(None, SECOND + SECOND // 2) == Exit()
    child.wait()
    process.close()


@pytest.mark.parametrize(
    ("known", "facts", "fine", "severity"),
    [
        (Exit(code=0), {}, True, "INFO"),
        (Exit(), {"goodbye": {"code": None}}, True, "INFO"),
        (Exit(code=1), {}, False, "ERROR"),
        (Exit(signal=9), {"worker_id": "w"}, False, "ERROR"),
        (Exit(code=1), {"worker_id": "w"}, False, "WARN"),
        (Exit(code=1), {"worker_id": "w", "goodbye": {"code": None}}, True, "INFO"),
        (Exit(), {}, False, "ERROR"),
    ],
)
def test_an_end_is_as_bad_as_it_was(known: Exit, facts: dict[str, Any], fine: bool, severity: str) -> None:
    value = Ending().describe(known, facts, "last words")
    assert (value["fine"], value["last"]) == (fine, "last words")
    record = ownrecords.encode(decision(5, "end", **value), "writer", facts)
    assert severity.encode() in record and b"writer/decisions/0/5-6" in record and known.describe().encode() in record
