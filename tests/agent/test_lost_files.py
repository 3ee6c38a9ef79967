"""Files that are emptied, rotated or removed under the agent: what they held is sent, or counted lost."""

from __future__ import annotations

import os
from pathlib import Path

from skyrl_otel.agent.batch import build
from skyrl_otel.agent.writer import Writer
from skyrl_otel.spool import layout
from skyrl_otel.spool.writer import WriterFolder
from tests.agent.conftest import SECOND, Desk
from tests.receiver import decode


def test_bytes_under_way_when_their_file_is_emptied_are_counted_if_they_do_not_arrive(desk: Desk) -> None:
    desk.write(b"under way\n")
    desk.look()
    batch = desk.build()
    desk.write(b"prepared\n")
    desk.look()
    os.truncate(desk.folder.path / "out", 0)
    desk.look()
    assert desk.lost() == [(len(b"prepared\n"), "truncated by its writer")]
    batch.undo()
    assert desk.lost()[-1] == (len(b"under way\n"), "truncated before it could be sent again")


def test_what_an_agent_that_was_killed_had_sent_is_counted_as_maybe_lost(desk: Desk) -> None:
    desk.write(b"maybe\n")
    desk.look()
    assert desk.build(), "sent, and then killed before the answer"
    desk.restart()
    desk.write(b"for certain\n")
    desk.look()
    os.truncate(desk.folder.path / "out", 0)
    desk.look()
    assert desk.lost() == [
        (len(b"maybe\n"), "truncated after an agent ended that may have sent some of it"),
        (len(b"for certain\n"), "truncated by its writer"),
    ]


def test_after_a_truncation_and_a_restart_the_new_bytes_are_read_from_the_first(desk: Desk) -> None:
    desk.write(b"y" * 99 + b"\n")
    desk.look()
    os.truncate(desk.folder.path / "out", 0)
    desk.write(b"one\ntwo\n")
    desk.look()
    desk.restart()
    desk.look()
    assert desk.deliver() == ["one", "two"]
    assert desk.agent.own.lost_bytes == 100


def test_a_refused_batch_of_an_emptied_file_is_counted(desk: Desk) -> None:
    desk.write(b"refused\n")
    desk.look()
    batch = desk.build()
    os.truncate(desk.folder.path / "out", 0)
    desk.look()
    for move in batch.moves:
        move.file.refuse(move, "refused by the receiver")
    assert desk.lost() == [(len(b"refused\n"), "refused by the receiver")]


def test_a_file_that_is_emptied_and_grows_to_the_same_size_is_not_taken_for_the_same_partial_line(desk: Desk) -> None:
    desk.write(b"half")
    desk.look()
    assert not desk.build().moves, "a partial line waits"
    os.truncate(desk.folder.path / "out", 0)
    desk.look()
    desk.write(b"one\n")
    desk.look()
    file = desk.agent.files["out"]
    assert file.ready and not file.is_drained
    assert desk.deliver() == ["one"]


def test_a_rotated_file_is_not_left_before_its_last_byte_is_acknowledged(spool_root: Path) -> None:
    log = spool_root / "worker.out"
    log.write_bytes(b"one\n")
    found = log.stat()
    follow = {"out": {"path": str(log), "dev": found.st_dev, "ino": found.st_ino, "offset": 0}}
    folder = WriterFolder.create(layout.open_run(spool_root, "run"), files=(), facts={"role": "r", "follow": follow})
    agent = Writer("run", folder.writer_id, folder.path)
    agent.observe(SECOND)
    batch = build([agent])
    log.rename(spool_root / "worker.out.1")
    log.write_bytes(b"two\n")
    agent.observe(2 * SECOND)
    batch.undo()
    again = build([agent])
    assert [record.body for record in decode(again.body) if not record.event] == ["one"]
    again.accept()
    agent.observe(3 * SECOND)
    agent.observe(4 * SECOND)
    assert [record.body for record in decode(build([agent]).body) if not record.event] == ["two"]
    agent.close()
    folder.close()


def test_a_followed_file_that_is_removed_while_no_agent_runs_is_counted(spool_root: Path) -> None:
    log = spool_root / "worker.out"
    log.write_bytes(b"one\ntwo\n")
    found = log.stat()
    follow = {"out": {"path": str(log), "dev": found.st_dev, "ino": found.st_ino, "offset": 0}}
    folder = WriterFolder.create(layout.open_run(spool_root, "run"), files=(), facts={"role": "r", "follow": follow})
    agent = Writer("run", folder.writer_id, folder.path)
    agent.observe(SECOND)
    agent.flush()
    agent.close()
    log.unlink()
    folder.close()
    agent = Writer("run", folder.writer_id, folder.path)
    for second in range(2, 6):
        agent.observe(second * SECOND)
    assert agent.ended
    assert agent.own.lost_bytes == 8
    assert agent.backlog_bytes == 0
    agent.close()
