"""What goes wrong round the agent for a while (disk, receiver, its own request) costs nothing, or is counted."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from skyrl_otel.agent import ending, identitylog
from skyrl_otel.agent.batch import Batch, build
from skyrl_otel.agent.connect import connect
from skyrl_otel.agent.ship import Client, Sender
from skyrl_otel.agent.writer import Writer
from skyrl_otel.spool import layout, locks
from skyrl_otel.spool.token import Shipping
from skyrl_otel.spool.writer import WriterFolder
from tests.agent.conftest import Node, wait_for
from tests.receiver import OK, Receiver, Reply, decode

SECOND = 1_000_000_000


@contextmanager
def full_disk(node: Node) -> Iterator[None]:
    """For the agent alone, as a full disk is: write(2) takes nothing, reading and sending go on."""
    pids = node.pids()
    try:
        for pid in pids:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        yield
    finally:
        for pid in pids:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_a_disk_that_is_full_for_a_while_costs_no_line(node: Node) -> None:
    folder = node.writer(role="r")
    node.ship()
    os.write(folder.fds["out"], b"before\n")
    node.start()
    node.receiver.wait(lambda: node.receiver.bodies() == {"before": 1})
    with full_disk(node):
        os.write(folder.fds["out"], b"meanwhile\n")
        time.sleep(0.5)
        assert node.receiver.bodies() == {"before": 1}, "sent without a decision on disk"
    node.receiver.wait(lambda: node.receiver.bodies() == {"before": 1, "meanwhile": 1})
    wait_for(lambda: node.status().get("drained"))
    assert node.status()["lost_bytes"] == 0


def test_a_full_disk_while_a_request_is_under_way_gives_its_answer_to_no_other(node: Node) -> None:
    """The batch behind it cannot be journaled; the 2xx that comes then is the first one's alone."""
    answered = threading.Event()

    def reply(receiver: Receiver, body: bytes) -> Reply:
        if receiver.requests == 1:
            answered.wait(10)
        return OK

    node.receiver.reply = reply
    folder = node.writer(role="r")
    node.ship()
    os.write(folder.fds["out"], b"first\n")
    node.start()
    wait_for(lambda: node.receiver.requests == 1)
    with full_disk(node):
        for number in range(20):
            os.write(folder.fds["out"], b"line %d\n" % number)
            time.sleep(0.03)
        answered.set()
        time.sleep(0.2)
    node.receiver.wait(lambda: len(node.receiver.lines()) == 21)
    wait_for(lambda: node.status().get("drained"))
    assert sorted(record.body for record in node.receiver.records if not record.event) == sorted(
        ["first", *(f"line {number}" for number in range(20))]
    ), "lost or sent again"


def test_a_full_disk_from_the_start_keeps_the_writer(node: Node) -> None:
    node.ship()
    node.start()
    with full_disk(node):
        folder = node.writer(role="r")
        os.write(folder.fds["out"], b"line\n")
        time.sleep(0.5)
    node.receiver.wait(lambda: node.receiver.bodies() == {"line": 1}, 30)


class Desk:
    """One writer and the agent's view of it, without an agent; the clock is ours."""

    def __init__(self, root: Path) -> None:
        self.folder = WriterFolder.create(layout.open_run(root, "run"), facts={"role": "r"})
        self.now = SECOND * 1000
        self.agent = Writer("run", self.folder.writer_id, self.folder.path)

    def write(self, data: bytes) -> None:
        os.write(self.folder.fds["out"], data)

    def look(self, after_ns: int = 10_000_000) -> None:
        self.now += after_ns
        self.agent.observe(self.now)
        self.agent.flush()
        self.agent.bound_journal()

    def build(self, budget: int = 1 << 20) -> Batch:
        batch = build([self.agent], budget)
        assert not batch.failed
        return batch

    def accept(self, batch: Batch) -> None:
        batch.accept()
        self.agent.write_checkpoint()

    def deliver(self) -> list[str]:
        """Bodies of all lines that are left."""
        bodies = []
        while batch := self.build():
            bodies += [record.body for record in decode(batch.body) if not record.event]
            self.accept(batch)
        return bodies

    def restart(self) -> None:
        self.agent.close()
        self.agent = Writer("run", self.folder.writer_id, self.folder.path)

    def lost(self) -> list[tuple[int, str]]:
        return [(event.value["bytes"], event.value["why"]) for event in self.agent.own.waiting if event.kind == "loss"]


@pytest.fixture
def desk(spool_root: Path) -> Iterator[Desk]:
    desk = Desk(spool_root)
    yield desk
    desk.agent.close()
    desk.folder.close()


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


def test_a_refused_batch_of_an_emptied_file_is_counted(desk: Desk) -> None:
    desk.write(b"refused\n")
    desk.look()
    batch = desk.build()
    os.truncate(desk.folder.path / "out", 0)
    desk.look()
    for move in batch.moves:
        move.file.refuse(move, "refused by the receiver")
    assert desk.lost() == [(len(b"refused\n"), "refused by the receiver")]


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
    for move in again.moves:
        move.file.accept(move.to)
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


@pytest.fixture
def small_disk() -> Iterator[Path]:
    root = Path(tempfile.mkdtemp(prefix="sk-", dir="/var/tmp"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,mode=0700", "tmpfs", str(root)], check=True)
    yield root
    subprocess.run(["umount", "-l", str(root)], check=True)
    root.rmdir()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk_gets_its_space_back_once_all_is_delivered(small_disk: Path) -> None:
    node = Node(small_disk)
    try:
        folder = node.writer(role="r")
        node.ship()
        node.start()
        wait_for(lambda: (node.run.path / "ballast").exists())
        for pid in node.pids():
            os.kill(pid, signal.SIGSTOP)
        written = 0
        with pytest.raises(OSError, match="No space"):
            while True:
                written += os.write(folder.fds["out"], b"z" * 99 + b"\n")
        for pid in node.pids():
            os.kill(pid, signal.SIGCONT)
        wait_for(lambda: (folder.path / "out").stat().st_blocks * 512 < 3 << 20, 30)
        os.write(folder.fds["out"], b"\nlife goes on\n")
        node.receiver.wait(lambda: "life goes on" in node.receiver.bodies())
    finally:
        node.close()


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


def test_a_receiver_that_refuses_before_it_has_read_all_is_understood() -> None:
    """As otelcol and nginx do with a body over their limit: answer, close, the rest of the body meets a reset."""
    listener = socket.create_server(("127.0.0.1", 0))

    def refuse() -> None:
        connection, _ = listener.accept()
        connection.recv(1024)
        connection.sendall(b"HTTP/1.1 413 Request Entity Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        time.sleep(0.5)
        connection.close()

    thread = threading.Thread(target=refuse)
    thread.start()
    try:
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/logs"
        answer = Client(Shipping(endpoint, {}, compression="none", timeout_s=5)).post(os.urandom(32 << 20))
    finally:
        thread.join()
        listener.close()
    assert answer.verdict == "too_large"


@pytest.mark.parametrize(
    "endpoint", ["http://127.0.0.1:port/v1/logs", "http://[::1/v1/logs", "http://127.0.0.1:99999/"]
)
def test_a_url_that_no_library_takes_is_said_and_waited_out(endpoint: str) -> None:
    sender = Sender(Shipping(endpoint, {}), connect)
    try:
        sender.submit(b"", "")
        deadline = time.monotonic() + 10
        while (answer := sender.take_answer()) is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        sender.close()
    assert answer.verdict in ("retry", "unauthorized")
    assert endpoint in answer.reason
    assert answer.wait_s > 0


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
