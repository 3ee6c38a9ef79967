"""A run with a real agent process, a real receiver, and writers that are folders of this very process."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from skyrl_otel.capture import launch
from skyrl_otel.spool import layout, locks, token
from skyrl_otel.spool.token import Shipping
from skyrl_otel.spool.writer import WriterFolder
from tests.receiver import Receiver


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


@pytest.fixture
def node(spool_root: Path) -> Iterator[Node]:
    node = Node(spool_root)
    yield node
    node.close()
