"""What a run's store comes to: who wrote how much, what was lost, how each process ended."""

from __future__ import annotations

import json
import signal
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skyrl_otel.collector.text import who
from skyrl_otel.query.database import connect
from skyrl_otel.query.records import Owner


@dataclass(frozen=True, slots=True)
class Writer:
    """All that one resource wrote. `name` is what the text file calls it. Times in nanoseconds since 1970."""

    name: str
    role: str | None
    rank: int | None
    actor_id: str | None
    actor_name: str | None
    actor_class: str | None
    node: str | None
    channel: str
    pid: int | None
    records: int
    errors: int
    size_bytes: int
    first_unix_nano: int | None
    last_unix_nano: int | None


@dataclass(frozen=True, slots=True)
class Loss:
    """Bytes of one writer that were given up, and why."""

    name: str
    node: str | None
    stream: str | None
    size_bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class ProcessEnd:
    """How one process ended. `exit_code` and `signal` (as "SIGKILL") are None where nobody could know."""

    name: str
    role: str | None
    rank: int | None
    actor_id: str | None
    actor_name: str | None
    actor_class: str | None
    node: str | None
    pid: int | None
    time_unix_nano: int
    clean: bool
    exit_code: int | None
    signal: str | None
    oom_kill: bool
    last_line: str | None

    @property
    def failed(self) -> bool:
        """A signal, a code other than 0, or an end that was neither clean nor explained."""
        if self.exit_code is not None:
            return self.exit_code != 0
        return self.signal is not None or not self.clean


@dataclass(frozen=True, slots=True)
class RunSummary:
    """One run. `repeats_dropped` counts records that came again after a restart and were recognised, those below the
    announced low-water mark included."""

    run_id: str
    path: Path
    started_unix_nano: int
    last_unix_nano: int | None
    records: int
    errors: int
    repeats_dropped: int
    below_low_water_dropped: int
    size_bytes: int
    texts: dict[str, Path]
    writers: tuple[Writer, ...]
    losses: tuple[Loss, ...]
    ends: tuple[ProcessEnd, ...]

    @property
    def lost_bytes(self) -> int:
        return sum(loss.size_bytes for loss in self.losses)


def summarize(store_path: Path) -> RunSummary:
    """Read a store. Costs as much as there are writers and events, not records.

    Raises:
        FileNotFoundError, sqlite3.Error: there is none, or it cannot be read.
    """
    with connect(store_path) as db:
        meta = dict(db.execute("SELECT key, value FROM meta"))
        owners: dict[int, Owner] = {}
        writers: list[Writer] = []
        for number, attributes, *counters in db.execute(
            "SELECT id, attributes, records, errors, bytes, first_time, last_time FROM resources ORDER BY id"
        ):
            owners[number] = owner = Owner.of(json.loads(attributes))
            writers.append(_writer(owner, *counters))
        texts = {channel: Path(path) for channel, path in db.execute("SELECT channel, path FROM texts")}
        losses = tuple(_loss(owners[event[0]], event) for event in _events(db, "skyrl.loss"))
        ends = tuple(_end(owners[event[0]], event) for event in _events(db, "skyrl.process.end"))
    wal = Path(f"{store_path}-wal")
    return RunSummary(
        run_id=str(meta["run"]),
        path=store_path,
        started_unix_nano=int(meta["started_unix_nano"]),
        last_unix_nano=max((w.last_unix_nano for w in writers if w.last_unix_nano), default=None),
        records=int(meta["records"]),
        errors=sum(writer.errors for writer in writers),
        repeats_dropped=int(meta["repeats_dropped"]) + int(meta["below_low_water_dropped"]),
        below_low_water_dropped=int(meta["below_low_water_dropped"]),
        size_bytes=store_path.stat().st_size + (wal.stat().st_size if wal.exists() else 0),
        texts=texts,
        writers=tuple(writer for writer in writers if writer.records),
        losses=losses,
        ends=ends,
    )


_Event = tuple[int, int, str | None, dict[str, Any]]


def _events(db: sqlite3.Connection, name: str) -> list[_Event]:
    """(resource, time, stream, attributes) of each event of that name, by time."""
    rows = db.execute(
        "SELECT resource, time, stream, attributes FROM records INDEXED BY records_by_event"
        " WHERE event_name = ? ORDER BY time",
        (name,),
    )
    return [(resource, time, stream, json.loads(text) if text else {}) for resource, time, stream, text in rows]


def _writer(owner: Owner, records: int, errors: int, size_bytes: int, first: int | None, last: int | None) -> Writer:
    return Writer(
        name=who(owner),
        role=owner.role,
        rank=owner.rank,
        actor_id=owner.actor_id,
        actor_name=owner.actor_name,
        actor_class=owner.actor_class,
        node=owner.node,
        channel=owner.channel,
        pid=owner.pid,
        records=records,
        errors=errors,
        size_bytes=size_bytes,
        first_unix_nano=first,
        last_unix_nano=last,
    )


def _loss(owner: Owner, event: _Event) -> Loss:
    _, _, stream, attributes = event
    size = attributes.get("skyrl.lost.bytes")
    return Loss(
        name=who(owner),
        node=owner.node,
        stream=stream,
        size_bytes=size if isinstance(size, int) else 0,
        reason=str(attributes.get("skyrl.lost.reason", "")),
    )


def _end(owner: Owner, event: _Event) -> ProcessEnd:
    _, time, _, attributes = event
    code = attributes.get("process.exit.code")
    last_line = attributes.get("skyrl.last_line")
    return ProcessEnd(
        name=who(owner),
        role=owner.role,
        rank=owner.rank,
        actor_id=owner.actor_id,
        actor_name=owner.actor_name,
        actor_class=owner.actor_class,
        node=owner.node,
        pid=owner.pid,
        time_unix_nano=time,
        clean=attributes.get("skyrl.exit.clean") is True,
        exit_code=code if isinstance(code, int) else None,
        signal=_signal_name(attributes.get("skyrl.exit.signal")),
        oom_kill=attributes.get("skyrl.oom_kill") is True,
        last_line=str(last_line) if last_line else None,
    )


def _signal_name(value: Any) -> str | None:
    if value is None or value == "":
        return None
    try:
        return signal.Signals(int(value)).name
    except ValueError:
        return str(value)
