"""A disk that is full for a while costs no line, and gets its space back."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.agent.conftest import Node, wait_for
from tests.receiver import OK, Receiver, Reply


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


@pytest.fixture
def small_disk() -> Iterator[Path]:
    root = Path(tempfile.mkdtemp(prefix="sk-", dir="/var/tmp"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,mode=0700", "tmpfs", str(root)], check=True)
    yield root
    subprocess.run(["umount", "-l", str(root)], check=True)
    root.rmdir()


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
