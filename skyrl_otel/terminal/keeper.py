"""Keeps this node's agent alive for as long as the launcher is there, as every other writer's watch thread does."""

from __future__ import annotations

import threading

from skyrl_otel.capture.launch import ensure_agent
from skyrl_otel.spool.layout import RunDir

_LOOK_EVERY_S = 2.0


class AgentKeeper(threading.Thread):
    """Starts a new agent where both processes of the old one were killed. A daemon thread; `stop` ends it soon."""

    def __init__(self, run: RunDir) -> None:
        super().__init__(name="skyrl-otel-agent-keeper", daemon=True)
        self._run_dir = run
        self._stopping = threading.Event()

    def run(self) -> None:
        while not self._stopping.wait(_LOOK_EVERY_S):
            try:
                ensure_agent(self._run_dir)
            except OSError:
                continue  # no process to be had at the moment; the spool keeps what it has

    def stop(self) -> None:
        self._stopping.set()
