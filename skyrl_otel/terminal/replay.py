"""`skyrl-otel replay`: deliver what spools on this node still hold, once their receiver is back or another one is named.

Nothing here reads a line: the run's own agent is started again, and goes on from its checkpoint and journal. So what was
delivered before is not delivered again, and what is sent twice is sent byte for byte the same.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skyrl_otel.capture.launch import ensure_agent
from skyrl_otel.collector import node_ip
from skyrl_otel.config import Config
from skyrl_otel.query.backlog import Backlog, measure, oldest_unix_nano
from skyrl_otel.spool import locks, token
from skyrl_otel.spool.layout import RunDir, read_file
from skyrl_otel.terminal.say import say
from skyrl_otel.terminal.supervise import Collector, hand_out_token

_LOOK_EVERY_S = 0.2
_SAY_EVERY_S = 5.0
_READY_S = 30.0
_LOKI_WINDOW_S = 3600.0
"""Half of `ingester.max_chunk_age`, which is two hours where nobody changed it."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """What became of one run."""

    run_id: str
    size_bytes: int
    left_bytes: int
    error: str | None


def waiting(runs: Sequence[RunDir]) -> list[tuple[RunDir, Backlog]]:
    """The runs that hold something, and what."""
    found = [(run, measure(run)) for run in runs]
    return [(run, backlog) for run, backlog in found if backlog.size_bytes]


def replay(run: RunDir, config: Config, *, timeout_s: float) -> Delivery:
    """Deliver one run's backlog; returns when it is delivered, or after `timeout_s` without any progress.

    Raises:
        OSError: no agent could be started, or the token not be written.
    """
    before = measure(run)
    say(f"run {run.run_id}: {_size(before.size_bytes)} of {before.holding} writers to deliver")
    collector = _choose_receiver(run, config)
    _warn_of_age(run)
    try:
        left, error = _wait(run, before.size_bytes, timeout_s)
    finally:
        if collector is not None:
            collector.stop()
            collector.join(_READY_S)
    return Delivery(run.run_id, before.size_bytes, left, error)


def _choose_receiver(run: RunDir, config: Config) -> Collector | None:
    """Where the agent is to send: what the environment says, else what the run was told, else its own collector, started
    again if it was on this node."""
    shipping = token.from_config(config)
    if shipping is not None:
        known = token.read(run)
        token.write(run, shipping._replace(control=known.control if known else None))
        return None
    known = token.read(run)
    if known is not None and (known.control is None or not _is_embedded(known)):
        return None
    if not run.store.is_dir() or locks.is_held(run.store / "lock"):
        return None
    collector = Collector(
        run,
        _log_dir(run, config),
        lambda: node_ip.find(os.environ, given=config.node_ip),
        control_only=False,
        mask=(),
        on_ready=lambda ready: hand_out_token(run, config, ready),
        on_failure=lambda sentence: say(f"run {run.run_id}: {sentence}"),
    )
    collector.start()
    collector.wait_ready(_READY_S, lambda: False)
    return collector


def _warn_of_age(run: RunDir) -> None:
    """Loki refuses lines that lie too far behind the newest of their stream; who sent them hears of it from nobody."""
    known, oldest = token.read(run), oldest_unix_nano(run)
    if oldest is None or known is None or (known.control is not None and _is_embedded(known)):
        return
    age_s = (time.time_ns() - oldest) / 1e9
    if age_s > _LOKI_WINDOW_S:
        say(
            f"run {run.run_id}: the oldest line is {age_s / 3600:.1f} h old; a Loki of stock settings refuses what lies more"
            " than 1 h behind the newest line of its stream (ours: 25 h, ingester.max_chunk_age / 2) or is over 7 days old"
            " (reject_old_samples); afterwards, `skyrl-otel doctor --loki URL` tells what it refused"
        )


def _is_embedded(shipping: token.Shipping) -> bool:
    assert shipping.control is not None
    return shipping.endpoint.removesuffix("/v1/logs") == shipping.control.url.removesuffix("/v1/status")


def _log_dir(run: RunDir, config: Config) -> Path:
    try:
        stored = json.loads(read_file(run.run_file)).get("log_dir")
    except (OSError, ValueError, AttributeError):
        stored = None
    return Path(stored) if stored else config.log_dir


def _wait(run: RunDir, whole: int, timeout_s: float) -> tuple[int, str | None]:
    progress_at = said_at = time.monotonic()
    least = whole
    while True:
        ensure_agent(run)
        left = measure(run).size_bytes
        status = _status(run)
        now = time.monotonic()
        if left < least:
            least, progress_at = left, now
        if not left:
            _show(run, whole, 0, None, last=True)
            return 0, None
        error = str(status["error"]) if status.get("error") else None
        if now - progress_at > timeout_s:
            _show(run, whole, left, error, last=True)
            return left, error
        if sys.stderr.isatty() or now - said_at >= _SAY_EVERY_S:
            said_at = now
            _show(run, whole, left, error, last=False)
        time.sleep(_LOOK_EVERY_S)


def _show(run: RunDir, whole: int, left: int, error: str | None, *, last: bool) -> None:
    done = 100 * max(whole - left, 0) // max(whole, 1)
    text = f"run {run.run_id}: {done} % delivered, {_size(left)} left" + (f"; {error}" if error else "")
    if not sys.stderr.isatty():
        say(text)
        return
    sys.stderr.write(f"\r\x1b[K{text}" + ("\n" if last else ""))
    sys.stderr.flush()


def _status(run: RunDir) -> dict[str, Any]:
    try:
        found = json.loads(read_file(run.status))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _size(size_bytes: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} GB"
