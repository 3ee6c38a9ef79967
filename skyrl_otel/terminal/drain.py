"""After the child's end: wait until every node has delivered, and know which has not.

An agent's word counts if it was spoken after the end: the collector tells how old each report is by its own clock, so
nodes whose clocks differ do not matter.
"""

from __future__ import annotations

import http.client
import json
import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from skyrl_otel.spool.layout import RunDir, read_file
from skyrl_otel.terminal.supervise import Ready

_ASK_EVERY_S = 0.1


@dataclass(frozen=True, slots=True)
class Node:
    """What a node's agent last said. `age_s` is how long ago it said so; `place` tells nodes of one name apart."""

    name: str
    age_s: float
    drained: bool
    writers_alive: int
    backlog_bytes: int
    sent_records: int
    lost_bytes: int
    rejected_records: int
    error: str
    place: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """`nodes` as of the end of waiting; `late` are those of them that may still hold bytes."""

    nodes: tuple[Node, ...]
    late: tuple[Node, ...]
    skipped: bool

    @property
    def complete(self) -> bool:
        return bool(self.nodes) and not self.late


def drain(
    ask: Callable[[], tuple[Node, ...]],
    *,
    here: str,
    place: str = "",
    ended_at: float,
    timeout_s: float,
    is_skipped: Callable[[], bool],
    expected: Collection[str] = (),
    on_progress: Callable[[tuple[Node, ...]], None] = lambda late: None,
) -> Outcome:
    """Wait until each agent that ever reported, and that of each `expected` node, has delivered all.

    This node's agent (`here`, and `place` as far as known) must say so after `ended_at` (of time.monotonic), and so must every
    other whose node had living processes when it spoke last. One that said that all are gone and all is delivered has nothing
    to add.

    `ask` gives the last reports; it may raise OSError, HTTPException or ValueError, and is asked again then.
    """
    deadline = time.monotonic() + timeout_s
    nodes: tuple[Node, ...] = ()
    while True:
        try:
            nodes = _with_silent(ask(), {*expected} - {here})
        except (OSError, http.client.HTTPException, ValueError):
            pass  # it is being restarted
        since_end_s = time.monotonic() - ended_at
        ours = [node for node in nodes if node.name == here and (not place or node.place in ("", place))]
        late = tuple(node for node in nodes if not _is_done(node, since_end_s, is_here=node in ours))
        if not late and ours:
            return Outcome(nodes, late, skipped=False)
        if is_skipped() or time.monotonic() >= deadline:
            return Outcome(nodes, late, skipped=is_skipped())
        on_progress(late)
        time.sleep(_ASK_EVERY_S)


def _with_silent(nodes: tuple[Node, ...], expected: set[str]) -> tuple[Node, ...]:
    """Also those who should have reported and have not; their reports are infinitely old."""
    silent = sorted(expected - {node.name for node in nodes})
    return nodes + tuple(
        Node(name, math.inf, drained=False, writers_alive=0, backlog_bytes=0, sent_records=0, lost_bytes=0,
             rejected_records=0, error="its agent has not reported")
        for name in silent
    )  # fmt: skip


def _is_done(node: Node, since_end_s: float, *, is_here: bool) -> bool:
    is_fresh = node.age_s < since_end_s
    return node.drained and (is_fresh or (node.writers_alive == 0 and not is_here))


def ask_collector(ready: Ready) -> tuple[Node, ...]:
    """What all nodes' agents last said. Raises OSError, HTTPException, ValueError."""
    parts = urlsplit(ready.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=2)
    try:
        connection.request("GET", "/v1/agents", headers={"authorization": ready.authorization})
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise ValueError(f"GET {ready.url}/v1/agents: {response.status} {response.reason}")
    finally:
        connection.close()
    # An agent that was replaced has left a last report behind; the newest of each node counts.
    reports = sorted(json.loads(body), key=lambda report: -float(report["age_s"]))
    newest = {(report.get("node"), report.get("place")): report for report in reports}
    return tuple(_node(report, float(report["age_s"])) for report in newest.values())


def ask_here(run_dir: RunDir) -> tuple[Node, ...]:
    """What this node's agent last wrote, where there is no collector to ask. Raises OSError, ValueError."""
    report = json.loads(read_file(run_dir.status))
    return (_node(report, (time.time_ns() - int(report["time_unix_nano"])) / 1e9),)


def _node(report: dict[str, Any], age_s: float) -> Node:
    return Node(
        name=str(report.get("node", "?")),
        age_s=age_s,
        drained=bool(report.get("drained")),
        writers_alive=int(report.get("writers_alive") or 0),
        backlog_bytes=int(report.get("backlog_bytes") or 0),
        sent_records=int(report.get("sent_records") or 0),
        lost_bytes=int(report.get("lost_bytes") or 0),
        rejected_records=int(report.get("rejected_records") or 0),
        error=str(report.get("error") or ""),
        place=str(report.get("place") or ""),
    )
