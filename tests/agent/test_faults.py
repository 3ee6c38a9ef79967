"""Errors that pass, limits that are met, outages that last: nothing is taken for gone, nothing grows without bound."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import subprocess

import pytest

from skyrl_otel.agent import ending, identitylog
from skyrl_otel.spool import locks
from tests.agent.conftest import SECOND, Desk
from tests.receiver import decode


def test_what_was_given_up_is_not_counted_again_nor_said_to_the_receiver(desk: Desk) -> None:
    desk.write(b"line\n" * 10)
    desk.look()
    file = desk.agent.files["out"]
    assert file.give_up(-5, "cap") == 0
    assert file.give_up(20, "cap") == 25, "whole lines"
    file.give_up(25, "cap")
    desk.agent.flush()
    desk.accept(desk.build())  # the events
    skip = desk.build()
    assert (skip.records, skip.body) == (0, b"")
    for move in skip.moves:
        move.file.refuse(move, "refused by the receiver")
    assert desk.agent.own.lost_bytes == 50


def test_an_error_that_passes_costs_no_identity_and_no_end(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    desk.write(b"last words\n")
    desk.look()
    desk.folder.publish({"rank": 3})
    with monkeypatch.context() as patch:
        patch.setattr(identitylog, "read_file", fail)
        with pytest.raises(OSError, match="Input/output"):
            desk.look()
    desk.look()
    assert desk.agent.facts["rank"] == 3
    desk.folder.close()
    with monkeypatch.context() as patch:
        patch.setattr(desk.agent.files["out"].__class__, "last_line", fail)
        with pytest.raises(OSError, match="Input/output"):
            desk.look(SECOND)
    desk.look(SECOND)
    assert [event.value["last"] for event in desk.agent.own.waiting if event.kind == "end"] == ["last words"]


def test_out_of_descriptors_nobody_is_taken_for_gone(desk: Desk) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
        with pytest.raises(OSError, match="Too many open files"):
            os.dup(0)
        assert locks.is_held(desk.folder.path / "out")
        assert desk.agent.is_alive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_process_is_watched_by_a_descriptor_of_any_number() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    child = subprocess.Popen(["sleep", "100"])
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    pidfd = os.pidfd_open(child.pid)
    try:
        os.dup2(pidfd, 1500)
        assert not ending.has_ended(1500)
        child.kill()
        child.wait()
        assert ending.has_ended(1500)
    finally:
        os.close(1500)
        os.close(pidfd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_was_a_partial_line_is_looked_at_again_after_an_undo(desk: Desk) -> None:
    desk.write(b"whole\npart")
    desk.look()
    batch = desk.build()
    assert not desk.build(), "a partial line waits"
    batch.undo()
    assert desk.agent.has_work
    assert [record.body for record in decode(desk.build().body) if not record.event] == ["whole"]


def test_a_long_outage_keeps_memory_and_journal_small(desk: Desk) -> None:
    expected = []
    for number in range(6000):
        desk.write(b"line %d\n" % number)
        expected.append(f"line {number}")
        desk.look()
    file = desk.agent.files["out"]
    began = file.decided.marks[0].value
    assert len(file.decided.marks) < 1200
    assert (desk.folder.path / "decisions").stat().st_size < 120_000
    assert file.backlog == os.stat(desk.folder.path / "out").st_size, "counted, marked or not"
    for earlier, later in itertools.pairwise(file.decided.marks):
        assert later.value - earlier.value <= (later.value - began) / 200 + 20_000_000
    desk.restart()
    desk.look(SECOND)
    assert desk.deliver() == expected


def test_a_long_line_in_a_stream_that_tears_is_sent(desk: Desk) -> None:
    desk.write(b"(A pid=1) a\n(B pid=2) b\n(A pid=1) a(B pid=2) b\n" + b"(A pid=1) " + b"z" * 2_000_000 + b"\n")
    desk.write(b"(B pid=2) the end\n")
    bodies = []
    for _ in range(4):
        desk.look(2 * SECOND)
        bodies += desk.deliver()
    assert "".join(bodies).endswith("zthe end")
