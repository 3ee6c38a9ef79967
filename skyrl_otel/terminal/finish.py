"""What happens between the child's end and ours: deliver, close the store, say what was recorded."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from skyrl_otel.config import Config
from skyrl_otel.query.summary import RunSummary, summarize
from skyrl_otel.spool.layout import RunDir, read_file, store_path
from skyrl_otel.terminal import drain, summary
from skyrl_otel.terminal.pipes import Pump
from skyrl_otel.terminal.say import write
from skyrl_otel.terminal.supervise import Collector

# How long a collector may still take to come up after a child that was quicker than it.
_COLLECTOR_START_S = 10.0
# How long it may take to commit and to copy its store.
_COLLECTOR_END_S = 120.0
# Waiting that is shorter than this is not worth a word.
_SILENT_S = 0.4


def see_off(
    run_dir: RunDir,
    config: Config,
    collector: Collector,
    *,
    pid: int,
    failed: bool,
    pumps: Sequence[Pump],
    impatient: threading.Event,
    environ: Mapping[str, str],
) -> None:
    """Wait for delivery, end the collector, print the summary.

    Args:
        pid: what the command's process id was.
        failed: whether it ended with anything but exit code 0.
        impatient: set when the user does not want to wait; cuts every wait short.
    """
    ended_at, over_unix_nano = time.monotonic(), time.time_ns()
    with _Waiting() as waiting:
        waiting.tell("waiting for the collector")
        ready = collector.wait_ready(min(_COLLECTOR_START_S, config.drain_s), impatient.is_set)
        outcome = drain.drain(
            partial(drain.ask_collector, ready) if ready else partial(drain.ask_here, run_dir),
            here=os.uname().nodename,
            place=_place(run_dir),
            ended_at=ended_at,
            # Without a collector and an endpoint nothing can be delivered; the spool keeps it.
            timeout_s=config.drain_s if ready or config.endpoint else 0,
            is_skipped=impatient.is_set,
            expected=_nodes_used(run_dir) if ready else (),
            on_progress=lambda late: waiting.tell(_late(late)),
        )
        collector.stop()
        deadline = time.monotonic() + _COLLECTOR_END_S
        while collector.is_alive() and not impatient.is_set() and time.monotonic() < deadline:
            waiting.tell("closing the store")
            collector.join(0.1)
    facts = summary.Facts(
        run_id=run_dir.run_id,
        endpoint=config.endpoint,
        spool=run_dir.path,
        store=None if config.endpoint else _store(run_dir),
        outcome=outcome,
        driver_pid=pid,
        driver_failed=failed,
        over_unix_nano=over_unix_nano,
        shutdown_unix_nano=_shutdown_began(run_dir),
        agent_said=_last_line(run_dir.path / "agent.log"),
        unrecorded_bytes=sum(pump.lost_bytes for pump in pumps),
        remarks=(*collector.remarks, *_unprinted(pumps)),
    )
    if os.isatty(2):
        write(summary.block(facts, summary.NO_COLOURS if environ.get("NO_COLOR") else summary.COLOURS))
    else:
        write(summary.plain(facts))


def _shutdown_began(run_dir: RunDir) -> int | None:
    """What the driver's process noted when it began to end its cluster."""
    try:
        return int(read_file(run_dir.path / "shutdown"))
    except (OSError, ValueError):
        return None


def _nodes_used(run_dir: RunDir) -> tuple[str, ...]:
    """Host names of the nodes on which the driver's process knew of workers."""
    try:
        return tuple(str(name) for name in json.loads(read_file(run_dir.path / "nodes")))
    except (OSError, ValueError, TypeError):
        return ()


def _place(run_dir: RunDir) -> str:
    """How this node's agent calls this node."""
    try:
        return read_file(run_dir.agent_lock).decode(errors="replace")
    except OSError:
        return ""


def _last_line(path: Path) -> str:
    try:
        lines = read_file(path).decode("utf-8", "replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _store(run_dir: RunDir) -> RunSummary | None:
    try:
        return summarize(store_path(run_dir))
    except (OSError, sqlite3.Error, KeyError, ValueError):
        return None


def _unprinted(pumps: Sequence[Pump]) -> list[str]:
    return [
        f"{summary.size(screen.unprinted_bytes)} of std{pump.stream.name} could not be written: {screen.problem}"
        for pump in pumps
        if (screen := pump.stream.screen).unprinted_bytes
    ]


def _late(late: Sequence[drain.Node]) -> str:
    if not late:
        return "waiting for this node's agent (Ctrl-C skips)"
    bytes_left = sum(node.backlog_bytes for node in late)
    who = late[0].name if len(late) == 1 else f"{len(late)} nodes"
    return f"waiting for {who} to deliver {summary.size(bytes_left)} (Ctrl-C skips)"


class _Waiting:
    """A line on the terminal that says what is waited for, once that takes long enough to be noticed."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._stack = ExitStack()
        self._update: Callable[[str], None] | None = None

    def __enter__(self) -> _Waiting:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def tell(self, text: str) -> None:
        if not os.isatty(2) or time.monotonic() - self._began < _SILENT_S:
            return
        if self._update is None:
            from rich.console import Console  # not before it is needed: it takes longer than most waits

            status = Console(stderr=True).status("")
            self._stack.enter_context(status)
            self._update = status.update
        self._update(f"skyrl-otel: {text}")
