"""What a tail is made of, each by itself: decisions by offset, holes, rotation, the line without an end."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_otel.agent import rotation
from skyrl_otel.agent.decided import Decided
from skyrl_otel.agent.holes import Holes, first_data
from skyrl_otel.agent.partial import BAR_S, PARTIAL_S, PartialLine
from skyrl_otel.spool.decisions import Decision, Kind
from tests.agent.conftest import SECOND

_seq = itertools.count()


def decided(*decisions: tuple[Kind, int, Any]) -> Decided:
    found = Decided()
    for kind, offset, value in decisions:
        found.add(Decision(next(_seq), "out", 0, offset, kind, value))
    return found


# -- decisions ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), max_size=8), st.integers(0, 80))
def test_what_is_given_up_is_passed_over_whatever_the_order(ranges: list[tuple[int, int]], offset: int) -> None:
    known = decided(*(("loss", start, {"bytes": size, "why": "cap"}) for start, size in ranges))
    inside = [(start, size) for start, size in ranges if start <= offset < start + size]
    assert (known.loss_at(offset) is not None) == bool(inside)
    assert known.up_to_loss(offset, 99) == min([start for start, _ in ranges if start > offset], default=99)
    behind = known.behind_losses(offset)
    assert behind >= offset
    assert not any(start <= behind < start + size for start, size in ranges)


def test_bytes_that_are_gone_are_nothing_to_pass_over() -> None:
    known = decided(("loss", 0, {"bytes": 10, "why": "truncated", "skip": False}))
    assert known.loss_at(0) is None
    assert known.all() == []


def test_only_what_speaks_of_bytes_to_come_is_kept() -> None:
    known = decided(
        *(("mark", offset, offset) for offset in (10, 20, 30)),
        ("cut", 20, None),
        ("cut", 25, None),
        *(("identity", offset, offset) for offset in (0, 15, 25)),
        *(("zone", offset, 0) for offset in (0, 12, 18, 28)),
        ("loss", 5, {"bytes": 5, "why": "cap"}),
        ("loss", 18, {"bytes": 5, "why": "cap"}),
        ("echo", 1, {"bytes": 9}),
        ("echo", 19, {"bytes": 4}),
    )
    known.forget(20)
    assert [(decision.kind, decision.offset) for decision in known.all()] == [
        ("mark", 30),
        ("cut", 25),
        ("identity", 15),  # in force at 20
        ("identity", 25),
        ("loss", 18),
        ("echo", 19),
        ("zone", 12),  # the one before the one in force counts too
        ("zone", 18),
        ("zone", 28),
    ]
    assert known.given_up(20) == 3


def test_no_record_reaches_across_a_cut_or_the_ends_of_an_echo() -> None:
    known = decided(("cut", 7, None), ("cut", 90, None), ("echo", 40, {"bytes": 8}), ("echo", 10, {"bytes": 5}))
    assert known.edges(7, 44) == {10, 15, 40, 90}
    assert known.has_echo(40) and not known.has_echo(48)


def test_the_mark_of_a_byte_is_the_first_above_it() -> None:
    known = decided(("mark", 10, 1), ("mark", 20, 2))
    assert [known.mark_of(offset).value for offset in (0, 9, 10, 19)] == [1, 1, 2, 2]


# -- holes -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def descriptor(spool_root: Path) -> Iterator[int]:
    found = os.open(spool_root / "file", os.O_RDWR | os.O_CREAT)
    os.write(found, b"x" * (4 << 20))
    yield found
    os.close(found)


def test_the_tail_before_a_position_is_never_punched(descriptor: int) -> None:
    holes = Holes()
    acked = (2 << 20) + 100
    holes.dig_behind(descriptor, acked)
    assert first_data(descriptor) == 2 << 20
    holes.dig_behind(descriptor, (3 << 20) + 10)
    assert os.pread(descriptor, 74, (3 << 20) - 64) == b"x" * 74
    assert first_data(descriptor) == 2 << 20, "less than a step is left to later"


def test_the_blocks_within_what_was_given_up_are_punched(descriptor: int) -> None:
    before = os.fstat(descriptor).st_blocks
    Holes().dig_losses(descriptor, [(5000, 1 << 20)])
    data = os.pread(descriptor, 1 << 20, 0)
    assert data[:8192] == b"x" * 8192 and data[8192:-4096] == bytes((1 << 20) - 8192 - 4096)
    assert data[-4096:] == b"x" * 4096
    assert os.fstat(descriptor).st_blocks < before


# -- rotation ----------------------------------------------------------------------------------------------------------


def test_a_file_is_found_under_its_new_name_and_its_successors_one_after_the_other(tmp_path: Path) -> None:
    path = tmp_path / "worker.out"
    inodes = []
    for age in (30, 20, 10):
        for number in (1, 0):
            old = path.with_name(f"worker.out.{number}") if number else path
            if old.exists():
                old.rename(path.with_name(f"worker.out.{number + 1}"))
        path.write_text("x")
        os.utime(path, (1_000_000 - age, 1_000_000 - age))
        inodes.append(rotation.inode_of(path.stat()))
    first, second, third = inodes
    assert [rotation.find(path, inode).name for inode in inodes] == ["worker.out.2", "worker.out.1", "worker.out"]
    assert rotation.has_moved(path, first) and not rotation.has_moved(path, third)
    after_first = rotation.successor(path, rotation.find(path, first).stat())
    assert after_first is not None and rotation.inode_of(after_first) == second
    after_second = rotation.successor(path, rotation.find(path, second).stat())
    assert after_second is not None and rotation.inode_of(after_second) == third
    assert rotation.successor(path, path.stat()) is None
    assert rotation.find(path, (0, 0)) == path
    path.unlink()
    assert not rotation.has_moved(path, third), "there is nothing to go on with yet"


# -- the line without an end -------------------------------------------------------------------------------------------


def test_a_partial_line_is_due_when_nothing_came_for_a_second() -> None:
    line, second = PartialLine(), int(PARTIAL_S * SECOND)
    assert not line.is_due(b"whole\npart", 0, second - 1, waits=False)
    assert line.is_due(b"whole\npart", 0, second, waits=False)
    assert not line.is_due(b"whole\n", 0, second, waits=False)
    assert line.is_due(b"whole\n", 0, second, waits=True), "an event that is open"


def test_a_running_bar_is_due_every_ten_seconds_however_busy() -> None:
    line = PartialLine()
    due = [now for now in range(1, 40) if line.is_due(b"\r 3%\r 4%", now * SECOND, 0, waits=False)]
    assert due == list(range(1 + int(BAR_S), 40, int(BAR_S)))
