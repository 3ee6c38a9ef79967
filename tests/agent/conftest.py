"""Two ways to hold an agent: `Node`, a real process with a real receiver, and `Desk`, its view of one writer with our clock."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from skyrl_otel.agent.batch import Batch, build
from skyrl_otel.agent.writer import Writer
from skyrl_otel.capture import launch
from skyrl_otel.spool import layout, locks, token
from skyrl_otel.spool.token import Shipping
from skyrl_otel.spool.writer import WriterFolder
from tests.receiver import Receiver, decode

SECOND = 1_000_000_000


class Node:
    """One node of one run."""

    def __init__(self, root: Path) -> None:
        self.run = layout.open_run(root, "run")
        self.receiver = Receiver()
        self.folders: list[WriterFolder] = []

    def writer(self, **facts: Any) -> WriterFolder:
        folder = WriterFolder.create(self.run, facts=facts)
        self.folders.append(folder)
        return folder

    def ship(self, **settings: Any) -> None:
        token.write(self.run, Shipping(settings.pop("endpoint", self.receiver.url), {}, **settings))

    def start(self) -> None:
        launch.ensure_agent(self.run)
        wait_for(lambda: locks.is_held(self.run.agent_lock))

    def status(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.run.status.read_bytes()))
        except FileNotFoundError:
            return {}

    def pids(self) -> list[int]:
        """The agent's processes: those with the run's folder in an argv of ours."""
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if str(self.run.path).encode() in words and any(b"skyrl_otel.agent.supervise" in w for w in words):
                    found.append(int(entry))
        return found

    def kill(self, pid: int) -> None:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def close(self) -> None:
        for folder in self.folders:
            folder.close()
        deadline = time.monotonic() + 10
        while (pids := self.pids()) and time.monotonic() < deadline:
            for pid in pids:
                self.kill(pid)
            time.sleep(0.02)
        self.receiver.close()


def wait_for(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.01)


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
def node(spool_root: Path) -> Iterator[Node]:
    node = Node(spool_root)
    yield node
    node.close()


@pytest.fixture
def desk(spool_root: Path) -> Iterator[Desk]:
    desk = Desk(spool_root)
    yield desk
    desk.agent.close()
    desk.folder.close()
